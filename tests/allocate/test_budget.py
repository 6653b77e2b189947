"""Budgets: never passed, used up as far as single steps go, counted on models that are really cut, or refused."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import networks
from secateur.allocate.budget import Budget
from secateur.allocate.knapsack import Knapsack
from secateur.allocate.limits import Limits
from secateur.allocate.plan import Plan, Strategy, allocate
from secateur.allocate.problem import Problem
from secateur.allocate.ranking import GlobalRanking
from secateur.allocate.sparsity_guided import SparsityGuided
from secateur.allocate.uniform import Uniform
from secateur.errors import PlanError
from secateur.graph.groups import find_groups
from secateur.graph.records import Groups
from secateur.measure.macs import count_macs
from secateur.measure.params import count_params
from secateur.measure.sparsity import SparsityRow, SparsityTable
from secateur.score.scoring import Scores
from secateur.surgery.cut import apply

NETS = tuple(net for net in networks.NETWORKS if net.sizes)
STRATEGIES: tuple[Strategy, ...] = (
    Uniform(), GlobalRanking(), GlobalRanking(per_cost=True), Knapsack(0), Knapsack(20),
    lambda problem: problem.by_shares([0.2 + 0.1 * (g % 3) for g in range(len(problem.groups.groups))]),
)  # fmt: skip


@functools.cache
def model_and_groups(index: int) -> tuple[nn.Module, Groups]:
    model = networks.build(NETS[index])
    return model, find_groups(model, NETS[index].inputs())


def random_scores(groups: Groups, seed: int, coarse: bool = False) -> Scores:
    """With ties if they are coarse, and some below zero."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(g.size, generator=generator, dtype=torch.float64) - 0.1 for g in groups.groups)
    return Scores(groups, tuple((v * 3).round() if coarse else v for v in values))


def left(groups: Groups, keep: tuple[tuple[int, ...], ...]) -> dict[str, int]:
    stays = groups.stays(keep)
    left = {"params": groups.params_left(keep), "macs": groups.macs_left(keep), "bytes": groups.costs.bytes(stays)}
    return {**left, "units": sum(map(len, keep))}


def named(groups: Groups, names: Sequence[str]) -> list[int]:
    """The groups of these names, and those of which a layer of such a name makes units."""
    makers = [{s.tensor.rpartition(".")[0] for s in g.slots if s.role == "write"} for g in groups.groups]
    return [i for i, (g, made) in enumerate(zip(groups.groups, makers)) if not {g.name, *made}.isdisjoint(names)]


def allowed(groups: Groups, limits: Limits) -> Iterator[tuple[tuple[int, ...], ...]]:
    """For each set of groups that move together, the counts that it may have: by definition, from all counts."""
    tied = named(groups, [name for family in limits.tied for name in family])
    spared = named(groups, limits.keep)
    for members in [*([tied] if tied else []), *([g] for g in range(len(groups.groups)) if g not in tied)]:
        sizes = [groups.groups[g].size for g in members]
        rows = []
        for row in itertools.product(*(range(1, size + 1) for size in sizes)):
            same = all(n * sizes[0] == row[0] * size for n, size in zip(row, sizes))
            fine = all(n >= limits.least and n % limits.multiple == 0 for n in row)
            capped = all(size - n <= size * limits.cap + 1e-9 for n, size in zip(row, sizes))
            kept = any(g in spared for g in members)
            if row == tuple(sizes) or (same and fine and capped and not kept):
                rows.append(tuple(zip(members, row)))
        yield tuple(rows)


def with_counts(plan: Plan, scores: Scores, changes: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], ...]:
    keep = list(plan.keep)
    for g, count in changes:
        keep[g] = tuple(sorted(scores.values[g].argsort(descending=True, stable=True)[:count].tolist()))
    return tuple(keep)


BUDGETS = st.fixed_dictionaries(
    {},
    optional={name: st.floats(0.02, 1) | st.integers(1, 4000) for name in ("params", "macs", "bytes", "units")},
).filter(bool)


