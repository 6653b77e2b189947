"""Repeated features: VGG16 on small images reads each of its 512 features 49 times."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import vgg11_bn, vgg16

from secateur.recipe.folder import load, save
from secateur.surgery.endings import observe
from secateur.surgery.replicas import find_replicas, folded
from secateur.surgery.simplify import simplify


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def head(pool: nn.Module, width: int, middle: tuple[nn.Module, ...] = ()) -> nn.Sequential:
    torch.manual_seed(0)
    reader = (nn.Flatten(), nn.ReLU(), nn.Linear(width, 5), nn.Linear(5, 2))
    return nn.Sequential(nn.Conv2d(3, 4, 3), pool, *middle, *reader)


POOLS = (
    (nn.AdaptiveAvgPool2d((7, 7)), 3, (1, 1), 49, {"output_size": (1, 1)}),
    (nn.AdaptiveAvgPool2d(4), 4, (2, 2), 16, {"output_size": (2, 2)}),
    (nn.AdaptiveAvgPool2d((6, 2)), 4, (2, 2), 12, {"output_size": (2, 2)}),
    (nn.Upsample(scale_factor=3), 4, (2, 2), 36, {"scale_factor": 1}),
    (nn.Upsample(size=(4, 6)), 4, (2, 2), 24, {"size": (2, 2)}),
)


@pytest.mark.parametrize(("pool", "size", "small", "large", "told"), POOLS)
@pytest.mark.parametrize("middle", [(), (nn.Hardswish(), nn.Dropout(0.5))])
def test_a_repeated_map_is_read_once(
    pool: nn.Module,
    size: int,
    small: tuple[int, ...],
    large: int,
    told: dict[str, object],
    middle: tuple[nn.Module, ...],
) -> None:
    model, x = head(pool, 4 * large, middle).eval(), torch.randn(2, 3, size, size)
    smaller, record = simplify(model, x)
    features = 4 * math.prod(small)
    assert record.count("replicated features") == 4 * large - features
    assert record.params_left == count(model) - 5 * (4 * large - features) == count(smaller)
    assert record.attributes == {"1": told, f"{4 + len(middle)}": {"in_features": features}}
    save(smaller, "small", plan=record)
    with torch.no_grad():
        torch.testing.assert_close(model(x), smaller(x))
        assert torch.equal(load("small", factory=lambda: model)(x), smaller(x))


def test_a_length_is_pooled_like_a_map() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.AdaptiveAvgPool1d(6), nn.Flatten(), nn.Linear(24, 2)).eval()
    x = torch.randn(2, 3, 5)
    smaller, record = simplify(model, x)
    assert record.count("replicated features") == 12
    assert smaller[1].output_size == 3
    torch.testing.assert_close(model(x), smaller(x))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(36, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.adaptive_avg_pool2d(self.a(x), 3).flatten(1))


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.pool = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(3)
        self.b, self.c = nn.Linear(36, 2), nn.Linear(36, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.a(x)).flatten(1)
        return self.b(x) + self.c(x)


class TiedReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.pool, self.b = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(3), nn.Linear(36, 36)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.b(self.pool(self.a(x)).flatten(1)))


class Uneven(nn.Module):
    """What is added differs by position, so the copies are none when the linear layer reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.pool, self.b = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(3), nn.Linear(36, 2)
        self.place = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.pool(self.a(x)) + self.place).relu().flatten(1))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Functional(), "by a function"),
        (TiedReader(), "not one linear layer's own"),
        (TwoReaders(), ""),
        (Uneven(), ""),
        (head(nn.AdaptiveAvgPool2d(3), 4, (nn.AdaptiveMaxPool2d(1),)), ""),
        (head(nn.Upsample(scale_factor=3, mode="bilinear"), 36), ""),
    ],
)
def test_other_readers_keep_the_copies(model: nn.Module, why: str) -> None:
    _, record = simplify(model, torch.randn(2, 3, 3, 3))
    assert record.count("replicated features") == 0
    assert [why in item.why for item in record.left] == ([True] if why else [])


@pytest.mark.parametrize("size", [5, 9])
def test_maps_that_are_not_repeated_stay(size: int) -> None:
    """3 x 3 from 3 x 3, and 3 x 3 from 7 x 7: nothing is repeated evenly."""
    _, record = simplify(head(nn.AdaptiveAvgPool2d(3), 36), torch.randn(2, 3, size, size))
    assert record.found == ()
    _, record = simplify(head(nn.AdaptiveAvgPool2d(3), 36), torch.randn(2, 3, 4, 4))
    assert record.found == ()


def test_columns_are_summed_block_by_block() -> None:
    model, x = head(nn.AdaptiveAvgPool2d((4, 6)), 96).eval(), torch.randn(1, 3, 4, 4)
    (replica,), left = find_replicas(observe(model, x).wiring, model)
    assert left == ()
    assert (replica.channels, replica.small, replica.large) == (4, (2, 2), (4, 6))
    weight = torch.arange(96.0).repeat(2, 1)
    by_hand = weight.reshape(2, 4, 2, 2, 2, 3).sum((3, 5)).reshape(2, 16)
    assert torch.equal(folded(replica, weight), by_hand)


def test_vgg16_on_small_images_by_formula() -> None:
    """49 copies of 512 features: 4096 x (25,088 - 512) weights of 138,357,544 go."""
    with torch.device("meta"):
        whole, narrow = vgg16(), vgg16()
        narrow.classifier[0] = nn.Linear(512, 4096)
    assert count(whole) == 138_357_544
    assert count(narrow) == 138_357_544 - 4096 * (25_088 - 512) == 37_694_248
    assert count(whole) / count(narrow) == pytest.approx(3.67, abs=0.005)


def test_a_real_vgg_on_small_images() -> None:
    torch.manual_seed(0)
    model = vgg11_bn(num_classes=10).eval()
    model.classifier = nn.Sequential(nn.Linear(25_088, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10)).eval()
    x = torch.randn(2, 3, 32, 32)
    smaller, record = simplify(model, x)
    assert record.params - record.params_left == 64 * (25_088 - 512)
    assert smaller.avgpool.output_size == (1, 1)
    assert smaller.classifier[0].in_features == 512
    assert record.error < 1e-12
    torch.testing.assert_close(model(x), smaller(x))
