"""Does Python follow? Cut a copy by random plans, run it without arithmetic, and compare every op with the prediction.

A model computes integers in Python: `x.view(n, 8, 64)`, `self.heads`, `x.shape[1] // 2`. Some follow a cut by
themselves, some through a module's attribute, some not at all. No need to know where each came from: it shows in the
shapes, at the op where it is used. A call whose sizes do not follow is given the right ones at once, as it will be
after a cut (`graph.replay`), and the run goes on; what cannot be given them is frozen there, with the op's name, and
all else stays prunable.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.graph.analysis import Analysis, analyse
from secateur.graph.attention import see_heads
from secateur.graph.axes import refs_in
from secateur.graph.capture import (
    Recorder,
    Trace,
    fake_copy,
    map_tensors,
    recording,
    run,
    steps,
    tensors_in,
)
from secateur.graph.compare import Stays, Steps, first_odd, survivors
from secateur.graph.decisions import Following
from secateur.graph.rebuild import narrow, rebuild
from secateur.graph.records import Groups
from secateur.graph.replay import Place, PythonCall, PythonCalls, changed

PLANS = 2
"""Random plans tried: each cuts every group, by different shares, so that no two sizes agree by chance."""


def settle(model: nn.Module, example_inputs: Any, trace: Trace) -> Analysis:
    """The analysis of `trace` with the calls to replay, and all that does not follow a cut frozen."""
    frozen: list[tuple[int, str]] = []
    replayed: set[int] = set()
    unbound: set[tuple[str, str]] = set()
    while True:
        analysis = analyse(trace, model, frozen, unbound)
        missed = False
        for seed in range(PLANS):
            if not missed and analysis.groups.groups:
                probe = _probe(model, example_inputs, analysis, seed, replayed)
                replayed |= _same_sites(model, trace, probe.replayed)
                missed = probe.odd is not None
                if probe.odd is not None:
                    guesses = _guesses(model, analysis, probe.odd.module) - unbound
                    unbound |= guesses
                    frozen += [] if guesses else probe.odd.freeze
        if not missed:
            sizes = tuple(size for call in sorted(replayed) for size in analysis.sizes.get(call, ()))
            return replace(analysis, groups=replace(analysis.groups, sizes=tuple(dict.fromkeys(sizes))))


def _same_sites(model: nn.Module, trace: Trace, calls: Collection[int]) -> set[int]:
    """These calls, and the same ones in all modules of the same class: what one block does, its brothers do."""

    def site(call: PythonCall) -> tuple[type, str, int]:
        return type(model.get_submodule(call.module)), call.function, call.ordinal

    sites = {site(trace.python[call]) for call in calls}
    return {i for i, call in enumerate(trace.python) if site(call) in sites} if sites else set()


def _guesses(model: nn.Module, analysis: Analysis, module: str) -> set[tuple[str, str]]:
    """The attributes, of modules of this one's class, that were taken for a count because they have its value."""
    kind = type(model.get_submodule(module))
    bound = {(item.module, item.attribute) for item in analysis.groups.ints} & analysis.guessed
    return {(path, name) for path, name in bound if type(model.get_submodule(path)) is kind}


@dataclass(frozen=True)
class Odd:
    """An op that is not as predicted: its module, and (value, reason) to freeze."""

    module: str
    freeze: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Probe:
    """What one random plan showed: calls that had to be replayed, and the first op that is odd even so."""

    replayed: frozenset[int]
    odd: Odd | None


def random_keep(groups: Groups, seed: int) -> tuple[tuple[int, ...], ...]:
    """A plan that cuts every group by its own share, between a tenth and six tenths of its units.

    An odd seed leaves every other group whole: small neighbours would often lose the same number of units.
    """
    random = np.random.default_rng(seed)
    keep = []
    for number, group in enumerate(groups.groups):
        share = random.uniform(0.1, 0.6)
        stay = group.size - (0 if seed % 2 and number % 2 else max(1, int(group.size * share)))
        keep.append(tuple(sorted(random.permutation(group.size)[: max(1, stay)].tolist())))
    return tuple(keep)


