"""Blocks that can be left out: each pattern with what stays of it, what is refused and why, and real families."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

import residual
from secateur.errors import PlanError, UnknownName
from secateur.graph.blocks import Blocks, Pass, Step
from secateur.graph.nested import Example
from secateur.graph.residual import find_blocks
from secateur.measure.macs import count_macs

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IDS = {"input_ids": torch.arange(7)[None], "attention_mask": torch.ones(1, 7, dtype=torch.long)}
IMAGE = torch.randn(1, 3, 64, 64)


def keeps(blocks: Blocks) -> dict[str, tuple[str, ...]]:
    return {block.name: tuple(map(str, block.keeps)) for block in blocks.blocks}


@pytest.mark.parametrize("case", residual.CASES, ids=range(len(residual.CASES)))
def test_each_pattern(case):
    model = case.make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = find_blocks(model, case.inputs())
    assert keeps(blocks) == case.keeps
    assert Blocks.from_json(json.loads(json.dumps(blocks.to_json()))) == blocks
    assert blocks.macs == count_macs(model, case.inputs()).total
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("make", "name", "why"), residual.REFUSED)
def test_what_cannot_be_left_out_is_said(make, name, why):
    blocks = find_blocks(make(), torch.randn(2, 4, 6, 6))
    assert name not in blocks.names
    assert re.search(why, {item.name: item.why for item in blocks.refused}[name])
    with pytest.raises(PlanError, match=rf"^{name} cannot be left out: "):
        blocks.chosen([name])


def test_what_is_computed_outside_for_a_block_alone():
    blocks = find_blocks(nn.Sequential(nn.Linear(4, 4), residual.Apart()), residual.tokens())
    assert keeps(blocks) == {"1": ("narrow.norm",)}
    assert [(item.name, item.why) for item in blocks.refused] == [
        ("1.narrow", "what 1 computes for it alone would be computed in vain")
    ]


def test_what_an_activation_is_given_is_said():
    (first, second) = find_blocks(residual.CASES[0].make(), residual.CASES[0].inputs()).blocks
    assert first.assumed == ("its relu changes nothing: what that is given is at least 0, made by relu in stem.1",)
    assert second.assumed == ("its relu changes nothing: what that is given is at least 0, made by relu in blocks.0",)
    kept = find_blocks(residual.CASES[2].make(), residual.CASES[2].inputs()).blocks
    assert [bool(block.assumed) for block in kept] == [False, True]
    assert kept[0].passes == (Pass("x", 0, (), (Step("", "aten.relu.default"),)),)


@pytest.mark.parametrize(
    ("given", "sign"), [(nn.ReLU(), True), (nn.Sigmoid(), True), (nn.Tanh(), False), (nn.LeakyReLU(), False)]
)
def test_an_activation_goes_only_behind_what_keeps_the_sign(given, sign):
    stem = nn.Sequential(residual.conv(), given, nn.AvgPool2d(3, 1, 1), nn.Dropout())
    blocks = find_blocks(residual.net(residual.in_place, stem)(), residual.CASES[0].inputs())
    assert keeps(blocks)["blocks.0"] == (() if sign else ("relu",))


def test_a_positive_sum_does_not_make_its_parts_positive():
    """x + exp(...) - 1 is at least what x is, but x alone may lie below: the second block must keep its relu."""
    shifted = residual.Block(lambda x, f: nn.functional.hardtanh(x, -1, 1) + (f(x).exp() + 1))
    blocks = find_blocks(residual.Net(shifted, residual.Block(residual.in_place)), residual.CASES[0].inputs())
    assert keeps(blocks) == {"blocks.0": ("hardtanh",), "blocks.1": ("relu",)}


def test_forms_of_arguments_and_results():
    first, second, _ = find_blocks(residual.Layered(), residual.tokens()).blocks
    assert first.form == second.form == (Pass("hidden_states", 0), None)
    (mixed, _) = find_blocks(residual.Mixed(), residual.tokens()).blocks
    assert mixed.form == {"both": [Pass("streams", 0, ("both", 0)), Pass("streams", 0, ("both", 1))], "count": 2}


def test_a_shared_block_is_one():
    (block,) = find_blocks(residual.Shared(), residual.CASES[0].inputs()).blocks
    assert (block.name, block.paths, block.calls) == ("one", ("one", "two"), 3)


def test_print_and_names():
    blocks = find_blocks(torchvision.models.resnet18(), IMAGE)
    assert str(blocks).startswith(
        "6 blocks can be left out, of 11,689,512 parameters and 148,557,824 MACs\n"
        "        params             MACs  block\n"
        "       147,968       37,748,736  layer1\n"
        "        73,984       18,874,368    layer1.0\n"
    )
    assert "layer2.0, layer2: it changes the shape from (1, 64, 16, 16) to (1, 128, 8, 8)" in str(blocks)
    assert [block.inside for block in blocks.blocks] == [2, 1, 1, 1, 1, 1]
    with pytest.raises(UnknownName, match=r"did you mean 'layer2\.1'"):
        blocks.chosen(["layer2.11"])
    with pytest.raises(PlanError, match=r"layer1\.0 lies in layer1; name one of them only"):
        blocks.chosen(["layer1.0", "layer1"])


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (lambda: torchvision.models.resnet50(), "layer1.1 layer1.2 layer2.1 layer2.2 layer2.3 layer3.1 layer3.2 "
         "layer3.3 layer3.4 layer3.5 layer4.1 layer4.2"),
        (lambda: torchvision.models.mobilenet_v2(), "features.3 features.5 features.6 features.8 features.9 "
         "features.10 features.12 features.13 features.15 features.16"),
        (lambda: torchvision.models.efficientnet_b0(), "features.2.1 features.3.1 features.4.1 features.4.2 "
         "features.5.1 features.5.2 features.6.1 features.6.2 features.6.3"),
        (lambda: torchvision.models.vision_transformer.VisionTransformer(64, 16, 2, 2, 16, 32),
         "encoder.layers encoder.layers.encoder_layer_0 encoder.layers.encoder_layer_1"),
        (lambda: torchvision.models.swin_transformer.SwinTransformer([4, 4], 8, [1, 2], [2, 2], [4, 4]),
         "features.1.0 features.3 features.3.0 features.3.1"),
        (lambda: torchvision.models.convnext.ConvNeXt([torchvision.models.convnext.CNBlockConfig(8, 16, 1),
         torchvision.models.convnext.CNBlockConfig(16, None, 2)]), "features.1.0 features.3 features.3.0 features.3.1"),
        (lambda: torchvision.models.densenet121(), ""),
        (lambda: timm.create_model("resnetv2_50"), "stages.0.blocks.1 stages.0.blocks.2 stages.1.blocks.1 "
         "stages.1.blocks.2 stages.1.blocks.3 stages.2.blocks.1 stages.2.blocks.2 stages.2.blocks.3 stages.2.blocks.4 "
         "stages.2.blocks.5 stages.3.blocks.1 stages.3.blocks.2"),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2), "blocks blocks.0 blocks.1"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(1, 2),
         embed_dim=8, num_heads=(2, 2)), "layers.0.blocks.0 layers.1.blocks layers.1.blocks.0 layers.1.blocks.1"),
        (lambda: timm.create_model("regnetx_002"), "s3.b2 s3.b3 s3.b4 s4.b2 s4.b3 s4.b4 s4.b5 s4.b6 s4.b7"),
    ],
)  # fmt: skip
def test_families_of_images(model, names):
    found = list(find_blocks(model().eval(), IMAGE).names)
    assert found == names.split()


def test_transformers():
    bert = find_blocks(transformers.BertModel(transformers.BertConfig(vocab_size=50, **SMALL)), IDS)
    layer = {"encoder.layer.{}": ("attention.output.LayerNorm", "output.LayerNorm"),
             "encoder.layer.{}.attention": ("output.LayerNorm",)}  # fmt: skip
    assert keeps(bert) == {name.format(i): kept for i in (0, 1) for name, kept in layer.items()}
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    gpt2 = transformers.GPT2LMHeadModel(config)
    logits = find_blocks(gpt2, Example(IDS, lambda out: out.logits))
    assert keeps(logits) == {"transformer.h.0": (), "transformer.h.1": ()}
    whole = find_blocks(gpt2, IDS)  # with the keys and values that each layer keeps for the next token
    assert not whole.names
    assert {item.why for item in whole.refused} == {
        "the model gives what cat makes inside; if nobody reads that, say so by an Example"
    }
    albert = transformers.AlbertConfig(vocab_size=50, embedding_size=8, **{**SMALL, "num_hidden_layers": 3})
    blocks = find_blocks(transformers.AlbertModel(albert), IDS).blocks
    assert [block.calls for block in blocks] == [3, 3]
