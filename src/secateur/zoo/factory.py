"""A network from the user's own Python file: `path/to/file.py:factory`."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from secateur.errors import ModelError, UnknownName
from secateur.zoo.built import Built


def build_from_file(spec: str, classes: int | None) -> Built:
    """Loads the file and calls the factory, with `classes` or `num_classes` if it has such a parameter.

    The file may import its neighbours, as a script may.

    Raises:
        ModelError: no such file, it or the factory fails, or what comes back is no `nn.Module`.
        UnknownName: no such factory in the file.

    >>> _ = Path("mine.py").write_text("import torch\\ndef make(classes): return torch.nn.Linear(4, classes)")
    >>> build_from_file("mine.py:make", classes=3).model
    Linear(in_features=4, out_features=3, bias=True)
    >>> Path("mine.py").unlink()
    """
    file, _, name = (spec, "", "") if spec.endswith(".py") else spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ModelError(f"there is no file {file} to build {spec!r} from; check the path (from {Path.cwd()}).")
    with _importable(path.parent):
        factory = _named(_load(path), name, path)
        asked = _class_argument(factory, classes)
        try:
            model = factory(**asked)
        except Exception as error:  # the user's code may raise whatever it likes
            raise ModelError(f"{name} in {path} raised {_words(error)}.") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} in {path} returned a {type(model).__name__}; it must return a torch.nn.Module.")
    if asked or classes is None:
        return Built(model, spec, classes, ())
    note = f"{name} takes neither classes nor num_classes: the {classes} classes of the data were not passed on"
    return Built(model, spec, None, (note,))


def _load(path: Path) -> ModuleType:
    """Runs the file as a module of its own; it has to be listed among the modules for dataclasses to work in it."""
    mark = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"secateur_file_{path.stem}_{mark}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:  # as above
        del sys.modules[name]
        raise ModelError(f"{path} could not be loaded; it raised {_words(error)}.") from error
    return module


def _named(module: ModuleType, name: str, path: Path) -> Callable[..., Any]:
    made = vars(module).get(name)
    if callable(made):
        factory: Callable[..., Any] = made
        return factory
    own = [
        key
        for key, value in vars(module).items()
        if callable(value) and not key.startswith("_") and value.__module__ == module.__name__
    ]
    raise UnknownName("factory", name, own, hint=f"Write {path}:NAME with something callable from that file.")


def _class_argument(factory: Callable[..., Any], classes: int | None) -> dict[str, int]:
    if classes is None:
        return {}
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some built-in callables have no signature
        return {}
    return next(({name: classes} for name in ("classes", "num_classes") if name in parameters), {})


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".")


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path[:] = before