def _probe(model: nn.Module, example_inputs: Any, analysis: Analysis, seed: int, replayed: Collection[int]) -> Probe:
    """Cut by the random plan `seed`, run, compare."""
    groups, trace = analysis.groups, analysis.trace
    keep = random_keep(groups, seed)
    stays = survivors(groups, keep)
    every = tuple(dict.fromkeys(size for sizes in analysis.sizes.values() for size in sizes))
    changes = replace(groups, sizes=every).replays(keep)
    with (
        _cut_copy(model, example_inputs, groups, keep, trace.fake) as (cut, inputs),
        Following(analysis.decisions),
        recording(cut, Recorder(_Replayer(analysis, stays, changes, replayed))) as recorder,
    ):
        for tensor in tensors_in(inputs):
            recorder.register(tensor, "input")
        error = ""
        try:
            with _quiet():
                run(cut, inputs)
        except Exception as stopped:
            error = f": {str(stopped).splitlines()[0]}" if str(stopped) else ""
    wanted = steps(trace.calls)
    found = first_odd(wanted, steps(recorder.calls), analysis, recorder.values, stays)
    odd = found and Odd(wanted[found[0]][1].module, _freeze_around(analysis, wanted, found[0], stays, error))
    assert isinstance(recorder.python, _Replayer)
    return Probe(frozenset(recorder.python.needed), odd)


class _Replayer(PythonCalls):
    """Gives calls their predicted sizes: those known to need it, and those whose ops come out odd without."""

    def __init__(
        self,
        analysis: Analysis,
        stays: Stays,
        changes: Mapping[str, Mapping[tuple[str, int], Mapping[Place, int | float]]],
        replayed: Collection[int],
    ) -> None:
        super().__init__()
        self._analysis, self._stays, self._changes, self._replayed = analysis, stays, changes, replayed
        self._wanted: dict[int, list[tuple[str, Any]]] = {}
        for name, call in steps(analysis.trace.calls):
            if call.python is not None:
                self._wanted.setdefault(call.python, []).append((name, call))
        self.needed: set[int] = set()

    def execute(self, recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
        index, call, python = len(self.made) - 1, self.made[-1], self._analysis.trace.python
        change = self._changes.get(call.module, {}).get((call.function, call.ordinal))
        known = index < len(python) and python[index].site == call.site and index in self._analysis.sizes
        if change is None or not known:
            return func(*args, **kwargs)
        if index not in self._replayed:
            before = recorder.mark()
            try:
                result = func(*args, **kwargs)
            except Exception:
                result = None
            else:
                made = steps(recorder.calls[before:])
                wanted = self._wanted.get(index, [])
                if len(made) == len(wanted) and self._as_predicted(wanted, made, recorder):
                    return result
            recorder.rewind(before)
            self.needed.add(index)
        return changed(func, args, kwargs, change)

    def _as_predicted(self, wanted: Steps, made: Steps, recorder: Recorder) -> bool:
        return first_odd(wanted, made, self._analysis, recorder.values, self._stays) is None


@contextlib.contextmanager
def _cut_copy(
    model: nn.Module, example_inputs: Any, groups: Groups, keep: Sequence[Sequence[int]], fake: bool
) -> Iterator[tuple[nn.Module, Any]]:
    """A cut copy and inputs for it: fake ones, or real ones where the model does not run on fake tensors."""
    if not fake:
        cut = rebuild(model, narrow(model, groups.kept(keep)), groups.attributes(keep))
        yield see_heads(cut.eval()), map_tensors(torch.clone, example_inputs)
        return
    with fake_copy(model, example_inputs) as (twin, inputs):
        tensors = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
        shapes = groups.shapes(keep)
        narrowed = {n: t if t.shape == shapes[n] else t.new_empty(shapes[n]) for n, t in tensors.items()}
        yield rebuild(twin, narrowed, groups.attributes(keep)), inputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch logs what fails on fake tensors with a traceback; here a failure is an answer."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _freeze_around(
    analysis: Analysis, wanted: Steps, index: int, stays: Stays, error: str
) -> tuple[tuple[int, str], ...]:
    """Freeze what the cut changed on the values that meet in the odd call, or in the last one before that has any."""
    for at in range(index, -1, -1):
        call = wanted[at][1]
        reason = f"an integer in Python does not follow a cut of this axis ({call.where}{error})"
        refs = [*refs_in((call.args, call.kwargs)), *(ref for ref in call.outputs if ref is not None)]
        cut = [r.id for r in refs if any(not stays[b.units].all() for b in analysis.units_of(r))]
        if cut:
            return tuple((value, reason) for value in cut)
    return tuple((value, f"a cut model stops before this{error}") for value in analysis.blocks)