@st.composite
def drawn_limits(draw: st.DrawFn, groups: Groups) -> Limits:
    names = [group.name for group in groups.groups]
    pair = draw(st.permutations(names))[:2]
    return Limits(
        least=draw(st.integers(1, 4)),
        multiple=draw(st.sampled_from([1, 1, 2, 3])),
        cap=draw(st.sampled_from([1.0, 1.0, 0.8, 0.5])),
        keep=draw(st.sampled_from([(), (), tuple(names[:1])])),
        tied=draw(st.sampled_from([(), (tuple(pair),)])) if len(pair) == 2 else (),
    )


def test_a_layer_that_makes_units_of_two_groups_ties_both():
    _, groups = model_and_groups(2)
    assert [group.name for group in groups.groups] == ["stem", "a", "b"]
    scores = random_scores(groups, 0)
    assert [len(k) for k in allocate(scores, Uniform(0.5), limits=Limits(tied=(("b",),))).keep] == [2, 3, 2]
    with pytest.raises(PlanError, match="without it there is a plan"):  # 4, 5 and 4 units have no common divisor
        allocate(scores, Uniform(), budget=Budget(params=0.5), limits=Limits(tied=(("a", "b"),)))


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_plans_meet_budgets_within_limits(data):
    _, groups = model_and_groups(data.draw(st.integers(0, len(NETS) - 1)))
    scores = random_scores(groups, data.draw(st.integers(0, 99)), data.draw(st.booleans()))
    bounds, asked = data.draw(drawn_limits(groups)), data.draw(BUDGETS)
    most = {m: v if isinstance(v, int) else int(v * left(groups, whole(groups))[m]) for m, v in asked.items()}

    def fits(keep: tuple[tuple[int, ...], ...]) -> bool:
        return all(left(groups, keep)[m] <= n for m, n in most.items())

    rungs = list(allowed(groups, bounds))
    floor = with_counts(Plan(groups, whole(groups)), scores, tuple(pair for rows in rungs for pair in rows[0]))
    strategy = data.draw(st.sampled_from(STRATEGIES))
    if not fits(floor):
        with pytest.raises(PlanError, match="cannot be met: at least"):
            allocate(scores, strategy, budget=Budget(**asked), limits=bounds)
        return
    plan = allocate(scores, strategy, budget=Budget(**asked), limits=bounds)
    assert fits(plan.keep)
    assert all(plan.keep)
    have = [len(units) for units in plan.keep]
    for rows in rungs:
        assert any(all(have[g] == n for g, n in row) for row in rows)
        more = [row for row in rows if all(n > have[g] for g, n in row)]
        # Limits that hold, a budget that is held, and of any group not one step more would have been.
        assert not more or not fits(with_counts(plan, scores, more[0]))


def whole(groups: Groups) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(range(group.size)) for group in groups.groups)


@pytest.mark.parametrize("index", range(len(NETS)))
def test_what_is_left_is_counted_on_the_cut_model(index):
    model, groups = model_and_groups(index)
    inputs = NETS[index].inputs()
    before = {"macs": count_macs(model, inputs).total, "params": count_params(model)}
    budget = Budget(macs=0.8, params=0.7)
    plan = allocate(random_scores(groups, index), Knapsack(), budget=budget)
    smaller = apply(model, plan)
    assert count_macs(smaller, inputs).total <= 0.8 * before["macs"]
    assert count_params(smaller) <= 0.7 * before["params"]


def two_layers(width: int = 100) -> Scores:
    groups = find_groups(nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2)), torch.zeros(1, 4))
    return Scores(groups, (torch.arange(width, dtype=torch.float64),))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("asked", "kept"),
    # n units: 7 n + 2 parameters of 702, 6 n MACs of 600, 4 bytes each.
    [
        ({"params": 0.5}, 49), ({"params": 351}, 49), ({"params": 352}, 50), ({"macs": 0.5}, 50), ({"macs": 0.505}, 50),
        ({"bytes": 4 * 72}, 10), ({"macs": 0.5, "params": 100}, 14), ({"macs": 6}, 1), ({"macs": 1.0}, 100),
        ({"params": 10_000}, 100),
    ],
)  # fmt: skip
def test_closed_form(strategy, asked, kept):
    plan = allocate(two_layers(), strategy, budget=Budget(**asked))
    assert plan.keep == (tuple(range(100 - kept, 100)),)
    assert (plan.params_left, plan.macs_left, plan.bytes_left) == (7 * kept + 2, 6 * kept, 28 * kept + 8)


