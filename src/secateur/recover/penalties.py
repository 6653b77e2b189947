"""Penalties that make units small before they are cut: a penalty is a function of the model that is added to the loss.

Each is made for `Groups`, so that it presses on the very units that a plan can take: L1, L2, group lasso, slimming; any
function `penalty(model) -> Tensor` will do. How strong it is, is `strength` of `fine_tune`, a number or a function of
the step such as `Growing`. Those that can be are proximal too: `shrink_` sets weights, or whole units, exactly to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.allocate.plan import Plan
from secateur.errors import PlanError, TrainingError
from secateur.graph.records import Groups
from secateur.recover.unit_weights import UnitWeights
from secateur.score.weights import check_roles, chosen

Penalty = Callable[[nn.Module], Tensor]
"""The model, as it is being trained -> one number, differentiable."""

Strength = float | Callable[[int], float]
"""A factor, or a function of the optimizer steps taken before."""


@runtime_checkable
class Shrinks(Protocol):
    """A penalty with a proximal step: weights become argmin_v |v - w|^2 / 2 + amount * penalty(v)."""

    def shrink_(self, model: nn.Module, amount: float) -> None: ...


@dataclass(frozen=True)
class UnitPenalty:
    """A penalty on the weights of units: what `L1`, `L2` and `GroupLasso` have in common, their arguments too.

    Args:
        groups: those of the model.
        roles: whose weights count: "write" are those that make the unit (a filter), "read" those that take it in,
            "scale" batch norm and biases. A group without any of these roles is penalised on all its weights.
        plan: penalise only the units that it cuts.

    Raises:
        UnknownName: a role that does not exist. PlanError: a plan of other groups, or nothing to penalise.
    """

    groups: Groups
    roles: tuple[str, ...] = ("write",)
    plan: Plan | None = None

    def __post_init__(self) -> None:
        check_roles(self.roles)
        _ = self.held

    @cached_property
    def held(self) -> UnitWeights:
        """The weights."""
        return UnitWeights.of(self.groups, chosen(self.groups, self.roles), self.plan)


class L1(UnitPenalty):
    """The sum of |w| (Tibshirani 1996).

    >>> from secateur.graph.groups import find_groups
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[3.0, -4.0], [0.0, 1.0]]))
    >>> groups = find_groups(net, torch.zeros(1, 2))
    >>> L1(groups)(net).item(), L2(groups)(net).item(), round(GroupLasso(groups)(net).item(), 4)
    (8.0, 13.0, 8.4853)
    """

    def __call__(self, model: nn.Module) -> Tensor:
        return self.held.sums(model, 1).sum()

    @torch.no_grad()
    def shrink_(self, model: nn.Module, amount: float) -> None:
        """Each weight comes nearer to zero by `amount`, and stops there (soft thresholding)."""
        _soften(self.held, model, amount)


class L2(UnitPenalty):
    """Half the sum of w^2: as weight decay, on these weights alone.

    With a `plan` and a strength that is `Growing`, it is GReg-1 (Wang et al. 2021, Neural Pruning via Growing
    Regularization, section 3.2): units that are to go lose their weight while the others learn to do without.

    >>> from secateur.graph.groups import find_groups
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
    >>> groups = find_groups(net, torch.zeros(1, 2))
    >>> round((L2(groups)(net) / net[0].weight.square().sum()).item(), 4)
    0.5
    """

    def __call__(self, model: nn.Module) -> Tensor:
        return self.held.sums(model, 2).sum() / 2

    @torch.no_grad()
    def shrink_(self, model: nn.Module, amount: float) -> None:
        """Each weight is divided by 1 + `amount`."""
        sizes = self.held.sizes
        _scale(self.held, model, torch.where(sizes > 0, 1 / (1 + amount), 1.0))


class GroupLasso(UnitPenalty):
    """The sum over units of sqrt(weights) * |all its weights|_2 (Wen et al. 2016, Learning Structured Sparsity in Deep
    Neural Networks, eq. 2; the root makes units of different sizes comparable, as Yuan and Lin 2006 have it).

    >>> from secateur.graph.groups import find_groups
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[3.0, -4.0], [0.0, 1.0]]))
    >>> lasso = GroupLasso(find_groups(net, torch.zeros(1, 2)))
    >>> lasso.shrink_(net, 1.0)  # by the square root of 2
    >>> round(net[0].weight[0].norm().item(), 4), net[0].weight[1].tolist()
    (3.5858, [0.0, 0.0])
    """

    def __call__(self, model: nn.Module) -> Tensor:
        squares = self.held.sums(model, 2)
        some = squares > 0
        norms = torch.where(some, squares, 1.0).sqrt() * some  # at zero the slope is 0, not infinite
        return (norms * self.held.sizes.sqrt().to(norms)).sum()

    @torch.no_grad()
    def shrink_(self, model: nn.Module, amount: float) -> None:
        """Each unit's norm goes down by `amount` sqrt(weights); one that has no more becomes exactly zero."""
        norms = self.held.sums(model, 2).sqrt()
        bound = amount * self.held.sizes.sqrt().to(norms)
        _scale(self.held, model, torch.where(norms > bound, 1 - bound / norms, (bound == 0).to(norms)))


