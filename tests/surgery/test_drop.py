"""Models without blocks: equal to the branches at zero, before and after cuts; what is wrong is noticed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torchvision
import transformers
from torch import nn

import residual
from secateur.allocate.depth import Drop
from secateur.allocate.plan import Plan
from secateur.errors import PlanError, ProofError
from secateur.graph.attention import headwise
from secateur.graph.blocks import Blocks
from secateur.graph.groups import find_groups
from secateur.graph.nested import Example
from secateur.graph.passing import Passing
from secateur.graph.residual import find_blocks
from secateur.measure.macs import count_macs
from secateur.measure.params import count_params
from secateur.surgery import drop as room
from secateur.surgery.certify import certify
from secateur.surgery.cut import apply
from secateur.surgery.drop import certify_drop, drop_blocks
from secateur.surgery.tier import tier_of


def innermost(blocks: Blocks) -> tuple[str, ...]:
    return tuple(b.name for b in blocks.blocks if not any(o is not b and b.holds(o) for o in blocks.blocks))


def outermost(blocks: Blocks) -> tuple[str, ...]:
    return tuple(b.name for b in blocks.blocks if not any(o is not b and o.holds(b) for o in blocks.blocks))


def halved(model: nn.Module, x: object) -> tuple[nn.Module, Plan]:
    groups = find_groups(model, x)
    plan = Plan(groups, tuple(tuple(range(0, group.size, 2)) for group in groups.groups))
    return apply(model, plan), plan


def check_dropped(model: nn.Module, x: object, names: tuple[str, ...] | None = None) -> nn.Module:
    blocks = find_blocks(model, x)
    drop = Drop(blocks, innermost(blocks) if names is None else names)
    assert Drop.from_json(json.loads(json.dumps(drop.to_json()))) == drop
    smaller = drop_blocks(model, blocks, drop.names)
    found = certify_drop(model, smaller, drop, x)
    assert found.ok, found.sentence
    assert count_params(smaller) == drop.params_left < blocks.params
    assert count_macs(smaller, x.inputs if isinstance(x, Example) else x).total == drop.macs_left
    return smaller


@pytest.mark.parametrize("case", residual.CASES, ids=range(len(residual.CASES)))
def test_each_pattern(case):
    torch.manual_seed(0)
    model, x = case.make().eval(), case.inputs()
    smaller = check_dropped(model, x)
    blocks = find_blocks(model, x)
    check_dropped(model, x, outermost(blocks))
    check_dropped(model, x, innermost(blocks)[-1:])
    assert not set(innermost(blocks)) & set(find_blocks(smaller, x).names)
    assert any(isinstance(module, Passing) for module in copy.deepcopy(smaller).modules())


@pytest.mark.parametrize("case", residual.CASES, ids=range(len(residual.CASES)))
def test_before_and_after_cuts(case):
    torch.manual_seed(0)
    model, x = case.make().eval(), case.inputs()
    names = innermost(find_blocks(model, x))[-1:]
    smaller, plan = halved(dropped := check_dropped(model, x, names), x)
    assert certify(dropped, smaller, plan, x).ok
    cut, _ = halved(model, x)
    assert find_blocks(cut, x).names == find_blocks(model, x).names
    again = check_dropped(cut, x, names)
    assert again.state_dict().keys() == smaller.state_dict().keys()


def test_dropping_twice_is_dropping_both():
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18().eval(), torch.randn(2, 3, 32, 32)
    once = drop_blocks(model, find_blocks(model, x), ["layer1.1", "layer4.1"])
    first = drop_blocks(model, find_blocks(model, x), ["layer4.1"])
    assert torch.equal(drop_blocks(first, find_blocks(first, x), ["layer1.1"])(x), once(x))
    whole = drop_blocks(model, find_blocks(model, x), ["layer1"])
    assert repr(whole.layer1) == "Passing(input)"
    both = drop_blocks(once, rest := find_blocks(once, x), ["layer1.0"])
    assert rest.names == ("layer1.0", "layer2.1", "layer3.1")
    assert not torch.equal(both(x), once(x))
    assert repr(once.layer1[1]) == "Passing(x)"


def test_the_model_is_as_it_was_and_the_copy_its_own():
    model, x = residual.CASES[0].make().train(), residual.CASES[0].inputs()
    before = copy.deepcopy(model.state_dict())
    smaller = drop_blocks(model, find_blocks(model, x), ["blocks.1"])
    assert (tier_of(model), tier_of(smaller)) == ("a", "b")
    smaller(x).sum().backward()
    assert all(p.grad is not None for p in smaller.parameters())
    assert all(p.grad is None for p in model.parameters())
    smaller.stem[0].weight.data.zero_()
    assert model.training
    assert smaller.blocks[1].training
    kept = [name for name in before if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in kept)


def test_what_comes_out_may_be_written_into():
    model, x = residual.Features().eval(), residual.CASES[0].inputs()
    smaller = check_dropped(model, x)
    kept, doubled = smaller(x)
    assert torch.equal(doubled, 2 * kept)


def test_calls_with_other_arguments():
    model, x = residual.Layered().eval(), residual.tokens()
    layer = drop_blocks(model, find_blocks(model, x), ["layers.1"]).layers[1]
    assert layer.kind == "full"
    assert layer(x, None, weights=False)[0] is layer(mask=None, hidden_states=x)[0] is x
    assert layer(x)[1] is None


def test_the_encoder_of_torch_reads_its_first_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = residual.tokens().repeat(1, 1, 2)
    smaller = check_dropped(model, x, ("layers.0",))
    assert smaller.layers[0].self_attn.batch_first
    assert [name for name, _ in smaller.layers[0].named_parameters()] == [
        "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"
    ]  # fmt: skip
    assert not any(headwise(module) for module in smaller.layers[0].modules())


def test_language_models():
    torch.manual_seed(0)
    ids = {"input_ids": torch.arange(7)[None], "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    bert = transformers.BertModel(config).eval()
    check_dropped(bert, ids, ("encoder.layer.0.attention", "encoder.layer.1"))
    gpt = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    gpt2, x = transformers.GPT2LMHeadModel(gpt).eval(), Example(ids, lambda out: out.logits)
    smaller = check_dropped(gpt2, x, ("transformer.h.1",))
    cut, plan = halved(smaller, x)
    assert certify(smaller, cut, plan, x).ok


def test_sizes_are_counted_anew_in_the_modules_around():
    """The network's own forward makes a view with a size that a cut changes, after a block that makes views too."""

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 8), nn.Linear(4, 2)
            self.block = residual.Block(lambda x, f: x + f(x.view(2, 1, 4).view(2, 4)), nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.block(x)
            return self.head(self.stem(x).view(2, 2, 4).sum(1))

    torch.manual_seed(0)
    model, x = Viewing().eval(), torch.randn(2, 4)
    cut, plan = halved(model, x)
    assert plan.replays()[""][("view", 2)]
    blocks = find_blocks(cut, x)
    assert blocks.counted[0].before == (("block", 2),)
    assert blocks.renumbered(["block"]) == {"": {("view", 2): 0}}
    check_dropped(cut, x)


def test_what_is_wrong_is_noticed(monkeypatch):
    torch.manual_seed(0)
    model, x = residual.CASES[0].make().eval(), residual.CASES[0].inputs()
    drop = Drop(find_blocks(model, x), ("blocks.0",))
    other = drop_blocks(model, drop.blocks, ["blocks.1"])
    wrong = certify_drop(model, other, drop, x)
    assert not wrong.ok
    assert "failed equals the model with branches at 0" in wrong.sentence
    kept = residual.CASES[2].make().eval()
    form = find_blocks(model, x).blocks[0].form
    without_relu = drop_blocks(kept, find_blocks(kept, x), ["blocks.0"])
    without_relu.blocks[0].form = form
    assert not certify_drop(kept, without_relu, Drop(find_blocks(kept, x), ("blocks.0",)), x).ok
    with monkeypatch.context() as patch:
        patch.setattr(room, "_without_branches", lambda twin, inputs, found, names: room.outputs(twin, inputs))
        assert not certify_drop(model, drop_blocks(model, drop.blocks, drop.names), drop, x).ok


def test_refusals():
    model, x = residual.CASES[0].make(), residual.CASES[0].inputs()
    blocks = find_blocks(model, x)
    with pytest.raises(PlanError, match=r"the blocks are those of another model: .* Find the blocks of this model"):
        drop_blocks(residual.Shared(), blocks, ["blocks.0"])

    class Wavering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.turn = residual.Block(lambda x, f: x + f(x)), [0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.turn[0] += 1
            return self.block(x) if bool(x.sum() > 1e9) else self.block(x.neg())

    model = Wavering()
    drop = Drop(find_blocks(model, x), ("block",))
    smaller = drop_blocks(model, drop.blocks, drop.names)
    found = room.find_in(room.watch_twin(room.share(model.eval()), x, fake=False), model)
    with pytest.raises(ProofError, match="its path depends on the values"):
        room._without_branches(model, x.abs() * 1e9, found, ["block"])
    assert certify_drop(model, smaller, drop, x).ok