def test_a_budget_alone_is_met_by_the_global_ranking():
    _, groups = model_and_groups(0)
    scores, budget = random_scores(groups, 3), Budget(macs=0.5)
    plan = allocate(scores, budget)
    assert plan == allocate(scores, GlobalRanking(), budget=budget)
    assert plan.hash == allocate(scores, budget).hash
    assert plan.hash == allocate(scores, Budget(macs=groups.macs // 2)).hash
    assert plan.hash == Plan.from_json(plan.to_json()).hash
    assert plan.hash != allocate(scores, Budget(macs=0.4)).hash


def test_limits_bind_under_a_budget():
    scores = two_layers()
    for limits, kept in ((Limits(multiple=8), 48), (Limits(multiple={"0": 33}), 33), (Limits(least=50), 50)):
        assert len(allocate(scores, Budget(macs=0.5), limits=limits).keep[0]) == kept


def test_a_table_of_sparsity_is_scaled_to_the_budget():
    _, groups = model_and_groups(0)
    rows = (SparsityRow("0.weight", 1, 4), SparsityRow("4.weight", 1, 2), SparsityRow("8.weight", 0, 9))
    guided, scores = SparsityGuided(SparsityTable(rows)), random_scores(groups, 0)
    assert [len(k) for k in allocate(scores, guided).keep] == [6, 3, 7]
    # Twice as much: half of the first layer, and all but one of the second, which must keep one.
    most = groups.macs_left(((0, 1, 2, 3), (0,), tuple(range(7))))
    assert [len(k) for k in allocate(scores, guided, budget=Budget(macs=most)).keep] == [4, 1, 7]
    with pytest.raises(PlanError, match=r"The strategy takes no more from 8\.$"):
        allocate(scores, guided, budget=Budget(params=60))


def test_the_meter_counts_as_the_groups_do_and_prices_are_their_derivatives():
    for index in range(len(NETS)):
        _, groups = model_and_groups(index)
        problem = Problem(random_scores(groups, index), Limits(), Budget(params=1.0, macs=1.0, bytes=1.0))
        ladder, meter = problem.ladder, problem.meter
        for seed in range(3):
            counts = np.random.default_rng(seed).integers(1, ladder.sizes + 1)
            gone = ladder.allowed(counts.tolist())
            assert ladder.counts(gone) == tuple(counts.tolist())
            stays = ~np.append(gone, False)[ladder.step_of]
            costs, lengths = groups.costs, meter.lengths(gone)
            exact = [costs.params(stays), costs.macs(stays), costs.bytes(stays)]
            assert meter.left(lengths).tolist() == exact
            for step in np.flatnonzero(gone)[:3].tolist():
                without = gone.copy()
                without[step] = False
                assert np.array_equal(meter.regained(lengths, step), meter.lengths(without))
                assert meter.prices(lengths)[1, step] == slope(groups, stays, ladder.step_of == step)


def slope(groups: Groups, stays: np.ndarray, going: np.ndarray) -> int:
    """How fast the MACs grow with these units, term by term: each length in turn, times all others."""
    total = 0
    for product in groups.products:
        lengths = [int(stays[list(axis)].sum()) for axis in product.axes]
        for i, axis in enumerate(product.axes):
            others = math.prod(length for j, length in enumerate(lengths) if j != i)
            total += product.constant * int(going[list(axis)].sum()) * others
    return total


def test_prices_are_derivatives():
    """Linear layers 3 -> a -> b -> 2: a unit of the first costs 3 + b MACs, one of the second a + 2."""
    groups = find_groups(nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2)), torch.zeros(1, 3))
    problem = Problem(random_scores(groups, 0), Limits(), Budget(params=1.0, macs=1.0))
    for a, b in ((6, 5), (4, 5), (2, 1)):
        prices = problem.meter.prices(problem.meter.lengths(problem.ladder.allowed([a, b])))
        assert prices.tolist() == [[3 + b + 1] * 5 + [a + 2 + 1] * 4, [3 + b] * 5 + [a + 2] * 4]


