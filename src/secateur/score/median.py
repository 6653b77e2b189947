"""Distance to the geometric median: what the other units of a group can stand in for (He et al. 2019, Filter Pruning
via Geometric Median for Deep Convolutional Neural Networks Acceleration)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.graph.records import Groups
from secateur.graph.slots import Slot
from secateur.graph.twin import tensors_of
from secateur.score.weights import by_unit, check_roles, chosen, wide

TABLE = 1 << 22
"""So many distances are held at a time."""
ENTRIES = 1 << 22
"""So many numbers of the weights are held as float64 at a time."""


@dataclass(frozen=True)
class Median:
    """The sum of a unit's distances to all units of its group (equation 6): least for the one nearest to the median.

    Args:
        roles: whose weights make the vector of a unit, as for `Magnitude`.

    Raises:
        UnknownName: a role that does not exist.

    >>> net = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[0.0], [1.0], [5.0]]))
    >>> from secateur.graph.groups import find_groups
    >>> Median()(net, find_groups(net, torch.zeros(1, 1)))[0].tolist()
    [6.0, 5.0, 9.0]
    """

    roles: tuple[str, ...] = ("write",)

    def __post_init__(self) -> None:
        check_roles(self.roles)

    def __call__(self, model: nn.Module, groups: Groups) -> Sequence[Tensor]:
        """One score per unit."""
        tensors = tensors_of(model)
        return [_distances(tensors, slots) for slots in chosen(groups, self.roles)]


def _distances(tensors: dict[str, Tensor], slots: Sequence[Slot]) -> Tensor:
    """The sum of each row of the table of distances, of which each pair is worked out once."""
    units = len(slots[0].index)
    step = max(1, TABLE // units)
    out = torch.zeros(units, dtype=torch.float64)
    for start in range(0, units, step):
        products = squares = torch.zeros(())
        for piece in _pieces(tensors, slots):
            rest = piece[start:]
            products = products.to(rest) + rest[:step] @ rest.T
            squares = squares.to(rest) + rest.square().sum(1)
        table = (squares[:step, None] + squares - 2 * products).clamp(min=0).sqrt().cpu().double()
        out[start : start + step] += table.sum(1)
        out[start + step :] += table[:, step:].sum(0)
    return out


def _pieces(tensors: dict[str, Tensor], slots: Sequence[Slot]) -> Iterator[Tensor]:
    """The units' vectors, some columns at a time: (units, columns).

    They are centred: distances stay what they are, and differences of large products lose no digits.
    """
    for slot in slots:
        tensor = tensors[slot.tensor].detach()
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        rows = tensor.movedim(slot.dim, 0).reshape(tensor.shape[slot.dim], -1)
        for columns in rows.split(max(1, ENTRIES // len(rows)), dim=1):
            piece = by_unit(columns, slot).flatten(1).to(wide(columns))
            yield piece - piece.mean(0)
