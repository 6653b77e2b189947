"""Classes of units -> groups: units on the same axes, of tensors and of values on the way, are interchangeable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from secateur.graph.axes import Field
from secateur.graph.products import KERNEL
from secateur.graph.slots import Frozen, Group, Slot
from secateur.graph.units import Ids, Solution

ROLES = ("write", "read", "scale")

Owner = tuple[int, str, int]
"""(the first of its units, tensor, axis)."""


def form_groups(
    state: Field, solution: Solution, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Ids, tuple[Group, ...], tuple[Frozen, ...]]:
    """The number of each class of units, counted through the groups, and -1 for a frozen one; the groups; the rest."""
    order = {name: i for i, name in enumerate(shapes)}
    owners = sorted(state.owners, key=lambda owner: (order[owner[1]], owner[2]))
    slot, place, root = _spots(owners, solution, shapes)
    classes, unit = _classes(root, len(solution.root))
    marks = _marks(len(owners), seed=1)
    kind = _paths(state, solution)[classes]
    np.add.at(kind, unit, marks[slot])  # random marks: equal sums are equal collections
    kinds, group = _by_appearance(kind)
    rank = np.argsort(group, kind="stable")
    numbers = np.full(len(solution.root) + 1, -1, np.int64)
    numbers[classes[rank]] = np.arange(len(classes))
    # Places ascend within a slot, and a stable order keeps them so.
    at = np.lexsort((numbers[root], group[unit] * len(owners) + slot))
    sizes = np.bincount(group, minlength=len(kinds))
    groups: list[Group] = []
    taken: set[str] = set()
    known: dict[tuple[bytes, int], tuple[tuple[int, ...], ...]] = {}
    spots = np.stack([group[unit], slot, place])[:, at]
    for number, (mine, ids) in enumerate(zip(_runs(spots, 0), np.split(classes[rank], np.cumsum(sizes)[:-1]))):
        slots = []
        for part in _runs(mine, 1):
            _, tensor, dim = owners[part[1, 0]]
            key = (part[2].tobytes(), int(sizes[number]))
            if key not in known:
                known[key] = tuple(zip(*part[2].reshape(sizes[number], -1).T.tolist()))
            slots.append(Slot(tensor, dim, state.roles.get((tensor, dim), "scale"), known[key]))
        groups.append(Group(_name(slots, taken), len(ids), tuple(slots), solution.why_inexact(int(ids[0]))))
        taken.add(groups[-1].name)
    return numbers, tuple(groups), _frozen_axes(owners, solution, shapes)


def _spots(owners: Sequence[Owner], solution: Solution, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Ids, Ids, Ids]:
    """Each index along each axis that is not frozen: the number of its owner, its place there, its class."""
    starts = np.array([start for start, _, _ in owners], np.int64)
    sizes = np.array([shapes[tensor][dim] for _, tensor, dim in owners], np.int64)
    slot = np.repeat(np.arange(len(owners)), sizes)
    place = np.arange(len(slot)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    root = solution.root[starts[slot] + place]
    free = ~solution.frozen(root)
    return slot[free], place[free], root[free]


def _by_appearance(values: Ids) -> tuple[Ids, Ids]:
    """The different values, in order of first appearance, and which of them each value is."""
    different, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return _ranked(different, first, inverse)


def _classes(root: Ids, count: int) -> tuple[Ids, Ids]:
    """The same for numbers below `count`, which takes no sorting of them all."""
    first = np.full(count, -1, np.int64)
    first[root[::-1]] = np.arange(len(root))[::-1]
    different = np.flatnonzero(first >= 0)
    place = np.empty(count, np.int64)
    place[different] = np.arange(len(different))
    return _ranked(different, first[different], place[root])


def _ranked(different: Ids, first: Ids, inverse: Ids) -> tuple[Ids, Ids]:
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return different[order], rank[inverse]


def _runs(table: Ids, row: int) -> list[Ids]:
    """The table cut into pieces of columns wherever `table[row]` changes."""
    return np.split(table, np.flatnonzero(np.diff(table[row])) + 1, axis=1) if table.shape[1] else []


def _marks(count: int, seed: int) -> Ids:
    return np.random.default_rng(seed).integers(np.iinfo(np.int64).max, size=count)


def _paths(state: Field, solution: Solution) -> Ids:
    """For each class a fingerprint of the values on which its units are."""
    marks = _marks(len(state.values), seed=0)
    path = np.zeros(len(solution.root) + 1, np.int64)
    blocks = ((marks[ref] + sum(block.dims), block.ids) for ref, found in state.blocks.items() for block in found)
    sums: dict[int, tuple[int, Ids]] = {}
    for mark, ids in blocks:  # mostly the same arrays on many values
        sums[id(ids)] = (sums.get(id(ids), (0, ids))[0] ^ int(mark), ids)
    for mark, ids in sums.values():
        path[solution.root[ids]] ^= mark  # once, however often a class appears
    return path


def _name(slots: Sequence[Slot], taken: set[str]) -> str:
    """That of the module that makes the units, or reads them, or scales them."""
    lead = next(s for role in (*ROLES, slots[0].role) for s in slots if s.role == role)
    base = lead.tensor.rpartition(".")[0] or lead.tensor
    return next(n for k in range(1, len(taken) + 2) if (n := base if k == 1 else f"{base}#{k}") not in taken)


def _frozen_axes(
    owners: Sequence[Owner], solution: Solution, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Frozen, ...]:
    """Each axis with frozen units and why, but for kernel positions, which nobody would cut."""
    out = []
    for start, tensor, dim in owners:
        size = shapes[tensor][dim]
        roots = solution.root[start : start + size]
        stuck = roots[solution.frozen(roots)]
        if stuck.size and (reason := solution.why_frozen(int(stuck[0]))) != KERNEL:
            out.append(Frozen(tensor, dim, int(stuck.size), size, reason))
    return tuple(out)
