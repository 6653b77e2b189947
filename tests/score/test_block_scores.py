"""Scores of blocks, against slow replicas of their formulas."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import residual
from secateur.errors import PlanError
from secateur.graph.residual import find_blocks
from secateur.score.blocks import Depth, added_energy, cross_entropy, damage, score_blocks, turning, wrong


@torch.no_grad()
def streams(model: residual.Net, x: Tensor) -> list[Tensor]:
    """What goes into the first block, and what each gives."""
    out = [model.stem(x)]
    for block in model.blocks:
        out.append(block(out[-1]))
    return out


@pytest.fixture
def plain() -> tuple[residual.Net, list[Tensor]]:
    torch.manual_seed(0)
    model = residual.net(lambda x, f: x + f(x))().double().eval()
    return model, [torch.randn(n, 4, 6, 6, dtype=torch.float64) for n in (3, 5)]


def test_energy_is_a_share_of_sums(plain):
    model, batches = plain
    scores = score_blocks(model, find_blocks(model, batches[0]), batches)
    every = streams(model, torch.cat(batches))
    wanted = [float((y - x).square().mean() / y.square().mean()) for x, y in pairwise(every)]
    assert scores.values == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("axis", [None, 1, -1])
def test_turning_is_a_mean_of_cosines(plain, axis):
    model, batches = plain
    scores = score_blocks(model, find_blocks(model, batches[0]), batches, partial(turning, axis=axis))
    wanted = []
    every = streams(model, torch.cat(batches))
    for x, y in pairwise(every):
        x, y = (t.flatten(1) if axis is None else t.movedim(axis, -1) for t in (x, y))
        pairs = zip(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))
        cosines = [float(a @ b) / float(a.norm() * b.norm()) for a, b in pairs]
        wanted.append(1 - sum(cosines) / len(cosines))
    assert scores.values == pytest.approx(wanted, rel=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("loss", [cross_entropy, wrong])
def test_damage_is_the_rise_of_the_mean_loss(plain, loss):
    model, batches = plain
    labelled = [(x, torch.arange(len(x)) % 3) for x in batches]
    blocks = find_blocks(model, batches[0])
    scores = score_blocks(model, blocks, labelled, partial(damage, loss=loss))
    x, y = torch.cat(batches), torch.cat([labels for _, labels in labelled])
    whole, wanted = float(loss(model(x), y)), []
    for number in range(2):
        bare = copy.deepcopy(model)
        bare.blocks[number] = nn.Identity()
        wanted.append(float(loss(bare(x), y)) - whole)
    assert scores.values == pytest.approx(wanted, abs=1e-12)
    assert any(value != 0 for value in scores.values)


@pytest.mark.parametrize("number", range(len(residual.CASES)))
@pytest.mark.parametrize("by", [added_energy, turning])
def test_the_model_is_left_as_it_was(number, by):
    case = residual.CASES[number]
    torch.manual_seed(0)
    model, x = case.make().train(), case.inputs()
    before, given = copy.deepcopy(model.state_dict()), x.clone()
    values = score_blocks(model, find_blocks(model, x), [x], by).values
    assert all(0 < value < 3 for value in values)
    assert model.training
    assert torch.equal(x, given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_a_norm_that_stays_is_part_of_what_goes_on():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), residual.PostNorm()).eval(), residual.tokens()
    (value,) = score_blocks(model, find_blocks(model, x), [x]).values
    stream = model[0](x)
    bare = model[1].norm2(model[1].norm1(stream))
    whole = model[1](stream)
    assert value == pytest.approx(float((whole - bare).square().sum() / whole.square().sum()), rel=1e-5)


@torch.no_grad()
def test_blocks_that_are_gone():
    torch.manual_seed(0)
    model = residual.CASES[11].make().eval()
    x = residual.CASES[11].inputs()
    blocks = find_blocks(model, x)
    assert blocks.names == ("blocks.0", "blocks.0.0", "blocks.0.1")
    whole, inner, second = score_blocks(model, blocks, [x], gone=["blocks.0.0"]).values
    assert whole != whole
    assert inner != inner
    stream = model.stem(x)
    given = model.blocks[0][1](stream)
    assert second == pytest.approx(float((given - stream).square().sum() / given.square().sum()), rel=1e-6)
    depth = Depth(model, blocks, ("blocks.0.0",))
    assert torch.equal(depth.without("blocks.0.1")(x), model.head(stream.mean((2, 3))))
    shown = str(score_blocks(model, blocks, [x])).splitlines()
    assert shown[0].split() == ["score", "params", "MACs", "block"]
    assert {line.split()[-1] for line in shown[1:]} == set(blocks.names)


def test_refusals(plain):
    model, batches = plain
    blocks = find_blocks(model, batches[0])
    with pytest.raises(PlanError, match="the blocks are those of another model"):
        score_blocks(residual.Shared(), blocks, batches)
    with pytest.raises(PlanError, match="there are no batches to score the blocks by"):
        score_blocks(model, blocks, [])
    with pytest.raises(PlanError, match="there are no batches to measure the loss on"):
        score_blocks(model, blocks, [], damage)
    with pytest.raises(PlanError, match=r"the score of blocks\.0 is nan"):
        score_blocks(model, blocks, [(batches[0], 0)], partial(damage, loss=lambda *_: torch.tensor(torch.nan)))