@dataclass(frozen=True)
class Slimming:
    """The sum of |gamma| over the units' channels in batch norms (Liu et al. 2017, Learning Efficient Convolutional
    Networks through Network Slimming, eq. 1); cut afterwards by `BatchNormScale`.

    Args:
        groups: those of the model.
        plan: penalise only the units that it cuts.

    Raises:
        PlanError: no unit goes through a batch norm with running statistics.

    >>> from secateur.graph.groups import find_groups
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    >>> Slimming(find_groups(net, torch.zeros(1, 3, 8, 8)))(net).item()
    4.0
    """

    groups: Groups
    plan: Plan | None = None

    def __post_init__(self) -> None:
        _ = self.held

    @cached_property
    def held(self) -> UnitWeights:
        """The scales."""
        end = ".running_var"
        names = {t.name.removesuffix(end) + ".weight" for t in self.groups.tensors if t.name.endswith(end)}
        slots = [[slot for slot in group.slots if slot.tensor in names] for group in self.groups.groups]
        if not any(slots):
            raise PlanError("no unit goes through a batch norm with running statistics; give another penalty.")
        return UnitWeights.of(self.groups, slots, self.plan)

    def __call__(self, model: nn.Module) -> Tensor:
        return self.held.sums(model, 1).sum()

    @torch.no_grad()
    def shrink_(self, model: nn.Module, amount: float) -> None:
        """Each scale comes nearer to zero by `amount`, and stops there."""
        _soften(self.held, model, amount)


@dataclass(frozen=True)
class Growing:
    """A strength that grows by `by` before the first step and after every `every` steps, up to `to` (Wang et al. 2021,
    algorithm 1: delta lambda, K_u and tau).

    Raises:
        TrainingError: a number that is not above 0.

    >>> [Growing(0.5, 2, 1.2)(step) for step in range(5)]
    [0.5, 0.5, 1.0, 1.0, 1.2]
    """

    by: float
    every: int
    to: float

    def __post_init__(self) -> None:
        if not (self.by > 0 and self.every >= 1 and self.to > 0):
            raise TrainingError(f"{self} cannot grow; give numbers above 0.")

    def __call__(self, step: int) -> float:
        """The strength when `step` steps have been taken."""
        return min(self.by * (step // self.every + 1), self.to)


def _soften(held: UnitWeights, model: nn.Module, amount: float) -> None:
    weights = held.weights(model)
    bounds = held.spread(torch.full((held.count,), amount, dtype=weights[0].dtype, device=weights[0].device), 0.0)
    for weight, bound in zip(weights, bounds):
        weight.sub_(weight.clamp(-bound, bound))


def _scale(held: UnitWeights, model: nn.Module, factors: Tensor) -> None:
    weights = held.weights(model)
    torch._foreach_mul_(weights, held.spread(factors.to(weights[0]), 1.0))
