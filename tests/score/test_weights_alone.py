"""Criteria that look at weights alone: batch norm's scale and the distance to the median, against slow replicas."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import networks
from secateur.errors import PlanError, UnknownName
from secateur.graph.groups import find_groups
from secateur.score import median
from secateur.score.batch_norm import BatchNormScale
from secateur.score.combining import largest
from secateur.score.magnitude import Magnitude
from secateur.score.median import Median
from secateur.score.scoring import score
from secateur.surgery.shuffle import shaken


def residual() -> nn.Module:
    return networks.build(networks.NETWORKS[1]).double()


class TwoNorms(nn.Sequential):
    """A convolution with two batch norms behind it, and a group norm, which is none."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.SyncBatchNorm(6), nn.GroupNorm(3, 6),
            nn.Conv2d(6, 2, 3),
        )  # fmt: skip


def test_batch_norm_scale_is_gamma() -> None:
    model = shaken(networks.build(networks.NETWORKS[3]), 0)
    groups = find_groups(model, networks.image()())
    model.norm.weight.data.neg_()
    values = score(model, groups, BatchNormScale(otherwise=Magnitude())).values
    gamma = model.norm.weight.detach().double().abs()
    assert torch.equal(torch.cat(values[:2]), gamma)  # a and b meet in one batch norm
    assert torch.equal(values[2], score(model, groups, Magnitude()).values[2])


def test_gammas_of_several_places_and_batch_norms_are_combined() -> None:
    model = shaken(TwoNorms().eval(), 0)
    groups = find_groups(model, networks.image()())
    a, b = (model[i].weight.detach().double().reshape(3, 2).mean(1) for i in (1, 3))
    torch.testing.assert_close(score(model, groups, BatchNormScale()).values[0], (a + b) / 2)
    torch.testing.assert_close(score(model, groups, BatchNormScale(combine=largest)).values[0], torch.maximum(a, b))


def test_a_group_without_batch_norm_needs_another_criterion() -> None:
    model = residual()
    groups = find_groups(model, networks.image()().double())
    with pytest.raises(PlanError, match=r"no batch norm scales the units of group 'a', .* give otherwise="):
        score(model, groups, BatchNormScale())
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 3)).eval()
    with pytest.raises(PlanError, match=r"no batch norm scales the units of group '0'"):
        score(plain, find_groups(plain, networks.image()()), BatchNormScale())


def test_the_other_criterion_is_not_asked_where_all_have_batch_norm() -> None:
    model = TwoNorms().eval()
    groups = find_groups(model, networks.image()())

    def fail(model: nn.Module, groups: object) -> list[Tensor]:
        raise AssertionError

    assert score(model, groups, BatchNormScale(otherwise=fail)).values[0].tolist() == [1.0] * 3


def slow_median(rows: Tensor) -> Tensor:
    return torch.stack([torch.stack([(a - b).square().sum().sqrt() for b in rows]).sum() for a in rows])


def test_median_against_a_slow_replica() -> None:
    model = residual()
    groups = find_groups(model, networks.image()().double())
    values = score(model, groups, Median()).values
    made = torch.cat([weight.detach().flatten(1) for weight in (model.stem.weight, model.b.weight)], 1)
    torch.testing.assert_close(values[0], slow_median(made))
    torch.testing.assert_close(values[1], slow_median(model.a.weight.detach().flatten(1)))


def test_roles_choose_the_vectors_of_the_median() -> None:
    model = residual()
    groups = find_groups(model, networks.image()().double())
    read = score(model, groups, Median(roles=("read",))).values[1]
    torch.testing.assert_close(read, slow_median(model.b.weight.detach().transpose(0, 1).flatten(1)))
    with pytest.raises(UnknownName, match="unknown role 'reads'"):
        Median(roles=("reads",))


def test_heads_are_vectors_of_all_their_rows() -> None:
    model = networks.build(networks.NETWORKS[12]).double()
    groups = find_groups(model, networks.NETWORKS[12].inputs().double())
    weight = model.qkv.weight.detach().reshape(3, 4, 4, 6)  # q, k, v; heads; width; inputs
    torch.testing.assert_close(score(model, groups, Median()).values[0], slow_median(weight.transpose(0, 1).flatten(1)))


def test_pieces_do_not_change_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    model = residual()
    groups = find_groups(model, networks.image()().double())
    whole = score(model, groups, Median()).values
    monkeypatch.setattr(median, "TABLE", 17)
    monkeypatch.setattr(median, "ENTRIES", 9)
    for one, other in zip(whole, score(model, groups, Median()).values, strict=True):
        torch.testing.assert_close(one, other)


def test_units_that_are_alike_and_far_from_zero_are_at_no_distance() -> None:
    model = nn.Sequential(nn.Linear(50, 6), nn.Linear(6, 2))
    groups = find_groups(model, torch.zeros(1, 50))
    model[0].weight.data.copy_(torch.full((6, 50), 1000.0))
    model[0].weight.data[5, 0] += 1
    assert score(model, groups, Median()).values[0].tolist() == pytest.approx([1.0] * 5 + [5.0], abs=1e-5)


def test_the_median_needs_no_memory_for_all_pairs_of_weights() -> None:
    """2,048 units with 512 weights each: all pairs at once would be 17 GB."""
    model = nn.Sequential(nn.Linear(512, 2048, bias=False), nn.Linear(2048, 1))
    groups = find_groups(model, torch.zeros(1, 512))
    values = score(model, groups, Median()).values[0]
    weight = model[0].weight.detach().double()
    for unit in (0, 1033):
        assert values[unit].item() == pytest.approx((weight - weight[unit]).norm(dim=1).sum().item(), rel=1e-6)
    assert not any(a == b for a, b in pairwise(values.tolist()))
