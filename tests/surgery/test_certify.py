"""What the certificate says of each group, and that a cut model runs wherever the uncut one did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import networks
from secateur.allocate.plan import Plan
from secateur.graph.groups import find_groups
from secateur.graph.nested import map_tensors, tensors_in
from secateur.graph.probe import random_keep
from secateur.graph.twin import run
from secateur.surgery.certify import certify
from secateur.surgery.cut import apply


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(m for i in range(4) for m in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 3)).double()


def test_every_group_has_its_error_and_the_first_wrong_one_is_named() -> None:
    model, x = layers(), torch.randn(5, 8)
    plan = Plan(find_groups(model, x), ((0, 1, 2, 5, 7),) * 4)
    smaller = apply(model, plan)
    certificate = certify(model, smaller, plan, x)
    assert [name for name, _ in certificate.errors] == [group.name for group in plan.groups.groups]
    assert max(error for _, error in certificate.errors) < 1e-14
    with torch.no_grad():
        smaller[4].weight.mul_(1.5)
    certificate = certify(model, smaller, plan, x)
    assert "first at 4" in certificate.sentence
    assert [error < 1e-14 for _, error in certificate.errors[:2]] == [True, True]


class Branch(nn.Module):
    """A residual branch that is begun as nothing, as those of networks without norms are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gain = nn.Linear(16, 32), nn.Linear(32, 16), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * 6 * self.b(torch.sin(3 * self.a(x)))


def test_branches_begun_as_nothing_are_seen_and_do_not_blow_rounding_up() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 16), *(Branch() for _ in range(24)), nn.Linear(16, 3)), torch.randn(2, 4)
    plan = Plan(groups := find_groups(model, x), random_keep(groups, 3))
    certificate = certify(model, apply(model, plan), plan, x)
    assert certificate.ok, certificate.sentence
    assert certificate.control_error > 0.01


def several(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor, tensor]) if tensor.ndim else tensor


def first(outputs: object) -> Tensor:
    return next(tensors_in(outputs))


@pytest.mark.parametrize("net", networks.NETWORKS, ids=lambda net: net.make.__name__)
def test_a_cut_model_runs_at_every_batch_that_the_uncut_did(net: networks.Net) -> None:
    model, inputs = networks.build(net), net.inputs()
    more = map_tensors(several, inputs)
    groups = find_groups(model, inputs)
    smaller = apply(model, Plan(groups, random_keep(groups, 7)))
    torch.testing.assert_close(first(run(smaller, more)), torch.cat([first(run(smaller, inputs))] * 3))


class Chaos(nn.Module):
    """Doubles a difference again and again: a rounding error of its first layers reaches the output as 1e-8."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.one, self.two, self.head, self.times = nn.Linear(4, 999), nn.Linear(999, 96), nn.Linear(96, 2), times

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.two(self.one(x).relu()))
        for _ in range(self.times):
            hidden = 3.99 * hidden * (1 - hidden)
        return self.head(hidden)


def test_a_model_that_blows_up_rounding_is_not_accused() -> None:
    torch.manual_seed(0)
    net, x = Chaos(28), torch.randn(16, 4)
    plan = Plan(find_groups(net, x), keep=(tuple(range(1, 999, 3)), tuple(range(60))))
    certificate = certify(net, apply(net, plan), plan, x)
    assert certificate.permutation_error > 1e-9
    assert certificate.permutation_rounding > 1e-10
    assert (certificate.masked_rounding > 0) == (certificate.masked_error > 1e-9)
    assert not certificate.guilty
    assert "where the last bit of the inputs makes" in certificate.rows()[0][1]
    assert certificate.ok


def test_a_model_of_which_rounding_decides_all_is_not_certified() -> None:
    torch.manual_seed(0)
    net, x = Chaos(80), torch.randn(16, 4)
    plan = Plan(find_groups(net, x), keep=(tuple(range(1, 999, 3)), tuple(range(60))))
    assert not certify(net, apply(net, plan), plan, x).ok


class Edge(nn.Module):
    """Where the last bit of the inputs decides: what lies at the edge of a function's domain, or of a threshold."""

    def __init__(self, edge: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.edge = nn.Linear(4, 8), nn.Linear(8, 2), edge

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.two(self.one(x).relu()) + self.edge(mask)


EDGES = (
    lambda mask: (torch.randn_like(mask) + (1 - mask) * torch.finfo(mask.dtype).min).softmax(-1),
    torch.acos,
    lambda mask: nn.functional.threshold(mask - 1, 0, -1),
    lambda mask: nn.functional.binary_cross_entropy(mask, mask),
)


@pytest.mark.parametrize("edge", EDGES)
def test_an_edge_in_the_inputs_excuses_no_wrong_cut(edge: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net, inputs = Edge(edge), (torch.randn(3, 4), torch.ones(3, 2))
    plan = Plan(find_groups(net, inputs), keep=((0, 3, 5),))
    smaller = apply(net, plan)
    assert certify(net, smaller, plan, inputs).ok
    with torch.no_grad():
        smaller.two.weight.mul_(1.05)
    assert not certify(net, smaller, plan, inputs).ok
