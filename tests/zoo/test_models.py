"""Networks by name: the parameters of `build_model`, the libraries, and each sentence for what cannot be."""

from __future__ import annotations

import dataclasses
import sys
import urllib.error
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum

from secateur.errors import ModelError, UnknownName
from secateur.zoo import libraries
from secateur.zoo.heads import adapt_head
from secateur.zoo.models import Built, build_model, list_models

FRESH = "all weights are freshly initialised"


def test_the_record_cannot_be_changed() -> None:
    built = build_model("secateur:resnet20")
    assert (built.spec, built.classes, built.notes) == ("secateur:resnet20", 10, (FRESH,))
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'classes'"):
        built.classes = 3  # type: ignore[misc]


def test_classes_change_the_head() -> None:
    for classes in (3, 100):
        built = build_model("secateur:digits_vgg", classes=classes)
        assert built.model(torch.zeros(2, 1, 8, 8)).shape == (2, built.classes) == (2, classes)


@pytest.mark.parametrize("classes", [0, -1])
def test_no_classes(classes: int) -> None:
    with pytest.raises(ModelError, match=f"needs at least 1 class, and secateur:resnet20 was asked for {classes}"):
        build_model("secateur:resnet20", classes=classes)


def test_device() -> None:
    assert {p.device.type for p in build_model("secateur:resnet20", device="meta").model.parameters()} == {"meta"}
    assert {p.device.type for p in build_model("secateur:resnet20", device="cpu").model.parameters()} == {"cpu"}
    # Its constructor computes with values, which the meta device has not.
    regnet = build_model("torchvision:regnet_y_400mf", classes=3, device="meta").model
    assert {p.device.type for p in regnet.parameters()} == {"meta"}
    with pytest.raises(UnknownName, match="unknown device 'cudo'; did you mean 'cuda'"):
        build_model("secateur:resnet20", device="cudo")
    with pytest.raises(ModelError, match="the meta device holds no values, so secateur:resnet20 cannot take weights"):
        build_model("secateur:resnet20", device="meta", weights="w.pt")


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"there is no device cuda:1 on this machine, .*use cpu"):
        build_model("secateur:resnet20", device="cuda:1")


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("resnet56", r"unknown model 'resnet56'; did you mean 'secateur:resnet56'\? .* as in secateur:resnet56,"),
        ("vgg16", r"unknown model 'vgg16'\. Choices: .*torchvision:vgg16.* as in torchvision:vgg16, timm:NAME"),
        ("", r"unknown model ''\. Say where it comes from, as in torchvision:resnet18, timm:NAME or path"),
        ("secateur:resnet65", r"unknown secateur model 'resnet65'; did you mean 'resnet56'\? Choices: resnet56"),
        ("secateur:", r"unknown secateur model ''\. Choices: .*digits_vgg"),
        ("torchvision:resnet19", r"unknown torchvision model 'resnet19'; did you mean 'resnet1[80]\w*'\?"),
        ("torchvison:vgg16", r"unknown model source 'torchvison'; did you mean 'torchvision'\? .*own is path/to/"),
    ],
)
def test_unknown_names_list_the_nearest(spec: str, sentence: str) -> None:
    with pytest.raises(UnknownName, match=sentence):
        build_model(spec)


def test_list_models_builds() -> None:
    listed = list_models()
    assert listed[0] == "secateur:resnet20"
    assert len(listed) == len(set(listed)) > 100
    for spec in listed[:8]:
        assert build_model(spec, device="meta").spec == spec


HEADS = (
    ("resnet18", "fc"),
    ("vgg16", "classifier.6"),
    ("mobilenet_v3_small", "classifier.3"),
    ("squeezenet1_0", "classifier.1"),
    ("densenet121", "classifier"),
    ("vit_b_16", "heads.head"),
    ("swin_t", "head"),
    ("convnext_tiny", "classifier.2"),
    ("googlenet", "fc"),
    ("inception_v3", "fc"),
)


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_the_head_is_found_and_adapted(name: str, head: str) -> None:
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **options)
    before = dict(model.named_modules())
    assert adapt_head(model, width=1000, classes=37) == f"head {head}: 1000 -> 37 outputs, freshly initialised"
    changed = [key for key, module in model.named_modules() if module is not before[key]]
    assert changed == [head]
    old, new = before[head], model.get_submodule(head)
    assert type(new) is type(old)
    built = build_model(f"torchvision:{name}", classes=37, device="meta")
    assert "built with 37 classes instead of 1000" in built.notes
    assert built.classes == 37
    ours = {key: value.shape for key, value in model.state_dict().items()}
    assert ours == {key: value.shape for key, value in built.model.state_dict().items()}


