"""Weights chosen by optimal brain surgery and solved: slow replicas in float64, and what holds on every network."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import networks
import secateur as sc
from secateur.errors import CaptureError, DataError, PlanError, UnknownName
from secateur.graph.nested import map_tensors, tensors_in
from secateur.graph.twin import duplicate, run
from secateur.recover.normal import Affine, Together
from secateur.recover.prune import prune_weights
from secateur.recover.reconstruct import reconstruct
from secateur.recover.surgeon import in_blocks, prices
from secateur.surgery.masks import Masks, find_masks
from secateur.surgery.pattern import find_pattern


def double(net: networks.Net) -> tuple[nn.Module, Any]:
    """A network and more inputs than it comes with, in float64."""
    random = torch.Generator().manual_seed(3)

    def more(x: Tensor) -> Tensor:
        return torch.randn(40, *x.shape[1:], generator=random, dtype=torch.float64)

    return networks.build(net).double(), map_tensors(more, net.inputs())


def named(kind: type[nn.Module]) -> tuple[nn.Module, Any]:
    return double(next(net for net in networks.NETWORKS if net.make is kind))


def error(model: nn.Module, sparse: nn.Module, x: Any) -> float:
    pairs = zip(tensors_in(run(model, x)), tensors_in(run(sparse, x)), strict=True)
    return sum(float((a - b).square().sum()) for a, b in pairs)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def masked(model: nn.Module, masks: Masks) -> nn.Module:
    sparse = duplicate(model)
    masks.apply_(sparse)
    return sparse


def quadratic(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, their raised second moments, and weights."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=random, dtype=torch.float64)
    x = torch.randn(5 * columns, columns, generator=random, dtype=torch.float64) @ mixing
    hessian = x.T @ x / len(x) + 0.01 * torch.eye(columns, dtype=torch.float64)
    return x, hessian, torch.randn(rows, columns, generator=random, dtype=torch.float64)


def cost(w: Tensor, hessian: Tensor, stays: list[int]) -> float:
    """The least (v - w) H (v - w) with v zero but where it stays."""
    v = torch.zeros_like(w)
    if stays:
        v[stays] = torch.linalg.solve(hessian[stays][:, stays], hessian[stays] @ w)
    return float((v - w) @ hessian @ (v - w))


def slow_prices(w: Tensor, hessian: Tensor, parts: list[int], most: int) -> list[float]:
    """Algorithm 1 of Optimal Brain Compression for a row, each candidate solved anew."""
    stays, out, paid, before = list(range(len(w))), [float("inf")] * len(w), 0.0, 0.0
    while True:
        gone = [parts[place] for place in range(len(w)) if place not in stays]
        free = [place for place in stays if gone.count(parts[place]) < most]
        if not free:
            return out
        after = {place: cost(w, hessian, [other for other in stays if other != place]) for place in free}
        place = min(free, key=lambda p: after[p])
        paid = max(paid, after[place] - before)
        out[place], before = paid, after[place]
        stays.remove(place)


@pytest.mark.parametrize(("columns", "of", "most"), [(9, 9, 9), (16, 4, 2), (12, 4, 3), (20, 20, 20)])
def test_prices_are_those_of_solving_anew_for_each_candidate(columns: int, of: int, most: int) -> None:
    _, hessian, weights = quadratic(5, columns)
    parts = torch.arange(columns) % (columns // of)
    found = prices(weights, hessian, parts if most < of else None, most)
    for row, w in zip(found, weights, strict=True):
        assert row.tolist() == pytest.approx(slow_prices(w, hessian, parts.tolist(), most), rel=1e-6)


def test_prices_of_many_rows_are_those_of_each() -> None:
    _, hessian, weights = quadratic(40, 130)
    together = prices(weights, hessian)
    torch.testing.assert_close(together, torch.cat([prices(row[None], hessian) for row in weights]))


def slow_blocks(weights: Tensor, hessian: Tensor, share: float, block: int) -> Tensor:
    """SparseGPT's algorithm 1, column by column, with errors carried on block by block."""
    w, inverse = weights.clone(), torch.linalg.inv(hessian)
    upper = torch.linalg.cholesky(inverse, upper=True)
    columns = w.shape[1]
    stays = torch.ones_like(w)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        costs = w[:, start:end] ** 2 / upper.diagonal()[start:end] ** 2
        limit = costs.flatten().sort().values[round(share * costs.numel()) - 1]
        stays[:, start:end] = (costs > limit).double()
        errors = torch.zeros(len(w), end - start, dtype=w.dtype)
        for j in range(start, end):
            errors[:, j - start] = (1 - stays[:, j]) * w[:, j] / upper[j, j]
            w[:, j:end] -= errors[:, j - start, None] * upper[j, j:end]
        w[:, end:] -= errors @ upper[start:end, end:]
    return stays > 0


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_blocks_are_chosen_as_sparsegpt_does(share: float) -> None:
    _, hessian, weights = quadratic(6, 300)
    found = in_blocks(weights, hessian, share)
    assert torch.equal(found, slow_blocks(weights, hessian, share, 128))


