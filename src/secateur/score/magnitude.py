"""Ln magnitude: a unit matters as much as its weights are large (Li et al. 2017, Pruning Filters for Efficient
ConvNets, for n = 1; any n, and the maximum for n = inf)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.graph.records import Groups, Slot
from secateur.score.scoring import tensors_of


@dataclass(frozen=True)
class Magnitude:
    """The Ln norm of a unit over the weights with one of `roles`: (sum |w|^p)^(1/p), or max |w| for p = inf.

    Args:
        p: the norm's order, above 0.
        roles: whose weights count: "write" are those that make the unit (a filter), "read" those that take it in
            (the next layer's input channel), "scale" batch norm and biases. A group without any of these roles
            is scored by all its weights.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[3.0, -4.0], [1.0, 0.0]]))
    >>> from secateur.graph.groups import find_groups
    >>> groups = find_groups(net, torch.zeros(1, 2))
    >>> Magnitude(1)(net, groups)[0].tolist(), Magnitude(2)(net, groups)[0].tolist()
    ([7.0, 1.0], [5.0, 1.0])
    """

    p: float = 1.0
    roles: tuple[str, ...] = ("write",)

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise PlanError(f"the order of a norm must be above 0, and {self.p} is not; 1, 2 and inf are usual.")

    def __call__(self, model: nn.Module, groups: Groups) -> Sequence[Tensor]:
        """One score per unit."""
        tensors = tensors_of(model)
        out = []
        for group in groups.groups:
            slots = [s for s in group.slots if s.role in self.roles and tensors[s.tensor].is_floating_point()]
            rows = [by_unit(tensors[slot.tensor].detach(), slot) for slot in slots or group.slots]
            out.append(self._norm(rows))
        return out

    def _norm(self, rows: Sequence[Tensor]) -> Tensor:
        if math.isinf(self.p):
            return torch.stack([row.abs().amax(1) for row in rows]).amax(0).double()
        powers = [row.abs().pow(self.p).sum(1, dtype=torch.float64) for row in rows]
        return torch.stack(powers).sum(0).pow(1 / self.p)


def by_unit(tensor: Tensor, slot: Slot) -> Tensor:
    """All of a tensor's entries that belong to a unit, as a row: (units, entries)."""
    index = torch.tensor(slot.index, device=tensor.device)
    rows = tensor.movedim(slot.dim, 0).reshape(tensor.shape[slot.dim], -1)
    return rows[index.flatten()].reshape(len(slot.index), -1)
