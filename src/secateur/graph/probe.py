"""Does Python follow? Cut a fake copy by random plans, run it, and compare every op's shapes with the prediction.

A model computes integers in Python: `x.view(n, 8, 64)`, `self.heads`, `x.shape[1] // 2`. Some follow a cut by
themselves, some through a module's attribute, some not at all. No need to know where each came from: it shows in the
shapes, at the op where it is used. What does not follow is frozen there, with the op's name, and all else stays
prunable.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.graph.analysis import Analysis, UnitBlock, analyse
from secateur.graph.attention import see_heads
from secateur.graph.axes import refs_in
from secateur.graph.capture import (
    Call,
    Trace,
    Value,
    fake_copy,
    map_tensors,
    op_name,
    recording,
    run,
    steps,
    tensors_in,
)
from secateur.graph.rebuild import narrow, rebuild
from secateur.graph.records import Groups
from secateur.graph.replay import REPLAYABLE, PythonCall

RANKING = frozenset(("nonzero", "nms", "masked_select", "unique", "unique2"))
"""Ops whose result's shape depends on values: a detector keeps the boxes that score best."""

PLANS = 2
"""Random plans tried: each cuts every group, by different shares, so that no two sizes agree by chance."""

SIZED = frozenset(
    """
    view unsafe_view reshape reshape_alias expand slice split split_with_sizes unsafe_split chunk narrow repeat
    constant_pad_nd zeros ones empty new_zeros new_ones new_empty convolution native_group_norm native_layer_norm
    channel_shuffle native_channel_shuffle fused_rms_norm as_strided
    """.split()
)
FILLED = frozenset(("full", "new_full"))
"""Ops whose integers are sizes that a cut changes, and those that take a value besides."""


def settle(model: nn.Module, example_inputs: Any, trace: Trace) -> Analysis:
    """The analysis of `trace` with all that does not follow a cut frozen."""
    frozen: list[tuple[int, str]] = []
    replayed: set[int] = set()
    while True:
        analysis = analyse(trace, model, frozen, replayed)
        probes = (_first_miss(model, example_inputs, analysis, seed) for seed in range(PLANS))
        miss = next((found for found in probes if found is not None), None)
        if miss is None:
            return analysis
        new = _same_site(model, trace, miss.python) - replayed
        replayed |= new
        if not new:
            frozen += miss.freeze


def _same_site(model: nn.Module, trace: Trace, python: int | None) -> set[int]:
    """The call, and the same call in all modules of the same class: what one block does, its brothers do."""
    if python is None:
        return set()

    def site(call: PythonCall) -> tuple[type, str, int]:
        return type(model.get_submodule(call.module)), call.function, call.ordinal

    return {i for i, call in enumerate(trace.python) if site(call) == site(trace.python[python])}


@dataclass(frozen=True)
class Miss:
    """An op of a cut model that is not as predicted: the Python call to replay, or else the values to freeze."""

    python: int | None
    freeze: tuple[tuple[int, str], ...]


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


def predicted_shape(shape: Sequence[int], blocks: Sequence[UnitBlock], stays: np.ndarray[Any, Any]) -> tuple[int, ...]:
    """The shape of a value after a cut; `stays[unit]` says which units do, and `stays[-1]` is true.

    Raises:
        ValueError: what is left of a split axis is not a rectangle.
    """
    out = list(shape)
    for block in blocks:
        left = stays[block.units]
        for axis, dim in enumerate(block.dims):
            others = tuple(a for a in range(left.ndim) if a != axis)
            out[dim] = int(left.any(axis=others).sum())
        if math.prod(out[d] for d in block.dims) != left.sum():
            raise ValueError("a split axis would become ragged")
    return tuple(out)


