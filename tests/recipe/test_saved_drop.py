"""Models without blocks on disk and back, alone and between cuts and simplifications."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import residual
from secateur.allocate.depth import Drop
from secateur.allocate.plan import Plan
from secateur.errors import PlanError
from secateur.graph.groups import find_groups
from secateur.graph.residual import find_blocks
from secateur.recipe.architecture import ARCHITECTURE
from secateur.recipe.folder import Reduction, load, save
from secateur.surgery.cut import apply
from secateur.surgery.drop import drop_blocks
from secateur.surgery.simplify import simplify
from secateur.zoo.models import build_model

X = torch.randn(2, 3, 32, 32)


def halved(model: nn.Module) -> tuple[nn.Module, Plan]:
    groups = find_groups(model, X)
    plan = Plan(groups, tuple(tuple(range(0, group.size, 2)) for group in groups.groups))
    return apply(model, plan), plan


def dropped(model: nn.Module, *names: str) -> tuple[nn.Module, Drop]:
    drop = Drop(find_blocks(model, X), names)
    return drop_blocks(model, drop.blocks, names).eval(), drop


def check_comes_back(model: nn.Module, steps: list[Reduction], source: str = "secateur:resnet20") -> None:
    save(model, "small", plan=steps, source=source)
    back = load("small")
    assert str(back) == str(model)
    assert list(back.state_dict()) == list(model.state_dict())
    assert torch.equal(back(X), model(X))


def test_in_every_order():
    torch.manual_seed(0)
    model = build_model("secateur:resnet20").model.eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.data.uniform_(0.5, 1.5)
    first, drop = dropped(model, "layer1.1", "layer3.2")
    check_comes_back(first, [drop])
    second, plan = halved(first)
    check_comes_back(second, [drop, plan])
    third, record = simplify(second, X, batch_norm=True)
    check_comes_back(third, [drop, plan, record])
    fourth, more = dropped(third, "layer1.0", "layer2.1")
    check_comes_back(fourth, [drop, plan, record, more])
    told = json.loads(Path("small", ARCHITECTURE).read_text())
    assert sorted(told["forms"]) == ["layer1.0", "layer1.1", "layer2.1", "layer3.2"]
    assert not any(name.startswith(("layer1.0.", "layer2.1.", "layer3.2.")) for name in told["attributes"])
    with pytest.raises(PlanError, match=r"drop 1 leaves .* and drop 2 was made for .*, in order"):
        save(fourth, "other", plan=[drop, more, plan, record], source="secateur:resnet20")


def test_a_stage_whose_block_had_gone():
    model = build_model("secateur:resnet20").model.eval()
    first, one = dropped(model, "layer1.0")
    second, two = dropped(first, "layer1")
    check_comes_back(second, [one, two])
    told = json.loads(Path("small", ARCHITECTURE).read_text())
    assert list(told["forms"]) == ["layer1"]


def test_what_stays_keeps_its_name_and_its_cut():
    """Norms of a dropped layer stay, are cut afterwards, and a size that Python computes around it is counted anew."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), residual.PostNorm(), nn.Linear(4, 2)).eval(), residual.tokens()
    drop = Drop(find_blocks(model, x), ("1",))
    smaller = drop_blocks(model, drop.blocks, drop.names).eval()
    groups = find_groups(smaller, x)
    plan = Plan(groups, tuple(tuple(range(0, group.size, 2)) for group in groups.groups))
    cut = apply(smaller, plan)
    save(cut, "small", plan=[drop, plan])
    back = load("small", factory=lambda: nn.Sequential(nn.Linear(4, 4), residual.PostNorm(), nn.Linear(4, 2)))
    assert {name for name in back.state_dict() if name.startswith("1.")} == {
        "1.norm1.weight", "1.norm1.bias", "1.norm2.weight", "1.norm2.bias"
    }  # fmt: skip
    assert back[1].norm1.weight.shape == (2,)
    assert torch.equal(back(x), cut(x))


class Viewing(nn.Module):
    """Makes a view with a size that a cut changes, after a block that makes views too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(4, 2)
        self.block = residual.Block(lambda x, f: x + f(x.view(2, 1, 4).view(2, 4)), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(x)
        return self.head(self.stem(x).view(2, 2, 4).sum(1))


def test_sizes_are_counted_anew():
    torch.manual_seed(0)
    model, x = Viewing().eval(), torch.randn(2, 4)
    groups = find_groups(model, x)
    plan = Plan(groups, tuple(tuple(range(0, group.size, 2)) for group in groups.groups))
    cut = apply(model, plan)
    drop = Drop(find_blocks(cut, x), ("block",))
    smaller = drop_blocks(cut, drop.blocks, drop.names).eval()
    save(smaller, "small", plan=[plan, drop])
    back = load("small", factory=Viewing)
    assert torch.equal(back(x), smaller(x))
    assert smaller.stem.out_features < 8
