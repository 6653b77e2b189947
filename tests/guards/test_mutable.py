"""No module-level mutable state in the package: two runs in one process must not be able to meet."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from sources import SOURCES, called, findings, found_in

DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
IMMUTABLE = frozenset(
    {
        "tuple",
        "frozenset",
        "MappingProxyType",
        "NewType",
        "TypeVar",
        "ParamSpec",
        "compile",
        "namedtuple",
        "int",
        "float",
        "str",
        "bytes",
        "range",
        "len",
        "Path",
        "PurePosixPath",
        "partial",
        "attrgetter",
        "itemgetter",
        "getLogger",
        "Typer",
        "ContextVar",  # each context has a value of its own
        "spec",  # graph.axes: an einops-like string made into a function
    }
)


def mutable(value: ast.expr) -> bool:
    """Whether an expression makes something that can be changed in place."""
    if isinstance(value, DISPLAYS):
        return True
    if isinstance(value, ast.Call):
        name = called(value)
        return not name or name[-1] not in IMMUTABLE
    if isinstance(value, ast.Tuple):
        return any(mutable(item) for item in value.elts)
    if isinstance(value, ast.BinOp):
        return mutable(value.left) or mutable(value.right)
    return False


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run on import: those in `if`, `try`, `with`, loops and class bodies too."""
    for node in body:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for part in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body)


def state(tree: ast.Module) -> Iterator[str]:
    """Module-level and class-level names bound to something mutable, and every `global` statement."""
    for node in statements(tree.body):
        if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [ast.unparse(target) for target in targets]
        if names != ["__all__"] and not is_field(node.value) and mutable(node.value):
            yield f"line {node.lineno}: {', '.join(names)} is mutable"
    for inner in ast.walk(tree):
        if isinstance(inner, ast.Global):
            yield f"line {inner.lineno}: global {', '.join(inner.names)}"


def is_field(value: ast.expr) -> bool:
    """Whether a value is a record's field declaration, which makes a new default for each instance."""
    return isinstance(value, ast.Call) and called(value)[-1:] in {("field",), ("Field",), ("ConfigDict",)}


def test_no_module_level_state():
    assert not findings(state, SOURCES)


@pytest.mark.parametrize(
    "snippet",
    [
        "CACHE = {}",
        "CACHE: dict[str, int] = {}",
        "NAMES = ['a']",
        "SEEN = set()",
        "BOTH = ('a', [1])",
        "TABLE = (1,) + tuple([2]) + [3]",
        "SQUARES = [x for x in (1, 2)]",
        "if True:\n    CACHE = dict()",
        "try:\n    import x\nexcept ImportError:\n    CACHE = {}",
        "class A:\n    seen = []",
        "import torch\nEYE = torch.eye(3)",
        "def f():\n    global x\n    x = 1",
    ],
)
def test_mutable_state_is_seen(snippet):
    assert found_in(state, snippet)


@pytest.mark.parametrize(
    "snippet",
    [
        "__all__ = ['a']",
        "SIZES = (1, 2)",
        "NAMES = frozenset({'a'})",
        "RULES = MappingProxyType({'a': 1})",
        "Weights = Callable[[int], str]",
        "Either = int | str",
        "def f():\n    cache = {}",
        "class A:\n    seen: list[int] = field(default_factory=list)",
    ],
)
def test_constants_are_let_through(snippet):
    assert not found_in(state, snippet)
