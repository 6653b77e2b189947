"""The networks of this package: parameters by formula, and the ResNet computed a second time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.codec.state import load_state
from secateur.zoo import resnet_cifar, vgg_cifar
from secateur.zoo.models import build_model

SHARED = Path(__file__).parents[2].parent / "shared"


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def conv_and_norm(inputs: int, outputs: int) -> int:
    return 9 * inputs * outputs + 2 * outputs


@pytest.mark.parametrize(("name", "blocks"), [("20", 3), ("32", 5), ("44", 7), ("56", 9), ("110", 18)])
@pytest.mark.parametrize("classes", [10, 100])
def test_resnet_has_the_parameters_of_the_paper(name: str, blocks: int, classes: int) -> None:
    model = build_model(f"secateur:resnet{name}", classes=classes, device="meta").model
    stages = conv_and_norm(16, 16) * 2 * blocks
    stages += conv_and_norm(16, 32) + conv_and_norm(32, 32) * (2 * blocks - 1)
    stages += conv_and_norm(32, 64) + conv_and_norm(64, 64) * (2 * blocks - 1)
    assert count(model) == conv_and_norm(3, 16) + stages + 65 * classes
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == int(name)


def test_resnet_maps_images_to_logits_of_any_even_size() -> None:
    model = resnet_cifar.resnet20(7).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert model(torch.zeros(1, 3, 64, 48)).shape == (1, 7)


def test_resnet_computes_what_the_paper_says() -> None:
    """One block per stage, written out a second time from section 4.2, in float64."""
    torch.manual_seed(0)
    model = resnet_cifar.ResNetCifar(1, classes=5).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5)
    s = model.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            s[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = norm(F.conv2d(image, s["conv1.weight"], padding=1), "bn1").clamp(min=0)
    for layer, stride in ((1, 1), (2, 2), (3, 2)):
        block = f"layer{layer}.0"
        y = F.conv2d(x, s[f"{block}.conv1.weight"], stride=stride, padding=1)
        y = norm(y, f"{block}.bn1").clamp(min=0)
        y = norm(F.conv2d(y, s[f"{block}.conv2.weight"], padding=1), f"{block}.bn2")
        if stride == 2:
            padded = torch.zeros_like(y)
            quarter = y.shape[1] // 4
            padded[:, quarter:-quarter] = x[:, :, ::2, ::2]
            x = padded
        x = (x + y).clamp(min=0)
    logits = x.flatten(2).mean(2) @ s["linear.weight"].T + s["linear.bias"]
    assert torch.allclose(model(image), logits, rtol=0, atol=1e-12)


def test_the_padding_of_a_shortcut_can_be_rebound() -> None:
    shortcut = resnet_cifar.resnet20().layer2[0].shortcut
    assert isinstance(shortcut, resnet_cifar.ZeroPaddedShortcut)
    assert shortcut.padding == (0, 0, 0, 0, 8, 8)
    shortcut.padding = (0, 0, 0, 0, 3, 5)
    out = shortcut(torch.ones(1, 4, 6, 6))
    assert out.shape == (1, 12, 3, 3)
    assert out.sum(dim=(0, 2, 3)).tolist() == [0] * 3 + [9] * 4 + [0] * 5
    assert not list(shortcut.parameters())


def test_vgg_has_the_layers_of_its_name() -> None:
    for name, convolutions, parameters in (("vgg16_bn", 13, 14_710_464), ("vgg19_bn", 16, 20_018_880)):
        model = build_model(f"secateur:{name}", classes=100, device="meta").model
        kinds = [type(module).__name__ for module in model.modules()]
        assert (kinds.count("Conv2d"), kinds.count("BatchNorm2d")) == (convolutions, convolutions)
        assert (kinds.count("MaxPool2d"), kinds.count("Linear")) == (5, 1)
        channels = sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
        assert count(model) == parameters + 2 * channels + 513 * 100


def test_vgg_maps_images_to_logits() -> None:
    assert vgg_cifar.vgg16_bn(6).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 6)
    assert vgg_cifar.digits_vgg(4).eval()(torch.zeros(3, 1, 8, 8)).shape == (3, 4)
    assert count(vgg_cifar.digits_vgg(11)) - count(vgg_cifar.digits_vgg(10)) == 513


@pytest.mark.parametrize(("name", "top1"), [("resnet20", "91.73"), ("resnet56", "93.39")])
def test_published_weights_load_whole(name: str, top1: str) -> None:
    path = SHARED / "weights" / f"{name}_cifar10.safetensors"
    if not path.is_file():
        pytest.skip(f"published weights of {name} are not beside the repository; loading them is not tested")
    built = build_model(f"secateur:{name}", weights=path)
    assert (built.classes, len(built.notes)) == (10, 2)
    assert built.notes[0] == f"weights from {path}"
    assert built.notes[1].endswith("expect inputs normalised with mean 0.485 0.456 0.406, std 0.229 0.224 0.225")
    state, stored = built.model.state_dict(), load_state(path)
    assert all(torch.equal(state[key], value) for key, value in stored.items())
    assert {key for key in state if key not in stored} == {key for key in state if "num_batches" in key}
    assert top1 in path.read_bytes()[:400].decode(errors="replace")
