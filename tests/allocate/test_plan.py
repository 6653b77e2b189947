"""Plans: what stays, the knobs, the golden numbers of the report, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import torchvision
from torch import nn

import networks
from secateur.allocate.limits import Limits
from secateur.allocate.plan import Plan, allocate
from secateur.allocate.sparsity_guided import SparsityGuided
from secateur.allocate.uniform import Uniform
from secateur.errors import PlanError, UnknownName
from secateur.graph.groups import find_groups
from secateur.graph.records import Groups
from secateur.graph.slots import Group, Slot
from secateur.measure.sparsity import SparsityRow, SparsityTable
from secateur.score.magnitude import Magnitude
from secateur.score.scoring import Scores, score
from secateur.surgery.cut import apply
from secateur.surgery.masks import find_masks

TABLE_1 = (
    (56, 1728), (6081, 36864), (12449, 73728), (29101, 147456), (68043, 294912), (164093, 589824), (160281, 589824),
    (373458, 1179648), (929979, 2359296), (934632, 2359296), (897492, 2359296), (905980, 2359296), (995514, 2359296),
    (93590467, 102760448), (10156255, 16777216), (1451421, 4096000),
)  # fmt: skip
"""Zeros and elements of each layer of VGG16 at global sparsity 0.8: the report's Table 1."""

CONVS = (62, 54, 107, 103, 197, 185, 187, 350, 311, 310, 318, 316, 296)
"""Channels left in the report's printed model; its classifier is 14504 -> 366 -> 1617 -> 100."""


def scores(numbers: list[float]) -> Scores:
    model = nn.Sequential(nn.Linear(2, len(numbers)), nn.Linear(len(numbers), 1))
    return Scores(find_groups(model, torch.zeros(1, 2)), (torch.tensor(numbers, dtype=torch.float64),))


def test_the_reports_golden_numbers() -> None:
    with torch.device("meta"):
        model = torchvision.models.vgg16(num_classes=100)
    groups = find_groups(model, torch.zeros(1, 3, 32, 32, device="meta"))
    names = [name for name, p in model.named_parameters() if name.endswith("weight")]
    assert sum(elements for _, elements in TABLE_1) == 138_344_128
    table = SparsityTable(tuple(SparsityRow(n, *row) for n, row in zip(names, TABLE_1)))
    flat = Scores(groups, tuple(torch.zeros(g.size, dtype=torch.float64) for g in groups.groups))
    smaller = apply(model, allocate(flat, SparsityGuided(table)))
    convs = [m for m in smaller.features if isinstance(m, nn.Conv2d)]
    linears = [m for m in smaller.classifier if isinstance(m, nn.Linear)]
    assert tuple(m.out_channels for m in convs) == CONVS
    assert [(m.in_features, m.out_features) for m in linears] == [(14504, 366), (366, 1617), (1617, 100)]
    assert sum(p.numel() for p in smaller.parameters()) == 12_141_667


def test_a_group_made_by_attention_has_the_sparsity_of_its_projections() -> None:
    table = find_masks(nn.MultiheadAttention(4, 2), 0.5).table()
    heads = Group("heads", 2, (Slot("in_proj_weight", 0, "write", ((0, 1, 4, 5, 8, 9), (2, 3, 6, 7, 10, 11))),))
    groups = dataclasses.replace(find_groups(nn.Linear(2, 3), torch.zeros(1, 2)), groups=(heads,))
    assert SparsityGuided(table).shares(groups) == [table["in_proj_weight"].sparsity]


