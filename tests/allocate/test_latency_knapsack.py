"""Plans for a latency: against every plan there is, within limits, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from secateur.allocate.budget import Budget
from secateur.allocate.latency_knapsack import LatencyKnapsack
from secateur.allocate.limits import Limits
from secateur.allocate.plan import Plan, allocate
from secateur.errors import PlanError
from secateur.graph.costs import Product
from secateur.graph.groups import find_groups
from secateur.graph.records import Groups
from secateur.measure.reasons import why_not_faster
from secateur.measure.table import Conditions, Fit, LatencyTable, LayerTimes, TimedCall
from secateur.score.scoring import Scores

CONDITIONS = Conditions("eager", "eager", "cpu", "test", 1, 1, "float32", "2", 10.0, 0.001)


def chain(*widths: int) -> Groups:
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return find_groups(nn.Sequential(*layers), torch.zeros(1, widths[0]))


def table(groups: Groups, ms, step: int = 1, constant: float = 0.0) -> LatencyTable:
    """`ms(*widths)` is the time of each layer of a chain, at widths rounded up to a multiple of `step`."""
    axes = [tuple(range(a, b)) for a, b in itertools.pairwise(groups.offsets)]
    layers, calls = [], []
    for number, along in enumerate([axes[:1], *([a, b] for a, b in itertools.pairwise(axes)), axes[-1:]]):
        sizes = tuple(map(len, along))
        rows = tuple(tuple(range(1, size + 1)) for size in sizes)
        times = tuple(ms(*(-(-n // step) * step for n in point)) for point in itertools.product(*rows))
        even = ((0.0,) * 5,) * len(sizes), ((1.0,) * 5,) * len(sizes)
        traffic = ((4, tuple(range(len(sizes)))),)
        layers.append(LayerTimes("mm", (), sizes, (1,) * len(sizes), rows, False, times, *even, traffic))
        calls.append(TimedCall(f"layer{number}", number, tuple(along)))
    written = (Product("", 1, (axes[0],)),)
    return LatencyTable(CONDITIONS, groups.offsets[-1], tuple(layers), tuple(calls), written, Fit(1, 0, constant), ())


def product(*widths: int) -> float:
    return float(np.prod(widths))


def drawn(groups: Groups, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.rand(g.size, generator=generator, dtype=torch.float64).square() for g in groups.groups]
    return Scores(groups, tuple(values))


def kept(plan: Plan, scores: Scores) -> float:
    return sum(float(values[list(units)].sum()) for values, units in zip(scores.values, plan.keep))


def best(scores: Scores, times: LatencyTable, most: float) -> float:
    """The largest sum of scores that any plan keeps which is fast enough."""
    sums = [values.sort(descending=True).values.cumsum(0).tolist() for values in scores.values]
    out = 0.0
    for counts in itertools.product(*(range(1, g.size + 1) for g in scores.groups.groups)):
        if times.predict(scores.groups.stays([range(n) for n in counts])) <= most:
            out = max(out, sum(row[n - 1] for row, n in zip(sums, counts)))
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_it_keeps_nearly_as_much_as_the_best_plan(seed: int, step: int, share: float) -> None:
    groups = chain(4, 8, 12, 8, 3)
    scores, times = drawn(groups, seed), table(groups, product, step)
    plan = allocate(scores, LatencyKnapsack(times, share=share))
    assert times.predict(plan) <= share * times.whole_ms
    assert kept(plan, scores) >= 0.96 * best(scores, times, share * times.whole_ms)


def test_widths_end_on_the_steps() -> None:
    groups = chain(4, 32, 48, 32, 3)
    plan = allocate(drawn(groups, 0), LatencyKnapsack(table(groups, product, 8), share=0.5))
    assert all(len(units) % 8 == 0 for units in plan.keep)


def test_a_layer_that_costs_no_time_is_left_alone() -> None:
    groups = chain(4, 16, 16, 16, 3)
    times = table(groups, lambda *widths: 1.0 if len(widths) == 1 else product(*widths))
    free = table(groups, lambda *widths: 1.0)
    scores = drawn(groups, 1)
    assert all(len(units) == 16 for units in allocate(scores, LatencyKnapsack(free, share=1.0)).keep)
    assert any(len(units) < 16 for units in allocate(scores, LatencyKnapsack(times, share=0.5)).keep)


def test_milliseconds_are_a_share_of_the_whole() -> None:
    groups = chain(4, 16, 16, 3)
    scores, times = drawn(groups, 2), table(groups, product, constant=10.0)
    by_share = allocate(scores, LatencyKnapsack(times, share=0.5))
    assert by_share.keep == allocate(scores, LatencyKnapsack(times, ms=0.5 * times.whole_ms)).keep


@pytest.mark.parametrize(
    "limits",
    [Limits(least=5), Limits(multiple=4), Limits(cap=0.5), Limits(keep=["1"]), Limits(tied=[["0", "1"]])],
)
def test_limits_hold(limits: Limits) -> None:
    groups = chain(4, 16, 16, 16, 3)
    times = table(groups, product)
    plan = allocate(drawn(groups, 3), LatencyKnapsack(times, share=0.7), limits=limits)
    counts = [len(units) for units in plan.keep]
    assert times.predict(plan) <= 0.7 * times.whole_ms
    assert min(counts) >= (limits.least if isinstance(limits.least, int) else 1)
    assert min(counts) >= (8 if limits.cap == 0.5 else 1)
    assert all(n % (limits.multiple if isinstance(limits.multiple, int) else 1) == 0 for n in counts)
    assert counts[1] == 16 or not limits.keep
    assert counts[0] == counts[1] or not limits.tied


def test_wide_groups_are_planned_in_multiples() -> None:
    groups = chain(2, 600, 300, 2)
    rows = table(chain(2, 6, 6, 2), product)
    coarse = [LayerTimes(
        "mm", (), sizes, (1,) * len(sizes), tuple((1, size) for size in sizes), False,
        tuple(float(np.prod(p)) for p in itertools.product(*((1, size) for size in sizes))),
        ((0.0,) * 5,) * len(sizes), ((1.0,) * 5,) * len(sizes), (),
    ) for sizes in ((600,), (600, 300), (300,))]  # fmt: skip
    axes = (tuple(range(600)), tuple(range(600, 900)))
    calls = (TimedCall("a", 0, axes[:1]), TimedCall("b", 1, axes), TimedCall("c", 2, axes[1:]))
    times = LatencyTable(CONDITIONS, 900, tuple(coarse), calls, (), rows.fit, ())
    plan = allocate(drawn(groups, 0), LatencyKnapsack(times, share=0.5))
    assert all(len(units) % 8 == 0 or len(units) == group.size for units, group in zip(plan.keep, groups.groups))
    assert 0.45 * times.whole_ms <= times.predict(plan) <= 0.5 * times.whole_ms


def test_what_cannot_be_met_is_refused_with_the_nearest() -> None:
    groups = chain(4, 8, 8, 3)
    times = table(groups, product, constant=40.0)
    with pytest.raises(PlanError, match=r"a latency of 20 ms cannot be met: .* takes 43 ms by the table, 36 % of"):
        allocate(drawn(groups, 0), LatencyKnapsack(times, ms=20.0))
    with pytest.raises(PlanError, match="within the limits that was found takes 64 ms"):
        allocate(drawn(groups, 0), LatencyKnapsack(times, ms=60.0), limits=Limits(cap=0.5))
    with pytest.raises(PlanError, match="cannot be met"):
        allocate(drawn(groups, 0), LatencyKnapsack(times, ms=60.0), limits=Limits(keep=["*"]))


def test_scores_below_zero_go_first() -> None:
    groups = chain(4, 8, 8, 3)
    scores = Scores(groups, tuple(torch.linspace(-1, 1, g.size, dtype=torch.float64) for g in groups.groups))
    plan = allocate(scores, LatencyKnapsack(table(groups, product), share=0.5))
    assert all(min(units) >= 2 for units in plan.keep)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give the latency as ms, in milliseconds, or as share"),
        ({"ms": 1.0, "share": 0.5}, "one of them"),
        ({"ms": 0.0}, "ms is a number of milliseconds above 0, and not 0.0"),
        ({"share": 1.5}, "share is above 0 and up to 1, and not 1.5"),
        ({"share": 0.5, "tries": -1}, "0 or more, and not -1"),
    ],
)
def test_values_out_of_range(given, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        LatencyKnapsack(table(chain(4, 8, 3), product), **given)


def test_another_budget_or_table_is_refused() -> None:
    groups = chain(4, 8, 8, 3)
    with pytest.raises(PlanError, match="says how much goes, and so does the budget"):
        allocate(drawn(groups, 0), LatencyKnapsack(table(groups, product), share=0.5), budget=Budget(macs=0.5))
    with pytest.raises(PlanError, match="the table is of a model with 8 units and this one has 16"):
        allocate(drawn(groups, 0), LatencyKnapsack(table(chain(4, 8, 3), product), share=0.5))


def test_tries_only_help() -> None:
    groups = chain(4, 16, 24, 16, 3)
    for seed in range(5):
        scores, times = drawn(groups, seed), table(groups, product, 4)
        plain, tried = (allocate(scores, LatencyKnapsack(times, share=0.5, tries=n)) for n in (0, 60))
        assert kept(tried, scores) >= kept(plain, scores)


@pytest.mark.parametrize(
    ("ms", "step", "counts", "said"),
    [
        (lambda *w: 5.0 + 0.001 * product(*w), 1, (32, 32), "launch bound: of 6.02"),
        (lambda *w: 1e-5 * product(*w) ** 0.6, 1, (64, 64), "memory bound: it reads 0.0164 MB"),
        (product, 16, (33, 33), "off the step: 48 in place of 33 take"),
    ],
)
def test_the_reason_is_told(ms, step: int, counts: tuple[int, int], said: str) -> None:
    groups = chain(4, 128, 128, 3)
    plan = Plan(groups, tuple(tuple(range(n)) for n in counts))
    lines = why_not_faster(table(groups, ms, step), plan)
    assert f"{100 * plan.macs_left / groups.macs:.0f} % of the MACs" in lines[0]
    assert any(said in line for line in lines[1:])


def test_nothing_is_told_where_time_follows_work() -> None:
    groups = chain(4, 32, 32, 3)
    plan = Plan(groups, (tuple(range(16)), tuple(range(8))))
    assert len(why_not_faster(table(groups, product), plan)) == 1
