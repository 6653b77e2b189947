"""The repository's Python files as the guards read them: paths, syntax trees and where the rooms lie."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "secateur"
SOURCES = tuple(sorted(PACKAGE.rglob("*.py")))
TESTS = tuple(sorted((ROOT / "tests").rglob("*.py")))

Guard = Callable[[ast.Module], Iterator[str]]


def findings(guard: Guard, files: tuple[Path, ...]) -> list[str]:
    """What `guard` objects to in `files`, each with the file it is in."""
    return [
        f"{path.relative_to(ROOT)}: {found}"
        for path in files
        for found in guard(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    ]


def found_in(guard: Guard, snippet: str) -> list[str]:
    """What `guard` objects to in a snippet: a guard that cannot fail guards nothing."""
    return list(guard(ast.parse(snippet)))


def called(call: ast.Call) -> tuple[str, ...]:
    """The parts of the name called: ("torch", "load") for `torch.load(x)`, () where it is no name."""
    parts: list[str] = []
    node: ast.expr = call.func
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        parts.append(node.id)
    return tuple(reversed(parts))
