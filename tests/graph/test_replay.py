"""Numbers that Python computes: each kind of call that a cut model has to be given anew."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from secateur.allocate.plan import Plan
from secateur.graph import replay
from secateur.graph.groups import find_groups
from secateur.graph.probe import random_keep
from secateur.graph.records import Groups
from secateur.surgery.certify import certify
from secateur.surgery.cut import apply

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(-1, 2, 4).transpose(1, 2).flatten(1),
    "reshape": lambda x: torch.reshape(x, (2, 8)),
    "reshape by size": lambda x: x.reshape((x.shape[0], 8)),
    "split": lambda x: torch.cat([part * (i + 1) for i, part in enumerate(x.split(4, -1))], -1),
    "split by sizes": lambda x: torch.cat(x.split([3, 5], dim=1)[::-1], 1),
    "chunk": lambda x: torch.cat([x.chunk(2, -1)[0], x.chunk(2, 1)[1].tanh()], 1),
    "slice": lambda x: torch.cat([x[:, :3], x[..., 3:8].exp()], 1),
    "narrow": lambda x: torch.cat([x.narrow(1, 0, 2), x.narrow(1, 2, 6).sin()], 1),
    "pad": lambda x: F.pad(x[:, :5], (0, 3)) + x,
    "zeros": lambda x: torch.cat([x, torch.zeros(2, 8)], 1)[:, :8] + torch.ones(2, 8),
    "new_zeros": lambda x: x + x.new_full((2, 8), 0.5),
    "expand": lambda x: x * torch.ones(8).expand(2, 8),
    "unflatten": lambda x: x.unflatten(1, (2, 4)).flatten(1),
    "factor": lambda x: x * float(x.shape[1]) ** -0.5 + x / float(x.shape[1]),
}


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.into, self.out, self.function = nn.Linear(4, 8), nn.Linear(8, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self.into(x)))


def cut(name: str) -> tuple[nn.Module, nn.Module, Plan]:
    torch.manual_seed(0)
    model = Calls(CALLS[name]).eval()
    groups = find_groups(model, torch.randn(2, 4))
    plan = Plan(groups, random_keep(groups, 3))
    return model, apply(model, plan), plan


@pytest.mark.parametrize("name", CALLS)
def test_each_kind_of_call_follows_the_cut(name: str) -> None:
    model, smaller, plan = cut(name)
    assert plan.groups.groups, str(plan.groups)
    certificate = certify(model, smaller, plan, torch.randn(2, 4))
    assert certificate.ok, certificate.sentence
    assert certificate.prunable_share > 0.9


@pytest.mark.parametrize("name", ["split by sizes", "slice", "factor"])
def test_cut_model_trains_copies_and_keeps_its_class(name: str) -> None:
    model, smaller, plan = cut(name)
    assert type(smaller) is Calls
    assert smaller.state_dict().keys() == model.state_dict().keys()
    twin = copy.deepcopy(smaller)
    x = torch.randn(2, 4)
    smaller(x).sum().backward()
    assert smaller.into.weight.grad is not None
    torch.testing.assert_close(twin(x), smaller(x))
    assert plan.replays()


def test_other_batch_sizes_still_run() -> None:
    _, smaller, _ = cut("split")
    assert smaller(torch.randn(7, 4)).shape == (7, 3)


def test_a_forward_that_fails_leaves_no_replay_behind() -> None:
    _, smaller, _ = cut("split by sizes")
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied"):
        smaller(torch.randn(2, 5))
    assert torch.zeros(2, 8).chunk(2, 1)[0].shape == (2, 4)


def test_a_second_cut_takes_the_place_of_the_first() -> None:
    _, smaller, _ = cut("split by sizes")
    x = torch.randn(2, 4)
    groups = find_groups(smaller, x)
    plan = Plan(groups, random_keep(groups, 5))
    twice = apply(smaller, plan)
    assert certify(smaller, twice, plan, x).ok
    owners = [getattr(hook, "__self__", None) for hook in twice._forward_pre_hooks.values()]
    assert sum(isinstance(owner, replay.Replay) for owner in owners) == 1
    assert certify(smaller, smaller, Plan(groups, tuple(tuple(range(g.size)) for g in groups.groups)), x).ok


def test_sizes_survive_json() -> None:
    _, _, plan = cut("factor")
    groups = plan.groups
    assert any(size.constant is not None for size in groups.sizes)
    assert Groups.from_json(json.loads(json.dumps(groups.to_json()))) == groups
    assert replay.from_json(json.loads(json.dumps(replay.to_json(plan.replays())))) == plan.replays()


@pytest.mark.parametrize("name", CALLS)
def test_a_cut_model_can_be_cut_again(name: str) -> None:
    _, smaller, _ = cut(name)
    groups = find_groups(smaller, torch.randn(2, 4))
    assert groups.prunable_params > 0.8 * groups.params, str(groups)
    again = Plan(groups, random_keep(groups, 4))
    certificate = certify(smaller, apply(smaller, again), again, torch.randn(2, 4))
    assert certificate.ok, certificate.sentence


class Shy(nn.Module):
    """Reshapes once more where it sees that tensors are fake, as libraries do that take care while they are traced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if isinstance(y, FakeTensor):
            y = y.reshape(len(x), 5, 24)
        y = y.reshape(len(x), 5, 4, 6)
        return self.b(y.tanh().reshape(len(x), 5, 24))


def test_calls_are_counted_as_on_real_tensors() -> None:
    torch.manual_seed(0)
    model, x = Shy().double().eval(), torch.randn(2, 5, 4).double()
    groups = find_groups(model, x)
    assert groups.sizes
    plan = Plan(groups, tuple(tuple(range(0, group.size, 2)) for group in groups.groups))
    certificate = certify(model, apply(model, plan), plan, x)
    assert certificate.ok, certificate.sentence


PASSES: list[tuple[torch.device, torch.dtype]] = []


class Reader(nn.Module):
    """Reads attributes of real tensors only, which counts as calls and runs no op; counts its passes on real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if not isinstance(y, FakeTensor):
            PASSES.append((y.device, y.dtype))
        return self.b(y.reshape(len(x), 5, 4, 6).mT.mT.tanh().reshape(len(x), 5, 24))


def test_attributes_that_only_real_tensors_are_asked_for_are_no_other_path() -> None:
    PASSES.clear()
    groups = find_groups(Reader(), torch.randn(2, 5, 4))
    assert groups.sizes
    assert len(PASSES) == 1
