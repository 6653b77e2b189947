"""Every test can fail: it asserts, expects an error by its sentence, or hands on to a checking helper."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from sources import TESTS, called, findings, found_in

EXPECTATIONS = (("raises",), ("warns",))


def claims(node: ast.AST) -> bool:
    """Whether a node states something that may turn out false."""
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant)
    if isinstance(node, ast.Call) and (name := called(node)):
        if name[-1] in {"raises", "warns"}:
            return any(keyword.arg == "match" for keyword in node.keywords)
        return name[-1].startswith(("check_", "assert_"))
    return False


def vacuous(tree: ast.Module) -> Iterator[str]:
    """Test functions that claim nothing, and expected errors that any error of the type would satisfy."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            if not any(claims(inner) for inner in ast.walk(node)):
                yield f"{node.name} asserts nothing"
        elif isinstance(node, ast.Call) and called(node)[-1:] in EXPECTATIONS:
            if claims(node) or [ast.unparse(argument) for argument in node.args] == ["KeyboardInterrupt"]:
                continue  # Ctrl-C has no sentence
            yield f"line {node.lineno}: {called(node)[-1]} without match="


def test_no_vacuous_tests():
    assert not findings(vacuous, TESTS)


@pytest.mark.parametrize(
    "snippet",
    [
        "def test_prints():\n    print(1)",
        "def test_true():\n    assert True",
        "class TestIt:\n    def test_nothing(self):\n        x = 1",
        "def test_any():\n    with pytest.raises(ValueError):\n        f()",
        "def test_two():\n    assert x\n    with pytest.raises(ValueError):\n        f()",
    ],
)
def test_a_vacuous_test_is_seen(snippet):
    assert found_in(vacuous, snippet)


@pytest.mark.parametrize(
    "snippet",
    [
        "def test_a():\n    assert f() == 1",
        "def test_a():\n    with pytest.raises(ValueError, match='no'):\n        f()",
        "def test_a():\n    check_same(f(), g())",
        "def test_a():\n    torch.testing.assert_close(f(), g())",
    ],
)
def test_a_real_test_is_let_through(snippet):
    assert not found_in(vacuous, snippet)
