"""Model + groups -> `Scores`: how much each unit matters; higher means keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.graph.records import Groups

Criterion = Callable[[nn.Module, Groups], Sequence[Tensor]]
"""Anything that gives one score for each unit of each group: a function of yours, `Magnitude()`, `Random()`."""


@dataclass(frozen=True)
class Scores:
    """`values[g][u]` is the score of unit u of group g: float64, one-dimensional, on the CPU."""

    groups: Groups
    values: tuple[Tensor, ...]


def score(model: nn.Module, groups: Groups, criterion: Criterion) -> Scores:
    """Score every unit of every group.

    Args:
        model: the model that `groups` was found on; left as found.
        groups: from `find_groups`.
        criterion: called as `criterion(model, groups)`, without gradients.

    Raises:
        PlanError: the criterion's answer has another shape, or is not finite.

    >>> import secateur as sc
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> groups = sc.find_groups(net, torch.zeros(1, 2))
    >>> sc.score(net, groups, lambda model, groups: [model[0].weight.abs().sum(1)]).values[0].shape
    torch.Size([3])
    """
    with torch.no_grad():
        answer = [torch.as_tensor(v).detach().to("cpu", torch.float64) for v in criterion(model, groups)]
    shapes, wanted = [tuple(v.shape) for v in answer], [(group.size,) for group in groups.groups]
    if shapes != wanted:
        raise PlanError(
            f"the criterion gave scores of shapes {shapes[:4]}, but one value per unit is needed: {wanted[:4]} "
            f"for the {len(wanted)} groups, in their order."
        )
    for group, values in zip(groups.groups, answer):
        if not bool(values.isfinite().all()):
            raise PlanError(f"the criterion gave scores that are not finite for group {group.name!r}.")
    return Scores(groups, tuple(answer))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, as `Slot.tensor` names them."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