@pytest.mark.parametrize(
    ("asked", "given", "sentence"),
    [
        ({"macs": 5}, {}, "the budget of 5 (0.8 %) of 600 MACs cannot be met: at least 6 (1.0 %) stay. It is out of"),
        ({"params": 2}, {}, "too much of the model cannot be cut; print the groups"),
        ({"macs": 0.5}, {"least": 60}, "at least 360 (60.0 %) stay. What stands in the way is least=60: without it"),
        ({"macs": 0.5}, {"least": 60, "cap": 0.4}, "The limits stand in the way together: least, cap."),
        ({"macs": 0.5}, {"least": 9, "cap": 0.4}, "What stands in the way is cap=0.4: without it there is a plan."),
        ({"params": 0.5}, {"keep": ["0"], "least": 9}, "at least 702 (100.0 %) stay. What stands in the way is keep="),
        ({"macs": 0.9, "bytes": 0.1}, {"cap": 0.4}, "the budget of 280 (10.0 %) of 2,808 bytes cannot be met"),
    ],
)  # fmt: skip
def test_what_stands_in_the_way_is_said(asked, given, sentence):
    with pytest.raises(PlanError, match=re.escape(sentence)):
        allocate(two_layers(), GlobalRanking(), budget=Budget(**asked), limits=Limits(**given))


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, "the budget is empty; say what may be left of params, macs, bytes, units"),
        ({"macs": 0.0}, "the budget for macs is 0.0; give a share above 0 and up to 1.0, or a count as an int"),
        ({"macs": 1.5}, "the budget for macs is 1.5"),
        ({"params": 0}, "the budget for params is 0"),
        ({"bytes": True}, "the budget for bytes is True"),
        ({"bytes": "1 MB"}, "the budget for bytes is '1 MB'"),
    ],
)
def test_budgets_that_cannot_be(asked, sentence):
    with pytest.raises(PlanError, match=re.escape(sentence)):
        Budget(**asked)


def test_how_much_is_said_once():
    scores, budget = two_layers(), Budget(macs=0.5)
    with pytest.raises(PlanError, match=r"Uniform\(0\.3\) says how much goes, and so does the budget"):
        allocate(scores, Uniform(0.3), budget=budget)
    with pytest.raises(PlanError, match=r"Uniform\(\) needs a budget, .* or a share, as in Uniform\(0\.5\)"):
        allocate(scores, Uniform())
    with pytest.raises(PlanError, match=r"GlobalRanking\(\) needs a budget, such as budget=sc\.Budget\(macs=0\.5\)"):
        allocate(scores, GlobalRanking())
    with pytest.raises(PlanError, match=r"Knapsack\(\) needs a budget"):
        allocate(scores, Knapsack())
    with pytest.raises(PlanError, match="there are two budgets; put them into one"):
        allocate(scores, budget, budget=budget)


def test_strategies_of_the_callers_own_are_held_to_limits_and_budget():
    scores = two_layers()
    assert len(allocate(scores, lambda problem: [30], limits=Limits(multiple=8)).keep[0]) == 32
    assert len(allocate(scores, lambda problem: [0]).keep[0]) == 1
    with pytest.raises(PlanError, match=r"leaves 480 \(80\.0 %\), and the budget is 300 \(50\.0 %\) of 600 MACs"):
        allocate(scores, lambda problem: [80], budget=Budget(macs=0.5))
    with pytest.raises(PlanError, match="gave 2 counts of units, and the model has 1 groups"):
        allocate(scores, lambda problem: [80, 80])


def test_a_model_without_groups_has_the_empty_plan():
    groups = find_groups(nn.Linear(4, 2), torch.zeros(1, 4))
    nothing = Scores(groups, ())
    for strategy in STRATEGIES:
        assert allocate(nothing, strategy, budget=Budget(macs=1.0)).keep == ()
    with pytest.raises(PlanError, match="too much of the model cannot be cut"):
        allocate(nothing, Budget(macs=0.5))
