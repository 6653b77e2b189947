"""What makes the scores of different groups comparable: one function of a group's scores, applied by `score`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.errors import PlanError
from secateur.graph.slots import Group

Scale = Callable[[Tensor, Group], Tensor]
"""The scores of a group's units, one-dimensional, and the group -> as many other scores: one of these, or yours."""


def none(values: Tensor, group: Group) -> Tensor:
    """The scores as the criterion gave them."""
    return values


def by_mean(values: Tensor, group: Group) -> Tensor:
    """As shares of the group's mean: the mean becomes 1.

    Raises:
        PlanError: a score is below 0.

    >>> by_mean(torch.tensor([1.0, 2.0, 3.0]), Group("conv", 3, ()))
    tensor([0.5000, 1.0000, 1.5000])
    """
    return _shares(values, values.mean(), group)


def by_max(values: Tensor, group: Group) -> Tensor:
    """As shares of the group's largest score: it becomes 1.

    Raises:
        PlanError: a score is below 0.

    >>> by_max(torch.tensor([1.0, 2.0, 4.0]), Group("conv", 3, ()))
    tensor([0.2500, 0.5000, 1.0000])
    """
    return _shares(values, values.max(), group)


def gaussian(values: Tensor, group: Group) -> Tensor:
    """Mean 0 and standard deviation 1 (of the group as the whole population); equal scores become 0.

    >>> gaussian(torch.tensor([1.0, 3.0]), Group("conv", 2, ()))
    tensor([-1.,  1.])
    """
    if values.max() == values.min():
        return torch.zeros_like(values)
    return (values - values.mean()) / values.std(correction=0)


def lamp(values: Tensor, group: Group) -> Tensor:
    """The squared score over the sum of the squares of all scores of the group that are not smaller.

    It is the share of what is left that goes with the unit, once all smaller ones have gone: Lee et al. 2021,
    Layer-adaptive Sparsity for the Magnitude-based Pruning, equation 2, with units for weights; equal scores stay
    equal.

    Raises:
        PlanError: a score is below 0.

    >>> lamp(torch.tensor([3.0, 1.0, 2.0]), Group("conv", 3, ()))
    tensor([1.0000, 0.0714, 0.3077])
    """
    ordered, order = values.sort(stable=True)
    # As shares of the largest: squares of very small or large scores leave the range of numbers.
    squares = by_max(ordered, group).square()
    left = squares.flip(0).cumsum(0).flip(0)[torch.searchsorted(ordered, ordered)]
    return torch.zeros_like(values).index_put((order,), squares / left.clamp(min=torch.finfo(left.dtype).tiny))


def _shares(values: Tensor, whole: Tensor, group: Group) -> Tensor:
    if values.min() < 0:
        raise PlanError(
            f"the scores of group {group.name!r} go down to {float(values.min()):.3g}, and shares are of scores of 0 "
            "and above; scale=gaussian takes any scores."
        )
    return values / whole if whole > 0 else values
