"""Does Python follow? Cut a fake copy by random plans, run it, and compare every op's shapes with the prediction.

A model computes integers in Python: `x.view(n, 8, 64)`, `self.heads`, `x.shape[1] // 2`. Some follow a cut by
themselves, some through a module's attribute, some not at all. No need to know where each came from: it shows in the
shapes, at the op where it is used. What does not follow is frozen there, with the op's name, and all else stays
prunable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from secateur.errors import CaptureError
from secateur.graph.analysis import Analysis, UnitBlock, analyse
from secateur.graph.axes import refs_in
from secateur.graph.capture import Call, Trace, Value, fake_copy, recording, run, steps, tensors_in
from secateur.graph.rebuild import rebuild
from secateur.graph.records import Groups

PLANS = 2
"""Random plans tried: each cuts every group, by different shares, so that no two sizes agree by chance."""


def settle(model: nn.Module, example_inputs: Any, trace: Trace) -> Analysis:
    """The analysis of `trace` with all that does not follow a cut frozen."""
    frozen: list[tuple[int, str]] = []
    while True:
        analysis = analyse(trace, model, frozen)
        found = [miss for seed in range(PLANS) if (miss := _first_miss(model, example_inputs, analysis, seed))]
        if not found:
            return analysis
        frozen += [place for miss in found for place in miss]


def random_keep(groups: Groups, seed: int) -> tuple[tuple[int, ...], ...]:
    """A plan that cuts every group by its own share, between a tenth and six tenths of its units."""
    random = np.random.default_rng(seed)
    keep = []
    for group in groups.groups:
        stay = group.size - max(1, int(group.size * random.uniform(0.1, 0.6)))
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


def _first_miss(model: nn.Module, example_inputs: Any, analysis: Analysis, seed: int) -> list[tuple[int, str]]:
    """What to freeze for the first op of a cut model that is not as predicted; empty if all are."""
    groups = analysis.groups
    if not groups.groups:
        return []
    keep = random_keep(groups, seed)
    stays = survivors(groups, keep)
    with fake_copy(model, example_inputs) as (twin, inputs):
        tensors = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
        shapes = groups.shapes(keep)
        narrowed = {n: t if t.shape == shapes[n] else t.new_empty(shapes[n]) for n, t in tensors.items()}
        cut = rebuild(twin, narrowed, groups.attributes(keep))
        with recording(cut) as recorder:
            for tensor in tensors_in(inputs):
                recorder.register(tensor, "input")
            error = ""
            try:
                run(cut, inputs)
            except Exception as stopped:
                error = f": {str(stopped).splitlines()[0]}" if str(stopped) else ""
    wanted, made, values = steps(analysis.trace.calls), steps(recorder.calls), recorder.values
    for index, (name, expected) in enumerate(wanted):
        if index >= len(made) or made[index][0] != name:
            return _freeze_around(analysis, index, stays, error)
        if first_odd_output(expected, made[index][1], analysis, values, stays):
            return _freeze_around(analysis, index, stays, "")
    return []


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


def _freeze_around(analysis: Analysis, index: int, stays: np.ndarray[Any, Any], error: str) -> list[tuple[int, str]]:
    """Freeze what the cut changed on the values that meet in a call; if nothing there, in the calls before it."""
    wanted = steps(analysis.trace.calls)
    for at in range(index, -1, -1):
        call = wanted[at][1]
        reason = f"an integer in Python does not follow a cut of this axis ({call.where}{error})"
        refs = [*refs_in((call.args, call.kwargs)), *(ref for ref in call.outputs if ref is not None)]
        changed = [r.id for r in refs if any(not stays[b.units].all() for b in analysis.units_of(r))]
        if changed:
            return [(value, reason) for value in changed]
    raise CaptureError("the model does not run the same way twice, so no cut of it can be followed")
