"""Every line of the table of ops, each met by a tiny model that would have other groups without it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

import idioms
import networks
from lanes import Family
from lanes_places import PLACES
from lanes_values import ELSEWHERE, VALUES
from networks import Net
from secateur.allocate.plan import Plan
from secateur.graph import rules
from secateur.graph.analysis import analyse
from secateur.graph.capture import Trace, capture, op_name
from secateur.graph.groups import find_groups
from secateur.graph.probe import random_keep
from secateur.graph.records import Groups
from secateur.graph.rules import RULES
from secateur.graph.slots import Group
from secateur.surgery.certify import Certificate, certify
from secateur.surgery.cut import apply

pytestmark = pytest.mark.filterwarnings("ignore:index_reduce")  # torch calls it a beta

FAMILIES: Mapping[str, Family] = MappingProxyType({**VALUES, **PLACES})
LANES = [(family, lane) for family, kind in FAMILIES.items() for lane in kind.lanes]
EXPERTS = Net(idioms.Experts, networks.tokens(4), (8, 16, 8))

Run = tuple[nn.Module, Trace, frozenset[str], list[tuple[str, int]]]


def built(make: Any) -> nn.Module:
    return networks.build(Net(make, tuple, ()))


def cut(model: nn.Module, inputs: Any, groups: Groups, seed: int = 2) -> tuple[nn.Module, Certificate]:
    plan = Plan(groups, random_keep(groups, seed))
    smaller = apply(model, plan)
    return smaller, certify(model, smaller, plan, inputs)


@functools.cache
def groups_of(family: str) -> Groups:
    return find_groups(built(FAMILIES[family].make), FAMILIES[family].inputs())


def by_lane(groups: Groups) -> dict[str, list[Group]]:
    """The groups of each lane, from their names: those of its module's layers."""
    found: dict[str, list[Group]] = {}
    for group in groups.groups:
        found.setdefault(group.name.partition(".")[0], []).append(group)
    return found