def survivors(groups: Groups, keep: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
    """`[unit]` -> whether it stays; one entry more, at -1, for whatever is in no group."""
    stays = np.zeros(groups.offsets[-1] + 1, bool)
    stays[-1] = True
    for offset, units in zip(groups.offsets, keep):
        stays[offset + np.asarray(units, np.int64)] = True
    return stays


def _first_miss(model: nn.Module, example_inputs: Any, analysis: Analysis, seed: int) -> Miss | None:
    """The first op of a cut model that is not as predicted; None if all are."""
    groups = analysis.groups
    if not groups.groups:
        return None
    keep = random_keep(groups, seed)
    stays = survivors(groups, keep)
    with (
        _cut_copy(model, example_inputs, groups, keep, analysis.trace.fake) as (cut, inputs),
        recording(cut) as recorder,
    ):
        for tensor in tensors_in(inputs):
            recorder.register(tensor, "input")
        error = ""
        try:
            with _quiet():
                run(cut, inputs)
        except Exception as stopped:
            error = f": {str(stopped).splitlines()[0]}" if str(stopped) else ""
    wanted, made, values = steps(analysis.trace.calls), steps(recorder.calls), recorder.values
    for index, (name, expected) in enumerate(wanted):
        if name in RANKING or _picks_by_truth(expected, analysis.trace.values):
            return None  # what follows depends on the values, which a cut changes; the certificate looks at it
        if index >= len(made) or made[index][0] != name:
            return _freeze_around(analysis, index, stays, error)
        other = _constants(expected, analysis.trace.values) != _constants(made[index][1], values)
        if other or first_odd_output(expected, made[index][1], analysis, values, stays):
            return _freeze_around(analysis, index, stays, "")
    return None


def _picks_by_truth(call: Call, values: Sequence[Value]) -> bool:
    """Whether an op is `x[mask]`."""
    chosen = refs_in(call.args[1:]) if op_name(call) == "index" else ()
    return any(values[ref.id].dtype is torch.bool for ref in chosen)


@contextlib.contextmanager
def _cut_copy(
    model: nn.Module, example_inputs: Any, groups: Groups, keep: Sequence[Sequence[int]], fake: bool
) -> Iterator[tuple[nn.Module, Any]]:
    """A cut copy and inputs for it: fake ones, or real ones where the model does not run on fake tensors."""
    if not fake:
        cut = rebuild(model, narrow(model, groups.kept(keep)), groups.attributes(keep), groups.replays(keep))
        yield see_heads(cut.eval()), map_tensors(torch.clone, example_inputs)
        return
    with fake_copy(model, example_inputs) as (twin, inputs):
        tensors = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
        shapes = groups.shapes(keep)
        narrowed = {n: t if t.shape == shapes[n] else t.new_empty(shapes[n]) for n, t in tensors.items()}
        yield rebuild(twin, narrowed, groups.attributes(keep), groups.replays(keep)), inputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch logs what fails on fake tensors with a traceback; here a failure is an answer."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _constants(call: Call, values: Sequence[Value]) -> list[float]:
    """The numbers that an op is given, other than sizes: one that a cut changes was computed from a size."""
    given = [*call.args, *call.kwargs.values()]
    if op_name(call) in FILLED:
        given = [item for item in given if not isinstance(item, list | tuple)]
    elif op_name(call) in SIZED:
        given = []
    inner = [part for item in given for part in (item if isinstance(item, list | tuple) else (item,))]
    held = [values[ref.id].constant for ref in refs_in(given)]
    numbers = [item for item in (*inner, *held) if isinstance(item, int | float)]
    return [item for item in numbers if not math.isnan(item)]


def first_odd_output(
    expected: Call, made: Call, analysis: Analysis, values: Sequence[Value], stays: np.ndarray[Any, Any]
) -> str:
    """What is wrong with the shapes that a call of a cut model made; empty if they are as predicted."""
    for want, got in zip(expected.outputs, made.outputs):
        if want is not None and got is not None:
            shape = predicted_shape(analysis.trace.values[want.id].shape, analysis.units_of(want), stays)
            if values[got.id].shape != shape:
                return f"{made.where} makes {values[got.id].shape}, predicted {shape}"
    return ""


def _freeze_around(analysis: Analysis, index: int, stays: np.ndarray[Any, Any], error: str) -> Miss:
    """Replay the call's sizes, or freeze what the cut changed on the values that meet in it or in the one before."""
    wanted = steps(analysis.trace.calls)
    python = wanted[index][1].python
    call_made = analysis.trace.python[python] if python is not None else None
    replay = python if call_made and (call_made.function in REPLAYABLE or call_made.floats) else None
    for at in range(index, -1, -1):
        call = wanted[at][1]
        reason = f"an integer in Python does not follow a cut of this axis ({call.where}{error})"
        refs = [*refs_in((call.args, call.kwargs)), *(ref for ref in call.outputs if ref is not None)]
        changed = [r.id for r in refs if any(not stays[b.units].all() for b in analysis.units_of(r))]
        if changed:
            return Miss(replay, tuple((value, reason) for value in changed))
    return Miss(None, tuple((value, f"a cut model stops before this{error}") for value in analysis.blocks))
