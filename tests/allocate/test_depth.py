"""Which blocks go: the order of scores per cost, budgets, and blocks in blocks."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torchvision

from secateur.allocate.budget import Budget
from secateur.allocate.depth import Drop, choose_blocks
from secateur.errors import PlanError
from secateur.graph.blocks import Blocks
from secateur.graph.residual import find_blocks
from secateur.score.blocks import BlockScores


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    return find_blocks(torchvision.models.resnet18(), torch.randn(1, 3, 64, 64))


def scored(blocks: Blocks, **values: float) -> BlockScores:
    return BlockScores(blocks, tuple(values.get(name.replace(".", "_"), 10.0) for name in blocks.names))


def test_so_many_blocks(blocks):
    scores = scored(blocks, layer3_1=1, layer2_1=2, layer1=3)
    assert choose_blocks(scores, 1).names == ("layer3.1",)
    assert choose_blocks(scores, 2).names == ("layer3.1", "layer2.1")  # the stage is two blocks, and one is asked for
    assert choose_blocks(scores, 4).names == ("layer3.1", "layer1", "layer2.1")
    assert choose_blocks(scores, 0).names == ()
    with pytest.raises(PlanError, match="6 asks to leave out 6, and no more than 5 can go"):
        choose_blocks(scores, 6)


def test_budgets_count_what_is_left(blocks):
    scores = scored(blocks, layer4_1=4720640.0, layer1_0=1.0, layer1_1=2.0)
    by_params = choose_blocks(scores, Budget(params=0.95))
    assert by_params.names[0] == "layer3.1"
    assert by_params.params_left <= 0.95 * blocks.params
    by_macs = choose_blocks(scores, Budget(macs=blocks.macs - 1))
    assert by_macs.names == ("layer1.0",)
    assert by_macs.macs_left == blocks.macs - 18874368
    with pytest.raises(PlanError, match=r"no more than 6,\d+,\d+ can go; ask for less"):
        choose_blocks(scores, Budget(params=1))
    with pytest.raises(PlanError, match="for a budget of parameters or of MACs"):
        choose_blocks(scores, Budget(params=0.5, macs=0.5))


def test_scored_again_after_each(blocks):
    asked = []

    def again(gone: tuple[str, ...]) -> BlockScores:
        asked.append(gone)
        scores = scored(blocks, layer1_1=5 if len(gone) > 1 else 20)
        held = [name in gone or name == "layer1" for name in blocks.names]
        return BlockScores(blocks, tuple(math.nan if out else v for v, out in zip(scores.values, held)))

    first = scored(blocks, layer1_0=1, layer1_1=2)
    assert choose_blocks(first, 2).names == ("layer1.0", "layer1.1")
    assert choose_blocks(first, 3, again=again).names == ("layer1.0", "layer2.1", "layer1.1")
    assert asked == [("layer1.0",), ("layer1.0", "layer2.1")]


def test_the_plan_survives_json(blocks):
    drop = Drop(blocks, ("layer1.0", "layer4.1"))
    assert Drop.from_json(json.loads(json.dumps(drop.to_json()))) == drop
    assert drop.assumed == (
        "layer1.0: its relu changes nothing: what that is given is at least 0, made by relu in relu",
        "layer4.1: its relu changes nothing: what that is given is at least 0, made by relu in layer4.0.relu",
    )
    assert drop.params_left == sum(
        math.prod(shape) for name, shape in drop.shapes_left.items() if "running" not in name and "num_b" not in name
    )
    with pytest.raises(PlanError, match=r"layer1\.0 lies in layer1"):
        Drop(blocks, ("layer1", "layer1.0"))
