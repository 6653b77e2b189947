"""All units of all groups in one ranking: the lowest go first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.allocate.ladder import Floats
from secateur.allocate.problem import Problem


@dataclass(frozen=True)
class GlobalRanking:
    """Cut the units with the lowest scores of the whole model, until the budget is met.

    Scores of different layers are compared as they are: give `score` a scale that makes them comparable. Units that
    can only go together, because of limits, are ranked by the mean of their scores.

    Args:
        per_cost: rank by score over cost instead, the cost being what the unit saves of the budget when it is cut from
            the whole model; of several measures, the sum of the shares that it saves. (Molchanov et al. 2017, Pruning
            Convolutional Neural Networks, section 2.2, subtract the FLOPs times a factor; a ratio needs no factor.)

    >>> import torch, secateur as sc
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 6), torch.nn.Linear(6, 2))
    >>> scores = sc.score(net, sc.find_groups(net, torch.zeros(1, 4)), sc.Magnitude())
    >>> plan = sc.allocate(scores, GlobalRanking(per_cost=True), budget=sc.Budget(macs=0.5))
    >>> 0.4 * scores.groups.macs < plan.macs_left <= 0.5 * scores.groups.macs
    True
    """

    per_cost: bool = False

    def __call__(self, problem: Problem) -> Sequence[int]:
        """How many units of each group stay; PlanError without a budget, or if it cannot be met."""
        problem.need_budget("GlobalRanking()")
        ladder = problem.ladder
        whole = problem.meter.lengths(np.zeros(len(ladder.values), np.bool_))
        costs = relative_prices(problem, whole).sum(0) if self.per_cost else ladder.units.astype(np.float64)
        return problem.by_levels(per_price(ladder.values, costs))


def relative_prices(problem: Problem, lengths: NDArray[np.int64]) -> Floats:
    """(measures, steps) what each step is worth where these lengths are left, as a share of what may be left."""
    return problem.meter.prices(lengths) / np.maximum(problem.most, 1)[:, None]


def per_price(values: Floats, prices: Floats) -> Floats:
    """Values over prices; infinity, which is never cut, for what saves nothing."""
    out = np.full(len(values), np.inf)
    np.divide(values, prices, out=out, where=prices > 0)
    return out
