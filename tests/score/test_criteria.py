"""Criteria against slow replicas of their formulas, and what every criterion must obey."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import networks
from secateur.errors import PlanError
from secateur.graph.groups import find_groups
from secateur.graph.rebuild import rebuild
from secateur.score.magnitude import Magnitude
from secateur.score.random import Random
from secateur.score.scoring import score


def residual() -> nn.Module:
    return networks.build(networks.NETWORKS[1])


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, math.inf])
def test_magnitude_against_a_slow_replica(p: float) -> None:
    model = residual()
    groups = find_groups(model, networks.image()())
    values = score(model, groups, Magnitude(p)).values
    for unit in range(8):  # the stream is made by the stem and by the block's second convolution
        made_by = (model.stem.weight.detach(), model.b.weight.detach())
        weights = [abs(float(w)) for tensor in made_by for w in tensor[unit].flatten()]
        norm = max(weights) if math.isinf(p) else sum(w**p for w in weights) ** (1 / p)
        assert values[0][unit].item() == pytest.approx(norm, rel=1e-5)


def test_roles_choose_whose_weights_count() -> None:
    model = residual()
    groups = find_groups(model, networks.image()())
    read = score(model, groups, Magnitude(1, roles=("read",))).values[1]
    torch.testing.assert_close(read, model.b.weight.detach().abs().sum((0, 2, 3)).double())
    assert not torch.allclose(read, score(model, groups, Magnitude(1)).values[1])


def test_units_of_a_flattened_map_count_all_their_columns() -> None:
    model = networks.build(networks.NETWORKS[0])
    groups = find_groups(model, networks.image()())
    read = score(model, groups, Magnitude(1, roles=("read",))).values[1]
    torch.testing.assert_close(read, model[8].weight.detach().abs().sum(0).reshape(6, 4).sum(1).double())


@pytest.mark.parametrize("criterion", [Magnitude(1), Magnitude(2, roles=("write", "read", "scale"))])
def test_scores_move_with_the_units(criterion: Magnitude) -> None:
    model = residual()
    groups = find_groups(model, networks.image()())
    order = torch.tensor([5, 2, 7, 0, 1, 4, 3, 6])
    tensors = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    for slot in groups.groups[0].slots:
        tensors[slot.tensor] = tensors[slot.tensor].index_select(slot.dim, order)
    moved = score(rebuild(model, tensors, {}), groups, criterion).values[0]
    torch.testing.assert_close(moved, score(model, groups, criterion).values[0][order])


def test_random_depends_on_its_seed_only() -> None:
    model = residual()
    groups = find_groups(model, networks.image()())
    first, again, other = (score(model, groups, Random(seed)).values for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))


def test_a_function_of_the_callers_own() -> None:
    model = residual()
    groups = find_groups(model, networks.image()())
    scores = score(model, groups, lambda m, g: [torch.arange(group.size) for group in g.groups])
    assert scores.values[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert scores.values[1].dtype is torch.float64


def test_bad_answers_of_a_criterion_are_refused() -> None:
    model = residual()
    groups = find_groups(model, networks.image()())
    with pytest.raises(PlanError, match=r"one value per unit is needed: \[\(8,\), \(6,\)\]"):
        score(model, groups, lambda m, g: [torch.zeros(3)])
    with pytest.raises(PlanError, match=r"not finite for group 'stem'"):
        score(model, groups, lambda m, g: [torch.full((group.size,), math.nan) for group in g.groups])
    with pytest.raises(PlanError, match=r"order of a norm must be above 0, and 0 is not"):
        Magnitude(0)


def test_model_is_untouched_by_scoring() -> None:
    model = residual()
    groups = find_groups(model, networks.image()())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(model, groups, Magnitude())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
