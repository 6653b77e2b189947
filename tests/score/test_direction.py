"""`Direction` against replicas in float64 that cut, estimate the statistics anew and measure the error."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import networks
from secateur.allocate.budget import Budget
from secateur.allocate.plan import allocate
from secateur.allocate.ranking import GlobalRanking
from secateur.errors import PlanError
from secateur.graph.groups import find_groups
from secateur.graph.rebuild import rebuild
from secateur.recover.statistics import reset_statistics
from secateur.score.direction import Direction
from secateur.score.scoring import score


def images(count: int = 12, seed: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def residual() -> nn.Module:
    return networks.build(networks.NETWORKS[1]).double()


def scored(model: nn.Module, batches: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return score(model, find_groups(model, batches[0][:1]), Direction(batches)).values


def rows(values: Tensor) -> Tensor:
    """(n, channels, ...) -> (samples, channels)."""
    return values.movedim(1, -1).flatten(0, -2).detach()


def spread(values: Tensor) -> float:
    return float(values.var(0, correction=0).sum())


def without(values: Tensor, gone: Sequence[int]) -> Tensor:
    out = values.clone()
    out[:, list(gone)] = 0
    return out


def in_order(price: Callable[[Sequence[int]], float], size: int) -> tuple[list[float], list[int]]:
    """The scores, and the units in the order in which they go."""
    gone, scores, paid = list[int](), [0.0] * size, 0.0
    while len(gone) < size:
        prices = {unit: price([*gone, unit]) for unit in range(size) if unit not in gone}
        unit = min(prices, key=lambda u: prices[u])
        paid = max(paid, prices[unit] - (price(gone) if gone else 0.0))
        scores[unit] = paid
        gone.append(unit)
    return scores, gone


def test_it_is_the_error_after_statistics_are_estimated_anew() -> None:
    model, x = residual(), images()
    stem = model.stem(x)
    inner = torch.relu(model.a(stem))
    whole = rows(model.norm(model.b(inner)))
    stream = rows(stem + model.norm(model.b(inner)))

    def price(gone: Sequence[int]) -> float:
        left = rows(model.norm(model.b(without(inner, gone))))
        mean, deviation = left.mean(0), left.std(0, correction=0)
        # No channel is left at the end: nothing is given on.
        again = (left - mean) * (whole.std(0, correction=0) / deviation) if len(gone) < 6 else 0.0
        error = whole - whole.mean(0) - again
        lost = float(error.square().mean(0).sum()) if len(gone) < 6 else 2 * spread(whole)
        return lost / (spread(whole) * spread(stream)) ** 0.5

    expected, order = in_order(price, 6)
    values = scored(model, list(x.split(5)))[1]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-10)
    assert [float(values[u]) for u in order] == sorted(values.tolist())


def test_without_batch_norm_it_is_the_error_as_it_is_summed_over_readers() -> None:
    model, x = residual(), images()
    stem = model.stem(x)
    by_conv = rows(model.a(stem))
    pooled = torch.relu(stem + model.norm(model.b(torch.relu(model.a(stem))))).mean((2, 3))
    by_head = rows(model.head(pooled))

    def price(gone: Sequence[int]) -> float:
        lost = 0.0
        for whole, left in (
            (by_conv, rows(model.a(without(stem, gone)))),
            (by_head, rows(model.head(without(pooled, gone)))),
        ):
            lost += float((whole - left).square().mean(0).sum()) / spread(whole)
        return lost

    expected, _ = in_order(price, 8)
    torch.testing.assert_close(scored(model, [x])[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)


def test_it_is_what_the_outputs_of_a_cut_model_show() -> None:
    """One reader, its statistics really set anew by `reset_statistics`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5)).double()
    x = images(20)
    reset_statistics(model.eval(), [x])
    values = scored(model, [x])[0]
    unit = int(values.argmin())
    cut = copy.deepcopy(model)
    with torch.no_grad():
        cut[2].weight[:, unit] = 0
    reset_statistics(cut, [x])
    error = rows(model(x) - cut(x)).square().mean(0).sum()
    assert float(values[unit]) == pytest.approx(float(error) / spread(rows(model(x))), rel=1e-3)  # eps, n - 1


def test_of_two_equal_units_the_first_to_go_is_cheap_and_the_other_is_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3)).double().eval()
    model[0].weight.data[1], model[0].bias.data[1] = model[0].weight.data[0], model[0].bias.data[0]
    with torch.no_grad():
        model[2].weight[:, 1] = model[2].weight[:, 0]
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    first, second = scored(model, [x])[0][:2].sort().values
    assert second > 2 * first > 0


def test_a_reader_whose_weights_come_from_the_batch_counts_by_its_products() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x) + (self.a(x) @ self.b(x).mT).mean(-1, keepdim=True)

    torch.manual_seed(0)
    model = Gated().double()
    x = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    values = score(model, find_groups(model, x), Direction([x[:3], x[3:]])).values
    assert [len(of_group) for of_group in values] == [4]
    assert bool((values[0] > 0).all())


def test_batches_do_not_matter() -> None:
    model, x = residual(), images(13)
    for one, other in zip(scored(model, [x]), scored(model, list(x.split(4)))):
        torch.testing.assert_close(one, other)


def test_scores_move_with_the_units() -> None:
    model, batches = residual(), [images(), images(5, seed=8)]
    groups = find_groups(model, batches[0])
    order = torch.tensor([5, 2, 7, 0, 1, 4, 3, 6])
    tensors = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    for slot in groups.groups[0].slots:
        tensors[slot.tensor] = tensors[slot.tensor].index_select(slot.dim, order)
    moved = score(rebuild(model, tensors, {}), groups, Direction(batches)).values
    still = score(model, groups, Direction(batches)).values
    torch.testing.assert_close(moved[0], still[0][order])
    torch.testing.assert_close(moved[1], still[1])


def test_units_that_are_never_active_go_first_and_for_nothing() -> None:
    model, x = residual(), images()
    with torch.no_grad():
        model.a.weight[2], model.a.bias[2] = 0, -1.0
    values = scored(model, [x])[1]
    assert values[2] == pytest.approx(0, abs=1e-12)
    assert int(values.argmin()) == 2


def test_a_model_that_is_the_same_for_all_images_has_scores_of_zero() -> None:
    model = residual()
    x = torch.zeros(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        model.stem.weight.zero_()
    values = scored(model, [x])
    assert all(bool(of_group.isfinite().all()) for of_group in values)


def test_the_model_is_left_as_found() -> None:
    model, x = residual().train(), images()
    before = copy.deepcopy(model.state_dict())
    scored(model, [x])
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("net", networks.NETWORKS, ids=lambda net: getattr(net.make, "__name__", "net"))
def test_every_network_is_scored_and_ranked_per_cost(net: networks.Net) -> None:
    model, inputs = networks.build(net), net.inputs()
    scores = score(model, find_groups(model, inputs), Direction([inputs]))
    assert [len(of_group) for of_group in scores.values] == list(net.sizes)
    assert all(bool((of_group >= 0).all()) for of_group in scores.values)
    share = 0.9 if net.sizes else 1.0
    plan = allocate(scores, GlobalRanking(per_cost=True), budget=Budget(params=share))
    assert plan.params_left <= share * scores.groups.params


def test_no_batch_is_refused() -> None:
    model = residual()
    groups = find_groups(model, images(1))
    with pytest.raises(PlanError, match=r"there are no batches to score the units by"):
        score(model, groups, Direction([]))
