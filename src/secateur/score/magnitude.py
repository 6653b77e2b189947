"""Ln magnitude: a unit matters as much as its weights are large (Li et al. 2017, Pruning Filters for Efficient
ConvNets, for n = 1; any n, and the maximum for n = inf)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.graph.records import Groups
from secateur.graph.twin import tensors_of
from secateur.score.combining import Combine
from secateur.score.weights import along, by_unit, check_roles, chosen


@dataclass(frozen=True)
class Magnitude:
    """The Ln norm of a unit over the weights with one of `roles`: (sum |w|^p)^(1/p), or max |w| for p = inf.

    Args:
        p: the norm's order, above 0.
        roles: whose weights count: "write" are those that make the unit (a filter), "read" those that take it in
            (the next layer's input channel), "scale" batch norm and biases. A group without any of these roles
            is scored by all its weights.
        combine: makes one number of the norms that a unit has in each tensor, such as `combining.mean`; left out, the
            norm is over the weights of all tensors together.

    Raises:
        PlanError: an order that is not above 0. UnknownName: a role that does not exist.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[3.0, -4.0], [1.0, 0.0]]))
    >>> from secateur.graph.groups import find_groups
    >>> groups = find_groups(net, torch.zeros(1, 2))
    >>> Magnitude(1)(net, groups)[0].tolist(), Magnitude(2)(net, groups)[0].tolist()
    ([7.0, 1.0], [5.0, 1.0])
    """

    p: float = 1.0
    roles: tuple[str, ...] = ("write",)
    combine: Combine | None = None

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise PlanError(f"the order of a norm must be above 0, and {self.p} is not; 1, 2 and inf are usual.")
        check_roles(self.roles)

    def __call__(self, model: nn.Module, groups: Groups) -> Sequence[Tensor]:
        """One score per unit."""
        tensors = tensors_of(model)

        @cache
        def norms(tensor: str, dim: int) -> Tensor:
            return along(torch.abs, partial(_norm, self.p), dim, tensors[tensor].detach())

        out = []
        for slots in chosen(groups, self.roles):
            rows = torch.stack([_norm(self.p, by_unit(norms(s.tensor, s.dim), s)) for s in slots])
            out.append(_norm(self.p, rows.T) if self.combine is None else self.combine(rows))
        return out


def _norm(p: float, sizes: Tensor) -> Tensor:
    """The norm of each row of absolute values; torch adds up pairwise, so that it is off by rounding alone."""
    sizes = sizes.float() if sizes.element_size() < 4 else sizes
    if p == 1:
        return sizes.sum(1)
    top = sizes.amax(1)
    if math.isinf(p):
        return top
    # As shares of the largest: a high power of a small weight would be nothing.
    shares = sizes / top.clamp(min=torch.finfo(top.dtype).tiny).unsqueeze(1)
    return top * shares.pow_(p).sum(1).pow(1 / p)
