"""Criteria that look at images without labels, against slow replicas of their formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import networks
from secateur.errors import PlanError
from secateur.graph.groups import find_groups
from secateur.graph.rebuild import rebuild
from secateur.score.activation import Activation, magnitude, mean_square, nonzero, variance
from secateur.score.brain_surgeon import BrainSurgeon
from secateur.score.energy import Energy
from secateur.score.reconstruction import Reconstruction
from secateur.score.scoring import Criterion, score

Make = Callable[[Sequence[Tensor]], Criterion]

ALL: tuple[Make, ...] = (
    Activation,
    lambda batches: Activation(batches, mean_square),
    lambda batches: Activation(batches, variance),
    lambda batches: Activation(batches, nonzero),
    Energy,
    lambda batches: Energy(batches, centred=True),
    Reconstruction,
    BrainSurgeon,
    lambda batches: BrainSurgeon(batches, in_order=True),
)


def residual() -> nn.Module:
    return networks.build(networks.NETWORKS[1]).double()


def pair(inputs: int = 6, units: int = 5, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, units), nn.ReLU(), nn.Linear(units, outputs)).double()


def images(count: int = 12, seed: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vectors(count: int = 40, width: int = 6) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def scored(model: nn.Module, criterion: Criterion, example: Tensor) -> tuple[Tensor, ...]:
    return score(model, find_groups(model, example), criterion).values


def test_activations_are_the_means_over_readers() -> None:
    model, x = residual(), images()
    stem = model.stem(x)
    inner = torch.relu(model.a(stem)).detach()
    stream = torch.relu(stem + model.norm(model.b(inner))).mean((2, 3)).detach()
    stem = stem.detach()
    slow: dict[object, Callable[[Tensor], Tensor]] = {
        magnitude: lambda rows: rows.abs().mean(0),
        mean_square: lambda rows: rows.square().mean(0),
        variance: lambda rows: rows.var(0, correction=0),
        nonzero: lambda rows: (rows != 0).double().mean(0),
    }
    for statistic, replica in slow.items():
        both, alone = scored(model, Activation(list(x.split(5)), statistic), x[:1])  # type: ignore[arg-type]
        maps = [replica(values.movedim(1, -1).flatten(0, -2)) for values in (stem, stream, inner)]
        torch.testing.assert_close(alone, maps[2])
        torch.testing.assert_close(both, (maps[0] + maps[1]) / 2)


def test_energy_is_what_the_output_loses_with_the_unit() -> None:
    model, x = residual(), images()
    values = scored(model, Energy(list(x.split(5))), x[:1])[1]
    centred = scored(model, Energy([x], centred=True), x[:1])[1]
    inner = torch.relu(model.a(model.stem(x)))
    whole = model.norm(model.b(inner))
    for unit in range(6):
        without = inner.clone()
        without[:, unit] = 0
        lost = (whole - model.norm(model.b(without))).detach()
        assert values[unit].item() == pytest.approx(lost.square().sum(1).mean().item(), rel=1e-9)
        spread = lost.var((0, 2, 3), correction=0).sum().item()
        assert centred[unit].item() == pytest.approx(spread, rel=1e-9)


def test_energy_of_one_column_is_mean_square_times_squared_weights() -> None:
    model, x = pair(), vectors()
    hidden = model[1](model[0](x)).detach()
    expected = hidden.square().mean(0) * model[2].weight.detach().square().sum(0)
    torch.testing.assert_close(scored(model, Energy([x]), x[:1])[0], expected)


def test_energy_adds_up_over_readers() -> None:
    model, x = residual(), images()
    values = scored(model, Energy([x]), x[:1])[0]
    stem = model.stem(x)
    pooled = torch.relu(stem + model.norm(model.b(torch.relu(model.a(stem))))).mean((2, 3))
    for unit in (0, 7):
        lone = torch.zeros_like(stem)
        lone[:, unit] = stem[:, unit]
        by_conv = (model.a(lone) - model.a.bias[:, None, None]).square().sum(1).mean()
        by_head = pooled[:, unit].square().mean() * model.head.weight[:, unit].square().sum()
        assert values[unit].item() == pytest.approx((by_conv + by_head).item(), rel=1e-9)


def test_reconstruction_is_what_a_regression_leaves() -> None:
    model, x = pair(), vectors()
    values = scored(model, Reconstruction([x], damping=1e-12), x[:1])[0]
    hidden = model[1](model[0](x)).detach()
    for unit in range(5):
        rest = [u for u in range(5) if u != unit]
        features = torch.cat([hidden[:, rest], torch.ones(len(x), 1, dtype=torch.float64)], 1)
        fitted = features @ torch.linalg.lstsq(features, hidden[:, [unit]]).solution
        left = (hidden[:, unit] - fitted[:, 0]).square().mean() * model[2].weight[:, unit].square().sum()
        assert values[unit].item() == pytest.approx(left.item(), rel=1e-6)


def solved(rows: Tensor, outputs: Tensor, gone: Sequence[int]) -> float:
    """The least mean squared error of `outputs` from `rows` without some columns."""
    left = rows[:, [c for c in range(rows.shape[1]) if c not in gone]]
    return float((outputs - left @ torch.linalg.lstsq(left, outputs).solution).square().sum(1).mean())


def test_brain_surgeon_is_the_least_error_without_the_unit() -> None:
    model, x = pair(), vectors()
    hidden = model[1](model[0](x)).detach()
    outputs = hidden @ model[2].weight.detach().T
    values = scored(model, BrainSurgeon([x], damping=1e-12), x[:1])[0]
    for unit in range(5):
        assert values[unit].item() == pytest.approx(solved(hidden, outputs, [unit]), rel=1e-6)


def test_brain_surgeon_takes_a_unit_with_its_whole_kernel() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 2, bias=False)).double()
    x = images()
    patches = nn.functional.unfold(model[1](model[0](x)), 2).transpose(1, 2).flatten(0, 1).detach()
    outputs = patches @ model[2].weight.detach().flatten(1).T
    values = scored(model, BrainSurgeon([x], damping=1e-12), x[:1])[0]
    for unit in range(4):
        lost = solved(patches, outputs, range(4 * unit, 4 * unit + 4))
        assert values[unit].item() == pytest.approx(lost, rel=1e-6)


def test_in_order_prices_are_those_of_the_rest_solved_anew() -> None:
    model, x = pair(units=6), vectors()
    hidden = model[1](model[0](x)).detach()
    outputs = hidden @ model[2].weight.detach().T
    values = scored(model, BrainSurgeon([x], damping=1e-12, in_order=True), x[:1])[0]
    gone: list[int] = []
    paid = before = 0.0
    while len(gone) < 6:
        errors = {unit: solved(hidden, outputs, [*gone, unit]) for unit in range(6) if unit not in gone}
        unit = min(errors, key=lambda u: errors[u])
        paid = max(paid, errors[unit] - before)
        assert values[unit].item() == pytest.approx(paid, rel=1e-5, abs=1e-12)
        before = errors[unit]
        gone.append(unit)
    assert [float(values[unit]) for unit in gone] == sorted(values.tolist())


def test_of_two_equal_units_one_is_free_and_then_the_other_is_not() -> None:
    model, x = pair(), vectors()
    model[0].weight.data[1], model[0].bias.data[1] = model[0].weight.data[0], model[0].bias.data[0]
    alone = scored(model, BrainSurgeon([x], damping=1e-9), x[:1])[0]
    ordered = scored(model, BrainSurgeon([x], damping=1e-9, in_order=True), x[:1])[0]
    assert alone[:2].max() < 1e-6 * alone[2:].max()
    assert ordered[:2].min() < 1e-6 * ordered[2:].max()
    assert ordered[:2].max() > 1e-3 * ordered[2:].max()


@pytest.mark.parametrize("make", ALL)
def test_data_scores_move_with_the_units(make: Make) -> None:
    model, batches = residual(), [images(), images(5, seed=8)]
    groups = find_groups(model, batches[0])
    order = torch.tensor([5, 2, 7, 0, 1, 4, 3, 6])
    tensors = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    for slot in groups.groups[0].slots:
        tensors[slot.tensor] = tensors[slot.tensor].index_select(slot.dim, order)
    moved = score(rebuild(model, tensors, {}), groups, make(batches)).values
    still = score(model, groups, make(batches)).values
    torch.testing.assert_close(moved[0], still[0][order])
    torch.testing.assert_close(moved[1], still[1])


@pytest.mark.parametrize("make", ALL)
def test_data_criteria_leave_the_model_as_found(make: Make) -> None:
    model, x = residual().train(), images()
    before = copy.deepcopy(model.state_dict())
    scored(model, make([x]), x[:1])
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("net", networks.NETWORKS, ids=lambda net: getattr(net.make, "__name__", "net"))
def test_data_criteria_score_every_network(net: networks.Net, make: Make) -> None:
    model, inputs = networks.build(net), net.inputs()
    values = score(model, find_groups(model, inputs), make([inputs])).values
    assert [len(of_group) for of_group in values] == list(net.sizes)
    assert all(bool((of_group >= -1e-9).all()) for of_group in values)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(PlanError, match=r"the damping is 0; give a share above 0, usually 0.01"):
        BrainSurgeon([], damping=0)
    with pytest.raises(PlanError, match=r"the damping is -1; give a share above 0, such as"):
        Reconstruction([], damping=-1)
