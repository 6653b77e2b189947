"""Weights in float64 that take up no memory, and the proofs that run on them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.graph.probe import random_keep
from secateur.graph.rebuild import select
from secateur.surgery.double import Double, doubled, outputs
from secateur.surgery.widened import Widened, widened, widest

VALUES = torch.arange(12.0).reshape(3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_float64_to_whoever_reads_it(dtype: torch.dtype) -> None:
    held = Widened(VALUES.to(dtype))
    assert held.dtype == torch.float64
    assert torch.equal(held @ torch.eye(4).double(), VALUES.double())
    assert type(held.t()) is Tensor
    assert held.kept.dtype == dtype


def test_places_add_up_and_an_order_undone_is_none() -> None:
    held, order = Widened(VALUES), np.array([2, 0, 1])
    held.reorder(0, order)
    held.reorder(1, np.array([1, 0, 3, 2]))
    assert torch.equal(held + 0.0, VALUES[order][:, [1, 0, 3, 2]].double())
    held.reorder(0, order)
    assert torch.equal(held + 0.0, VALUES[order][order][:, [1, 0, 3, 2]].double())
    held.reorder(0, order)
    held.reorder(1, np.array([1, 0, 3, 2]))
    assert not held.places


def test_a_cut_takes_no_memory_and_reads_in_part() -> None:
    held = Widened(VALUES)
    held.reorder(0, np.array([2, 0, 1]))
    part = select(select(held, 0, torch.tensor([0, 2])), 1, torch.tensor([3]))
    assert isinstance(part, Widened)
    assert part.kept is held.kept
    assert part.shape == (2, 1)
    assert torch.equal(part * 1.0, VALUES[[2, 1]][:, [3]].double())


def test_what_is_written_to_it_stays_and_never_reaches_what_it_was_made_of() -> None:
    before = VALUES.clone()
    held = Widened(before)
    other = copy.deepcopy(held)
    held.add_(1e-12)
    assert torch.equal(held - 0.0, VALUES.double() + 1e-12)
    assert torch.equal(other - 0.0, VALUES.double())
    assert torch.equal(before, VALUES)


def test_a_copy_is_a_parameter_if_it_was_one() -> None:
    net = widened(nn.Linear(3, 2))
    again = copy.deepcopy(net)
    assert isinstance(net.weight, Widened)
    assert isinstance(again.weight, nn.Parameter)
    assert again.weight.requires_grad
    assert again.weight.kept is net.weight.kept


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_model_computes_what_its_copy_in_float64_does(layout: torch.memory_format) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Flatten(), nn.Linear(16, 2))
    net, x = net.to(memory_format=layout), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with Double():
        assert torch.equal(outputs(widened(net), x)[0], outputs(doubled(net), x)[0])
        assert torch.equal(widest(widened(net)[0].weight), net[0].weight.double())


def test_weights_of_float64_are_copied_as_they_are() -> None:
    net = nn.Linear(3, 2).double()
    copied = widened(net).weight
    assert type(copied) is nn.Parameter
    assert copied.data_ptr() != net.weight.data_ptr()


class Net(nn.Module):
    """Two layers, of which `change` does something to the first weight in every run, by `factor`."""

    def __init__(self, change: Callable[[Net], object]) -> None:
        super().__init__()
        self.embed, self.head, self.gain = nn.Linear(4, 8), nn.Linear(8, 2), nn.Parameter(torch.tensor([0.5, 2.0]))
        self.change, self.factor = change, 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.change(self)
        return self.head(self.embed(x).relu()) * self.gain


def by_data(net: Net) -> None:
    net.embed.weight.data = net.embed.weight.data * torch.tensor([net.factor, 1, 1, 1], dtype=net.gain.dtype)


def by_keyword(net: Net) -> None:
    column = net.embed.weight.data[:, 0]
    torch.mul(column, torch.tensor(net.factor, dtype=column.dtype), out=column)


WRITES = (lambda net: net.embed.weight.t()[0].mul_(net.factor), by_data, by_keyword)


@pytest.mark.parametrize("write", WRITES)
def test_a_model_that_writes_to_its_weights_is_proven_with_what_it_writes(write: Callable[[Net], object]) -> None:
    net, x = Net(write), torch.randn(3, 4)
    before = copy.deepcopy(net.state_dict())
    plan = sc.Plan(sc.find_groups(net, x), keep=((0, 3, 5),))
    smaller = sc.apply(net, plan)
    assert sc.certify(net, smaller, plan, x).ok
    smaller.factor = 1.0
    assert sc.certify(net, smaller, plan, x).masked_error > 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def tied(net: Net) -> None:
    """Goes another way where the weights are one memory; they are not."""
    if net.embed.weight.data_ptr() == net.gain.data_ptr():
        raise AssertionError


ASKS = (lambda net: net.gain.tolist(), tied, lambda net: torch.from_dlpack(net.gain.detach()))


@pytest.mark.parametrize("ask", ASKS)
def test_a_model_that_asks_for_the_memory_of_its_weights_is_proven_too(ask: Callable[[Net], object]) -> None:
    net, x = Net(lambda net: None), torch.randn(3, 4)
    plan = sc.Plan(sc.find_groups(net, x), keep=((0, 3, 5),))
    smaller = sc.apply(net, plan)
    net.change = smaller.change = ask
    assert sc.certify(net, smaller, plan, x).ok


class Odd(nn.Module):
    """A weight that is a slice of another tensor, a buffer with gradients, a number that is a count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 16), nn.Linear(8, 2)
        self.weight = nn.Parameter(torch.randn(16, 19)[::2, 1:17])
        self.register_buffer("shift", torch.ones(16, requires_grad=True))
        self.register_buffer("times", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x).relu() + self.shift
        weight = self.weight if self.weight.is_contiguous() else self.weight.clone()
        return self.head((hidden @ weight.t()).relu()).repeat(1, int(self.times))


def test_weights_and_buffers_of_odd_kinds() -> None:
    net, x = Odd(), torch.randn(3, 4)
    groups = sc.find_groups(net, x)
    plan = sc.Plan(groups, random_keep(groups, 1))
    assert sc.certify(net, sc.apply(net, plan), plan, x).ok
