"""The calls of a model that can be timed alone, and how their shapes follow the widths: `Layer`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.analysis import Analysis
from secateur.graph.axes import refs_in
from secateur.graph.capture import Call, Ref, op_name
from secateur.graph.costs import LOOPS, Axis, Product, plain_block
from secateur.graph.decisions import name_of

SWAPS = frozenset(("t", "transpose"))
"""Views by which a weight gets to a product; of the last two axes, in what models do."""


ALONE = frozenset(("convolution", *(op for op in LOOPS if op not in ("mkldnn_rnn_layer", "grouped_mm"))))
"""What can be timed alone: not what takes a size as an integer too, or works by the values of an operand."""


@dataclass(frozen=True)
class Hole:
    """The place of an operand among a call's arguments."""

    operand: int


@dataclass(frozen=True)
class Operand:
    """A tensor that a call reads: `along[d]` is the variable that axis d is as long as, -1 for none.

    `static` is a weight, or made of weights; `swapped` lies in memory with its last two axes the other way round.
    """

    shape: tuple[int, ...]
    along: tuple[int, ...]
    dtype: torch.dtype
    static: bool
    swapped: bool


@dataclass(frozen=True)
class Layer:
    """A call on its own, for any widths; equal layers take equally long.

    Args:
        op: what is called.
        args: positional arguments, each operand as a `Hole`.
        kwargs: (name, argument).
        operands: the tensors.
        sizes: how long each variable is in the whole model.
        repeats: how many entries along a variable are one unit, such as the pixels of a flattened channel.
    """

    op: torch._ops.OpOverload[Any, Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    operands: tuple[Operand, ...]
    sizes: tuple[int, ...]
    repeats: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the op, without its namespace."""
        return str(self.op.overloadpacket.__name__)

    def shapes(self, widths: Sequence[int]) -> list[tuple[int, ...]]:
        """The operands' shapes when the variables are this long."""
        return [
            tuple(
                n if v < 0 else max(1, math.ceil(n * widths[v] / self.sizes[v]))
                for n, v in zip(operand.shape, operand.along)
            )
            for operand in self.operands
        ]

    def traffic(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Bytes that the operands take: (constant, variables), each to be multiplied."""
        rows = []
        for operand in self.operands:
            fixed = math.prod(n for n, v in zip(operand.shape, operand.along) if v < 0)
            rows.append((fixed * operand.dtype.itemsize, tuple(v for v in operand.along if v >= 0)))
        return tuple(rows)

    def alone(self, widths: Sequence[int], device: torch.device) -> tuple[Alone, tuple[Tensor, ...]]:
        """A module that makes this call, with weights of its own, and inputs for it.

        Raises:
            ValueError: no call has these widths.
        """
        shapes = self.shapes(widths)
        made = [_tensor(operand, shape, device) for operand, shape in zip(self.operands, shapes)]
        args = list(self.args)
        if name_of(self.op) == "convolution" and args[8] > 1:
            args[8] = _conv_groups(args, self.operands, shapes)
        moving = [t for t, operand in zip(made, self.operands) if not operand.static]
        static = [t if operand.static else None for t, operand in zip(made, self.operands)]
        return Alone(self.op, tuple(args), dict(self.kwargs), static), tuple(moving)


class Alone(nn.Module):
    """One call as a module: the weights are its own, the rest are its inputs."""

    def __init__(self, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], static: list[Tensor | None]) -> None:
        super().__init__()
        self.op, self.args, self.kwargs = op, args, dict(kwargs)
        self.static = static

    def operands(self, moving: Sequence[Tensor]) -> list[Tensor]:
        """All operands, in their order."""
        rest = iter(moving)
        return [next(rest) if tensor is None else tensor for tensor in self.static]

    def forward(self, *moving: Tensor) -> Any:
        """Make the call."""
        operands = self.operands(moving)
        return self.op(*fill(self.args, operands), **fill(self.kwargs, operands))


def fill(nested: Any, operands: Sequence[Any]) -> Any:
    """Arguments with the operands in their places.

    >>> fill((Hole(1), (3, Hole(0))), ["a", "b"])
    ('b', (3, 'a'))
    """
    if isinstance(nested, Hole):
        return operands[nested.operand]
    if isinstance(nested, tuple):
        return tuple(fill(item, operands) for item in nested)
    if isinstance(nested, dict):
        return {key: fill(item, operands) for key, item in nested.items()}
    return nested


def find_layers(analysis: Analysis) -> tuple[list[tuple[Layer, str, tuple[Axis, ...]]], list[Product]]:
    """The calls to time, each with its module and the units along its variables; and what all others write.

    Timed are the calls that MACs are counted of, but for LSTMs and experts (see `ALONE`);
    `Product`s are the numbers that the others write.
    """
    trace = analysis.trace
    made_by = {ref.id: call for call in trace.calls for ref in call.outputs if ref is not None}
    static = {i for i, value in enumerate(trace.values) if value.origin in ("parameter", "buffer")}
    timed, written = [], []
    for call in trace.calls:
        refs = list(refs_in((call.args, call.kwargs)))
        if refs and all(ref.id in static for ref in refs):
            static.update(ref.id for ref in call.outputs if ref is not None)
        if call.dead or call.op.is_view:
            continue
        if op_name(call) in ALONE:
            found = _layer(call, analysis, static, made_by)
            if runs(found[0], found[0].sizes):
                timed.append((found[0], call.module, found[1]))
                continue
        written.extend(_written(call, analysis))
    return timed, _added(written)


def runs(layer: Layer, widths: Sequence[int]) -> bool:
    """Whether there is a call with these widths: tried without memory."""
    try:
        module, inputs = layer.alone(widths, torch.device("meta"))
        with torch.inference_mode():
            module(*inputs)
    except (RuntimeError, ValueError, NotImplementedError, IndexError, TypeError):
        return False
    return True


def _layer(
    call: Call, analysis: Analysis, static: set[int], made_by: Mapping[int, Call]
) -> tuple[Layer, tuple[Axis, ...]]:
    values, places, axes = analysis.trace.values, dict[bytes, int](), list[Axis]()
    operands: list[Operand] = []

    def hole(ref: Ref) -> Hole:
        value, along = values[ref.id], [-1] * len(values[ref.id].shape)
        for dims, units in map(plain_block, analysis.units_of(ref)):
            if dims and (units >= 0).any():
                key = units.tobytes()
                if key not in places:
                    places[key] = len(axes)
                    axes.append(tuple(units.ravel().tolist()))
                along[dims[0]] = places[key]
        maker = made_by.get(ref.id)
        swapped = maker is not None and len(along) > 1 and op_name(maker) in SWAPS
        operands.append(Operand(value.shape, tuple(along), value.dtype, ref.id in static, swapped))
        return Hole(len(operands) - 1)

    args, kwargs = _holes(call.args, hole), tuple((key, _holes(item, hole)) for key, item in call.kwargs.items())
    sizes = tuple(map(len, axes))
    repeats = tuple(1 if -1 in axis else len(axis) // len(set(axis)) for axis in axes)
    return Layer(call.op, args, kwargs, tuple(operands), sizes, repeats), tuple(axes)


def _holes(nested: Any, hole: Any) -> Any:
    if isinstance(nested, Ref):
        return hole(nested)
    if isinstance(nested, tuple | list):
        return tuple(_holes(item, hole) for item in nested)
    return nested


def _tensor(operand: Operand, shape: tuple[int, ...], device: torch.device) -> Tensor:
    order = (*shape[:-2], shape[-1], shape[-2]) if operand.swapped else shape
    if operand.dtype.is_floating_point and device.type != "meta":
        # Small, so that nothing overflows in half precision; none is denormal, which would take longer.
        made = torch.empty(order, dtype=operand.dtype, device=device).uniform_(0.01, 0.1)
    else:
        made = torch.zeros(order, dtype=operand.dtype, device=device)
    return made.transpose(-1, -2) if operand.swapped else made


def _conv_groups(args: Sequence[Any], operands: Sequence[Operand], shapes: Sequence[tuple[int, ...]]) -> int:
    """How many groups a convolution has left; ValueError where the channels do not divide by it."""
    x, weight = (shapes[args[i].operand] for i in (0, 1))
    if not args[6]:
        groups = x[1] // weight[1]
    elif operands[args[1].operand].along[1] >= 0:
        groups = args[8]
    else:
        groups = max(1, args[8] * weight[0] // operands[args[1].operand].shape[0])
    if groups < 1 or x[1] % groups or weight[0] % groups:
        raise ValueError(f"no convolution has {x[1]} channels and weights {weight}")
    return int(groups)


def _written(call: Call, analysis: Analysis) -> list[Product]:
    """How many numbers the first output of a call has."""
    ref = call.outputs[0] if call.outputs else None
    if ref is None:
        return []
    sizes, axes = dict(enumerate(analysis.trace.values[ref.id].shape)), []
    for dims, units in map(plain_block, analysis.units_of(ref)):
        if (units >= 0).any():
            axes.append(tuple(units.ravel().tolist()))
            sizes.update(dict.fromkeys(dims, 1))
    return [Product("", math.prod(sizes.values()), tuple(axes))]


def _added(products: Sequence[Product]) -> list[Product]:
    """Those with equal axes as one."""
    sums: dict[tuple[Axis, ...], int] = {}
    for product in products:
        sums[product.axes] = sums.get(product.axes, 0) + product.constant
    return [Product("", constant, axes) for axes, constant in sums.items()]
