"""How much each group matters, measured: cut it alone at several ratios, and see what the model loses.

Such curves tell layers with much to spare from those with nothing (Li et al. 2017, Pruning Filters for Efficient
ConvNets, section 3.2). `find_sensitivity` measures them, `SensitivityGuided` cuts every group as far as one threshold
on the loss allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from secateur.allocate.ladder import Floats
from secateur.allocate.plan import Plan, best_units
from secateur.allocate.problem import Problem
from secateur.errors import PlanError
from secateur.graph.records import Groups
from secateur.score.scoring import Scores


@dataclass(frozen=True)
class Curve:
    """The loss when units of one group alone are gone: `losses[i]` with `gone[i]` of its `size` units, ascending."""

    group: str
    size: int
    gone: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """`whole` is the loss of the uncut model; one curve for each group, in their order."""

    whole: float
    curves: tuple[Curve, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Sensitivity:
        """The record that `to_json` wrote."""
        curves = (Curve(c["group"], c["size"], tuple(c["gone"]), tuple(c["losses"])) for c in value["curves"])
        return cls(value["whole"], tuple(curves))

    def rise(self, groups: Groups) -> list[Floats]:
        """For each group, how much the loss has risen with 0, 1, ... units gone; infinity beyond what was measured.

        Between two measured points it rises in a straight line, and where it was measured to fall it stays.

        Raises:
            PlanError: the curves are of another model's groups.
        """
        have = [(curve.group, curve.size) for curve in self.curves]
        if have != [(group.name, group.size) for group in groups.groups]:
            raise PlanError("the sensitivity was measured on a model with other groups; measure it on this one.")
        out = []
        for curve in self.curves:
            points = np.maximum.accumulate([0.0, *(loss - self.whole for loss in curve.losses)])
            counts = np.arange(curve.size + 1)
            out.append(np.interp(counts, [0, *curve.gone], points, right=np.inf))
        return out


def find_sensitivity(
    scores: Scores, loss: Callable[[Plan], float], *, shares: Sequence[float] = (0.25, 0.5, 0.75)
) -> Sensitivity:
    """Cut each group alone by each share, lowest scores first, and measure.

    Args:
        scores: from `score`.
        loss: what a plan does to the model, on held-out data: lower is better; it is called once with the plan that
            cuts nothing and then once per group and share. The cut is the caller's: `sc.apply(model, plan)`, or, where
            that is slow, `sc.mask`. For an accuracy, give one minus it.
        shares: in (0, 1); a group is never cut beyond the largest.

    Raises:
        PlanError: a share outside (0, 1), or a loss that is not a number.

    >>> import torch, secateur as sc
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    >>> x = torch.randn(16, 4)
    >>> scores = sc.score(net, sc.find_groups(net, x), sc.Magnitude())
    >>> found = find_sensitivity(scores, lambda plan: (sc.apply(net, plan)(x) - net(x)).square().mean().item())
    >>> found.whole, found.curves[0].gone
    (0.0, (2, 4, 6))
    """
    if not all(0 < share < 1 for share in shares):
        raise PlanError(f"shares to measure at must be above 0 and below 1, and {list(shares)} are not.")
    groups, sizes = scores.groups, [group.size for group in scores.groups.groups]

    def measured(group: int, gone: int) -> float:
        counts = [size - gone * (g == group) for g, size in enumerate(sizes)]
        value = float(loss(Plan(groups, best_units(scores, counts))))
        if math.isnan(value):
            name = groups.groups[group].name if gone else "nothing"
            raise PlanError(f"the loss is not a number with {gone} units of {name} cut; a curve needs one.")
        return value

    whole, curves = measured(-1, 0), []
    for g, group in enumerate(groups.groups):
        gone = sorted({int(group.size * share) for share in shares} - {0})
        curves.append(Curve(group.name, group.size, tuple(gone), tuple(measured(g, k) for k in gone)))
    return Sensitivity(whole, tuple(curves))


@dataclass(frozen=True)
class SensitivityGuided:
    """Cut every group as far as its predicted loss stays under one threshold, which is searched to meet the budget.

    A group is never cut further than it was measured. Of groups that are tied, the most sensitive decides.

    Args:
        sensitivity: from `find_sensitivity`.
        rise: the threshold, as the rise of the loss over the uncut model's; left out, the budget says it.
    """

    sensitivity: Sensitivity
    rise: float | None = None

    def __call__(self, problem: Problem) -> Sequence[int]:
        """How many units of each group stay; PlanError if the curves are of other groups."""
        curves = self.sensitivity.rise(problem.groups)
        if self.rise is None:
            problem.need_budget("SensitivityGuided()", instead=", or a rise of the loss that it may cost")
            return problem.by_levels(problem.ladder.levels(curves))
        problem.need_budget(f"SensitivityGuided(rise={self.rise})", wanted=False)
        return [len(curve) - int((curve <= self.rise).sum()) for curve in curves]