@pytest.mark.parametrize(("family", "lane"), LANES)
def test_groups_of_each_op(family: str, lane: str) -> None:
    expected, groups = FAMILIES[family].lanes[lane], by_lane(groups_of(family)).get(lane, [])
    why = [f"{f.tensor}: {f.reason}" for f in groups_of(family).frozen if f.tensor.startswith(f"{lane}.")]
    assert sorted(group.size for group in groups) == sorted(expected.sizes), why
    assert all(bool(group.inexact) == expected.inexact for group in groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_through_each_op_is_certified(family: str) -> None:
    _, certificate = cut(built(FAMILIES[family].make), FAMILIES[family].inputs(), groups_of(family))
    assert certificate.ok, certificate.sentence
    assert certificate.masked_effect > 1e-3


@pytest.mark.parametrize("name", idioms.IDIOMS)
def test_groups_and_cut_of_each_idiom(name: str) -> None:
    net = idioms.IDIOMS[name]
    model, inputs = networks.build(net), net.inputs()
    groups = find_groups(model, inputs)
    assert sorted(group.size for group in groups.groups) == sorted(net.sizes), str(groups)
    if net.sizes:
        _, certificate = cut(model, inputs, groups)
        assert certificate.ok, certificate.sentence
        assert certificate.masked_effect > 1e-3


@pytest.mark.parametrize("name", idioms.ELSEWHERE)
def test_groups_of_attention_on_other_devices(name: str) -> None:
    net = idioms.ELSEWHERE[name]
    groups = find_groups(networks.build(net), net.inputs())
    (group,) = groups.groups
    assert group.size == 4
    assert ("bias" in {slot.tensor for slot in group.slots}) == ("bias" in name), str(groups)


def test_groups_of_what_no_certificate_can_run() -> None:
    groups = find_groups(built(ELSEWHERE.make), ELSEWHERE.inputs())
    assert [group.size for group in groups.groups] == [8] * len(ELSEWHERE.lanes), str(groups)


@pytest.fixture(scope="module")
def runs() -> tuple[Run, ...]:
    """All models of the room's tests: each with its trace, the names of its ops and its groups."""
    models = [(built(family.make), family.inputs()) for family in (*FAMILIES.values(), ELSEWHERE)]
    nets = (*networks.NETWORKS, *idioms.IDIOMS.values(), *idioms.ELSEWHERE.values(), EXPERTS)
    models += [(networks.build(net), net.inputs()) for net in nets]
    traced = [(model, capture(model, inputs)) for model, inputs in models]
    traced.sort(key=lambda run: len(run[1].calls))  # what is told soon is told by a short one
    return tuple((model, trace, frozenset(map(op_name, trace.calls)), sizes(trace, model)) for model, trace in traced)


def sizes(trace: Trace, model: nn.Module) -> list[tuple[str, int]]:
    return [(group.name, group.size) for group in analyse(trace, model).groups.groups]


@pytest.mark.parametrize("name", sorted(RULES))
def test_without_a_line_of_the_table_some_groups_are_others(
    name: str, runs: tuple[Run, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = [(model, trace, before) for model, trace, names, before in runs if name in names]
    assert meeting, f"no model of the tests meets {name}: add a lane to tests/lanes_values.py or tests/lanes_places.py"
    monkeypatch.setattr(rules, "RULES", {key: rule for key, rule in RULES.items() if key != name})
    told = any(sizes(trace, model) != before for model, trace, before in meeting)
    assert told, f"no model's groups would be others without {name}: it can go, or needs a lane that tells"


def test_a_grouped_product_has_the_groups_of_each_expert() -> None:
    model = networks.build(EXPERTS)
    groups = analyse(capture(model, EXPERTS.inputs()), model).groups
    assert sorted(group.size for group in groups.groups) == sorted(EXPERTS.sizes), str(groups)


def test_halves_that_lose_the_same_number_by_chance_are_told_apart() -> None:
    x = torch.randn(2, 5, 4)
    missed = [n for n in range(24) if not find_groups(built(lambda n=n: idioms.Chunked(n)), x).sizes]
    assert not missed, "chunk does not follow a cut of one half, and the probe's plans do not show it"


def test_a_function_that_caches_is_left_clean() -> None:
    net = idioms.IDIOMS["cached"]
    model, x = networks.build(net), net.inputs()
    idioms.steps(5)
    groups = find_groups(model, x)
    assert idioms.steps.cache_info().currsize == 0
    assert cut(model, x, groups)[1].ok
    assert type(idioms.steps(5)) is torch.Tensor


def test_an_attribute_that_only_has_the_value_of_a_count_is_let_go() -> None:
    net = idioms.IDIOMS["guess"]
    groups = find_groups(networks.build(net), net.inputs())
    smaller, certificate = cut(networks.build(net), net.inputs(), groups)
    assert certificate.ok, certificate.sentence
    assert smaller.steps == 8
    assert smaller.a.out_features < 8
    assert [size.function for size in groups.sizes] == ["view"]


def test_rows_of_a_table_that_nothing_reads_stay() -> None:
    net = idioms.IDIOMS["patches"]
    model = networks.build(net)
    groups = find_groups(model, net.inputs())
    smaller, _ = cut(model, net.inputs(), groups)
    assert smaller.places.shape[1] == 9
    assert smaller.places.shape[2] < 8
    rows = next(f for f in groups.frozen if f.tensor == "places" and f.dim == 1)
    assert rows.units == rows.size == 9


def test_a_ranking_is_followed_and_other_boxes_are_no_error() -> None:
    net = idioms.IDIOMS["ranking"]
    model, x = networks.build(net), net.inputs()
    groups = find_groups(model, x)
    for seed in range(4):
        smaller, certificate = cut(model, x, groups, seed)
        assert certificate.ok, certificate.sentence
        assert smaller(x)["boxes"].shape[1] == 4
