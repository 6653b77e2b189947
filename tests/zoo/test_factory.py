"""Networks from the user's own file, and each sentence for a file or factory that will not do."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from torch import nn

from secateur.errors import ModelError, UnknownName
from secateur.zoo.models import build_model

MINE = """
from __future__ import annotations
import dataclasses
import torch
from torch import nn
from neighbour import WIDTH

@dataclasses.dataclass
class Config:
    width: int = WIDTH

class Net(nn.Module):
    def __init__(self, num_classes: int = 5):
        super().__init__()
        self.fc = nn.Linear(Config().width, num_classes)

def make(classes=2): return nn.Linear(4, classes)
def fixed(): return nn.Linear(4, 9)
def needs(classes): return nn.Linear(4, classes)
def breaks(): raise KeyError("depth")
def returns(): return {"weight": 1}
WIDE = 3
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 7\n")
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


@pytest.mark.parametrize(
    ("name", "classes", "outputs", "known"),
    [("make", 6, 6, 6), ("make", None, 2, None), ("Net", 6, 6, 6), ("Net", None, 5, None), ("fixed", None, 9, None)],
)
def test_a_factory_of_the_user(
    mine: Path, name: str, classes: int | None, outputs: int, known: int | None
) -> None:
    path = list(sys.path)
    built = build_model(f"{mine}:{name}", classes=classes)
    layers = [module for module in built.model.modules() if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in layers] == [outputs]
    assert (built.classes, built.notes) == (known, ())
    assert sys.path == path


def test_a_factory_that_takes_no_class_count_says_so(mine: Path) -> None:
    built = build_model(f"{mine}:fixed", classes=6)
    assert built.classes is None
    assert built.notes == ("fixed takes neither classes nor num_classes: the 6 classes of the data were not passed on",)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (":mak", r"unknown factory 'mak'; did you mean 'make'\? Choices: make, .*Write .*mine\.py:NAME"),
        (":WIDE", "unknown factory 'WIDE'"),
        ("", r"unknown factory ''\. Choices: .*needs"),
        (":breaks", r"breaks in .*mine\.py raised KeyError: 'depth'"),
        (":needs", r"needs in .*mine\.py raised TypeError: .*classes"),
        (":returns", r"returns in .*mine\.py returned a dict; it must return a torch\.nn\.Module"),
    ],
)
def test_what_can_be_wrong_with_a_factory(mine: Path, name: str, sentence: str) -> None:
    with pytest.raises((ModelError, UnknownName), match=sentence) as caught:
        build_model(f"{mine}{name}")
    listed = re.search(r"Choices: (.*?)\.", str(caught.value))
    own = {"Config", "Net", "make", "fixed", "needs", "breaks", "returns"}
    assert listed is None or set(listed[1].split(", ")) == own


def test_what_can_be_wrong_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no file none\.py to build 'none\.py:make' from; check the path"):
        build_model("none.py:make")
    for content, raised in (("def make(:", "SyntaxError"), ("import no_such_thing", "ModuleNotFoundError")):
        (tmp_path / "bad.py").write_text(content)
        with pytest.raises(ModelError, match=rf"bad\.py could not be loaded; it raised {raised}"):
            build_model(f"{tmp_path / 'bad.py'}:make")
    assert not [name for name in sys.modules if "file_bad" in name]


def test_a_file_is_read_anew_each_time(tmp_path: Path) -> None:
    for width in (3, 14):
        (tmp_path / "mine.py").write_text(f"import torch\ndef make(): return torch.nn.Linear({width}, 1)")
        linear = build_model(f"{tmp_path / 'mine.py'}:make").model
        assert isinstance(linear, nn.Linear)
        assert linear.in_features == width
