"""One call from a model to a smaller one: budgets met whatever the schedule, limits and optimizers across all cuts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.allocate.budget import Budget
from secateur.allocate.limits import Limits
from secateur.allocate.plan import allocate
from secateur.allocate.ranking import GlobalRanking
from secateur.errors import PlanError
from secateur.graph.groups import find_groups
from secateur.score.magnitude import Magnitude
from secateur.score.scoring import score
from secateur.search.compress import Compressed, compress
from secateur.search.schedule import Schedule, cubic, geometric, linear, one_shot
from secateur.surgery.cut import Cut, apply
from secateur.zoo.models import build_model


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    ).eval()  # fmt: skip


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def units(made: Compressed) -> list[int]:
    """How many units each cut took."""
    return [sum(g.size for g in p.groups.groups) - sum(map(len, p.keep)) for p in made.plans]


def test_one_shot_is_the_four_verbs():
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = compress(model, X, Budget(macs=0.4))
    plan = allocate(score(model, find_groups(model, X), Magnitude(1)), GlobalRanking(), budget=Budget(macs=0.4))
    assert [p.hash for p in made.plans] == [plan.hash]
    assert torch.equal(made.model(X), apply(model, plan)(X))
    assert made.certificates[0].ok
    assert made.search is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("schedule", [linear(3), geometric(3), cubic(3), lambda left: [0.9, left]])
def test_schedules_fall_to_the_same_budget(schedule: Schedule):
    model = net()
    groups = find_groups(model, X)
    made = compress(model, X, Budget(macs=0.3, params=0.5), schedule=schedule)
    left = [plan.macs_left / groups.macs for plan in made.plans]
    assert left == sorted(left, reverse=True)
    assert len(left) == len(schedule(0.3))
    assert all(share <= aim for share, aim in zip(left, schedule(0.3)))
    assert made.plans[-1].macs_left <= int(0.3 * groups.macs)
    assert made.plans[-1].params_left <= int(0.5 * groups.params)
    assert find_groups(made.model, X).macs == made.plans[-1].macs_left


def test_schedules_by_their_formulas():
    assert one_shot(0.3) == (0.3,)
    assert linear(4)(0.2) == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert geometric(3)(0.125) == pytest.approx([0.5, 0.25, 0.125])
    assert cubic(2)(0.2) == pytest.approx([0.2 + 0.8 / 8, 0.2])
    for schedule in (linear(7), geometric(7), cubic(7)):
        assert schedule(1 / 3)[-1] == 1 / 3
        assert schedule(1.0) == pytest.approx([1.0] * 7)


def test_a_few_units_at_a_time():
    made = compress(net(), X, Budget(macs=0.4), at_a_time=6)
    taken = units(made)
    assert all(n == 6 for n in taken[:-1])
    assert 0 < taken[-1] <= 6
    assert made.plans[-1].macs_left <= int(0.4 * find_groups(net(), X).macs)


def test_recovery_after_each_cut_and_scores_anew():
    seen: list[int] = []

    def recover(cut: Cut[Any, Any, Any]) -> None:
        seen.append(cut.model[0].out_channels)
        nn.init.zeros_(cut.model[3].weight[0])  # so that the next cut takes this one first

    made = compress(net(), X, Budget(macs=0.5), schedule=linear(2), recover=recover)
    assert seen[0] > seen[1]
    assert all(0 not in plan.keep[1] for plan in made.plans[1:])


def test_the_optimizer_goes_on_across_cuts():
    model = net()
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    F.cross_entropy(model(X), torch.tensor([0, 1])).backward()
    adam.step()
    steps: list[float] = []

    def recover(cut: Cut[Any, Any, Any]) -> None:
        cut.optimizer.zero_grad()
        F.cross_entropy(cut.model(X), torch.tensor([0, 1])).backward()
        cut.optimizer.step()
        state = cut.optimizer.state[cut.model[0].weight]
        assert state["exp_avg"].shape == cut.model[0].weight.shape
        steps.append(float(state["step"]))

    made = compress(model, X, Budget(macs=0.5), schedule=geometric(3), recover=recover, optimizer=adam)
    assert steps == [2.0, 3.0, 4.0]
    assert made.optimizer is not adam
    assert float(adam.state[model[0].weight]["step"]) == 1.0


def test_limits_hold_for_all_cuts_together():
    limits = Limits(cap=0.5, multiple={"0": 4}, keep=["3"])
    made = compress(net(), X, Budget(params=0.75), schedule=linear(4), limits=limits)
    assert (made.model[0].out_channels, made.model[3].out_channels) == (8, 24)
    with pytest.raises(PlanError, match="cannot be met"):
        compress(net(), X, Budget(params=0.5), schedule=linear(4), limits=limits)


def test_a_budget_that_is_met_already_cuts_nothing():
    made = compress(net(), X, Budget(params=1.0))
    assert units(made) == [0]
    assert torch.equal(made.model(X), net()(X))


def test_a_real_network_in_three_cuts():
    model = build_model("secateur:resnet20").model.eval()
    x = torch.randn(2, 3, 32, 32)
    made = compress(model, x, Budget(macs=0.5), schedule=cubic(3), limits=Limits(least=4))
    assert all(certificate.ok for certificate in made.certificates)
    assert 0.49 < made.plans[-1].macs_left / find_groups(model, x).macs <= 0.5


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: compress(net(), X, Budget(macs=0.5), at_a_time=0), "at_a_time is a number of units"),
        (lambda: compress(net(), X, Budget(macs=0.5), at_a_time=3, schedule=linear(2)), "the place of a schedule"),
        (lambda: compress(net(), X, Budget(macs=0.5), schedule=lambda left: [0.2, left]), "the shares must fall"),
        (lambda: compress(net(), X, Budget(macs=0.5), schedule=lambda left: [0.7]), "end at the 0.5"),
        (lambda: compress(net(), X, Budget(macs=0.5), schedule=lambda left: []), "leaves nothing"),
        (lambda: compress(net(), X, Budget(macs=0.5), at_a_time=1, limits=Limits(multiple=8)), "no cut takes 1 units"),
        (lambda: linear(0), "a whole number of cuts"),
    ],
)
def test_refusals(refused: Callable[[], object], words: str):
    with pytest.raises(PlanError, match=words):
        refused()
