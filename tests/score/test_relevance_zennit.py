"""Agreement with zennit, which propagates by modules, on the networks that it has canonisers for.

Random weights and statistics, float64, the same rules and stabilisers: everything within 1e-9 of the largest relevance
(measured: 8e-11). Zennit leaves the norm's eps in the identity that it makes of a folded batch norm; it is taken out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from zennit import rules as theirs
from zennit.composites import SpecialFirstLayerMapComposite, layer_map_base
from zennit.torchvision import ResNetCanonizer, VGGCanonizer
from zennit.types import Convolution, Linear

from secateur.score.lrp import rules
from secateur.score.lrp.composites import (
    AllEpsilon,
    Composite,
    EpsilonAlphaBeta,
    EpsilonGammaBox,
    EpsilonPlus,
    FlatFirst,
)
from secateur.score.lrp.explain import explain
from secateur.score.lrp.starts import one_hot

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Pair:
    """A composite of ours, and zennit's rules for dense layers, convolutions and the first layer."""

    name: str
    ours: Composite
    dense: Any
    convolution: Any
    first: Any = None


PAIRS = (
    Pair("epsilon", AllEpsilon(), theirs.Epsilon(), theirs.Epsilon()),
    Pair("epsilon plus", EpsilonPlus(), theirs.Epsilon(), theirs.ZPlus()),
    Pair("epsilon alpha2 beta1", EpsilonAlphaBeta(), theirs.Epsilon(), theirs.AlphaBeta(2, 1)),
    Pair("epsilon plus flat", FlatFirst(), theirs.Epsilon(), theirs.ZPlus(), theirs.Flat()),
    Pair(
        "epsilon gamma box",
        EpsilonGammaBox(-3.0, 3.0),
        theirs.Epsilon(),
        theirs.Gamma(0.25),
        theirs.ZBox(torch.tensor(-3.0), torch.tensor(3.0)),
    ),
    Pair(
        "gamma w-square",
        lambda layer: rules.WSquare() if layer.first else rules.Gamma(0.3 if layer.dense else 0.1),
        theirs.Gamma(0.3),
        theirs.Gamma(0.1),
        theirs.WSquare(zero_params="bias"),  # what an input has no part in gets nothing
    ),
)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(num_classes=10)
        if name.startswith("vgg"):  # dense layers of 4096 units only cost time
            model.classifier = nn.Sequential(nn.Linear(25088, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
    model = model.to_empty(device="cpu").double().eval()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # so that zennit can read what layers make
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


def by_zennit(model: nn.Module, pair: Pair, canonizer: Any, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The relevance of what each layer makes, and of the input under the name ""."""
    first = [] if pair.first is None else [((Convolution,), pair.first)]
    layers = [((Convolution,), pair.convolution), ((Linear,), pair.dense), *layer_map_base()]
    made: dict[str, Tensor] = {"": x.clone().requires_grad_()}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.retain_grad()
            made[name] = output

        return hook

    with SpecialFirstLayerMapComposite(layers, first, canonizers=[canonizer()]).context(model) as changed:
        for name, module in changed.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(keep(name))
        logits = changed(made[""])
        logits.backward(one_hot(logits.detach(), labels))
    return {name: tensor.grad for name, tensor in made.items() if tensor.grad is not None}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
@pytest.mark.parametrize(
    ("name", "canonizer"),
    [("vgg11", VGGCanonizer), ("vgg11_bn", VGGCanonizer), ("resnet18", ResNetCanonizer)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_relevance_is_that_of_zennit(name: str, canonizer: Any, pair: Pair) -> None:
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([3, 7])
    got = explain(network(name), x, labels, pair.ours, one_hot)
    want = by_zennit(network(name), pair, canonizer, x, labels)
    assert {layer for layer, _, _ in got.layers} == want.keys() - {""}
    for layer, made in [("", got.inputs[0]), *((layer, made) for layer, _, made in got.layers)]:
        error = (made - want[layer]).abs().max() / want[layer].abs().max()
        assert float(error) < TOLERANCE, layer
