"""Penalties against slow loops over units in float64: values, slopes, proximal steps, and their part in a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.allocate.plan import Plan
from secateur.errors import PlanError, TrainingError, UnknownName
from secateur.graph.records import Groups
from secateur.recover.penalties import L1, L2, GroupLasso, Growing, Slimming
from secateur.recover.train import Stage
from training import assert_same_weights, batches, network, one_epoch, plain_epoch


class Net(nn.Module):
    """A residual sum, a split, a grouped and a transposed convolution, and a layer read by places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.head = nn.Linear(4 * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = x + self.norm2(self.second(x))
        return self.head(self.up(self.deep(x)).relu().flatten(1))


def model_and_groups(seed: int = 0) -> tuple[Net, Groups]:
    torch.manual_seed(seed)
    net = Net()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net, sc.find_groups(net, torch.zeros(1, 2, 4, 4))


def half(groups: Groups) -> Plan:
    return Plan(groups, tuple(tuple(range(0, group.size, 2)) for group in groups.groups))


def units(model: nn.Module, groups: Groups, roles: tuple[str, ...], plan: Plan | None) -> Iterator[list[Tensor]]:
    """The weights of each unit, slot by slot."""
    named = dict(model.named_parameters())
    for number, group in enumerate(groups.groups):
        for unit in range(group.size):
            if plan is None or unit not in plan.keep[number]:
                slots = [slot for slot in group.slots if slot.role in roles and slot.tensor in named]
                yield [named[s.tensor].select(s.dim, place) for s in slots for place in s.index[unit]]


def l1(weights: list[Tensor]) -> Tensor:
    return sum(((w.double().abs()).sum() for w in weights), torch.zeros(()))


def l2(weights: list[Tensor]) -> Tensor:
    return sum(((w.double() ** 2).sum() for w in weights), torch.zeros(())) / 2


def lasso(weights: list[Tensor]) -> Tensor:
    return math.sqrt(sum(w.numel() for w in weights)) * (2 * l2(weights)).sqrt()


Slow = Callable[[list[Tensor]], Tensor]
KINDS: tuple[tuple[Any, Slow], ...] = ((L1, l1), (L2, l2), (GroupLasso, lasso))
ROLES = (("write",), ("scale",), ("write", "read"), ("write", "read", "scale"))


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize(("kind", "slow"), KINDS)
def test_values_and_slopes_are_those_of_a_loop_over_units(
    kind: Any, slow: Slow, roles: tuple[str, ...], part: bool
) -> None:
    model, groups = model_and_groups()
    assert {group.size for group in groups.groups} == {6, 4}
    plan = half(groups) if part else None
    found = kind(groups, roles, plan)(model)
    expected = sum(slow(weights) for weights in units(model, groups, roles, plan))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    parameters = list(model.parameters())
    slopes, wanted = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (found, expected))
    for slope, want in zip(slopes, wanted, strict=True):
        assert (slope is None) == (want is None)
        if slope is not None:
            torch.testing.assert_close(slope, want, rtol=1e-5, atol=1e-6)


def test_at_zero_a_unit_has_no_slope() -> None:
    model, groups = model_and_groups()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    for kind in (L1, L2, GroupLasso):
        loss = kind(groups)(model)
        slopes = torch.autograd.grad(loss, [model.first.weight, model.second.weight])
        assert loss.item() == 0
        assert all(not slope.any() for slope in slopes)


@pytest.mark.parametrize("part", [False, True])
def test_slimming_is_the_sum_of_scales(part: bool) -> None:
    model, groups = model_and_groups()
    plan = half(groups) if part else None
    stays = slice(1, None, 2) if part else slice(None)
    penalty = Slimming(groups, plan)
    expected = sum(norm.weight[stays].abs().sum() for norm in (model.norm, model.norm2))
    assert penalty(model).item() == pytest.approx(expected.item(), rel=1e-6)
    before = model.norm.weight.clone()
    penalty.shrink_(model, 0.3)
    soft = before.sign() * (before.abs() - 0.3).clamp(min=0)
    torch.testing.assert_close(model.norm.weight[stays], soft[stays])
    assert not part or torch.equal(model.norm.weight[::2], before[::2])


