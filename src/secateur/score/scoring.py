"""Model + groups -> `Scores`: how much each unit matters; higher means keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.graph.records import Groups
from secateur.graph.twin import tensors_of
from secateur.score.scaling import Scale, none

Criterion = Callable[[nn.Module, Groups], Sequence[Tensor]]
"""Anything that gives one score for each unit of each group: a function of yours, `Magnitude()`, `Random()`."""


@dataclass(frozen=True)
class Scores:
    """`values[g][u]` is the score of unit u of group g: float64, one-dimensional, on the CPU."""

    groups: Groups
    values: tuple[Tensor, ...]


def score(model: nn.Module, groups: Groups, criterion: Criterion, scale: Scale = none) -> Scores:
    """Score every unit of every group.

    Args:
        model: the model that `groups` was found on; left as found.
        groups: from `find_groups`.
        criterion: called as `criterion(model, groups)`, without gradients.
        scale: makes groups comparable, for what looks at all of them together: `scaling.by_mean`, `by_max`,
            `gaussian`, `lamp`, or a function of yours, called as `scale(values, group)`.

    Raises:
        PlanError: the groups are another model's; or the answer of `criterion` or `scale` has another shape, or is
            not finite.

    >>> import secateur as sc
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> groups = sc.find_groups(net, torch.zeros(1, 2))
    >>> sc.score(net, groups, lambda model, groups: [model[0].weight.abs().sum(1)]).values[0].shape
    torch.Size([3])
    """
    _check_fits(model, groups)
    with torch.no_grad():
        values = _checked(criterion(model, groups), groups, "criterion")
        if scale is not none:
            values = _checked([scale(v, group) for v, group in zip(values, groups.groups)], groups, "scale")
    return Scores(groups, tuple(values))


def _checked(answer: Sequence[Tensor], groups: Groups, whose: str) -> list[Tensor]:
    values = [torch.as_tensor(v).detach().to("cpu", torch.float64) for v in answer]
    shapes, wanted = [tuple(v.shape) for v in values], [(group.size,) for group in groups.groups]
    if shapes != wanted:
        raise PlanError(
            f"the {whose} gave scores of shapes {shapes[:4]}, but one value per unit is needed: {wanted[:4]} "
            f"for the {len(wanted)} groups, in their order."
        )
    for group, of_group in zip(groups.groups, values):
        if not bool(of_group.isfinite().all()):
            raise PlanError(f"the {whose} gave scores that are not finite for group {group.name!r}.")
    return values


def _check_fits(model: nn.Module, groups: Groups) -> None:
    have = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
    want = {info.name: info.shape for info in groups.tensors}
    odd = next((name for name in [*want, *have] if have.get(name) != want.get(name)), None)
    if odd is not None:
        raise PlanError(
            f"the groups are those of another model: {odd} is {have.get(odd, 'missing')} here and "
            f"{want.get(odd, 'missing')} there. Find the groups of this model anew."
        )
