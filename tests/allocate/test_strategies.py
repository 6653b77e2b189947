"""What each strategy prefers: closed forms, a comparison with every plan there is, and the knobs."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.allocate.budget import Budget
from secateur.allocate.knapsack import Knapsack
from secateur.allocate.limits import Limits
from secateur.allocate.plan import Plan, Strategy, allocate
from secateur.allocate.ranking import GlobalRanking
from secateur.allocate.uniform import Uniform
from secateur.errors import PlanError
from secateur.graph.groups import find_groups
from secateur.graph.records import Groups
from secateur.score.scoring import Scores


class Beside(nn.Module):
    """Two layers side by side, so that no cost is a product of their counts: a unit of `a` costs `cost` of `b`'s."""

    def __init__(self, width: int = 10, cost: int = 1) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4 * cost, width), nn.Linear(4, width), nn.Linear(2 * width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.a(x), self.b(x[:, :4])], 1))


class Block(nn.Module):
    """A residual block and a bottleneck: a stream in three products, and counts that multiply each other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 9, 3, padding=1), nn.Conv2d(9, 11, 1)
        self.c, self.d, self.head = nn.Conv2d(11, 12, 3), nn.Conv2d(12, 8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.b(F.relu(self.a(x)))
        return self.head(self.d(F.relu(self.c(x))).mean((2, 3)))


@functools.cache
def chain() -> Groups:
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise((6, 9, 11, 8, 10, 3))]
    return find_groups(nn.Sequential(*layers), torch.zeros(1, 6))


@functools.cache
def block() -> Groups:
    return find_groups(Block(), torch.zeros(1, 3, 8, 8))


def beside(cost: int = 1) -> Groups:
    return find_groups(Beside(cost=cost), torch.zeros(1, 4 * cost))


def drawn(groups: Groups, seed: int) -> Scores:
    """Scores of layers on very different scales."""
    generator = torch.Generator().manual_seed(seed)
    scales = (3 * torch.rand(len(groups.groups), generator=generator)).exp().tolist()
    values = (torch.rand(g.size, generator=generator, dtype=torch.float64).square() for g in groups.groups)
    return Scores(groups, tuple(v * scale for v, scale in zip(values, scales)))


def sizes(plan: Plan) -> list[int]:
    return [len(units) for units in plan.keep]


def kept(plan: Plan, scores: Scores) -> float:
    return sum(float(values[list(units)].sum()) for values, units in zip(scores.values, plan.keep))


def best(scores: Scores, budget: Budget) -> float:
    """The most score that any plan within the budget keeps: all of them are looked at, the best first."""
    groups = scores.groups
    ordered = [values.argsort(descending=True).tolist() for values in scores.values]
    sums = [np.cumsum([0.0, *values.sort(descending=True).values.tolist()]) for values in scores.values]
    counts = np.stack(np.meshgrid(*(np.arange(1, len(s)) for s in sums), indexing="ij"), -1).reshape(-1, len(sums))
    values = sum(s[column] for s, column in zip(sums, counts.T))
    targets = budget.targets(groups)
    costs = {"macs": groups.costs.macs, "params": groups.costs.params}
    for i in np.argsort(-values):
        stays = groups.stays([sorted(order[:n]) for order, n in zip(ordered, counts[i])])
        if all(costs[target.measure](stays) <= target.most for target in targets):
            return float(values[i])
    raise AssertionError("no plan meets the budget")


def test_uniform_takes_the_same_share_everywhere():
    groups = chain()
    scores = drawn(groups, 0)
    for share in (0.8, 0.5, 0.2):
        plan = allocate(scores, Uniform(), budget=Budget(params=share))
        gone = [1 - n / g.size for n, g in zip(sizes(plan), groups.groups)]
        # One share for all, but for the units that it takes to use the budget up.
        assert max(gone) - min(gone) <= 1 / 8 + 1 / 11


def test_the_ranking_takes_the_lowest_of_all():
    scores = drawn(beside(), 1)
    order = sorted(float(v) for values in scores.values for v in values)
    for count in (3, 8, 14):
        budget = Budget(macs=1 - count / 20)
        for strategy in (GlobalRanking(), GlobalRanking(per_cost=True), Knapsack()):
            plan = allocate(scores, strategy, budget=budget)
            gone = sorted(order)[:count] if min(sizes(plan)) > 1 else None
            if gone is not None:
                assert kept(plan, scores) == pytest.approx(sum(order) - sum(gone))


def test_equal_scores_go_from_where_least_has_gone():
    groups = chain()
    equal = Scores(groups, tuple(torch.ones(g.size, dtype=torch.float64) for g in groups.groups))
    plan = allocate(equal, Budget(macs=0.5))
    assert max(n / g.size for n, g in zip(sizes(plan), groups.groups)) < 0.85


def test_per_cost_spares_what_is_cheap():
    """A unit of `a` costs 16 + 2 MACs, one of `b` 4 + 2; b's score less, but more for their cost."""
    groups = beside(cost=4)
    scores = Scores(groups, (torch.full((10,), 2.0).double(), torch.full((10,), 1.0).double()))
    plain, per_cost = (
        allocate(scores, GlobalRanking(per_cost=flag), budget=Budget(macs=186)) for flag in (False, True)
    )
    assert (sizes(plain), sizes(per_cost)) == ([10, 1], [7, 10])
    assert kept(allocate(scores, Knapsack(), budget=Budget(macs=186)), scores) == 24


