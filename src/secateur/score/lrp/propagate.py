"""Layer-wise relevance propagation, from the model's output back along a tape, one call at a time.

Why by ops and not by modules: additions, pools and products need no module of their own to be seen, so residual
networks, functional calls and attention are covered without a list of architectures; and nothing is hooked, since the
tape is a run of a copy and each rule works on the tensors of one call alone.

Batch norm behind a linear layer is folded into it exactly, as a canoniser would: the layer's rule then sees the folded
weight and bias. Anywhere else it is the affine map that it is in eval mode, under the epsilon rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from secateur.errors import CaptureError
from secateur.graph.axes import refs_in
from secateur.graph.capture import Call, Ref, op_name
from secateur.score.lrp.composites import Composite, Layer
from secateur.score.lrp.factors import PAIRS, find_factors
from secateur.score.lrp.norms import BATCH_NORMS, affine, uses_batch
from secateur.score.lrp.ops import Shares, hand_on
from secateur.score.lrp.rules import STABILIZER, Product
from secateur.score.lrp.tape import Tape, filled, named_arguments, operands

BIASES: Mapping[str, int] = MappingProxyType({"convolution": 2, "addmm": 0, "baddbmm": 0, "addmv": 0})
"""Which argument of a product is added to it."""


@dataclass(frozen=True)
class Flow:
    """What call `index` hands on: `made`, the relevance of its outputs, becomes `taken`, that of its operands.

    `layer` is what the composite was asked; None for what is no linear layer.
    """

    index: int
    made: tuple[Tensor | None, ...]
    taken: tuple[Tensor | None, ...]
    layer: Layer | None


def propagate(
    tape: Tape, output: Ref, relevance: Tensor, composite: Composite, gates: float = 0.5, stabilizer: float = STABILIZER
) -> Iterator[Flow]:
    """The flow of relevance through each call, from the last to the first.

    Args:
        tape: a run of the model.
        output: the value that is explained.
        relevance: where it starts, of the shape of that value.
        composite: the rule of each linear layer.
        gates: the share that attention weights and other gates take of what they weigh, from 0 to 1.
        stabilizer: keeps additions, means and other ops that share from dividing by zero.

    Raises:
        CaptureError: relevance meets an op that torch does not differentiate.
    """
    found = {output.id: relevance}
    folds, firsts, factors = find_folds(tape), find_firsts(tape), find_factors(tape, gates)
    norms = frozenset(folds.values())
    for index in reversed(range(len(tape.trace.calls))):
        call = tape.trace.calls[index]
        made = tuple(None if ref is None else found.pop(ref.id, None) for ref in call.outputs)
        if all(part is None for part in made):
            continue
        layer = None
        if index in tape.rewrites and made[0] is not None:
            shares: Shares = [_rewritten(tape, index, made[0], found)]
        elif index in norms:
            shares = [made[0], *[None] * (len(operands(call)) - 1)]
        elif is_layer(tape, call) and made[0] is not None:
            layer = Layer(call.module, op_name(call) != "convolution", index in firsts)
            norm = tape.trace.calls[folds[index]] if index in folds else None
            shares = _by_rule(tape, call, norm, layer, composite, made[0])
        else:
            shares = hand_on(tape, call, made, factors, stabilizer)
        yield Flow(index, made, tuple(shares), layer)
        for ref, share in zip(operands(call), shares):
            if share is not None and tape.is_live(ref):
                found[ref.id] = found[ref.id] + share if ref.id in found else share


def _rewritten(tape: Tape, index: int, relevance: Tensor, found: dict[int, Tensor]) -> Tensor:
    """The relevance of what a tensor was before it was written to, and, put into `found`, of what was written."""
    rewrite = tape.rewrites[index]
    if not rewrite.plain:
        raise CaptureError(
            f"module {tape.trace.calls[index].module!r} writes in place into a tensor that it has expanded or reads as "
            "another type, and relevance cannot follow; let it write into a copy."
        )
    old, parts = rewrite.shares(relevance)
    for (ref, _), part in zip(rewrite.writes, parts):
        if tape.is_live(ref):
            found[ref.id] = found[ref.id] + part if ref.id in found else part
    return old


def is_layer(tape: Tape, call: Call) -> bool:
    """Whether a call multiplies an activation with what is made of parameters only, and adds no other activation."""
    pair = PAIRS.get(op_name(call))
    if pair is None or op_name(call) in ("mul", "addcmul") or call.kwargs:
        return False
    factors = [call.args[i] for i in pair]
    bias = _bias(call)
    static = bias is None or not tape.is_live(bias)
    return static and all(isinstance(ref, Ref) for ref in factors) and sum(tape.is_live(ref) for ref in factors) == 1


def _bias(call: Call) -> Ref | None:
    position = BIASES.get(op_name(call))
    held = None if position is None else call.args[position]
    return held if isinstance(held, Ref) else None


def _by_rule(
    tape: Tape, call: Call, norm: Call | None, layer: Layer, composite: Composite, relevance: Tensor
) -> Shares:
    """A linear layer, with the batch norm that is folded into it, under the rule that the composite has for it."""
    x, weight = sorted(PAIRS[op_name(call)], key=lambda i: not tape.is_live(call.args[i]))
    held = _bias(call)
    product = Product(
        x=tape.values[call.args[x].id].detach(),
        weight=tape.values[call.args[weight].id].detach(),
        bias=None if held is None else tape.values[held.id].detach(),
        apply=_applied(call, x, weight),
    )
    out: Shares = [None] * len(operands(call))
    whole = product if norm is None else folded(tape, call, norm, product)
    out[len(list(refs_in(call.args[:x])))] = composite(layer)(whole, relevance)
    return out


def _applied(call: Call, x: int, weight: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """What a layer computes, as a function of its input, weight and bias, the arguments `x`, `weight` and the other."""

    def apply(x_: Tensor, weight_: Tensor, bias_: Tensor | None) -> Tensor:
        args = list(call.args)
        args[x], args[weight] = x_, weight_
        if op_name(call) == "convolution":
            args[2] = bias_
            out: Tensor = call.op(*args)
            return out
        first, second = PAIRS[op_name(call)]
        out = torch.matmul(args[first], args[second])
        return out if bias_ is None else out + bias_

    return apply


def find_folds(tape: Tape) -> dict[int, int]:
    """For linear layers, the batch norm that alone reads the output, in eval mode: its call by that of the layer."""
    calls = tape.trace.calls
    maker = {ref.id: index for index, call in enumerate(calls) for ref in call.outputs[:1] if ref is not None}
    readers = Counter(ref.id for call in calls if not call.dead for ref in operands(call))
    readers.update(ref.id for ref in tape.trace.outputs)
    found = {}
    for index, call in enumerate(calls):
        if op_name(call) in BATCH_NORMS and not call.dead and not uses_batch(named_arguments(call)):
            layer = maker.get(call.args[0].id)
            if layer is not None and readers[call.args[0].id] == 1 and _makes_channels(tape, calls[layer]):
                found[layer] = index
    return found


def _makes_channels(tape: Tape, call: Call) -> bool:
    """Whether a call is a linear layer whose weight makes the axis that a batch norm normalises, the second."""
    name = op_name(call)
    plain = name == "convolution" or (name in ("mm", "addmm") and tape.is_live(call.args[PAIRS[name][0]]))
    return plain and is_layer(tape, call)


def folded(tape: Tape, call: Call, norm: Call, layer: Product) -> Product:
    """The layer and the batch norm behind it as one: s w, and s b + offset."""
    refs = operands(norm)
    tensors = [tape.values[ref.id].detach() for ref in refs]
    args, kwargs = filled((norm.args, dict(norm.kwargs)), tensors)
    scale, offset = affine(dict(zip(named_arguments(norm), [*args, *kwargs.values()])))
    bias = offset if layer.bias is None else layer.bias * scale + offset
    if op_name(call) != "convolution":
        return replace(layer, weight=layer.weight * scale, bias=bias)
    rank, transposed, groups = layer.weight.ndim, call.args[6], call.args[8]
    rows = scale.reshape(-1, *[1] * (rank - 1))
    if transposed:
        rows = scale.reshape(groups, 1, -1).expand(-1, layer.weight.shape[0] // groups, -1)
        rows = rows.reshape(layer.weight.shape[0], -1, *[1] * (rank - 2))
    return replace(layer, weight=layer.weight * rows, bias=bias)


def find_firsts(tape: Tape) -> frozenset[int]:
    """The linear layers that read the model's input, or what functions and pooling have made of it."""
    raw = {ref for ref in tape.live if tape.trace.values[ref].origin == "input"}
    out = set()
    for index, call in enumerate(tape.trace.calls):
        live = [ref.id for ref in operands(call) if tape.is_live(ref)]
        if live and raw.issuperset(live):
            if is_layer(tape, call):
                out.add(index)
            else:
                raw.update(ref.id for ref in call.outputs if ref is not None)
    return frozenset(out)
