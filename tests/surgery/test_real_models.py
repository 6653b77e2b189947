"""Models of three libraries, small and with random weights: what can be cut of each may only grow."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig

from secateur.allocate.plan import Plan, allocate
from secateur.allocate.uniform import Uniform
from secateur.graph.groups import find_groups
from secateur.graph.probe import random_keep
from secateur.score.magnitude import Magnitude
from secateur.score.scoring import score
from secateur.surgery.certify import certify
from secateur.surgery.cut import apply
from sources import ROOT

Built = tuple[nn.Module, Any]

BARE: Mapping[str, Any] = MappingProxyType({"weights": None, "weights_backbone": None, "num_classes": 5})


def image(side: int = 32) -> Tensor:
    return torch.randn(1, 3, side, side)


def torchvision(name: str, side: int = 32, **kwargs: Any) -> Built:
    return models.get_model(name, **{"num_classes": 10, **kwargs}), image(side)


def detector(name: str, **kwargs: Any) -> Built:
    return models.get_model(name, **BARE, **kwargs), ([torch.rand(3, 64, 64)],)


def from_timm(name: str, side: int = 32, **kwargs: Any) -> Built:
    return timm.create_model(name, num_classes=10, **kwargs), image(side)


def transformers(name: str) -> Built:
    """As the benchmarks build it: two layers, 64 wide."""
    built: Built = runpy.run_path(str(ROOT / "benchmarks" / "models.py"))["build"]("transformers", name)
    return built


SMALL = MappingProxyType({"depth": 2, "embed_dim": 48, "num_heads": 4})

ROWS: Mapping[str, tuple[Callable[[], Built], float, float]] = MappingProxyType({
    "resnet18": (lambda: torchvision("resnet18"), 0.999, 0.745),
    "mobilenet_v3_small": (lambda: torchvision("mobilenet_v3_small"), 0.999, 0.735),
    "shufflenet": (lambda: torchvision("shufflenet_v2_x0_5"), 0.995, 0.695),
    "googlenet": (lambda: torchvision("googlenet", aux_logits=False, init_weights=False), 0.999, 0.745),
    "densenet": (lambda: (models.DenseNet(8, (2, 2, 2, 2), 16), image()), 0.98, 0.59),
    "swin": (lambda: (models.SwinTransformer([4, 4], 24, [2, 2], [3, 6], [4, 4]), image()), 0.99, 0.635),
    "vit": (lambda: (models.VisionTransformer(32, 8, 2, 4, 48, 96), image()), 0.985, 0.585),
    "convnext": (
        lambda: (models.ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)]), image()), 0.98, 0.58),
    "ssdlite": (lambda: detector("ssdlite320_mobilenet_v3_large"), 0.999, 0.715),
    "faster_rcnn": (
        lambda: detector("fasterrcnn_mobilenet_v3_large_320_fpn", min_size=64, max_size=64), 0.999, 0.55),
    "lraspp": (lambda: (models.get_model("lraspp_mobilenet_v3_large", **BARE), image(64)), 0.999, 0.74),
    "raft_small": (lambda: (models.get_model("raft_small", weights=None), (image(128), image(128))), 0.999, 0.73),
    "timm regnet": (lambda: from_timm("regnetx_002"), 0.999, 0.715),
    "timm eva02": (lambda: from_timm("eva02_tiny_patch14_224", 28, img_size=28, **SMALL), 0.999, 0.66),
    "timm xcit": (lambda: from_timm("xcit_nano_12_p8_224", img_size=32, **SMALL), 0.999, 0.73),
    "timm swinv2_cr": (lambda: from_timm(
        "swinv2_cr_tiny_ns_224", 64, img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
        0.999, 0.73),
    "transformers bert": (lambda: transformers("bert"), 0.999, 0.695),
    "transformers gpt2": (lambda: transformers("gpt2"), 0.999, 0.71),
    "transformers llama": (lambda: transformers("llama"), 0.999, 0.68),
    "transformers llava": (lambda: transformers("llava"), 0.999, 0.67),
    "transformers wav2vec2": (lambda: transformers("wav2vec2"), 0.999, 0.695),
    "transformers t5": (lambda: transformers("t5"), 0.92, 0.46),
    "transformers swin": (lambda: transformers("swin"), 0.999, 0.74),
    "transformers mamba": (lambda: transformers("mamba"), 0.999, 0.695),
})  # fmt: skip
"""Name -> (model and inputs, least share of the parameters that can shrink, least share removed at half)."""


@pytest.mark.parametrize("name", ROWS)
def test_a_model_can_be_cut_as_far_as_ever_and_is_certified(name: str) -> None:
    make, share, removed = ROWS[name]
    torch.manual_seed(0)
    model, inputs = make()
    groups = find_groups(model.eval(), inputs)
    assert groups.prunable_params >= share * groups.params, str(groups)
    half = allocate(score(model, groups, Magnitude()), Uniform(0.5))
    assert groups.params - half.params_left >= removed * groups.params
    plan = Plan(groups, random_keep(groups, 11))
    certificate = certify(model, apply(model, plan), plan, inputs)
    assert certificate.ok, certificate.sentence