def test_an_adapted_head_works_and_keeps_device_dtype_and_mode() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3), nn.Linear(8, 8, bias=False).double()).eval()
    assert adapt_head(model, width=8, classes=3) == "head 2: 8 -> 3 outputs, freshly initialised"
    head = model[2]
    assert (head.weight.dtype, head.bias, head.training, head.weight.shape) == (torch.float64, None, False, (3, 8))
    assert adapt_head(model, width=8, classes=5) == "head 0: 8 -> 5 outputs, freshly initialised"
    assert model[0](torch.zeros(1, 4, 6, 6)).shape == (1, 5, 6, 6)


def test_a_model_without_such_a_head() -> None:
    with pytest.raises(ModelError, match=r"no linear layer or 1 x 1 convolution of Sequential has 1000 outputs"):
        adapt_head(nn.Sequential(nn.Conv2d(3, 1000, 3)), width=1000, classes=10)


def test_without_a_class_count_torchvision_keeps_its_own() -> None:
    built = build_model("torchvision:squeezenet1_1", device="meta")
    assert (built.classes, built.notes) == (1000, (FRESH,))
    assert build_model("torchvision:squeezenet1_1", classes=1000, device="meta").notes == (FRESH,)
    assert build_model("torchvision:fasterrcnn_mobilenet_v3_large_fpn", device="meta").classes == 91


def test_auxiliary_classifiers_are_left_off() -> None:
    built = build_model("torchvision:googlenet", classes=4, device="meta")
    assert built.notes[0].startswith("auxiliary classifiers are left off")
    assert not [name for name, _ in built.model.named_parameters() if name.startswith("aux")]


def test_a_model_that_takes_no_class_count() -> None:
    with pytest.raises(ModelError, match="torchvision:raft_small could not be built with 5 classes: TypeError"):
        build_model("torchvision:raft_small", classes=5)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision's downloads, replaced by a network filled with 0.5."""

    def get(self: WeightsEnum, *_: object, **__: object) -> Mapping[str, Any]:
        name = type(self).__name__.removesuffix("_Weights").lower()
        state = torchvision.models.get_model(name, weights=None).state_dict()
        return {key: torch.full_like(value, 0.5) for key, value in state.items()}

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get)


@pytest.mark.usefixtures("published")
def test_pretrained_keeps_all_but_the_head() -> None:
    built = build_model("torchvision:squeezenet1_1", classes=10, pretrained=True)
    assert built.classes == 10
    assert built.notes == (
        "pretrained weights SqueezeNet1_1_Weights.IMAGENET1K_V1",
        "head classifier.1: 1000 -> 10 outputs, freshly initialised",
    )
    weights = {key: value for key, value in built.model.named_parameters() if not key.startswith("classifier.1.")}
    assert all(bool((value == 0.5).all()) for value in weights.values())
    assert len(weights) == len(list(built.model.parameters())) - 2
    assert built.model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    whole = build_model("torchvision:squeezenet1_1", pretrained=True)
    assert (whole.classes, len(whole.notes)) == (1000, 1)
    assert bool((whole.model.get_parameter("classifier.1.weight") == 0.5).all())


def test_pretrained_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    with pytest.raises(ModelError, match=r"not fetch .* of torchvision:squeezenet1_1 \(.*no route.*pass the file"):
        build_model("torchvision:squeezenet1_1", pretrained=True)


def test_a_model_without_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_default_weights", lambda _: None)
    with pytest.raises(ModelError, match="torchvision has no pretrained weights for squeezenet1_1; pass a file as"):
        build_model("torchvision:squeezenet1_1", pretrained=True)


@pytest.mark.usefixtures("published")
def test_pretrained_that_cannot_be_had() -> None:
    with pytest.raises(ModelError, match="secateur:resnet20 has no pretrained weights to fetch; pass a file"):
        build_model("secateur:resnet20", pretrained=True)
    with pytest.raises(ModelError, match=r"mine\.py:make has no pretrained weights to fetch"):
        build_model("mine.py:make", pretrained=True)
    with pytest.raises(ModelError, match=r"cannot take both its pretrained weights and w\.pt; choose one"):
        build_model("torchvision:vgg16", pretrained=True, weights="w.pt")


def test_only_heads_of_classifiers_are_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: model.state_dict())
    with pytest.raises(ModelError, match="is pretrained on 21 classes and only the heads of classifiers"):
        build_model("torchvision:lraspp_mobilenet_v3_large", classes=3, pretrained=True)


def test_timm_models_take_the_class_count() -> None:
    pytest.importorskip("timm", reason="timm is not installed; its models are not tested")
    built = build_model("timm:test_resnet", classes=6)
    assert (built.classes, built.notes) == (6, ("built with 6 classes instead of 1000", FRESH))
    assert built.model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 6)
    assert build_model("timm:test_resnet").classes == 1000
    with pytest.raises(UnknownName, match="unknown timm model 'test_resnt'; did you mean 'test_resnet'"):
        build_model("timm:test_resnt")


def test_a_missing_timm_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"timm:resnet18 needs timm, .*: pip install 'secateur\[timm\]'"):
        build_model("timm:resnet18")


def test_built_is_what_build_model_returns() -> None:
    assert isinstance(build_model("secateur:digits_vgg"), Built)
