"""Decisions: where a forward pass goes from values to whole numbers, such as which boxes to keep.

A detector ranks, compares and selects: there, rounding or a cut can tip the scales, and two runs part ways though all
that they compute agrees. So decisions are noted in one run and followed in another, and what is compared is what led to
them. A decision along an axis that carries units (`x > 0` on channels) is part of what is computed: each run takes its
own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDED = frozenset(("floor", "ceil", "round", "trunc", "sign", "sgn"))
"""Ops that decide and stay floating."""

RANKED = frozenset(("topk", "sort", "max", "min", "kthvalue", "median", "mode"))
"""Ops that give values and their places; the places are the decision, along the axis at this argument."""

CREATED = ("_like", "new_")


@dataclass(frozen=True)
class Decision:
    """What call number `call` of a trace decided: its outputs, tensors or numbers."""

    call: int
    op: str
    outputs: tuple[Any, ...]


def name_of(func: Any) -> str:
    return str(func.overloadpacket.__name__).strip("_")


def decided(func: Any, args: Sequence[Any], outputs: Sequence[Any]) -> bool:
    """Whether the op made whole numbers, truths or numbers for Python from floating values."""
    name = name_of(func)
    if any(part in name for part in CREATED) or func.namespace == "prim":
        return False
    if not any(tensor.is_floating_point() for tensor in _tensors(args)):
        return False
    if name in RANKED:
        return len(outputs) == 2
    whole = all(not (isinstance(item, Tensor) and item.is_floating_point()) for item in outputs)
    return bool(outputs) and (whole or name in ROUNDED)


def noted(call: int, func: Any, outputs: Sequence[Any]) -> Decision:
    """The decision, with outputs that later writes do not reach."""
    kept = tuple(item.detach().clone() if isinstance(item, Tensor) else item for item in outputs)
    return Decision(call, name_of(func), kept)


def numbered(decisions: Sequence[Decision], live: Sequence[bool]) -> dict[tuple[str, int], Decision | None]:
    """(op, how manieth decision of that op) -> the decision to follow; None for one along an axis with units."""
    counts: Counter[str] = Counter()
    out: dict[tuple[str, int], Decision | None] = {}
    for decision, own in zip(decisions, live, strict=True):
        out[decision.op, counts[decision.op]] = None if own else decision
        counts[decision.op] += 1
    return out


class Following(TorchDispatchMode):
    """Runs what is within it with the decisions of another run; `led` are the floating values that led to them."""

    def __init__(self, decisions: Mapping[tuple[str, int], Decision | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._decisions, self._counts = decisions, Counter[str]()
        self.led: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [tensor for tensor in _tensors(args) if tensor.is_floating_point()]
        if name_of(func) in ROUNDED:  # it may write in place
            operands = [tensor.detach().clone() for tensor in operands]
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, tuple | list) else (result,)
        if not decided(func, args, outputs):
            return result
        name = name_of(func)
        number, self._counts[name] = self._counts[name], self._counts[name] + 1
        decision = self._decisions.get((name, number))
        if decision is None:
            return result
        self.led += [tensor.detach().clone() for tensor in operands]
        return _followed(func, args, kwargs, result, decision)


def _followed(func: Any, args: Any, kwargs: Any, result: Any, decision: Decision) -> Any:
    if func._schema.is_mutable:
        return result.copy_(decision.outputs[0])
    if not isinstance(result, tuple | list):
        return decision.outputs[0]
    if decision.op not in RANKED:
        return type(result)(decision.outputs)
    x, places = args[0], decision.outputs[1]
    at = [argument.name for argument in func._schema.arguments].index("dim")
    dim = args[at] if at < len(args) else kwargs.get("dim", -1)
    if x.ndim == places.ndim:
        return x.gather(dim, places), places
    return x.gather(dim, places.unsqueeze(dim)).squeeze(dim), places


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    return [t for item in args for t in (item if isinstance(item, tuple | list) else (item,)) if isinstance(t, Tensor)]
