"""Curves of each group cut alone, and the plans that they lead to."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from secateur.allocate.budget import Budget
from secateur.allocate.limits import Limits
from secateur.allocate.plan import Plan, allocate
from secateur.allocate.sensitivity import Curve, Sensitivity, SensitivityGuided, find_sensitivity
from secateur.errors import PlanError
from secateur.graph.groups import find_groups
from secateur.score.magnitude import Magnitude
from secateur.score.scoring import Scores, score
from secateur.surgery.cut import apply


@pytest.fixture
def scores() -> Scores:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 2))
    groups = find_groups(model, torch.zeros(1, 4))
    return Scores(groups, (torch.arange(8).double(), torch.arange(12).double()))


def weighed(plan: Plan) -> float:
    """A loss of 1, and 1 more for each unit of the first group that is gone, and a tenth for one of the second."""
    first, second = (group.size - len(units) for group, units in zip(plan.groups.groups, plan.keep))
    return 1 + first + 0.1 * second


def test_each_group_is_cut_alone_lowest_scores_first(scores):
    seen = []

    def loss(plan: Plan) -> float:
        seen.append(plan.keep)
        return weighed(plan)

    found = find_sensitivity(scores, loss, shares=(0.25, 0.5))
    all_8, all_12 = tuple(range(8)), tuple(range(12))
    assert seen == [
        (all_8, all_12), (all_8[2:], all_12), (all_8[4:], all_12), (all_8, all_12[3:]), (all_8, all_12[6:])
    ]  # fmt: skip
    assert found.whole == 1
    assert found.curves[0] == Curve("0", 8, (2, 4), (3, 5))
    assert found.curves[1].losses == pytest.approx((1.3, 1.6))
    assert Sensitivity.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_the_shares_are_a_knob_and_what_rounds_to_nothing_is_not_measured(scores):
    assert find_sensitivity(scores, weighed, shares=(0.1, 0.12, 0.9)).curves[0].gone == (7,)
    assert find_sensitivity(scores, weighed).curves[1].gone == (3, 6, 9)


def test_losses_are_interpolated_never_extrapolated_and_never_fall(scores):
    curves = (Curve("0", 8, (2, 4, 6), (3.0, 2.0, 7.0)), Curve("1", 12, (), ()))
    first, second = Sensitivity(1.0, curves).rise(scores.groups)
    inf = np.inf
    assert first.tolist() == [0, 1, 2, 2, 2, 4, 6, inf, inf]
    assert second.tolist() == [0, *[inf] * 12]


def test_one_threshold_for_all_given_or_searched(scores):
    found = find_sensitivity(scores, weighed)
    plan = allocate(scores, SensitivityGuided(found, rise=0.55))
    assert [len(units) for units in plan.keep] == [8, 7]
    plan = allocate(scores, SensitivityGuided(found, rise=2.05))
    assert [len(units) for units in plan.keep] == [6, 3]
    searched = allocate(scores, SensitivityGuided(found), budget=Budget(macs=plan.macs_left))
    assert searched == plan
    assert allocate(scores, SensitivityGuided(found), budget=Budget(macs=0.6)).macs_left <= 0.6 * scores.groups.macs


def test_the_most_sensitive_of_tied_groups_decides():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    groups = find_groups(model, torch.zeros(1, 4))
    scores = Scores(groups, (torch.arange(8).double(),) * 2)
    plan = allocate(scores, SensitivityGuided(find_sensitivity(scores, weighed), 2.05), limits=Limits(tied=["*"]))
    assert [len(units) for units in plan.keep] == [6, 6]


def test_a_real_loss_on_a_real_model(scores):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2))
    x = torch.randn(64, 4)
    with torch.no_grad():
        y = model(x)
        found = score(model, find_groups(model, x), Magnitude(2))
        curves = find_sensitivity(found, lambda plan: float((apply(model, plan)(x) - y).square().mean()))
        assert curves.whole == 0
        assert all(curve.losses[-1] > 0 for curve in curves.curves)
        plan = allocate(found, SensitivityGuided(curves), budget=Budget(params=0.6))
        assert sum(p.numel() for p in apply(model, plan).parameters()) <= 0.6 * found.groups.params


def test_refusals(scores):
    found = find_sensitivity(scores, weighed)
    with pytest.raises(PlanError, match=r"needs a budget, .* or a rise of the loss that it may cost"):
        allocate(scores, SensitivityGuided(found))
    with pytest.raises(PlanError, match=r"SensitivityGuided\(rise=1\) says how much goes, and so does the budget"):
        allocate(scores, SensitivityGuided(found, 1), budget=Budget(macs=0.5))
    with pytest.raises(PlanError, match=r"cannot be met: at least .* stay. The strategy takes no more from 0, 1\.$"):
        allocate(scores, SensitivityGuided(found), budget=Budget(macs=0.05))
    with pytest.raises(PlanError, match="measured on a model with other groups"):
        allocate(scores, SensitivityGuided(Sensitivity(0.0, found.curves[:1]), 1.0))
    with pytest.raises(PlanError, match=r"must be above 0 and below 1, and \[0\.5, 1\] are not"):
        find_sensitivity(scores, weighed, shares=(0.5, 1))
    with pytest.raises(PlanError, match="the loss is not a number with 2 units of 0 cut"):
        find_sensitivity(scores, lambda plan: weighed(plan) if len(plan.keep[0]) == 8 else float("nan"))
