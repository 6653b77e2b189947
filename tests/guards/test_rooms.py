"""A room imports only the rooms above it, in the order that ARCHITECTURE.md draws."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sources import PACKAGE, ROOT, SOURCES

ROOMS = (
    "errors",
    "codec",
    "zoo",
    "graph",
    "measure",
    "score",
    "allocate",
    "surgery",
    "recover",
    "search",
    "report",
    "recipe",
    "cli",
)
FRONT_DOORS = ("__init__", "__main__")


def room_of(path: Path) -> str:
    """The room that a file of the package belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.Module, package: tuple[str, ...]) -> Iterator[str]:
    """The rooms that a module imports, wherever the statement stands; `package` is the one it lies in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        yield from (name[1] if len(name) > 1 else "" for name in names if name[0] == "secateur")


def below(tree: ast.Module, room: str, package: tuple[str, ...]) -> list[str]:
    """The imports of rooms that `room` may not know: those below it, and the package's own front door."""
    allowed = ROOMS[: ROOMS.index(room) + 1]
    return [name for name in imported(tree, package) if name not in allowed and name != "__version__"]


def test_each_room_imports_only_rooms_above_it():
    wrong = []
    for path in SOURCES:
        room = room_of(path)
        if room in FRONT_DOORS:
            continue
        package = ("secateur", *path.relative_to(PACKAGE).parts[:-1])
        tree = ast.parse(path.read_text(encoding="utf-8"))
        wrong += [f"{path.relative_to(ROOT)} imports {name!r}" for name in below(tree, room, package)]
    assert not wrong


def test_every_file_is_in_a_room():
    assert {room_of(path) for path in SOURCES} <= {*ROOMS, *FRONT_DOORS}


def test_the_order_is_the_one_that_is_drawn():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    drawing = re.search(r"```\nsrc/secateur/\n(.*?)```", text, re.DOTALL)
    assert drawing
    assert tuple(re.findall(r"^  (\w+)(?:/|\.py)", drawing[1], re.MULTILINE)) == ROOMS


@pytest.mark.parametrize(
    "line",
    [
        "import secateur.recipe.run",
        "from secateur.recipe import run",
        "from secateur import recipe",
        "from secateur import load",
        "import secateur",
        "from ..recipe import run",
        "from .. import recipe",
        "def f():\n    from secateur.recipe.run import run",
    ],
)
def test_a_wrong_import_is_seen(line):
    assert below(ast.parse(line), "graph", ("secateur", "graph"))


@pytest.mark.parametrize("line", ["from secateur.errors import PlanError", "from . import axes", "import os"])
def test_a_right_import_is_let_through(line):
    assert not below(ast.parse(line), "graph", ("secateur", "graph"))


def test_sibling_names_do_not_repeat():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