def test_a_choice_weight_by_weight_is_better_than_one_in_blocks_and_than_magnitude() -> None:
    weights = quadratic(4, 60)[2]
    x = torch.randn(300, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * torch.logspace(-1, 1, 60, dtype=torch.float64)
    x[:, 1:] += 0.5 * x[:, :-1].clone()
    hessian = x.T @ x / len(x) + 0.01 * torch.eye(60, dtype=torch.float64)
    gone = round(0.6 * weights.numel())

    def total(stays: Tensor) -> float:
        return sum(cost(w, hessian, row.nonzero().flatten().tolist()) for w, row in zip(weights, stays, strict=True))

    def lowest(values: Tensor) -> Tensor:
        stays = torch.ones(values.numel(), dtype=torch.bool)
        stays[values.flatten().argsort()[:gone]] = False
        return stays.view_as(values)

    one_by_one, magnitude = lowest(prices(weights, hessian)), lowest(weights.abs())
    assert total(one_by_one) < total(in_blocks(weights, hessian, 0.6)) < total(magnitude)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("free", [True, False])
def test_rows_are_solved_each_with_its_own_weights(free: bool, ridge: float) -> None:
    random = torch.Generator().manual_seed(0)
    groups, rows, columns, count = 2, 5, 7, 60
    x, t = (torch.randn(groups, count, n, generator=random, dtype=torch.float64) + 0.5 for n in (columns, rows))
    stays = torch.rand(groups, rows, columns, generator=random) < 0.5
    stays[0, 0], stays[1, 1] = False, True
    start = Affine(torch.randn(groups, rows, columns, generator=random, dtype=torch.float64) * stays, t.mean(1) * 0.1)
    seen = Together()
    seen.add(x[:, :25], t[:, :25])
    seen.add(x[:, 25:], t[:, 25:])
    found = seen.solve(start, ridge, free, stays)
    assert not found.weight[~stays].any()
    for g, r in itertools.product(range(groups), range(rows)):
        own = stays[g, r].nonzero().flatten()
        mean, wanted = (x[g].mean(0), t[g, :, r].mean()) if free else (torch.zeros(columns), start.offset[g, r])
        centred, target = x[g] - mean, t[g, :, r] - wanted
        raised = (ridge * centred.square().mean(0).mean() * count) ** 0.5
        left = torch.cat([centred[:, own], raised * torch.eye(len(own), dtype=torch.float64)])
        right = torch.cat([target, raised * start.weight[g, r, own]])
        want = torch.linalg.lstsq(left, right.unsqueeze(1)).solution.flatten() if len(own) else right[:0]
        torch.testing.assert_close(found.weight[g, r, own], want)
        offset = wanted - want @ mean[own] if free else start.offset[g, r]
        torch.testing.assert_close(found.offset[g, r], offset)


@pytest.mark.parametrize("net", networks.NETWORKS, ids=lambda net: net.make.__name__)
def test_behind_masks_no_layer_has_a_larger_error_and_the_masks_hold(net: networks.Net) -> None:
    model, x = double(net)
    masks, before = find_masks(model, 0.6, scope="layer"), state(model)
    sparse = masked(model, masks)
    for layer in reconstruct(model, sparse, masks, [x], positions=None):
        assert layer.after <= layer.before * (1 + 1e-9) + 1e-12
    assert masks.holds(sparse)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("net", networks.NETWORKS, ids=lambda net: net.make.__name__)
def test_every_network_is_pruned_to_the_weight(net: networks.Net) -> None:
    model, x = double(net)
    before, like = state(model), find_masks(model, 0.7)
    for amount in (0.7, like):
        pruned = prune_weights(model, amount, [x], positions=None)
        assert pruned.masks.names == like.names
        assert pruned.masks.holds(pruned.model)
        assert abs(pruned.masks.table().zeros - like.table().zeros) <= len(like.names)
        if amount is like:
            assert pruned.masks.table() == like.table()
        for layer in pruned.layers:
            assert layer.after <= layer.before * (1 + 1e-9) + 1e-12
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("exact", [10_000, 0])
@pytest.mark.parametrize("kind", [networks.Chain, networks.Residual, networks.Dense], ids=lambda kind: kind.__name__)
def test_of_every_four_weights_in_a_row_two_stay(kind: type[nn.Module], exact: int) -> None:
    model, x = named(kind)
    like = find_pattern(model, 2, 4)
    pruned = prune_weights(model, (2, 4), [x], exact=exact)
    assert pruned.masks.names == like.names
    for name in like.names:
        kept = pruned.masks.keep(name).movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1)
        assert bool((kept == 2).all())
    assert pruned.masks.holds(pruned.model)
    assert pruned.masks != like


