"""The record of the graph room: `Groups`, all that the later rooms know about a model's structure.

Immutable, printable, and the same after a round trip through JSON.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.graph.costs import Costs, Product, Stays, UnitCost
from secateur.graph.overview import overview
from secateur.graph.slots import Frozen, Group, Int, Size, Slot, TensorInfo
from secateur.graph.units import Split

Keep = Sequence[Sequence[int]]
"""For each group, the indices of the units that stay, ascending."""


@dataclass(frozen=True)
class Groups:
    """Every channel group of a model, what may not be cut and why, what it all costs, and what follows a cut.

    `products` are the MACs of one pass of the example inputs, and `ints` and `sizes` the integers that follow.

    >>> from torch import nn, zeros
    >>> from secateur.graph.groups import find_groups
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> groups = find_groups(net, zeros(1, 4))
    >>> groups.params, groups.macs, groups.unit_costs
    (58, 48, (UnitCost(params=7, macs=6, bytes=28),))
    >>> keep = [(0, 3, 5)]
    >>> groups.params_left(keep), groups.macs_left(keep)
    (23, 18)
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    ints: tuple[Int, ...]
    sizes: tuple[Size, ...]
    tensors: tuple[TensorInfo, ...]
    products: tuple[Product, ...]
    split: Split

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The number of the first unit of each group, when all units are counted through; and of all, at the end."""
        return tuple(accumulate((group.size for group in self.groups), initial=0))

    def stays(self, keep: Keep) -> Stays:
        """`[unit]` -> whether it stays, when all units are counted through; one entry more, at -1, for all others."""
        stays = np.zeros(self.offsets[-1] + 1, np.bool_)
        stays[-1] = True
        for offset, units in zip(self.offsets[:-1], keep, strict=True):
            stays[offset + np.asarray(units, np.int64)] = True
        return stays

    @property
    def params(self) -> int:
        """Parameters of the whole model."""
        return sum(math.prod(t.shape) for t in self.tensors if t.parameter)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole model, for the batch of the example inputs."""
        return self.costs.macs(self.costs.whole)

    @property
    def prunable_params(self) -> int:
        """Parameters in tensors that shrink when some group is cut; one of a single unit cannot be."""
        touched = {slot.tensor for group in self.groups if group.size > 1 for slot in group.slots}
        return sum(math.prod(t.shape) for t in self.tensors if t.parameter and t.name in touched)

    @property
    def prunable_macs(self) -> int:
        """MACs in products that get smaller when some group is cut."""
        single = {offset for offset, group in zip(self.offsets, self.groups) if group.size == 1} | {-1}
        values = zip(self.products, self.costs.products(self.costs.whole).tolist())
        return sum(macs for product, macs in values if any(not single.issuperset(axis) for axis in product.axes))

    @cached_property
    def costs(self) -> Costs:
        """The costs for any units that stay: for a search, which asks often."""
        return Costs(self.groups, self.tensors, self.products)

    @cached_property
    def unit_costs(self) -> tuple[UnitCost, ...]:
        """For each group, what goes when one of its units alone is cut from the whole model."""
        return tuple(self.costs.of_unit(offset) for offset in self.offsets[:-1])

    def stays_in(self, other: Groups, keep: Keep) -> Stays:
        """As `stays`, of the units of another record of the same model: found again by their places in the tensors."""
        masks = self._masks(keep)
        stays = np.ones(other.offsets[-1] + 1, np.bool_)
        for offset, group in zip(other.offsets, other.groups):
            for slot in group.slots:
                mask = masks.get(slot.tensor, {}).get(slot.dim)
                if mask is not None:
                    stays[offset : offset + group.size] &= mask[other._places[id(slot.index)]].all(1)
        return stays

    def kept(self, keep: Keep) -> dict[str, dict[int, list[int]]]:
        """For each tensor and axis that a plan touches, the indices that stay, ascending."""
        lists: dict[bytes, list[int]] = {}  # the same for the many axes that are cut alike
        out: dict[str, dict[int, list[int]]] = {}
        for tensor, masks in self._masks(keep).items():
            for dim, mask in masks.items():
                key = mask.tobytes()
                if key not in lists:
                    lists[key] = np.flatnonzero(mask).tolist()
                out.setdefault(tensor, {})[dim] = lists[key]
        return out

    def shapes(self, keep: Keep) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor after the cut."""
        masks = self._masks(keep)
        left = {tensor: {d: int(np.count_nonzero(mask)) for d, mask in dims.items()} for tensor, dims in masks.items()}
        return {t.name: tuple(left.get(t.name, {}).get(d, n) for d, n in enumerate(t.shape)) for t in self.tensors}

    def _masks(self, keep: Keep) -> dict[str, dict[int, NDArray[np.bool_]]]:
        """For each tensor and axis that a plan touches, which indices stay."""
        shapes = {t.name: t.shape for t in self.tensors}
        out: dict[str, dict[int, NDArray[np.bool_]]] = {}
        for group, stay in zip(self.groups, keep):
            gone = np.ones(group.size, np.bool_)
            gone[np.asarray(stay, np.int64)] = False
            for slot in group.slots:
                lost = self._places[id(slot.index)][gone]
                if lost.size:
                    masks = out.setdefault(slot.tensor, {})
                    if slot.dim not in masks:
                        masks[slot.dim] = np.ones(shapes[slot.tensor][slot.dim], np.bool_)
                    masks[slot.dim][lost] = False
        return out

    @cached_property
    def _places(self) -> dict[int, NDArray[np.int64]]:
        """id of a slot's index -> the same as an array."""
        indices = {id(slot.index): slot.index for group in self.groups for slot in group.slots}
        return {key: np.array(index, np.int64).reshape(len(index), -1) for key, index in indices.items()}

    @cached_property
    def _units(self) -> dict[int, NDArray[np.int64]]:
        """id of the units that an integer counts -> the same as an array."""
        units = {id(units): units for units in (*(i.units for i in self.ints), *(s.units for s in self.sizes))}
        return {key: np.array(value, np.int64) for key, value in units.items()}

    def params_left(self, keep: Keep) -> int:
        """Parameters after the cut."""
        return self.costs.params(self.stays(keep))

    def macs_left(self, keep: Keep) -> int:
        """MACs of the cut model for the batch of the example inputs, as `measure.count_macs` counts them.

        They are those of the ops that the whole model runs; a cut model that takes another path can have others: where
        `einsum` meets an axis that has become 1 long, or Python decides by values.
        """
        return self.costs.macs(self.stays(keep))

    def attributes(self, keep: Keep) -> dict[str, dict[str, int | tuple[int, ...]]]:
        """Module path -> attribute -> its value after the cut, for those that change."""
        stays = self.stays(keep)
        out: dict[str, dict[str, int | tuple[int, ...]]] = {}
        for item in self.ints:
            left = int(np.count_nonzero(stays[self._units[id(item.units)]]))
            if left == len(item.units):
                continue
            held = out.setdefault(item.module, {})
            if isinstance(item.original, tuple) and item.position is not None:
                whole = list(held.get(item.attribute, item.original))  # type: ignore[arg-type]
                whole[item.position] = left
                held[item.attribute] = tuple(whole)
            else:
                held[item.attribute] = left
        return out

    def replays(self, keep: Keep) -> dict[str, dict[tuple[str, int], dict[tuple[str, int], int | float]]]:
        """Module path -> (function, ordinal) -> which number -> its value after the cut, as `graph.replay` takes it."""
        stays = self.stays(keep)
        out: dict[str, dict[tuple[str, int], dict[tuple[str, int], int | float]]] = {}
        for item in self.sizes:
            counted = int(np.count_nonzero(stays[self._units[id(item.units)]]))
            left = counted if item.constant is None else item.constant
            out.setdefault(item.module, {}).setdefault((item.function, item.ordinal), {})[item.place] = left
        return out

    def to_json(self) -> dict[str, Any]:
        """Plain values; index lists are kept as runs `[first, step, count]`."""
        return {
            "groups": [{**vars(group), "slots": [_slot_to(slot) for slot in group.slots]} for group in self.groups],
            "frozen": [{**vars(item)} for item in self.frozen],
            "ints": [{**vars(item), "units": _to_runs(item.units)} for item in self.ints],
            "sizes": [{**vars(item), "units": _to_runs(item.units)} for item in self.sizes],
            "tensors": [{**vars(info)} for info in self.tensors],
            "products": [{**vars(p), "axes": [_to_runs(axis) for axis in p.axes]} for p in self.products],
            "split": self.split,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Groups:
        """The record that `to_json` wrote."""
        groups = tuple(
            Group(g["name"], g["size"], tuple(_slot_from(s) for s in g["slots"]), g["inexact"])
            for g in value["groups"]
        )
        ints = tuple(
            Int(i["module"], i["attribute"], i["position"], _frozen_value(i["original"]), _from_runs(i["units"]))
            for i in value["ints"]
        )
        sizes = tuple(
            Size(s["module"], s["function"], s["ordinal"], tuple(s["place"]), _from_runs(s["units"]), s["constant"])
            for s in value["sizes"]
        )
        tensors = tuple(
            TensorInfo(t["name"], tuple(t["shape"]), t["parameter"], t["itemsize"]) for t in value["tensors"]
        )
        products = tuple(
            Product(p["module"], p["constant"], tuple(_from_runs(axis) for axis in p["axes"]))
            for p in value["products"]
        )
        return cls(groups, tuple(Frozen(**f) for f in value["frozen"]), ints, sizes, tensors, products, value["split"])

    def __str__(self) -> str:
        return overview(self)


def _slot_to(slot: Slot) -> dict[str, Any]:
    index = {"width": len(slot.index[0]), "runs": _to_runs([i for places in slot.index for i in places])}
    return {"tensor": slot.tensor, "dim": slot.dim, "role": slot.role, "index": index}


def _slot_from(value: Mapping[str, Any]) -> Slot:
    width = value["index"]["width"]
    flat = _from_runs(value["index"]["runs"])
    index = tuple(flat[i : i + width] for i in range(0, len(flat), width))
    return Slot(value["tensor"], value["dim"], value["role"], index)


def _frozen_value(value: int | list[int]) -> int | tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else value


def _to_runs(values: Sequence[int]) -> list[list[int]]:
    """Arithmetic runs [first, step, count].

    >>> _to_runs([0, 1, 2, 3, 7, 7, 7])
    [[0, 1, 4], [7, 0, 3]]
    """
    steps = np.diff(np.asarray(values, np.int64))
    turns = (np.flatnonzero(np.diff(steps)) + 1).tolist()
    runs, start, count = [], 0, len(values)
    while start < count:
        turn = bisect_left(turns, start + 1)
        end = turns[turn] if turn < len(turns) else count - 1
        runs.append([int(values[start]), int(steps[start]) if end > start else 0, end - start + 1])
        start = end + 1
    return runs


def _from_runs(runs: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(first + step * i for first, step, count in runs for i in range(count))
