"""The calls of modules in a trace: which of its ops each ran, what it was given and what it gave."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CaptureError
from secateur.graph.attention import see_heads
from secateur.graph.capture import Recorder, Ref, Trace, recording
from secateur.graph.nested import Nested, map_tensors, tensors_in
from secateur.graph.replay import PythonCalls
from secateur.graph.twin import duplicate, fake_copy, run

PLAIN = frozenset((bool, int, float, str, NoneType))


@dataclass(frozen=True)
class Given:
    """A tensor that a module was given: by which argument, in which place within it."""

    argument: str
    position: int | None
    place: tuple[int | str, ...]
    ref: Ref


@dataclass(frozen=True)
class Opaque:
    """Something that a module gave, of a type that cannot be made anew from plain values."""

    kind: str


@dataclass(frozen=True)
class Run:
    """One call of a module.

    Args:
        module: its dotted path.
        start, stop: of the ops that it ran.
        python: likewise of the torch functions that Python called.
        given: the tensors that it was given.
        alone: whether it was given one tensor and nothing else.
        gave: tuples, lists, dicts and plain values, with a `Ref` for each tensor and an `Opaque` for the rest.
    """

    module: str
    start: int
    stop: int
    python: tuple[int, int]
    given: tuple[Given, ...]
    alone: bool
    gave: Any


@dataclass(frozen=True)
class Watched:
    """A trace and the calls of modules in it, in the order in which they ended."""

    trace: Trace
    runs: tuple[Run, ...]


def watch(model: nn.Module, example_inputs: Nested) -> Watched:
    """Run a copy of the model, as `capture` does.

    Raises:
        CaptureError: the model does not run on these inputs.

    >>> watched = watch(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.zeros(1, 2))
    >>> [(run.module, run.start, run.stop) for run in watched.runs]
    [('0', 0, 2), ('1', 2, 3), ('', 0, 3)]
    """
    try:
        with fake_copy(model, example_inputs) as (twin, inputs):
            return watch_twin(twin, inputs, fake=True)
    except CaptureError:
        twin = see_heads(duplicate(model).eval())
        return watch_twin(twin, map_tensors(torch.clone, example_inputs), fake=False)


def watch_twin(twin: nn.Module, inputs: Nested, *, fake: bool) -> Watched:
    """Run `twin`, which is ours to touch."""
    recorder = Recorder(PythonCalls())
    runs: list[Run] = []
    with recording(twin, recorder), _noting(twin, recorder, runs):
        for tensor in tensors_in(inputs):
            recorder.register(tensor, "input")
        try:
            outputs = run(twin, inputs)
        except Exception as error:
            raise CaptureError(
                f"the model did not run on the example inputs: module {recorder.module!r} stopped with "
                f"{type(error).__name__}: {str(error).partition(chr(10))[0]}. Check the inputs' shapes and types."
            ) from error
        return Watched(recorder.trace(outputs, fake), tuple(runs))


@contextlib.contextmanager
def _noting(twin: nn.Module, recorder: Recorder, runs: list[Run]) -> Iterator[None]:
    handles = []
    for name, module in twin.named_modules():
        noter = _Noter(name, module, recorder, runs)
        handles.append(module.register_forward_pre_hook(noter.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(noter.leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Noter:
    """Notes the calls of one module."""

    def __init__(self, name: str, module: nn.Module, recorder: Recorder, runs: list[Run]) -> None:
        self._name, self._recorder, self._runs = name, recorder, runs
        self._names = _positional(module)
        self._open: list[tuple[int, int, tuple[Given, ...], bool]] = []

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [
            Given(self._names[i] if i < len(self._names) else "", i, place, self._recorder.ref(tensor))
            for i, value in enumerate(args)
            for place, tensor in _places(value)
        ]
        for key, value in kwargs.items():
            position = self._names.index(key) if key in self._names else None
            given += [Given(key, position, place, self._recorder.ref(t)) for place, t in _places(value)]
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        self._open.append((len(self._recorder.calls), len(self._recorder.python.made), tuple(given), alone))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        start, python, given, alone = self._open.pop()
        stop, made = len(self._recorder.calls), len(self._recorder.python.made)
        gave = _shown(output, self._recorder)
        self._runs.append(Run(self._name, start, stop, (python, made), given, alone, gave))


def _positional(module: nn.Module) -> list[str]:
    """The names of the arguments that may be given by position."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # a scripted module
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _places(value: Any) -> Iterator[tuple[tuple[int | str, ...], Tensor]]:
    """The tensors in an argument, and the keys and indices that lead to them."""
    if isinstance(value, Tensor):
        yield (), value
    elif isinstance(value, tuple | list | dict):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from (((key, *place), tensor) for place, tensor in _places(item))


def _shown(output: Any, recorder: Recorder) -> Any:
    if isinstance(output, Tensor):
        return recorder.ref(output)
    if type(output) is dict:
        return {key: _shown(item, recorder) for key, item in output.items()}
    if type(output) in (tuple, list):
        return type(output)(_shown(item, recorder) for item in output)
    return output if type(output) in PLAIN else Opaque(type(output).__name__)
