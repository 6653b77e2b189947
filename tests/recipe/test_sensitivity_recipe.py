"""A recipe whose cut goes by sensitivity: each group is cut alone, the loss is kept and drawn, the plan follows it."""

from __future__ import annotations

import pytest

from secateur.errors import RecipeError
from secateur.recipe.launch import run
from secateur.recipe.planning import how_much
from secateur.recipe.reading import build
from secateur.recipe.run import read_record
from secateur.recipe.schema import Cut

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    '''Two branches; the second counts for next to nothing.'''

    def __init__(self, classes):
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        return self.head(torch.cat([self.one(x), 1e-3 * self.two(x)], 1))

def make(classes):
    return Net(classes)
"""
TRAIN = {"kind": "train", "stages": [{"lr": 0.05, "epochs": 3}]}
CUT = {"kind": "cut", "guide": "sensitivity", "criterion": "random", "images": 100, "budget": {"macs": 0.6}}


@pytest.fixture
def parts(tmp_path):
    (tmp_path / "nets.py").write_text(NETWORK)
    return {
        "data": {"source": "digits", "batch_size": 64},
        "model": {"source": f"{tmp_path / 'nets.py'}:make"},
        "threads": 1,
    }


def test_groups_that_do_not_matter_give_more(parts, tmp_path):
    record = run(build(**parts, steps=(TRAIN, CUT)), tmp_path / "run")
    left = {row.layer: row.after for row in record.channels}
    assert left["two.1"] < 16 < left["one.1"]
    assert record.sensitivity is not None
    rises = [curve.losses[-1] - record.sensitivity.whole for curve in record.sensitivity.curves]
    assert rises[0] > 10 * abs(rises[1])
    assert read_record(tmp_path / "run").sensitivity == record.sensitivity
    assert (tmp_path / "run" / "plots" / "sensitivity.svg").stat().st_size > 1000
    assert 'id="sensitivity"' in (tmp_path / "run" / "report.html").read_text()


def test_a_penalty_may_press_on_what_it_would_take(parts, tmp_path):
    pressing = {**TRAIN, "penalty": {"kind": "group-lasso", "strength": 1e-3, "units": "next-cut"}}
    record = run(build(**parts, steps=(TRAIN, pressing, CUT)), tmp_path / "run")
    assert sum(row.after for row in record.channels) < sum(row.before for row in record.channels)


def test_it_needs_a_budget():
    with pytest.raises(RecipeError, match="the guide 'sensitivity' needs a budget"):
        build(
            data={"source": "digits"},
            model={"source": "secateur:digits_vgg"},
            steps=({**CUT, "budget": None},),
        )


def test_it_is_named_in_the_ledger():
    assert how_much(Cut(guide="sensitivity", budget={"macs": 0.5})) == "to 50 % of the MACs, guided by sensitivity"
