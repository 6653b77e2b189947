"""Reading weights by unit: which of a group's slots count, and sums for each index along an axis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from secateur.errors import UnknownName
from secateur.graph.grouping import ROLES
from secateur.graph.records import Groups
from secateur.graph.slots import Slot

PIECE = 1 << 18
"""Numbers worked on at a time: what comes of them stays in the cache, and no second copy of a weight is made."""


def check_roles(roles: Collection[str]) -> None:
    """UnknownName for a role that no slot can have."""
    for role in roles:
        if role not in ROLES:
            raise UnknownName("role", role, ROLES)


def chosen(groups: Groups, roles: Collection[str]) -> list[Sequence[Slot]]:
    """For each group the slots in parameters that have one of `roles`; all, where none has.

    Running statistics are no weights: buffers count only in a group that has no parameters.
    """
    parameters = {info.name for info in groups.tensors if info.parameter}
    out: list[Sequence[Slot]] = []
    for group in groups.groups:
        slots = [slot for slot in group.slots if slot.tensor in parameters] or group.slots
        out.append([slot for slot in slots if slot.role in roles] or slots)
    return out


def along(make: Callable[..., Tensor], reduce: Callable[[Tensor], Tensor], dim: int, *tensors: Tensor) -> Tensor:
    """One number for each index along `dim` of tensors of one shape, as float64 on the CPU.

    Args:
        make: what is added up, of as many tensors: a torch function that takes `out=`, such as `torch.abs`.
        reduce: (indices, entries) -> (indices,); called on pieces.
    """
    rows = [tensor.movedim(dim, 0) for tensor in tensors]
    step = max(1, PIECE * len(rows[0]) // max(1, rows[0].numel()))
    out: list[Tensor] = []
    made: Tensor | None = None
    for parts in zip(*(row.split(step) for row in rows)):
        piece = [part.reshape(len(part), -1) for part in parts]
        made = make(*piece) if made is None else make(*piece, out=made[: len(piece[0])])
        out.append(reduce(made))
    return torch.cat(out).to("cpu", torch.float64)


def by_unit(values: Tensor, slot: Slot) -> Tensor:
    """The rows of `values`, one for each index along the slot's axis, by unit: (units, places, ...)."""
    units, width = len(slot.index), len(slot.index[0])
    places = [np.fromiter(map(itemgetter(k), slot.index), np.int64, units) for k in range(width)]
    return values[torch.from_numpy(np.stack(places, 1)).to(values.device)]


def wide(tensor: Tensor) -> torch.dtype:
    """In what sums are taken: float64 wherever the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
