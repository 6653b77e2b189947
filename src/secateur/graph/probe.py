"""Does Python follow? Cut a copy by random plans, run it without arithmetic, and compare every op with the prediction.

A model computes integers in Python: `x.view(n, 8, 64)`, `self.heads`, `x.shape[1] // 2`. Some follow a cut by
themselves, some through a module's attribute, some not at all. No need to know where each came from: it shows in the
shapes, at the op where it is used. A call whose sizes do not follow is given the right ones at once, as it will be
after a cut (`graph.replay`), and the run goes on; what cannot be given them is frozen there, with the op's name, and
all else stays prunable.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.errors import CaptureError
from secateur.graph.analysis import Analysis, analyse
from secateur.graph.aside import Aside
from secateur.graph.attention import see_heads
from secateur.graph.axes import refs_in
from secateur.graph.capture import Recorder, Trace, capture, recording, steps
from secateur.graph.compare import Stays, Steps, first_odd
from secateur.graph.decisions import Following
from secateur.graph.nested import map_tensors, tensors_in
from secateur.graph.rebuild import narrow, rebuild, set_attributes
from secateur.graph.records import Groups
from secateur.graph.replay import ATTENTION, Place, PythonCall, PythonCalls, changed, missed
from secateur.graph.twin import fake_copy, run
from secateur.graph.units import Split
from secateur.graph.watch import Attribute, watch

PLANS = 2
"""Plans tried, in which groups lose different numbers of units (`probing_keep`); where Python gives no call a number
that could count units, one plan shows all that two would."""

Number = tuple[int, Place]
"""Of a torch function that Python called, by its number, one of the numbers that it is given."""


def settle(
    model: nn.Module, example_inputs: Any, trace: Trace, split: Split = "outer", aside: Aside | None = None
) -> Analysis:
    """The analysis of `trace` with the calls to replay, and all that does not follow a cut frozen."""
    frozen: list[tuple[int, str]] = []
    replayed: set[Number] = set()
    unbound: set[Attribute] = set()
    while True:
        analysis = analyse(trace, model, frozen, unbound, split, aside)
        missed = False
        counts = any(size.constant is None for sizes in analysis.sizes.values() for size in sizes)
        for plan in range(PLANS if counts else 1):
            if not missed and analysis.groups.groups:
                probe = _probe(model, example_inputs, analysis, plan, replayed)
                replayed |= _same_sites(model, trace, probe.replayed)
                guesses = probe.compared
                if probe.odd is not None and not guesses:
                    guesses = _guesses(model, analysis, probe.odd)
                    frozen += [] if guesses else probe.odd.freeze
                unbound |= guesses
                missed = bool(guesses or probe.odd)
        if not missed and aside and aside.follows and not _trains(model, example_inputs, analysis.groups):
            aside, missed = replace(aside, follows=False), True
        if not missed:
            sizes = (s for call in sorted(analysis.sizes) for s in analysis.sizes[call] if (call, s.place) in replayed)
            return replace(analysis, groups=replace(analysis.groups, sizes=tuple(dict.fromkeys(sizes))))


def _trains(model: nn.Module, example_inputs: Any, groups: Groups) -> bool:
    """Whether a model cut by one of the plans runs in training mode."""
    keep = probing_keep(groups, 0)
    cut = rebuild(model, narrow(model, groups.kept(keep)), groups.attributes(keep), groups.replays(keep))
    try:
        capture(cut, example_inputs, training=True)
    except CaptureError:
        return False
    return True


def _same_sites(model: nn.Module, trace: Trace, numbers: Collection[Number]) -> set[Number]:
    """These numbers, and the same ones in all modules of the same class: what one block does, its brothers do."""

    def site(call: PythonCall) -> tuple[type, str, int]:
        return type(model.get_submodule(call.module)), call.function, call.ordinal

    places: dict[tuple[type, str, int], set[Place]] = {}
    for call, place in numbers:
        places.setdefault(site(trace.python[call]), set()).add(place)
    every = enumerate(trace.python) if places else ()
    return {(i, place) for i, call in every for place in places.get(site(call), ())}


def _bound(analysis: Analysis) -> frozenset[Attribute]:
    """The attributes that were taken for a count because they have its value."""
    return frozenset((item.module, item.attribute) for item in analysis.groups.ints) & analysis.guessed


def _guesses(model: nn.Module, analysis: Analysis, odd: Odd) -> frozenset[Attribute]:
    """Such attributes of modules of the odd op's class, and of parts of it that count what met there; if there are
    none, of what is around it."""
    bound, module = _bound(analysis), odd.module
    met = {unit for value, _ in odd.freeze for block in analysis.blocks.get(value, ()) for unit in block.units.flat}
    counting = {(i.module, i.attribute) for i in analysis.groups.ints if not (met - {-1}).isdisjoint(i.units)}
    while True:
        kind = type(model.get_submodule(module))
        own = {(path, name) for path, name in bound if type(model.get_submodule(path)) is kind}
        parts = {(path, name) for path, name in bound & counting if path and path.rpartition(".")[0] == module}
        if own or parts or not module:
            return frozenset(own | parts)
        module = module.rpartition(".")[0]


@dataclass(frozen=True)
class Odd:
    """An op that is not as predicted: its module, and (value, reason) to freeze."""

    module: str
    freeze: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Probe:
    """What one random plan showed: numbers that had to be replayed, the first op that is odd even so, and guessed
    attributes that steer Python."""

    replayed: frozenset[Number]
    compared: frozenset[Attribute]
    odd: Odd | None


def random_keep(groups: Groups, seed: int) -> tuple[tuple[int, ...], ...]:
    """A plan that cuts every group by its own share, between a tenth and six tenths of its units."""
    random = np.random.default_rng(seed)
    lost = [max(1, int(group.size * random.uniform(0.1, 0.6))) for group in groups.groups]
    return _keep(groups, lost, random)


def probing_keep(groups: Groups, plan: int) -> tuple[tuple[int, ...], ...]:
    """One of two plans by which the probe tells all groups apart.

    Halves of an axis that lose as many units by chance would hide a number that does not follow; and so would a first
    half that keeps one more, as `chunk` makes it larger. So, of neighbours of one size, the later one keeps more in one
    of the plans: what is kept rises for a while, then falls back, and in the two plans at different places.
    """
    random = np.random.default_rng(plan)
    seen: Counter[int] = Counter()
    lost = []
    for group in groups.groups:
        most = group.size * 3 // 5
        count = most - min(max(1, group.size // 10), max(0, most - 1)) + 1
        step = max(1, count // 8)
        window = count // step
        turn = seen[group.size] + plan * (window // 2)
        lost.append(most - turn % window * step - turn // window % step)
        seen[group.size] += 1
    return _keep(groups, lost, random)


def _keep(groups: Groups, lost: Sequence[int], random: np.random.Generator) -> tuple[tuple[int, ...], ...]:
    """Any units of each group but as many as are lost; one stays."""
    shuffled = [random.permutation(group.size)[: max(1, group.size - n)] for group, n in zip(groups.groups, lost)]
    return tuple(tuple(sorted(units.tolist())) for units in shuffled)


def _probe(model: nn.Module, example_inputs: Any, analysis: Analysis, plan: int, replayed: Collection[Number]) -> Probe:
    """Cut by one of the plans, run, compare."""
    groups, trace = analysis.groups, analysis.trace
    keep = probing_keep(groups, plan)
    stays = groups.stays(keep)
    every = tuple(dict.fromkeys(size for sizes in analysis.sizes.values() for size in sizes))
    changes = replace(groups, sizes=every).replays(keep)
    with (
        _cut_copy(model, example_inputs, groups, keep, trace.fake) as (cut, inputs),
        Following(analysis.decisions) if analysis.decisions else contextlib.nullcontext(),
        recording(cut, Recorder(_Replayer(analysis, stays, changes, replayed))) as recorder,
    ):
        for tensor in tensors_in(inputs):
            recorder.register(tensor, "input")
        compared = watch(cut, _bound(analysis))
        error = ""
        try:
            run(cut, inputs)
        except Exception as stopped:
            error = f": {str(stopped).splitlines()[0]}" if str(stopped) else ""
    wanted = steps(trace.calls)
    found = first_odd(wanted, steps(recorder.calls), analysis, recorder.values, stays)
    odd = found and Odd(wanted[found[0]][1].module, _freeze_around(analysis, wanted, found[0], stays, error))
    assert isinstance(recorder.python, _Replayer)
    return Probe(frozenset(recorder.python.needed), frozenset(compared), odd)


class _Replayer(PythonCalls):
    """Gives calls the numbers they are known to need, and those that are wrong where their ops come out odd without."""

    def __init__(
        self,
        analysis: Analysis,
        stays: Stays,
        changes: Mapping[str, Mapping[tuple[str, int], Mapping[Place, int | float]]],
        replayed: Collection[Number],
    ) -> None:
        super().__init__()
        self._analysis, self._stays, self._changes = analysis, stays, changes
        self._wanted: dict[int, list[tuple[str, Any]]] = {}
        for name, call in steps(analysis.trace.calls):
            if call.python is not None:
                self._wanted.setdefault(call.python, []).append((name, call))
        self.needed: set[Number] = set(replayed)

    def execute(self, recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
        index, call, python = len(self.made) - 1, self.made[-1], self._analysis.trace.python
        change = self._changes.get(call.module, {}).get((call.function, call.ordinal))
        known = index < len(python) and python[index].site == call.site and index in self._analysis.sizes
        if change is None or not known:
            return func(*args, **kwargs)
        if call.function == ATTENTION:  # its default scale shows in no op
            self.needed.update((index, place) for place in missed(func, args, kwargs, change))
        given = {place: value for place, value in change.items() if (index, place) in self.needed}
        before, failure = recorder.mark(), None
        try:
            result = changed(func, args, kwargs, given) if given else func(*args, **kwargs)
        except Exception as error:
            failure = error
        if failure is None and self._as_predicted(index, steps(recorder.calls[before:]), recorder):
            return result
        wrong = missed(func, args, kwargs, change) - given.keys()
        if not wrong and failure is not None:
            raise failure
        if not wrong:
            return result
        recorder.rewind(before)
        self.needed.update((index, place) for place in wrong)
        return changed(func, args, kwargs, {place: change[place] for place in (*given, *wrong)})

    def _as_predicted(self, index: int, made: Steps, recorder: Recorder) -> bool:
        wanted = self._wanted.get(index, [])
        odd = first_odd(wanted, made, self._analysis, recorder.values, self._stays)
        return len(made) == len(wanted) and odd is None


@contextlib.contextmanager
def _cut_copy(
    model: nn.Module, example_inputs: Any, groups: Groups, keep: Sequence[Sequence[int]], fake: bool
) -> Iterator[tuple[nn.Module, Any]]:
    """A cut copy and inputs for it: fake ones, or real ones where the model does not run on fake tensors."""
    if not fake:
        cut = rebuild(model, narrow(model, groups.kept(keep)), groups.attributes(keep))
        yield see_heads(cut.eval()), map_tensors(torch.clone, example_inputs)
        return
    with fake_copy(model, example_inputs, groups.shapes(keep)) as (twin, inputs):
        set_attributes(twin, groups.attributes(keep))
        yield twin, inputs


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
