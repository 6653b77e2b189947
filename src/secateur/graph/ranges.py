"""Between which bounds the values of a trace lie, whatever the inputs and weights: as far as ops alone tell.

It is needed to leave a residual block out: relu(x + f(x)) becomes relu(x), and that is x where x is known to be at
least 0. A sum counts with each of its operands taken as 0 too, so that the bounds still hold when blocks have gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from secateur.graph.axes import refs_in
from secateur.graph.capture import Call, Ref, Trace, op_name

INF = math.inf

MOVING = frozenset(
    """
    clone contiguous alias detach to_copy view unsafe_view reshape reshape_alias lift_fresh roll flip pixel_shuffle
    pixel_unshuffle channel_shuffle
    """.split()
)
"""Ops that, like views, give the numbers of their operand in another place."""

AMONG = frozenset(
    "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d amax amin cat stack index".split()
)
"""Ops whose results are among their operands' numbers."""

MEANS = frozenset("avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d mean sum".split())
"""Ops that keep the sign."""

SHARES = frozenset("sigmoid hardsigmoid softmax".split())


@dataclass(frozen=True)
class Range:
    """Bounds, and the number of the call that set them."""

    low: float = -INF
    high: float = INF
    cause: int | None = None

    def within(self, other: Range) -> bool:
        return other.low <= self.low and self.high <= other.high


def _clip(call: Call) -> tuple[float, float]:
    """The bounds of an op that clips."""
    name, given = op_name(call), [item for item in call.args[1:] if not isinstance(item, Ref)]
    bounds = {**dict(zip(("min", "max"), given)), **call.kwargs}
    if name == "clamp_max":
        bounds = {"max": given[0] if given else call.kwargs.get("max")}
    default = (-1.0, 1.0) if name == "hardtanh" else (None, None)
    low = bounds.get("min", bounds.get("min_val", default[0]))
    high = bounds.get("max", bounds.get("max_val", default[1]))
    return -INF if low is None else float(low), INF if high is None else float(high)


def _elu(call: Call) -> tuple[float, float]:
    numbers = (*call.args[2:], *call.kwargs.values())
    return (0.0, INF) if all(number == 1 for number in numbers) else (INF, INF)


def _positive(_: Call) -> tuple[float, float]:
    return 0.0, INF


FIXED: Mapping[str, Callable[[Call], tuple[float, float]]] = MappingProxyType(
    dict.fromkeys(("relu", "leaky_relu", "celu", "abs"), _positive)
    | dict.fromkeys(("hardtanh", "clamp", "clamp_min", "clamp_max"), _clip)
    | {"relu6": lambda call: (0.0, 6.0), "elu": _elu}
)
"""Activations, and where they leave a number as it is."""

CLIPPING = frozenset(("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"))
"""Those of them that give nothing else."""


def leaves(call: Call, held: Range) -> bool:
    """Whether an op gives every number within these bounds as it is.

    >>> import torch
    >>> from secateur.graph.capture import capture
    >>> (call,) = capture(torch.nn.ReLU6(), torch.zeros(2)).calls
    >>> leaves(call, Range(0, 6)), leaves(call, Range(0))
    (True, False)
    """
    fixed = FIXED.get(op_name(call))
    return fixed is not None and all(not isinstance(a, Ref) for a in call.args[1:]) and held.within(Range(*fixed(call)))


def is_move(call: Call) -> bool:
    """Whether an op only moves the numbers of its one operand."""
    name = op_name(call)
    return (call.op.is_view or name in MOVING) and len(list(refs_in((call.args, call.kwargs)))) == 1


def range_of(call: Call, index: int, given: Sequence[Range]) -> Range:
    """The bounds of what a call gives; `given` are those of its operands."""
    name, low = op_name(call), min((r.low for r in given), default=-INF)
    high, cause = max((r.high for r in given), default=INF), given[0].cause if given else None
    if is_move(call) or name in AMONG:
        return Range(low, high, cause)
    if name in CLIPPING and len(given) == 1:
        least, most = FIXED[name](call)
        return Range(min(max(low, least), most), max(min(high, most), least), index)
    if name in SHARES:
        return Range(0.0, 1.0, index)
    if name in ("exp", "square", "abs"):
        return Range(0.0, INF, index)
    if name in MEANS or (name == "mul" and len(given) == 2 and low >= 0):
        return Range(0.0 if low >= 0 else -INF, 0.0 if high <= 0 and name != "mul" else INF, cause)
    if name == "add" and len(given) == 2 and call.kwargs.get("alpha", 1) == 1:
        lows, highs = [r.low for r in given], [r.high for r in given]
        return Range(min(*lows, sum(lows)), max(*highs, sum(highs)), index)
    return Range()


def ranges(trace: Trace) -> list[Range]:
    """The bounds of every value of a trace.

    >>> import torch
    >>> from secateur.graph.capture import capture
    >>> trace = capture(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.MaxPool2d(2)), torch.zeros(1, 1, 4, 4))
    >>> found = ranges(trace)[trace.outputs[0].id]
    >>> found.low, found.high, found.cause
    (0.0, inf, 0)
    """
    out = [Range() for _ in trace.values]
    for index, call in enumerate(trace.calls):
        given = [out[ref.id] for ref in refs_in((call.args, call.kwargs))]
        made = [ref for ref in call.outputs if ref is not None]
        if made and trace.values[made[0].id].dtype.is_floating_point:
            out[made[0].id] = range_of(call, index, given)
            if call.op.is_view:
                for ref in made[1:]:
                    out[ref.id] = out[made[0].id]
    return out


def told(call: Call) -> str:
    """An op in words."""
    return f"{op_name(call)} in {call.module or 'the model itself'}"