@pytest.mark.parametrize("exact", [10_000, 0])
def test_it_is_nearer_to_the_model_than_magnitude(exact: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        networks.conv(3, 12), nn.BatchNorm2d(12), nn.ReLU(), networks.conv(12, 12), nn.BatchNorm2d(12), nn.ReLU(),
        networks.conv(12, 6),
    )  # fmt: skip
    x = torch.randn(96, 3, 8, 8).cumsum(2).cumsum(3) / 4
    with torch.no_grad():
        model.train()(x)
    model.eval()
    new = torch.randn(64, 3, 8, 8).cumsum(2).cumsum(3) / 4
    like = find_masks(model, 0.7)
    raw = masked(model, like)
    solved = duplicate(raw)
    reconstruct(model, solved, like, [x])
    pruned = prune_weights(model, like, [x], exact=exact)
    errors = [error(model, other, new) for other in (pruned.model, solved, raw)]
    assert errors[0] < 0.9 * errors[1] < 0.5 * errors[2]


def test_weights_that_others_can_stand_in_for_go_first_and_cost_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    model[0].weight.data[4:] = 2 * model[0].weight.data[:4]
    model[0].bias.data[4:] = 2 * model[0].bias.data[:4]
    x = torch.randn(100, 3, dtype=torch.float64)
    pruned = prune_weights(model, 0.5, [x], names="2.weight", ridge=1e-12, damping=1e-9)
    assert error(model, pruned.model, x) < 1e-9
    keep = pruned.masks.keep("2.weight")
    assert bool((keep[:, :4] ^ keep[:, 4:]).all())


def test_what_cannot_be_solved_goes_by_magnitude() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), networks.conv(4, 4)).double()
    x = torch.randn(20, 3, 4, 4, dtype=torch.float64)
    pruned = prune_weights(model, 0.5, [x])
    assert pruned.masks.keep("0.weight").equal(find_masks(model, 0.5, names="0.weight").keep("0.weight"))
    assert not pruned.masks.keep("2.weight").equal(find_masks(model, 0.5, names="2.weight").keep("2.weight"))
    assert pruned.model[0].weight[pruned.masks.keep("0.weight")].equal(
        model[0].weight[pruned.masks.keep("0.weight")]
    )
    assert [layer.layer for layer in pruned.layers] == ["2"]


def test_a_norm_behind_masked_weights_has_true_statistics() -> None:
    model, x = named(networks.Residual)
    pruned = prune_weights(model, 0.6, [x], positions=None)
    before = state(pruned.model)
    assert sc.reset_statistics(pruned.model, [x])
    for name, tensor in pruned.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name])


@pytest.mark.parametrize("sizes", [(1,) * 40, (13, 20, 7)])
@pytest.mark.parametrize("held", [8, 0])
def test_how_inputs_are_batched_does_not_matter(sizes: tuple[int, ...], held: int) -> None:
    model, x = named(networks.Chain)
    one = prune_weights(model, 0.5, [x], positions=7)
    other = prune_weights(model, 0.5, x.split(sizes), positions=7, held=held)
    assert one.masks == other.masks
    for a, b in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_an_output_without_any_weight_left_is_a_constant() -> None:
    model, x = named(networks.Chain)
    weight = model[0].weight.data
    weight[2] *= 1e-9
    masks = find_masks(model, float((weight[2].numel()) / weight.numel()), names="0.weight")
    assert not masks.keep("0.weight")[2].any()
    sparse = masked(model, masks)
    reconstruct(model, sparse, masks, [x])
    assert all(bool(tensor.isfinite().all()) for tensor in sparse.state_dict().values())
    assert error(model, sparse, x) < 1e-9


def test_what_is_wrong_is_said() -> None:
    model, x = named(networks.Chain)
    masks = find_masks(model, 0.5)
    with pytest.raises(PlanError, match=r"call masks\.apply_"):
        reconstruct(model, duplicate(model), masks, [x])
    with pytest.raises(PlanError, match="another model"):
        prune_weights(model, find_masks(nn.Linear(2, 2), 0.5), [x])
    with pytest.raises(PlanError, match="out of range"):
        prune_weights(model, 1.0, [x])
    with pytest.raises(PlanError, match="is no pattern"):
        prune_weights(model, (4, 4), [x])
    with pytest.raises(UnknownName, match="no_such"):
        prune_weights(model, 0.5, [x], names="no_such")
    with pytest.raises(PlanError, match="the ridge is"):
        prune_weights(model, 0.5, [x], ridge=-1)
    with pytest.raises(PlanError, match="the damping is"):
        prune_weights(model, 0.5, [x], damping=0)
    with pytest.raises(DataError, match="no batches"):
        prune_weights(model, 0.5, [])
    with pytest.raises(DataError, match="not finite"):
        prune_weights(model, 0.5, [x, x * float("nan")])
    with pytest.raises(CaptureError, match="path"):
        prune_weights(networks.Winding().double(), 0.5, [torch.ones(4, 3).double(), -torch.ones(4, 3).double()])
