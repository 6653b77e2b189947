"""`import secateur as sc`: every verb by its name, whatever has been imported before it."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
import torch
from torch import nn

import secateur as sc
from sources import PACKAGE


@pytest.mark.parametrize("name", [name for name in sc.__all__ if name != "__version__"])
def test_every_name_is_there_and_can_be_called(name):
    assert callable(getattr(sc, name))
    assert name in dir(sc)


def test_the_type_checker_sees_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {(node.module, alias.name) for node in block.body for alias in node.names}
    assert seen == {(f"secateur.{home}", name) for home, names in sc._HOMES.items() for name in names}
    assert {name for _, name in seen} | {"__version__"} == set(sc.__all__)


@pytest.mark.parametrize(
    "first", ["", "import secateur.score.magnitude, secateur.measure.macs\n", "sc.score; sc.measure\n"]
)
def test_a_room_is_called_as_its_verb(first):
    code = (
        "import secateur as sc\n"
        f"{first}"
        "import torch\n"
        "net, x = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)), torch.zeros(1, 2)\n"
        "for _ in range(2):\n"
        "    scores = sc.score(net, sc.find_groups(net, x), sc.Magnitude(p=1))\n"
        "    params = sc.measure(net, x, latency_runs=0).params\n"
        "import secateur.score.random as module\n"
        "print(len(scores.values[0]), params, module.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "3 13 secateur.score.random\n", done.stderr


def test_the_page_that_the_design_opens_with():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    groups = sc.find_groups(model, x)
    scores = sc.score(model, groups, sc.Magnitude(p=1))
    plan = sc.allocate(scores, sc.Uniform(0.5))
    smaller = sc.apply(model, plan)
    assert sc.certify(model, smaller, plan, x).ok
    assert smaller[0].out_features == 4


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'secateur' has no attribute 'prune'"):
        _ = sc.prune
