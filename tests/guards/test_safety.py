"""What the package never does: unpickle a file, swallow every error, import torch to answer --help."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sources import SOURCES, TESTS, called, findings, found_in

PICKLERS = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
CHANGES_THE_PROCESS = frozenset({"set_default_dtype", "set_default_device"})


def pickles(tree: ast.Module) -> Iterator[str]:
    """Ways to read a file that can run code: pickle and its kin, torch and numpy without their guards."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            modules = []
        for name in modules:
            if name.split(".")[0] in PICKLERS:
                yield f"line {node.lineno}: imports {name}"
        if not isinstance(node, ast.Call):
            continue
        if called(node) == ("torch", "load") and not states(node, "weights_only", True):
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if states(node, "allow_pickle", True):
            yield f"line {node.lineno}: allow_pickle=True"


def states(call: ast.Call, name: str, value: object) -> bool:
    """Whether a call passes the constant `value` as the keyword `name`."""
    return any(
        keyword.arg == name and isinstance(keyword.value, ast.Constant) and keyword.value.value is value
        for keyword in call.keywords
    )


def swallows(tree: ast.Module) -> Iterator[str]:
    """Handlers that name no error, and handlers of every error that do nothing."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        if node.type is None:
            yield f"line {node.lineno}: bare except"
        elif ast.unparse(node.type) in {"Exception", "BaseException"} and isinstance(node.body[0], ast.Pass):
            yield f"line {node.lineno}: every error is passed over"


def settings(tree: ast.Module) -> Iterator[str]:
    """Calls that change a default of the caller's process."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node)[-1:] and called(node)[-1] in CHANGES_THE_PROCESS:
            yield f"line {node.lineno}: {'.'.join(called(node))}"


def test_nothing_is_unpickled():
    assert not findings(pickles, SOURCES)


def test_no_error_is_swallowed():
    assert not findings(swallows, SOURCES + TESTS)


def test_no_default_is_changed():
    assert not findings(settings, SOURCES)


@pytest.mark.parametrize(
    ("guard", "snippet"),
    [
        (pickles, "import pickle"),
        (pickles, "from joblib import load"),
        (pickles, "torch.load(path)"),
        (pickles, "torch.load(path, weights_only=False)"),
        (pickles, "np.load(path, allow_pickle=True)"),
        (swallows, "try:\n    f()\nexcept:\n    g()"),
        (swallows, "try:\n    f()\nexcept Exception:\n    pass"),
        (settings, "torch.set_default_dtype(torch.float64)"),
    ],
)
def test_each_is_seen(guard, snippet):
    assert found_in(guard, snippet)


@pytest.mark.parametrize(
    ("guard", "snippet"),
    [
        (pickles, "torch.load(path, weights_only=True)"),
        (swallows, "try:\n    f()\nexcept OSError as error:\n    raise RunError('x') from error"),
    ],
)
def test_each_lets_the_right_way_through(guard, snippet):
    assert not found_in(guard, snippet)


@pytest.mark.parametrize(
    "code",
    [
        "import secateur",
        "from secateur.cli import main\nimport sys\nsys.argv = ['secateur', '--help']\nmain()",
        "from secateur.cli import main\nimport sys\nsys.argv = ['secateur', 'compress', '--help']\nmain()",
    ],
)
def test_help_does_not_wait_for_torch(code):
    script = (
        "import atexit, sys\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'matplotlib'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules))))\n"
        f"{code}\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
