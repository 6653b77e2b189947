"""Whether the ops of a cut model are as predicted: the same ops, the predicted shapes, the same numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.graph.analysis import Analysis
from secateur.graph.axes import refs_in
from secateur.graph.capture import Call, Value, op_name
from secateur.graph.replay import ATTENTION
from secateur.graph.units import UnitBlock

SIZED = frozenset(
    """
    view unsafe_view reshape reshape_alias expand slice split split_with_sizes unsafe_split chunk narrow repeat
    constant_pad_nd zeros ones empty rand randn new_zeros new_ones new_empty convolution native_group_norm
    native_layer_norm channel_shuffle native_channel_shuffle fused_rms_norm as_strided mkldnn_rnn_layer
    """.split()
)
FILLED = frozenset(("full", "new_full"))
"""Ops whose integers are sizes that a cut changes, and those that take a value besides."""

PRODUCTS = frozenset(("einsum", "matmul", "__matmul__", "__rmatmul__", "tensordot", "linear", "bilinear", ATTENTION))

Stays = NDArray[np.bool_]
"""`[unit]` -> whether it stays; one entry more, at -1, for whatever is in no group."""

Steps = Sequence[tuple[str, Call]]
"""What `capture.steps` gives."""


def predicted_shape(shape: Sequence[int], blocks: Sequence[UnitBlock], stays: Stays) -> tuple[int, ...]:
    """The shape of a value after a cut; -1 for the axes of a split that would not be a rectangle."""
    out = list(shape)
    for block in blocks:
        left = stays[block.units]
        if left.ndim == 1:
            out[block.dims[0]] = int(np.count_nonzero(left))
            continue
        for axis, dim in enumerate(block.dims):
            others = tuple(a for a in range(left.ndim) if a != axis)
            out[dim] = int(left.any(axis=others).sum())
        if math.prod(out[d] for d in block.dims) != left.sum():
            for dim in block.dims:
                out[dim] = -1
    return tuple(out)


def first_odd(
    wanted: Steps, made: Steps, analysis: Analysis, values: Sequence[Value], stays: Stays
) -> tuple[int, str] | None:
    """The first op that is not as predicted, as its index in `wanted`, and in what; None if all are.

    Args:
        wanted: of the trace that was analysed.
        made: of the cut model, on `values`.
    """
    end, number = 0, -1
    runs = list(_runs(made))
    for number, run in enumerate(_runs(wanted)):
        other = runs[number] if number < len(runs) else []
        end += len(run)
        if _names(run) != _names(other) and _is_product(run, analysis) and other:
            odd = _odd_shape(_result(run), _result(other), analysis, values, stays)
            if odd:
                return end - 1, odd
            continue
        for at, (name, expected) in enumerate(run):
            if at >= len(other) or other[at][0] != name:
                done = other[at][1].where if at < len(other) else "the model stops"
                return end - len(run) + at, f"{done} instead of {expected.where}"
            odd = _odd(expected, other[at][1], analysis, values, stays)
            if odd:
                return end - len(run) + at, odd
    return None if number == len(runs) - 1 else (len(wanted) - 1, "the model goes on with other ops")


def _runs(steps: Steps) -> Iterator[list[tuple[str, Call]]]:
    """The ops of each torch function that Python called, together."""
    return (list(run) for _, run in groupby(steps, key=lambda step: step[1].python))


def _result(run: Steps) -> Call:
    """The last call, with its first output alone."""
    return replace(run[-1][1], outputs=run[-1][1].outputs[:1])


def _names(run: Steps) -> list[str]:
    return [name for name, _ in run]


def _is_product(run: Steps, analysis: Analysis) -> bool:
    """Products are taken apart in another way where an axis has become 1 long, or two widths of attention differ; the
    result is the same."""
    python = run[0][1].python
    return python is not None and analysis.trace.python[python].function in PRODUCTS


def _odd(expected: Call, made: Call, analysis: Analysis, values: Sequence[Value], stays: Stays) -> str:
    if expected.dead:
        return ""
    before, now = _constants(expected, analysis.trace.values), _constants(made, values)
    # Not bit by bit: a scale that is given is halved by another formula than one that is left out.
    if len(before) != len(now) or not all(a == b or math.isclose(a, b, rel_tol=1e-9) for a, b in zip(before, now)):
        return f"{made.where} is given another number than before"
    return _odd_shape(expected, made, analysis, values, stays)


def _odd_shape(expected: Call, made: Call, analysis: Analysis, values: Sequence[Value], stays: Stays) -> str:
    if len(expected.outputs) != len(made.outputs):
        return f"{made.where} makes {len(made.outputs)} values, predicted {len(expected.outputs)}"
    for want, got in zip(expected.outputs, made.outputs):
        if want is not None and got is not None:
            shape = predicted_shape(analysis.trace.values[want.id].shape, analysis.units_of(want), stays)
            if values[got.id].shape != shape:
                return f"{made.where} makes {values[got.id].shape}, predicted {shape}"
    return ""


def _constants(call: Call, values: Sequence[Value]) -> list[float]:
    """The numbers that an op is given, other than sizes: one that a cut changes was computed from a size."""
    given: list[Any] = [*call.args, *call.kwargs.values()]
    if op_name(call) in FILLED:
        given = [item for item in given if not isinstance(item, list | tuple)]
    elif op_name(call) in SIZED:
        given = []
    inner = [part for item in given for part in (item if isinstance(item, list | tuple) else (item,))]
    held = [values[ref.id].constant for ref in refs_in(given)]
    if op_name(call).startswith("scaled_dot_product") and call.kwargs.get("scale") is None:
        held.append(values[call.args[0].id].shape[-1] ** -0.5)  # the default
    numbers = [item for item in (*inner, *held) if isinstance(item, int | float)]
    return [item for item in numbers if not math.isnan(item)]
