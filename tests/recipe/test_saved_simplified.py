"""Simplified models on disk and back: what went is told by name, alone and between cuts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.allocate.plan import Plan
from secateur.errors import ModelError, PlanError
from secateur.graph.groups import find_groups
from secateur.recipe.architecture import ARCHITECTURE
from secateur.recipe.folder import load, save
from secateur.surgery.cut import apply
from secateur.surgery.simplification import Simplification
from secateur.surgery.simplify import simplify
from secateur.zoo.models import build_model

NORMED = """
from torch import nn

def make(bias=False):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d((3, 2)),
        nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 2),
    )

def biased():
    return make(True)
"""
SMALL, LARGE = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 9, 9)


def halved(model: nn.Module) -> tuple[nn.Module, Plan]:
    groups = find_groups(model, SMALL)
    plan = Plan(groups, tuple(tuple(range(0, group.size, 2)) for group in groups.groups))
    return apply(model, plan), plan


@pytest.fixture
def normed():
    """Networks with batch norms away from their fresh state; some of the second's channels are dead."""
    Path("nets.py").write_text(NORMED)
    torch.manual_seed(0)
    models = {name: build_model(f"nets.py:{name}").model.eval() for name in ("make", "biased")}
    for model in models.values():
        for norm in (model[1], model[4]):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.data.uniform_(0.5, 1.5)
        model[1].weight.data[:2], model[1].bias.data[:2] = 0, -1
    return models


@pytest.mark.parametrize(
    ("name", "x", "batch_norm", "kinds"),
    [
        ("make", LARGE, False, {"dead units"}),
        ("make", SMALL, False, {"dead units", "replicated features"}),
        ("biased", LARGE, True, {"dead units", "batch norms"}),
        ("make", LARGE, True, {"dead units", "batch norms"}),
        ("make", SMALL, True, {"dead units", "replicated features", "batch norms"}),
    ],
)
def test_a_simplified_model_comes_back_bit_for_bit(normed, name, x, batch_norm, kinds):
    model = normed[name]
    smaller, record = simplify(model, x, batch_norm=batch_norm)
    assert {found.kind for found in record.found} == kinds
    assert record.biases == (("3.bias",) if batch_norm and name == "make" else ())
    read = Simplification.from_json(json.loads(json.dumps(record.to_json())))
    assert read == record
    save(smaller, "small", plan=read, source=f"nets.py:{name}")
    back = load("small")
    assert str(back) == str(smaller)
    assert list(back.state_dict()) == list(smaller.state_dict())
    assert torch.equal(back(x), smaller(x))
    torch.testing.assert_close(back(x), model(x))


def test_cut_then_simplified_then_cut(normed):
    once, first = halved(normed["make"])
    with torch.no_grad():
        once[1].weight[0], once[1].bias[0] = 0, -1
    simpler, record = simplify(once, SMALL, batch_norm=True)
    twice, second = halved(simpler)
    assert record.identities == ("1", "4")
    assert simpler[3].bias.shape > twice[3].bias.shape
    save(twice, "small", plan=[first, record, second], source="nets.py:make")
    back = load("small")
    assert str(back) == str(twice)
    assert torch.equal(back(SMALL), twice(SMALL))
    told = json.loads(Path("small", ARCHITECTURE).read_text())
    assert (told["identities"], told["biases"]) == (["1", "4"], ["3.bias"])
    assert not {"1", "4"} & told["attributes"].keys()
    with pytest.raises(PlanError, match=r"simplification 1 leaves .* and plan 2 was made for .*, in order"):
        save(twice, "other", plan=[record, first, second], source="nets.py:make")
    with pytest.raises(PlanError, match=r"plan 1 leaves .* and simplification 2 was made for"):
        save(twice, "other", plan=[second, record], source="nets.py:make")
    with pytest.raises(PlanError, match=r"simplification 2 leaves .* and the model has"):
        save(twice, "other", plan=[first, record], source="nets.py:make")
    Path("nets.py").write_text(NORMED.replace("nn.BatchNorm2d(8), nn.ReLU(), nn.Ada", "nn.ReLU(), nn.Ada"))
    with pytest.raises(ModelError, match=r"builds another model than the one that was cut"):
        load("small")
