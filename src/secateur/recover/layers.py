"""The layers of a run whose weights can be solved anew, and what each is to match."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from secateur.graph.capture import COPIES, Call, Ref, Trace, op_name
from secateur.score.ends import NORMS
from secateur.surgery.wiring import Wiring, wire

RESHAPES = frozenset(("view", "unsafe_view", "reshape", "reshape_alias"))


@dataclass(frozen=True)
class Norm:
    """The batch norm right behind a layer: names of its tensors ("" for a scale or offset it has not), and epsilon."""

    weight: str
    bias: str
    mean: str
    variance: str
    eps: float


@dataclass(frozen=True)
class Layer:
    """A convolution, or a product with a matrix, that reads a parameter which nothing else reads.

    Args:
        name: the module that runs it.
        call: its number in the trace.
        operand: which argument is the input.
        weight, bias: names of parameters; "" for no bias.
        turned: whether the matrix is (inputs, outputs) and not (outputs, inputs).
        norm: the batch norm right behind it.
        target: the call whose result is matched: the addition that the layer's output goes into, the norm, or itself.
        added: the call whose result is added to the output in `target`, if that is an addition; a batch norm is between
            if there is one.
        rectified: whether what is matched goes into a ReLU, and nowhere else.
    """

    name: str
    call: int
    operand: int
    weight: str
    bias: str
    turned: bool
    norm: Norm | None
    target: int
    added: int | None
    rectified: bool = False

    @property
    def axis(self) -> int:
        """The axis of the weight along which its outputs lie."""
        return 1 if self.turned else 0


def find_layers(trace: Trace) -> tuple[Layer, ...]:
    """The layers, in the order in which they run."""
    wiring = wire(trace)
    makers = {ref.id: index for index, call in enumerate(trace.calls) for ref in call.outputs if ref is not None}
    found = [layer for index, call in enumerate(trace.calls) if not call.dead for layer in _layer(wiring, index, call)]
    ends = [layer.call for layer in found[1:]] + [len(trace.calls)]
    followed = (_followed(wiring, layer, end, makers) for layer, end in zip(found, ends))
    return tuple(replace(layer, rectified=_is_rectified(wiring, layer.target)) for layer in followed)


def find_pairs(trace: Trace, layers: Sequence[Layer]) -> tuple[tuple[Layer, Layer], ...]:
    """Of neighbours that are convolutions with nothing but a batch norm and a ReLU between them, each in one pair."""
    wiring, out = wire(trace), list[tuple[Layer, Layer]]()
    for first, second in itertools.pairwise(layers):
        convolutions = all(op_name(trace.calls[layer.call]) == "convolution" for layer in (first, second))
        taken = bool(out) and out[-1][1] == first
        if convolutions and first.rectified and first.added is None and not taken:
            rectifier = _behind(wiring, first.target)
            if rectifier is not None and _behind(wiring, rectifier) == second.call:
                out.append((first, second))
    return tuple(out)


def _layer(wiring: Wiring, index: int, call: Call) -> Iterator[Layer]:
    """The layer that a call is, if it is one."""
    name = op_name(call)
    if name == "convolution" and not call.args[6]:
        x, weight, bias = call.args[:3]
    elif name == "mm":
        (x, weight), bias = call.args, None
    elif name == "addmm" and not call.kwargs and len(call.args) == 3:
        bias, x, weight = call.args
    else:
        return
    if not isinstance(x, Ref) or x.id in wiring.root or not (wiring.read_once(weight)):
        return
    if bias is not None and not (wiring.read_once(bias) and _whole(wiring, bias) == ()):
        return
    moves = _whole(wiring, weight)
    if moves is None or moves not in ((), ("t",)) or (name == "convolution" and moves):
        return
    names = [wiring.name(ref) if ref is not None else "" for ref in (weight, bias)]
    turned = name != "convolution" and not moves
    yield Layer(call.module, index, int(name == "addmm"), names[0], names[1], turned, None, index, None)


def _whole(wiring: Wiring, ref: Ref) -> tuple[str, ...] | None:
    """The moves that made a value of a whole parameter; None if it is part of one, or a buffer."""
    moves: list[str] = []
    made = {out.id: call for call in wiring.trace.calls for out in call.outputs if out is not None}
    while ref.id in made:
        moves.append(op_name(made[ref.id]))
        ref = made[ref.id].args[0]
    value = wiring.trace.values[ref.id]
    return tuple(move for move in moves if move not in COPIES) if value.origin == "parameter" else None


def _followed(wiring: Wiring, layer: Layer, end: int, makers: Mapping[int, int]) -> Layer:
    """The layer with what comes behind it, before the next layer runs: the batch norm and the addition."""
    trace, at = wiring.trace, layer.call
    behind = _behind(wiring, at)
    if behind is not None and behind < end and op_name(trace.calls[behind]) in NORMS:
        norm = _norm(wiring, trace.calls[behind], trace.calls[at])
        if norm is not None:
            layer, at = replace(layer, norm=norm, target=behind), behind
            behind = _behind(wiring, at)
    while behind is not None and behind < end and op_name(trace.calls[behind]) in RESHAPES:
        at, behind = behind, _behind(wiring, behind)
    if behind is None or behind >= end or op_name(trace.calls[behind]) != "add":
        return layer
    call, own = trace.calls[behind], trace.calls[at].outputs[0]
    operands = [item for item in call.args if isinstance(item, Ref)]
    if own is None or len(operands) != 2 or call.kwargs or len(call.args) != 2 or operands.count(own) != 1:
        return layer
    other = operands[1 - operands.index(own)]
    shapes = [trace.values[ref.id].shape for ref in (own, other)]
    maker = _maker(trace, other, makers)
    if shapes[0] != shapes[1] or maker is None or maker >= layer.call:
        return layer
    made = trace.calls[layer.call].outputs[0]
    outputs = () if made is None else trace.values[made.id].shape
    same = outputs[-1:] == shapes[0][-1:] if len(outputs) == 2 else outputs[:2] == shapes[0][:2]
    return replace(layer, target=behind, added=maker) if same else layer


def _is_rectified(wiring: Wiring, index: int) -> bool:
    behind = _behind(wiring, index)
    return behind is not None and op_name(wiring.trace.calls[behind]) == "relu"


def _maker(trace: Trace, ref: Ref, makers: Mapping[int, int]) -> int | None:
    """The call that makes a value as its first result, copies left out; None if there is none."""
    while ref.id in makers:
        call = trace.calls[makers[ref.id]]
        if op_name(call) not in COPIES:
            return makers[ref.id] if call.outputs[0] == ref else None
        ref = call.args[0]
    return None


def _behind(wiring: Wiring, index: int) -> int | None:
    """The call that takes in what this one gives, if there is just one."""
    out = wiring.trace.calls[index].outputs[0]
    uses = [] if out is None or out in wiring.trace.outputs else wiring.uses.get(out.id, ())
    if len(uses) != 1:
        return None
    call = wiring.trace.calls[uses[0]]
    return _behind(wiring, uses[0]) if op_name(call) in COPIES else uses[0]


def _norm(wiring: Wiring, call: Call, before: Call) -> Norm | None:
    """A batch norm in eval mode of what the call before gives, with tensors of its own."""
    x, *given = call.args[:5]
    if x != before.outputs[0] or not all(ref is None or wiring.read_once(ref) for ref in given):
        return None
    if given[2] is None or given[3] is None or any(ref is not None and _moved(wiring, ref) for ref in given):
        return None
    eps = next(i for i, argument in enumerate(call.op._schema.arguments) if argument.name.startswith("eps"))
    weight, bias, mean, variance = (wiring.name(ref) if ref is not None else "" for ref in given)
    return Norm(weight, bias, mean, variance, float(call.args[eps]))


def _moved(wiring: Wiring, ref: Ref) -> bool:
    return wiring.root[ref.id] != ref.id
