"""No file over 400 lines, no function body over 60: what is longer does more than one thing."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from sources import ROOT, SOURCES, TESTS, findings, found_in

FILE_LINES = 400
BODY_LINES = 60


def long_bodies(tree: ast.Module) -> Iterator[str]:
    """Functions whose body, the docstring left out, spans more lines than allowed."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        if lines > BODY_LINES:
            yield f"{node.name} has a body of {lines} lines"


def test_no_long_files():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES + TESTS}
    assert not {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > FILE_LINES}


def test_no_long_functions():
    assert not findings(long_bodies, SOURCES + TESTS)


def test_a_long_function_is_seen():
    def function(lines: int) -> str:
        return "def f():\n    'a docstring'\n" + "    x = 1\n" * lines

    assert found_in(long_bodies, function(BODY_LINES + 1)) == ["f has a body of 61 lines"]
    assert not found_in(long_bodies, function(BODY_LINES))
