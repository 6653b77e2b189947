"""What a model costs as a function of which units stay: counted from the trace, not estimated, for any plan.

A call's multiply-accumulates (MACs) are a nest of loops, and each loop runs over an axis. An axis that carries no units
is a number; one that does is as long as units stay on it. So the MACs of every call are a constant times a few counts,
a `Product`, and so are the sizes of tensors. A MAC is what it is in `secateur.measure.macs`: one fused multiply-add of
a convolution, matrix product, attention or LSTM, each as dense; a bias adds none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.graph.capture import Call, Ref, Trace, op_name
from secateur.graph.slots import Group, TensorInfo
from secateur.graph.twin import tensors_of
from secateur.graph.units import UnitBlock

Axis = tuple[int, ...]
"""The unit at each index, numbered as `Groups.offsets` count them; -1 is one that always stays."""

Stays = NDArray[np.bool_]
"""`[unit]` -> whether it stays; one entry more, at -1, for what always stays."""


@dataclass(frozen=True)
class Product:
    """`constant` times, for each of `axes`, how many of its units stay: MACs of the calls that `module` makes.

    A block of several axes, such as heads x width, is one axis, and its entries are the block's cells.
    """

    module: str
    constant: int
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class UnitCost:
    """What goes when one unit alone goes from the whole model.

    Args:
        params: parameters, in all tensors that it touches.
        macs: of one forward pass on the example inputs.
        bytes: of the parameters and buffers, as they are saved.
    """

    params: int
    macs: int
    bytes: int


_ATTENTION = ("b h i k, . . j .", "b h i ., . . j ., . . . d")

LOOPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "mm": ("i k, . j",),
        "addmm": (", i k, . j",),
        "bmm": ("b i k, . . j",),
        "baddbmm": (", b i k, . . j",),
        "mv": ("i k",),
        "addmv": (", i k",),
        "dot": ("k",),
        "grouped_mm": ("s k, . . n",),
        "deform_conv2d": ("n . . ., o i h w, . . y x",),
        "mkldnn_rnn_layer": ("t n ., g i", "t n ., , g h"),
        "scaled_dot_product_flash_attention_for_cpu": _ATTENTION,
        "scaled_dot_product_flash_attention": _ATTENTION,
        "scaled_dot_product_efficient_attention": _ATTENTION,
        "scaled_dot_product_cudnn_attention": _ATTENTION,
    }
)
"""Each product of an op by its loops, each named once, where an operand has it as an axis; `.` is any other axis."""


def find_products(trace: Trace, blocks: Mapping[int, Sequence[UnitBlock]]) -> tuple[Product, ...]:
    """The MACs of every call of a trace, those of a module with equal axes added up.

    Args:
        trace: what `capture` recorded.
        blocks: for each value, by its number, the units along its axes, as `Analysis.blocks` has them.
    """
    sums: dict[tuple[str, tuple[Axis, ...]], int] = {}
    known: dict[bytes, Axis] = {}
    for call in trace.calls:
        for loops in _loops(call, trace):
            constant, axes = 1, []
            for ref, dims in loops:
                sizes = {dim: trace.values[ref.id].shape[dim] for dim in dims}
                for found, units in map(plain_block, blocks.get(ref.id, ())):
                    if set(found) <= set(sizes) and (units >= 0).any():
                        axes.append(known.setdefault(units.tobytes(), tuple(units.ravel().tolist())))
                        sizes.update(dict.fromkeys(found, 1))
                constant *= math.prod(sizes.values())
            key = (call.module, tuple(axes))
            sums[key] = sums.get(key, 0) + constant
    return tuple(Product(module, constant, axes) for (module, axes), constant in sums.items() if constant)


def _loops(call: Call, trace: Trace) -> Iterator[list[tuple[Ref, list[int]]]]:
    """For each product of a call, the values and which of their axes it loops over."""
    if op_name(call) == "convolution":
        x, weight, out = call.args[0], call.args[1], call.outputs[0]
        grid = x if call.args[6] or out is None else out
        kernel, places = (list(range(len(trace.values[ref.id].shape))) for ref in (weight, grid))
        yield [(x, [0]), (weight, kernel), (grid, places[2:])]
    for text in LOOPS.get(op_name(call), ()):
        operands = [(ref, row.split()) for ref, row in zip(call.args, text.split(",")) if row.strip()]
        if all(len(row) == len(trace.values[ref.id].shape) for ref, row in operands):
            yield [(ref, [d for d, name in enumerate(row) if name != "."]) for ref, row in operands]


def plain_block(block: UnitBlock) -> tuple[tuple[int, ...], NDArray[np.int64]]:
    """The axes of a block along which its units change, at least one, and the units along them."""
    dims, units = list(block.dims), block.units
    for axis in reversed(range(units.ndim)):
        if units.ndim > 1 and bool((units == np.take(units, [0], axis=axis)).all()):
            units = np.take(units, 0, axis=axis)
            del dims[axis]
    return tuple(dims), units


class Tally:
    """Products, to be worked out for many plans.

    >>> import numpy as np
    >>> tally = Tally([Product("conv", 9, ((0, 1, 2), (3, -1)))])
    >>> tally(np.array([True, False, True, False, True]))
    array([18])
    """

    def __init__(self, products: Sequence[Product]) -> None:
        always: Axis = (-1,)
        every = {id(axis): axis for axis in (always, *(axis for product in products for axis in product.axes))}
        place = {key: i for i, key in enumerate(every)}  # equal ones are mostly one object; to compare takes longer
        width = max((len(product.axes) for product in products), default=0)
        rows = [[*(place[id(axis)] for axis in p.axes), *[0] * (width - len(p.axes))] for p in products]
        self._rows = np.array(rows, np.int64).reshape(len(products), width)
        axes = [np.array(axis, np.int64) for axis in every.values()]
        self._units = np.concatenate(axes)
        self._starts = np.cumsum([0, *map(len, axes[:-1])])
        self._constants = np.array([product.constant for product in products], np.int64)

    def __call__(self, stays: Stays) -> NDArray[np.int64]:
        """What each product comes to."""
        counts = np.add.reduceat(stays[self._units], self._starts, dtype=np.int64)
        return np.asarray(self._constants * counts[self._rows].prod(1))


class Costs:
    """What is left of a model, for any units that stay: built once, asked often."""

    def __init__(
        self, groups: Sequence[Group], tensors: Sequence[TensorInfo], products: Sequence[Product]
    ) -> None:
        self.whole: Stays = np.ones(sum(group.size for group in groups) + 1, np.bool_)
        self.products = Tally(products)
        self._numbers = Tally(tensor_products(groups, tensors))
        counted = [(info.parameter, info.itemsize) for info in tensors]
        self._weights = np.array(counted, np.int64).reshape(len(counted), 2)

    def params(self, stays: Stays) -> int:
        """Parameters; `stays` as `Groups.stays` makes it."""
        return int(self._numbers(stays) @ self._weights[:, 0])

    def bytes(self, stays: Stays) -> int:
        """Bytes of all tensors, as they are saved."""
        return int(self._numbers(stays) @ self._weights[:, 1])

    def macs(self, stays: Stays) -> int:
        """MACs of one forward pass on the example inputs."""
        return int(self.products(stays).sum())

    def of_unit(self, unit: int) -> UnitCost:
        """What goes when this unit alone goes."""
        stays = self.whole.copy()
        stays[unit] = False
        numbers = (self._numbers(self.whole) - self._numbers(stays)) @ self._weights
        return UnitCost(int(numbers[0]), self.macs(self.whole) - self.macs(stays), int(numbers[1]))


def tensor_products(groups: Sequence[Group], tensors: Sequence[TensorInfo]) -> list[Product]:
    """How many numbers each tensor has."""
    shapes = {info.name: info.shape for info in tensors}
    along: dict[str, dict[int, NDArray[np.int64]]] = {name: {} for name in shapes}
    places: dict[int, NDArray[np.int64]] = {}
    for first, group in zip(accumulate((group.size for group in groups), initial=0), groups):
        units = np.arange(first, first + group.size)[:, None]
        for slot in group.slots:
            if id(slot.index) not in places:
                places[id(slot.index)] = np.array(slot.index, np.int64).reshape(group.size, -1)
            size = shapes[slot.tensor][slot.dim]
            axis = along[slot.tensor].setdefault(slot.dim, np.full(size, -1, np.int64))
            axis[places[id(slot.index)]] = units
    known: dict[bytes, Axis] = {}
    out = []
    for name, shape in shapes.items():
        rest = math.prod(n for d, n in enumerate(shape) if d not in along[name])
        axes = (known.setdefault(axis.tobytes(), tuple(axis.tolist())) for axis in along[name].values())
        out.append(Product(name, rest, tuple(axes)))
    return out


def item_sizes(model: nn.Module) -> dict[str, int]:
    """For each parameter and buffer, the bytes of one of its numbers in a saved file; 0 for what is not saved."""
    modules = model.named_modules()
    unsaved = {f"{path}.{name}".lstrip(".") for path, m in modules for name in m._non_persistent_buffers_set}
    named = tensors_of(model).items()
    return {name: 0 if name in unsaved else tensor.element_size() for name, tensor in named}
