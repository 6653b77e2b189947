"""Duplicate units: made alike, so that they are equal on every input; one can be read for both.

Each op treats the units of a group alike: put in another order, they come out in that order. So two of them that are
equal in every tensor that has a say in what they are, are equal all along the way, up to where they end. There
w1 x + w2 x = (w1 + w2) x, if what multiplies them is a weight that does nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from secateur.graph.capture import Ref
from secateur.graph.slots import Group, Slot
from secateur.surgery.endings import Observation, Truths
from secateur.surgery.wiring import is_random


@dataclass(frozen=True)
class Merge:
    """Units of an observed run: those `gone` are equal to `stays`, which takes over their weights in `reads`.

    Units are numbered within their group, which begins at `first`.
    """

    first: int
    stays: int
    gone: tuple[int, ...]
    reads: tuple[Slot, ...]


def find_duplicates(seen: Observation, tensors: Mapping[str, Tensor], idle: Truths) -> tuple[Merge, ...]:
    """The merges that are possible among units that are not idle (`idle[unit]`, over all groups)."""
    out: list[Merge] = []
    for group, first in zip(seen.analysis.groups.groups, seen.analysis.groups.offsets):
        busy = [unit for unit in range(group.size) if not idle[first + unit]]
        reads = () if group.inexact or len(busy) < 2 else _reads(seen, group, first)
        makes = [slot for slot in group.slots if slot not in reads]
        for same in _alike(makes, tensors, busy) if reads and makes else ():
            out.append(Merge(first, same[0], tuple(same[1:]), reads))
    return tuple(out)


def merge(found: Merge, tensors: dict[str, Tensor]) -> None:
    """Add the weights with which the units that go are read to those of the one that stays; `tensors` are ours."""
    for slot in found.reads:
        weight = tensors[slot.tensor].movedim(slot.dim, 0)
        for unit in found.gone:
            weight[list(slot.index[found.stays])] += weight[list(slot.index[unit])]


def _alike(makes: Sequence[Slot], tensors: Mapping[str, Tensor], units: Sequence[int]) -> list[list[int]]:
    """The classes of two and more units that are the same, bit for bit, in all slots."""
    keys: list[list[bytes]] = [[] for _ in units]
    for slot in makes:
        rows = tensors[slot.tensor].detach().movedim(slot.dim, 0).cpu().numpy()
        for key, unit in zip(keys, units):
            key.append(np.ascontiguousarray(rows[list(slot.index[unit])]).tobytes())
    classes: dict[tuple[bytes, ...], list[int]] = {}
    for key, unit in zip(keys, units):
        classes.setdefault(tuple(key), []).append(unit)
    return [same for same in classes.values() if len(same) > 1]


def _reads(seen: Observation, group: Group, first: int) -> tuple[Slot, ...]:
    """The slots that only multiply the group's units where they end; none if not all endings are of that kind."""

    def mine(units: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Truths:
        return np.asarray((units >= first) & (units < first + group.size))

    pairs: set[tuple[int, int]] = set()
    names: set[str] = set()
    for ending in seen.endings:
        if (mine(ending.units) & ~ending.empty).any():
            if ending.partner is None or not seen.wiring.name(ending.partner):
                return ()
            pairs.add((ending.call, ending.partner.id))
            names.add(seen.wiring.name(ending.partner))
    slots = [slot for slot in group.slots if slot.tensor in names]
    if len(slots) != len(names) or len({slot.tensor for slot in group.slots}) != len(group.slots):
        return ()  # a tensor with these units on two axes both makes and reads them
    for value, readers in seen.wiring.readers.items():
        name = seen.analysis.trace.values[value].name
        for call, ref in readers if name in names else ():
            carries = any(mine(block.units).any() for block in seen.analysis.units_of(Ref(ref)))
            if carries and (call, ref) not in pairs:
                return ()
    for op in seen.analysis.trace.calls:
        made = [block for ref in op.outputs if ref is not None for block in seen.analysis.units_of(ref)]
        if is_random(op) and any(mine(block.units).any() for block in made):
            return ()
    return tuple(slots)
