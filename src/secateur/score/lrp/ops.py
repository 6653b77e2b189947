"""How every op but a linear layer hands on relevance.

Without an entry here, an op shares in proportion to what each operand adds to its first-order expansion: input times
the vector-Jacobian product of R / output (`in_proportion`). That is the epsilon rule of whatever is linear (additions,
means, average pooling, interpolation, batch norm in eval mode), and the Taylor rule of what is not (softmax:
Achtibat et al. 2024, "AttnLRP"). So a residual addition shares relevance in proportion to its summands.

- `PASSED`: functions of one value, such as ReLU, GELU and sigmoid, pass all of it (AttnLRP).
- `MOVED`: what picks values out, such as views and max pooling, carries the relevance to where they came from.
- Norms over the inputs (`norms.py`) and divisions divide by a constant: what they divide by gets none.
- In a product of two activations each would take all; `Factors` says who takes how much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.errors import CaptureError
from secateur.graph.capture import Call, op_name
from secateur.score.lrp.factors import DIVIDED, MOVED, PASSED, Factors, is_inverse
from secateur.score.lrp.norms import NORMS
from secateur.score.lrp.rules import stabilized
from secateur.score.lrp.tape import Tape, filled, operands

Shares = list[Tensor | None]
"""For each operand of a call, the relevance that it gets; None for what gets none."""

Given = Sequence[Tensor | None]
"""For each output of a call, its relevance."""


def hand_on(tape: Tape, call: Call, given: Given, factors: Factors, stabilizer: float) -> Shares:
    """The relevance of a call's operands, for that of its outputs."""
    refs, name = operands(call), op_name(call)
    if all(relevance is None for relevance in given):
        return [None] * len(refs)
    if is_inverse(tape, call):
        return [None] * len(refs)
    if name in PASSED and given[0] is not None and tape.is_live(refs[0]):
        x = tape.values[refs[0].id]
        if x.shape == given[0].shape:
            return [given[0].to(x.dtype), *[None] * (len(refs) - 1)]
    wanted = [tape.is_live(ref) for ref in refs]
    if name in DIVIDED:
        wanted = [wanted[0], *[False] * (len(refs) - 1)]
    norm = NORMS.get(name)
    function = _replayed(call) if norm is None else norm(call)
    tensors = [tape.values[ref.id] for ref in refs]
    if name in MOVED:
        got = carried(function, tensors, wanted, given, call)
    else:
        got = in_proportion(function, tensors, wanted, given, call, stabilizer)
    for position, share in factors.shares(call).items():
        entry = got[position]
        got[position] = entry * share if entry is not None and share else None
    return got


Function = Callable[[Sequence[Tensor]], Sequence[Any]]
"""The operands of a call -> its outputs."""


def in_proportion(
    function: Function, tensors: Sequence[Tensor], wanted: Sequence[bool], given: Given, call: Call, stabilizer: float
) -> Shares:
    """x times the slope of R / out: the epsilon rule for any op."""

    def ratio(out: Tensor, relevance: Tensor) -> Tensor:
        return relevance / stabilized(out, stabilizer)

    slopes = _slopes(function, tensors, wanted, given, ratio, call)
    # an input of -inf, such as a mask, has no slope and gets nothing
    return [None if s is None else torch.where(s == 0, s, s * x) for s, x in zip(slopes, tensors)]


def carried(function: Function, tensors: Sequence[Tensor], wanted: Sequence[bool], given: Given, call: Call) -> Shares:
    """The slope of R: to where each output was picked from."""
    return _slopes(function, tensors, wanted, given, lambda out, relevance: relevance, call)


def _slopes(
    function: Function,
    tensors: Sequence[Tensor],
    wanted: Sequence[bool],
    given: Given,
    cotangent: Callable[[Tensor, Tensor], Tensor],
    call: Call,
) -> Shares:
    if not any(wanted):
        return [None] * len(tensors)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() if want else t.detach() for t, want in zip(tensors, wanted)]
        outputs = function(leaves)
        pairs = [
            (out, cotangent(out.detach(), relevance.to(out.dtype)))
            for out, relevance in zip(outputs, given)
            if relevance is not None and isinstance(out, Tensor) and out.requires_grad
        ]
        if not pairs:
            return [None] * len(tensors)
        asked = [leaf for leaf, want in zip(leaves, wanted) if want]
        try:
            made, ratios = zip(*pairs)
            found = torch.autograd.grad(made, asked, ratios, allow_unused=True)
        except (RuntimeError, NotImplementedError) as error:
            raise CaptureError(f"relevance cannot pass {call.where}; torch has no derivative: {error}") from error
    slopes = iter(found)
    return [next(slopes) if want else None for want in wanted]


def _replayed(call: Call) -> Function:
    """The op itself, on other operands."""

    def function(tensors: Sequence[Tensor]) -> Sequence[Any]:
        fresh = [t.clone() if t.requires_grad else t for t in tensors] if call.op._schema.is_mutable else tensors
        args, kwargs = filled((call.args, dict(call.kwargs)), fresh)
        result = call.op(*args, **kwargs)
        return result if isinstance(result, tuple | list) else (result,)

    return function
