"""Batch norm folded away for export: where it follows a layer directly and alone, by the trace and not by names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from secateur.recipe.folder import load, save
from secateur.surgery.simplify import simplify


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """With batch norms away from their fresh state."""
    random = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5, generator=random)
    return model.eval()


def image(channels: int) -> Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))


LAYERS: tuple[tuple[Callable[[], nn.Module], nn.Module, Tensor], ...] = (
    (lambda: nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), image(4)),
    (lambda: nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), image(4)),
    (lambda: nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False), image(4)),
    (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6, eps=0.1), image(4)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), image(4)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), image(4)),
    (lambda: nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), torch.randn(2, 4, 9)),
    (lambda: nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), torch.randn(2, 4, 5, 5, 5)),
    (lambda: nn.Linear(4, 6), nn.BatchNorm1d(6), torch.randn(5, 4)),
    (lambda: nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), torch.randn(5, 4)),
)


@pytest.mark.parametrize(("layer", "norm", "x"), LAYERS)
def test_every_kind_of_layer(layer: Callable[[], nn.Module], norm: nn.Module, x: Tensor) -> None:
    torch.manual_seed(0)
    model = settled(nn.Sequential(layer(), norm, nn.ReLU()), x)
    had_bias = model[0].bias is not None
    smaller, record = simplify(model, x, batch_norm=True)
    assert isinstance(smaller[1], nn.Identity)
    assert record.count("batch norms") == 1
    assert record.identities == ("1",)
    assert record.biases == (() if had_bias else ("0.bias",))
    assert smaller[0].bias.dtype == torch.float32
    assert record.error < 1e-13
    save(smaller.eval(), "small", plan=record)
    back = load("small", factory=lambda: model)
    assert str(back) == str(smaller)
    assert isinstance(model[1], nn.modules.batchnorm._BatchNorm)
    assert (model[0].bias is not None) is had_bias
    with torch.no_grad():
        torch.testing.assert_close(model(x), smaller(x))
        assert torch.equal(back(x), smaller(x))


def test_it_is_done_only_when_asked_for() -> None:
    model = settled(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), image(4))
    smaller, record = simplify(model, image(4))
    assert record.found == ()
    assert isinstance(smaller[1], nn.BatchNorm2d)


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + self.bn(x)


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.bn(self.conv(x))))


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.b(self.a(x)))


class Misnamed(nn.Module):
    """Named and ordered as if the norm followed the first layer; it follows the second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv2(self.conv1(x).relu()))


class Scaled(nn.BatchNorm2d):
    """A batch norm that does more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (TwoReaders(), "not the only one to read"),
        (CalledTwice(), "called more than once"),
        (TiedWeights(), "computed or used elsewhere"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), "does not directly follow"),
        (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), "does not directly follow"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), "from the batch"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), Scaled(4)), "more than a batch norm"),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)),
            "computed or used elsewhere",
        ),
    ],
)
def test_others_stay_and_say_why(model: nn.Module, why: str) -> None:
    smaller, record = simplify(settled(model, image(4)), image(4), batch_norm=True)
    assert record.found == ()
    assert record.left
    assert all(why in item.why for item in record.left)
    assert str(smaller) == str(model)


def test_values_tell_and_not_names() -> None:
    model = settled(Misnamed(), image(4))
    first = model.conv1.weight.detach().clone()
    smaller, record = simplify(model, image(4), batch_norm=True)
    assert record.identities == ("bn1",)
    assert torch.equal(smaller.conv1.weight, first)
    assert not torch.equal(smaller.conv2.weight, model.conv2.weight)
    torch.testing.assert_close(model(image(4)), smaller(image(4)))


class UnderTwoNames(nn.Module):
    """A norm and a layer that stand in two places each; they are called by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.norms, self.convs = nn.ModuleList([nn.BatchNorm2d(4)]), nn.ModuleList([nn.Conv2d(4, 4, 1, bias=False)])
        self.bn, self.conv = self.norms[0], self.convs[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def test_a_norm_under_two_names_goes_from_both() -> None:
    model = settled(UnderTwoNames(), image(4))
    smaller, record = simplify(model, image(4), batch_norm=True)
    assert record.identities == ("norms.0",)
    assert isinstance(smaller.bn, nn.Identity)
    assert isinstance(smaller.norms[0], nn.Identity)
    torch.testing.assert_close(model(image(4)), smaller(image(4)))
    save(smaller, "small", plan=record)
    assert torch.equal(load("small", factory=UnderTwoNames)(image(4)), smaller(image(4)))


def test_all_twenty_of_resnet18() -> None:
    torch.manual_seed(0)
    model, x = settled(resnet18(), image(3)), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        model.layer1[0].bn1.weight[:5] = 0
        model.layer1[0].bn1.bias[:5] = -0.1  # ReLU makes zero of it
    smaller, record = simplify(model, x, batch_norm=True)
    assert record.count("batch norms") == len(record.biases) == 20
    assert not any(isinstance(module, nn.BatchNorm2d) for module in smaller.modules())
    assert record.count("dead units") == 5
    assert smaller.layer1[0].conv1.out_channels == 59
    assert record.error < 1e-12
    assert record.rounding < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(model(x), smaller(x), atol=1e-4, rtol=1e-4)
