"""What is said not to vary is the same on other inputs, and what is zero by construction is found to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import networks
from secateur.graph.nested import map_tensors
from secateur.graph.twin import tensors_of
from secateur.surgery.double import Double, doubled
from secateur.surgery.endings import observe

BY_NAME = [net.make.__name__ for net in networks.NETWORKS]


def thinned(model: nn.Module, seed: int) -> nn.Module:
    """With slices of its tensors zero, along every axis, so that there is much to find."""
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for tensor in tensors_of(model).values():
            if tensor.is_floating_point() and tensor.ndim:
                for dim in range(min(2, tensor.ndim)):
                    for place in np.flatnonzero(random.random(tensor.shape[dim]) < 0.4):
                        tensor.select(dim, int(place)).zero_()
    return model


def drawn(inputs: object, seed: int) -> object:
    random = torch.Generator().manual_seed(seed)
    return map_tensors(lambda t: torch.randn(t.shape, generator=random, dtype=torch.float64), inputs)


@pytest.mark.parametrize("net", networks.NETWORKS, ids=BY_NAME)
def test_what_does_not_vary_is_the_same_on_other_inputs(net: networks.Net) -> None:
    found = 0
    for seed in range(3):
        with Double(), torch.no_grad():
            model = doubled(thinned(networks.build(net), seed))
            one, two = (observe(model, drawn(net.inputs(), number)) for number in (7, 8))
        assert [e.call for e in one.endings] == [e.call for e in two.endings]
        for a, b in zip(one.endings, two.endings, strict=True):
            assert np.array_equal(a.known, b.known)
            assert np.array_equal(a.steady, b.steady)
            assert np.array_equal(a.empty, b.empty)
            same = a.steady & np.isfinite(a.value)
            assert np.array_equal(a.value[same], b.value[same])
            found += int(a.empty.sum())
    assert found or net.make.__name__ in ("Recurrent", "Rolled")  # one has no such layer, one no unit that can go


class InPlace(nn.Module):
    """Zeros into which a view of what varies is written, before and after they are viewed otherwise."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.a, self.b, self.late = nn.Linear(4, 6), nn.Linear(6, 3), late

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        held = torch.zeros_like(y)
        view = held.view(-1, 6)[:, :3] if self.late else held[:, :3]
        view.copy_(y[:, :3])
        return self.b(held)


@pytest.mark.parametrize("late", [False, True])
def test_a_write_through_a_view_is_seen_in_the_whole(late: bool) -> None:
    model, x = InPlace(late).double().eval(), torch.randn(2, 4).double()
    seen = observe(model, x)
    assert seen.lost == ""
    (reader,) = (e for e in seen.endings if seen.analysis.trace.calls[e.call].module == "b")
    assert not reader.known[:3].any()


class Odd(nn.Module):
    """Between two layers, anything."""

    def __init__(self, between: object) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Conv2d(3, 4, 1), between, nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


ZERO_STAYS = (
    lambda x: F.max_pool2d(x, 2),
    lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    lambda x: x * torch.rand_like(x),
    lambda x: x * x.amax((2, 3), keepdim=True),
    lambda x: x.flatten(2).cumsum(2).view_as(x),
    lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    lambda x: F.hardswish(F.gelu(x)) + torch.tanh(x),
    lambda x: F.instance_norm(x),
)

ZERO_GOES = (
    lambda x: x + torch.rand_like(x),
    lambda x: x.cos(),
    lambda x: x + x.flip(1),
    lambda x: x + x.mean(1, keepdim=True),
)


@pytest.mark.parametrize("number", range(len(ZERO_STAYS)))
def test_zero_stays_zero_through(number: int) -> None:
    torch.manual_seed(0)
    model = Odd(ZERO_STAYS[number]).double().eval()
    nn.init.zeros_(model.a.weight[1])
    nn.init.zeros_(model.a.bias[1:2])
    reader = observe(model, torch.randn(2, 3, 6, 6).double()).endings[-1]
    assert reader.empty.tolist() == [False, True, False, False]


@pytest.mark.parametrize("number", range(len(ZERO_GOES)))
def test_zero_does_not_stay_zero_through(number: int) -> None:
    torch.manual_seed(0)
    model = Odd(ZERO_GOES[number]).double().eval()
    nn.init.zeros_(model.a.weight[1])
    nn.init.zeros_(model.a.bias[1:2])
    endings = observe(model, torch.randn(2, 3, 6, 6).double()).endings
    assert not any(ending.empty.any() for ending in endings if ending.partner is not None)