def test_units_that_save_nothing_of_the_budget_stay():
    """Scaling factors that nothing is multiplied with: no MACs."""

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bias = nn.Linear(4, 6), nn.Linear(6, 2), nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + self.bias.sum()

    groups = find_groups(Bias(), torch.zeros(1, 4))
    low = Scores(groups, tuple(torch.full((g.size,), 1.0 if g.size == 6 else 0.0).double() for g in groups.groups))
    for strategy in (GlobalRanking(), GlobalRanking(per_cost=True), Knapsack(), Uniform()):
        plan = allocate(low, strategy, budget=Budget(macs=0.5))
        assert all(len(units) == 5 for g, units in zip(groups.groups, plan.keep) if g.size == 5)


BUDGETS = (Budget(macs=0.7), Budget(macs=0.4), Budget(params=0.5), Budget(macs=0.5, params=0.4))


@pytest.mark.parametrize("groups", [chain, block], ids=["chain", "block"])
def test_the_knapsack_is_near_the_best_of_all_plans(groups):
    strategies: dict[str, Strategy] = {
        "ranking": GlobalRanking(), "per cost": GlobalRanking(per_cost=True), "prices": Knapsack(0), "full": Knapsack()
    }  # fmt: skip
    shares: dict[str, list[float]] = {name: [] for name in strategies}
    for seed, budget in itertools.product(range(3), BUDGETS):
        scores = drawn(groups(), seed)
        most = best(scores, budget)
        for name, strategy in strategies.items():
            shares[name].append(kept(allocate(scores, strategy, budget=budget), scores) / most)
    assert max(map(max, shares.values())) <= 1 + 1e-9
    worst, mean = {n: min(v) for n, v in shares.items()}, {n: float(np.mean(v)) for n, v in shares.items()}
    assert worst["full"] > 0.995
    assert worst["prices"] > 0.985
    assert mean["full"] > mean["prices"] >= mean["per cost"]
    assert mean["prices"] > mean["ranking"]


def test_the_tries_of_a_knapsack_are_a_knob():
    worse = 0
    for seed in range(6):
        scores = drawn(block(), seed)
        none, few, all_ = (kept(allocate(scores, Knapsack(n), budget=Budget(macs=0.4)), scores) for n in (0, 5, 200))
        assert none <= few <= all_
        worse += none < all_
    assert worse
    with pytest.raises(PlanError, match="tries is a number of moves, 0 or more, and not -2"):
        Knapsack(-2)


def test_limits_hold_in_a_knapsack():
    limits = Limits(multiple={"2": 4}, least=3)
    plan = allocate(drawn(chain(), 0), Knapsack(), budget=Budget(macs=0.3), limits=limits)
    assert min(sizes(plan)) >= 3
    assert sizes(plan)[2] in (4, 8)


def test_the_knapsack_uses_its_budget_up_though_cutting_would_raise_the_sum():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    scores = Scores(find_groups(net, torch.zeros(1, 3)), (torch.tensor([-0.1, 0.2, 0.8, 0.08]).double(),))
    for tries in (0, 20):
        assert allocate(scores, Knapsack(tries), budget=Budget(params=1.0)).keep == ((0, 1, 2, 3),)