def test_a_vision_transformer_is_cut_as_its_sparsity_says() -> None:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 24, num_classes=3).eval()
    groups = find_groups(model, torch.zeros(1, 3, 16, 16))
    plan = allocate(score(model, groups, Magnitude()), SparsityGuided(find_masks(model, 0.5).table()))
    smaller = apply(model, plan)
    assert smaller(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


def test_what_stays_is_out_minus_floor_of_the_share() -> None:
    for size in (1, 2, 5, 7, 10):
        for sparsity in (0.0, 0.3, 0.5, 0.99):
            plan = allocate(scores([float(i) for i in range(size)]), Uniform(sparsity)) if size > 1 else None
            if plan is not None:
                assert len(plan.keep[0]) == max(1, size - math.floor(size * sparsity))


def test_lowest_scores_go_and_ties_keep_the_first() -> None:
    assert allocate(scores([3, 1, 2, 1, 5]), Uniform(0.4)).keep == ((0, 2, 4),)
    assert allocate(scores([1, 1, 1, 1]), Uniform(0.5)).keep == ((0, 1),)


def test_knobs_least_multiple_and_keep() -> None:
    many = scores([float(i) for i in range(10)])
    assert len(allocate(many, Uniform(0.7)).keep[0]) == 3
    assert len(allocate(many, Uniform(0.7), limits=Limits(least=5)).keep[0]) == 5
    assert len(allocate(many, Uniform(0.7), limits=Limits(multiple=4)).keep[0]) == 4
    assert len(allocate(many, Uniform(0.7), limits=Limits(keep=["0"])).keep[0]) == 10
    assert len(allocate(many, Uniform(0.99), limits=Limits(least=1)).keep[0]) == 1


def test_keep_takes_patterns_and_names_what_it_does_not_know() -> None:
    model = networks.build(networks.NETWORKS[1])
    found = score(model, find_groups(model, networks.image()()), Magnitude())
    plan = allocate(found, Uniform(0.5), limits=Limits(keep=["st*"]))
    assert [len(units) for units in plan.keep] == [8, 3]
    assert [len(units) for units in allocate(found, Uniform(0.5), limits=Limits(keep=["b"])).keep] == [8, 3]
    with pytest.raises(UnknownName, match=r"unknown layer to keep 'stam'; did you mean 'stem'"):
        allocate(found, Uniform(0.5), limits=Limits(keep=["stam"]))


def test_layers_of_one_group_share_the_pooled_sparsity() -> None:
    model = networks.build(networks.NETWORKS[1])
    groups = find_groups(model, networks.image()())
    rows = (SparsityRow("stem.weight", 100, 216), SparsityRow("a.weight", 0, 432), SparsityRow("b.weight", 32, 432))
    assert SparsityGuided(SparsityTable(rows)).shares(groups) == [132 / 648, 0.0]


def test_a_table_without_the_layers_is_refused() -> None:
    model = networks.build(networks.NETWORKS[1])
    groups = find_groups(model, networks.image()())
    table = SparsityTable((SparsityRow("fc.weight", 1, 2),))
    with pytest.raises(PlanError, match=r"no row for b.weight, stem.weight, which group 'stem' is made by; it has fc"):
        SparsityGuided(table).shares(groups)


def test_illegal_plans_are_refused() -> None:
    groups = scores([1, 2, 3]).groups
    with pytest.raises(PlanError, match=r"would empty group '0'"):
        Plan(groups, ((),))
    with pytest.raises(PlanError, match=r"ascending numbers from 0 to 2"):
        Plan(groups, ((0, 3),))
    with pytest.raises(PlanError, match=r"ascending numbers from 0 to 2"):
        Plan(groups, ((1, 0),))
    with pytest.raises(PlanError, match=r"the plan has 2 groups and the model 1"):
        Plan(groups, ((0,), (0,)))
    with pytest.raises(PlanError, match=r"sparsity must be in \[0, 1\), and 1.0 is not"):
        Uniform(1.0)
    with pytest.raises(PlanError, match=r"share to cut of group '0' is 2; it must be in \[0, 1\]"):
        allocate(scores([1, 2]), lambda problem: problem.by_shares([2]))


def test_hash_is_of_the_content_and_notices_changes() -> None:
    first, second = (allocate(scores([1, 2, 3, 4]), Uniform(s)) for s in (0.5, 0.25))
    assert first.hash == allocate(scores([1, 2, 3, 4]), Uniform(0.5)).hash
    assert first.hash != second.hash
    value = json.loads(json.dumps(first.to_json()))
    assert Plan.from_json(value) == first
    value["keep"] = [[0, 1, 2]]
    with pytest.raises(PlanError, match=r"hash does not fit"):
        Plan.from_json(value)


def test_plans_cannot_be_changed() -> None:
    plan = allocate(scores([1, 2, 3]), Uniform(0.5))
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"cannot assign"):
        plan.keep = ()  # type: ignore[misc]


def test_channels_before_and_after_of_each_layer() -> None:
    model = networks.build(networks.NETWORKS[4])
    groups: Groups = find_groups(model, networks.image()())
    plan = Plan(groups, ((0, 1, 2),))
    assert plan.channels() == (("0", 8, 3), ("1", 16, 6), ("3", 16, 6))