def test_the_proximal_step_of_group_lasso_takes_whole_units() -> None:
    model, groups = model_and_groups()
    before = [[w.clone() for w in weights] for weights in units(model, groups, ("write",), None)]
    amount = 0.9
    GroupLasso(groups).shrink_(model, amount)
    gone = 0
    for old, new in zip(before, units(model, groups, ("write",), None), strict=True):
        norm, bound = (2 * l2(old)).sqrt(), amount * math.sqrt(sum(w.numel() for w in old))
        factor = max(0.0, 1 - bound / norm.item())
        gone += factor == 0
        for was, now in zip(old, new, strict=True):
            torch.testing.assert_close(now, was * factor, rtol=1e-5, atol=1e-6)
    assert 0 < gone < len(before)


@pytest.mark.parametrize("kind", [L1, L2])
def test_proximal_steps_of_single_weights_are_where_the_slope_is_zero(kind: Any) -> None:
    model, groups = model_and_groups()
    plan = half(groups)
    before = {name: value.clone() for name, value in model.named_parameters()}
    kind(groups, plan=plan).shrink_(model, 0.5)
    was, now = before["second.weight"], model.second.weight
    want = was.sign() * (was.abs() - 0.5).clamp(min=0) if kind is L1 else was / 1.5
    torch.testing.assert_close(now[1::2], want[1::2])
    assert torch.equal(now[::2], was[::2])
    assert torch.equal(model.head.weight, before["head.weight"])


def small() -> tuple[nn.Sequential, Groups]:
    model = network()
    return model, sc.find_groups(network().eval(), batches(1, 1)[0][0])


def test_a_run_adds_it_to_the_loss_with_a_strength_that_grows() -> None:
    (model, groups), (replica, _) = small(), small()
    plan = Plan(groups, ((0, 3),))
    steps = 0

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        nonlocal steps
        strength = min(0.1 * (steps // 2 + 1), 0.15)
        steps += 1
        units = replica[0].weight[[1, 2]].square().sum() / 2
        return nn.functional.cross_entropy(replica(images), labels) + strength * units

    plain = plain_epoch(replica, torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9), loss)
    given = {"penalty": L2(groups, plan=plan), "strength": Growing(0.1, 2, 0.15)}
    assert one_epoch(model, **given) == pytest.approx(plain, rel=1e-6)
    assert_same_weights(model, replica, 1e-5)


def test_a_function_of_ones_own_is_a_penalty() -> None:
    model, replica = network(), network()
    plain = plain_epoch(
        replica,
        torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9),
        lambda x, y: nn.functional.cross_entropy(replica(x), y) + 0.3 * replica[5].weight.abs().sum(),
    )
    assert one_epoch(model, penalty=lambda net: net[5].weight.abs().sum(), strength=0.3) == pytest.approx(plain, 1e-6)
    assert_same_weights(model, replica, 1e-5)


def test_a_proximal_run_steps_and_then_shrinks_by_rate_times_strength() -> None:
    (model, groups), (replica, _) = small(), small()
    lasso = GroupLasso(groups)
    order: list[bool] = []
    plain = plain_epoch(
        replica,
        torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9),
        after=lambda: lasso.shrink_(replica, 0.1 * 2.0),
    )
    given = {"penalty": lasso, "strength": 2.0, "proximal": True}
    found = one_epoch(model, **given, after_step=lambda: order.append(not model[0].weight.flatten(1).any(1).all()))
    assert found == pytest.approx(plain, rel=1e-6)
    assert_same_weights(model, replica, 1e-5)
    assert order[-1]


def test_group_lasso_before_a_cut_makes_the_cut_cost_nothing() -> None:
    model, groups = small()
    sc.fine_tune(
        model,
        lambda epoch: batches(100 + epoch),
        lambda: batches(7, 2),
        [Stage(0.1, 3)],
        penalty=GroupLasso(groups),
        strength=1.0,
        proximal=True,
    )
    zero = (model[0].weight.flatten(1) == 0).all(1)
    assert zero.any()


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda net, groups: L1(groups, ("wrote",)), UnknownName, "unknown role 'wrote'; did you mean 'write'"),
        (
            lambda net, groups: L1(groups, plan=Plan(groups, tuple(tuple(range(g.size)) for g in groups.groups))),
            PlanError,
            "no unit has a weight to penalise",
        ),
        (
            lambda net, groups: L1(groups, plan=half(small()[1])),
            PlanError,
            "the plan of a penalty was made for other groups",
        ),
        (
            lambda net, groups: Slimming(sc.find_groups(nn.Sequential(nn.Linear(2, 256), net.head), torch.zeros(1, 2))),
            PlanError,
            "no unit goes through a batch norm",
        ),
        (lambda net, groups: Growing(0.0, 1, 1.0), TrainingError, "cannot grow; give numbers above 0"),
    ],
)
def test_what_cannot_be_penalised(make: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        make(*model_and_groups())
