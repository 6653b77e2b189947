"""Functions that make groups comparable and slots one number, against slow replicas of their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import networks
from secateur.errors import PlanError, UnknownName
from secateur.graph.groups import find_groups
from secateur.graph.slots import Group
from secateur.score.combining import Combine, first, largest, mean, product, total
from secateur.score.magnitude import Magnitude
from secateur.score.scaling import Scale, by_max, by_mean, gaussian, lamp, none
from secateur.score.scoring import score

GROUP = Group("conv", 5, ())
SCALES: tuple[Scale, ...] = (by_mean, by_max, gaussian, lamp)
VALUES = st.lists(st.just(0.0) | st.floats(1e-100, 1e100), min_size=1, max_size=12)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slow_lamp(values: list[float]) -> list[float]:
    squares = [v * v for v in values]
    return [s / left if (left := sum(t for t in squares if t >= s)) else 0.0 for s in squares]


def test_each_scale_is_its_formula() -> None:
    values = [3.0, 0.5, 2.0, 2.0, 4.5]
    average = sum(values) / 5
    deviation = math.sqrt(sum((v - average) ** 2 for v in values) / 5)
    formulas = ([v / average for v in values], [v / 4.5 for v in values], [(v - average) / deviation for v in values])
    for scale, wanted in zip(SCALES, (*formulas, slow_lamp(values)), strict=True):
        torch.testing.assert_close(scale(tensor(values), GROUP), tensor(wanted))
    assert torch.equal(none(tensor(values), GROUP), tensor(values))


@given(VALUES)
def test_lamp_is_the_slow_formula_for_any_scores(values: list[float]) -> None:
    torch.testing.assert_close(lamp(tensor(values), GROUP), tensor(slow_lamp(values)), rtol=1e-9, atol=1e-9)


@given(VALUES)
def test_no_scale_changes_an_order_within_a_group(values: list[float]) -> None:
    given = tensor(values)
    for scale in SCALES:
        scaled = scale(given, GROUP)
        assert bool(scaled.isfinite().all())
        assert bool((scaled[given.argsort()].diff() >= 0).all())


@pytest.mark.parametrize("scale", SCALES)
def test_scales_survive_groups_without_any_difference(scale: Scale) -> None:
    for values in ([0.0, 0.0], [0.1, 0.1, 0.1], [7.0]):
        scaled = scale(tensor(values), GROUP)
        assert bool(scaled.isfinite().all())
        assert len(set(scaled.tolist())) == 1


@pytest.mark.parametrize("scale", [by_mean, by_max, lamp])
def test_shares_of_scores_below_zero_are_refused(scale: Scale) -> None:
    with pytest.raises(PlanError, match=r"group 'conv' go down to -1, and shares .* scale=gaussian takes any"):
        scale(tensor([1.0, -1.0]), GROUP)


def test_score_scales_each_group_by_itself() -> None:
    model = networks.build(networks.NETWORKS[1])
    groups = find_groups(model, networks.image()())
    plain, scaled = score(model, groups, Magnitude()), score(model, groups, Magnitude(), scale=by_mean)
    for before, after in zip(plain.values, scaled.values, strict=True):
        torch.testing.assert_close(after, before / before.mean())
    seen = score(model, groups, Magnitude(), lambda values, group: values * group.size)
    assert torch.equal(seen.values[1], plain.values[1] * 6)


def test_bad_answers_of_a_scale_are_refused() -> None:
    model = networks.build(networks.NETWORKS[1])
    groups = find_groups(model, networks.image()())
    with pytest.raises(PlanError, match=r"the scale gave scores of shapes \[\(\), \(\)\], but one value per unit"):
        score(model, groups, Magnitude(), lambda values, group: values.sum())
    with pytest.raises(PlanError, match=r"the scale gave scores that are not finite for group 'stem'"):
        score(model, groups, Magnitude(), lambda values, group: values / 0)


def test_groups_of_another_model_are_refused() -> None:
    groups = find_groups(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.zeros(1, 4))
    with pytest.raises(PlanError, match=r"another model: 0.weight is \(5, 4\) here and \(3, 4\) there"):
        score(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), groups, Magnitude())
    with pytest.raises(PlanError, match=r"another model: 1.weight is missing here and \(2, 3\) there"):
        score(nn.Sequential(nn.Linear(4, 3)), groups, Magnitude())


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, math.inf])
@pytest.mark.parametrize(
    ("combine", "of_two"),
    [
        (total, lambda a, b: a + b),
        (mean, lambda a, b: (a + b) / 2),
        (largest, max),
        (product, lambda a, b: a * b),
        (first, lambda a, b: a),
        (lambda rows: rows[-1], lambda a, b: b),
    ],
)
def test_magnitude_combines_what_a_unit_has_in_each_tensor(p: float, combine: Combine, of_two: object) -> None:
    model = networks.build(networks.NETWORKS[1]).double()
    groups = find_groups(model, networks.image()().double())
    values = score(model, groups, Magnitude(p, combine=combine)).values[0]
    rows = [weight.detach().flatten(1) for weight in (model.stem.weight, model.b.weight)]
    norms = [torch.linalg.vector_norm(row, p, dim=1).tolist() for row in rows]
    torch.testing.assert_close(values, tensor([of_two(a, b) for a, b in zip(*norms)]))  # type: ignore[operator]


@pytest.mark.parametrize("p", [1.0, 30.0, 300.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_of_any_order_keep_their_range(p: float, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2))
    groups = find_groups(model, torch.zeros(1, 4))
    weight = torch.tensor([[1e-3, -2e-3, 0, 1e-3], [0, 0, 0, 0], [1e-9, 1e-9, 0, -2e-9]], dtype=dtype)
    model = model.to(dtype)
    model[0].weight.data.copy_(weight)
    wide = weight.double().abs()
    top = wide.amax(1, keepdim=True)
    wanted = top[:, 0] * torch.linalg.vector_norm(wide / top.clamp(min=1e-300), p, dim=1)
    torch.testing.assert_close(score(model, groups, Magnitude(p)).values[0], wanted, rtol=1e-6, atol=0)


def test_running_statistics_are_no_weights() -> None:
    model = networks.build(networks.NETWORKS[1])
    groups = find_groups(model, networks.image()())
    scale = score(model, groups, Magnitude(roles=("scale",))).values[0]
    wanted = sum(t.detach().abs() for t in (model.stem.bias, model.b.bias, model.norm.weight, model.norm.bias))
    torch.testing.assert_close(scale, wanted.double())


def test_a_role_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UnknownName, match=r"unknown role 'wrote'; did you mean 'write'\?"):
        Magnitude(roles=("wrote",))
