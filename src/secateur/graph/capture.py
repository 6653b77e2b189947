"""Run the model once and write down every ATen op that it executes: a `Trace`.

Capture is by running, not by tracing Python: whatever control flow the model has, the ops arrive here one by
one. The run happens on a copy whose tensors are fake (shapes without arithmetic or memory); a model whose control
flow needs values is run on real ones. The caller's model is never called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import CaptureError
from secateur.graph.attention import see_heads
from secateur.graph.decisions import Decision, decided, noted
from secateur.graph.nested import Nested, map_tensors, tensors_in
from secateur.graph.rebuild import share
from secateur.graph.replay import PythonCall, PythonCalls
from secateur.graph.twin import Untouched, Writing, duplicate, fake_copy, run, tensors_of


@dataclass(frozen=True)
class Ref:
    """A value of the trace, in the place where the tensor stood; an in-place write makes a new value."""

    id: int


@dataclass(frozen=True)
class Value:
    """Shape, dtype and origin of a value; `name` is that of the parameter or buffer, `constant` a number's value."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str  # "parameter", "buffer", "input", "constant" or "op"
    name: str = ""
    constant: float | None = None


@dataclass(frozen=True)
class Call:
    """One executed ATen op; `args` and `kwargs` hold a `Ref` for each tensor; `python` indexes `Trace.python`.

    On what a `dead` call makes no output of the model depends: only its shape, or whether it is right, was asked for.
    """

    op: torch._ops.OpOverload[Any, Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Ref | None, ...]
    module: str
    python: int | None = None
    dead: bool = False

    @property
    def where(self) -> str:
        return f"{self.op} in {self.module or 'the model itself'}"


@dataclass(frozen=True)
class Trace:
    """All that one forward pass did, in order; `fake` says whether it ran without arithmetic.

    `python` are the torch functions that Python called, `decisions` what a real run decided from values.
    """

    calls: tuple[Call, ...]
    values: tuple[Value, ...]
    outputs: tuple[Ref, ...]
    python: tuple[PythonCall, ...]
    decisions: tuple[Decision, ...]
    fake: bool


OURS: Any = "secateur"
"""The key of the recorder's hooks, which torch numbers."""

TRUTHS = frozenset(("local_scalar_dense", "is_nonzero"))
"""Ops by which Python is told a number, or whether it is none."""

COPIES = frozenset(("clone", "contiguous", "alias", "detach", "to_copy", "local_scalar_dense"))
SAME = MappingProxyType(
    dict.fromkeys(("unsafe_view", "reshape", "reshape_alias"), "view")
    | dict.fromkeys(("split_with_sizes", "unsafe_split", "chunk"), "split")
)


def op_name(call: Call) -> str:
    """`aten.add_.Tensor` -> `add`: in place or not, and whatever the overload, the axes are the same."""
    return str(call.op.overloadpacket.__name__).strip("_")


def steps(calls: Sequence[Call]) -> list[tuple[str, Call]]:
    """The calls by name, without copies: whether `reshape` copies depends on the sizes, so a cut may change it.

    Names of which one does what the other does are one.
    """
    named = [(op_name(call), call) for call in calls]
    return [(SAME.get(name, name), call) for name, call in named if name not in COPIES]


def capture(model: nn.Module, example_inputs: Nested, *, training: bool = False, fake: bool = True) -> Trace:
    """The trace of one forward pass, on a copy: without arithmetic, on fake tensors, unless the model needs values.

    Args:
        model: any module; left exactly as found.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        training: run in training mode, and not in eval mode.
        fake: try fake tensors first.

    Raises:
        CaptureError: the model does not run on these inputs; names the module and the op.

    >>> trace = capture(nn.Linear(3, 2), torch.zeros(1, 3))
    >>> [str(call.op) for call in trace.calls]
    ['aten.t.default', 'aten.addmm.default']
    """
    with contextlib.suppress(CaptureError):
        if fake:
            with fake_copy(model, example_inputs) as (twin, inputs):
                return record(twin.train(training), inputs, fake=True)
    inputs = map_tensors(torch.clone, example_inputs)
    try:
        with Untouched(model.parameters()):
            return record(see_heads(share(model).train(training)), inputs, fake=False)
    except Writing:  # its own weights, as a model does that keeps them normalised
        inputs = map_tensors(torch.clone, example_inputs)
        return record(see_heads(duplicate(model).train(training)), inputs, fake=False)


def record(twin: nn.Module, inputs: Nested, *, fake: bool) -> Trace:
    """Run `twin`, which is ours to touch, under the recorder."""
    with recording(twin, Recorder(PythonCalls())) as recorder:
        for tensor in tensors_in(inputs):
            recorder.register(tensor, "input")
        try:
            outputs = run(twin, inputs)
        except Exception as error:
            where = f"module {recorder.module!r}" if recorder.module else "the model's own forward"
            raise CaptureError(
                f"the model did not run on the example inputs: {where} stopped after {recorder.last_op}: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. "
                "Check the inputs' shapes and types."
            ) from error
        return recorder.trace(outputs, fake)


@contextlib.contextmanager
def recording(twin: nn.Module, recorder: Recorder) -> Iterator[Recorder]:
    """The recorder in force, which knows the twin's parameters and in which module each op runs."""
    for name, tensor in tensors_of(twin).items():
        recorder.register(tensor, "parameter" if isinstance(tensor, nn.Parameter) else "buffer", name)
    # As `register_forward_hook` does it, but with a key of our own: a handle for each takes three times longer.
    modules = list(twin.named_modules())
    for name, module in modules:
        module._forward_pre_hooks[OURS] = recorder.entering(name)
        module._forward_hooks[OURS] = recorder.left
    try:
        with recorder.python, recorder:
            yield recorder
    finally:
        recorder.python.recorder = None  # a circle would keep all that was seen until the next garbage collection
        for _, module in modules:
            del module._forward_pre_hooks[OURS], module._forward_hooks[OURS]


class Refs:
    """The value that each living tensor is."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[weakref.ref[Tensor], Ref]] = {}

    def __setitem__(self, tensor: Tensor, ref: Ref) -> None:
        self._held[id(tensor)] = weakref.ref(tensor), ref

    def __getitem__(self, tensor: Tensor) -> Ref:
        found = self.get(tensor)
        if found is None:
            raise KeyError(id(tensor))
        return found

    def get(self, tensor: Tensor) -> Ref | None:
        held = self._held.get(id(tensor))
        return held[1] if held is not None and held[0]() is tensor else None


class Recorder(TorchDispatchMode):
    """The dispatch mode that writes the trace down; `prim` ops, which ask for a device, are left out."""

    def __init__(self, python: PythonCalls) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[Call] = []
        self._values: list[Value] = []
        self._refs = Refs()
        self._stack: list[str] = []
        self._decisions: list[Decision] = []
        self.python = python
        python.recorder = self

    def mark(self) -> int:
        """A place to `rewind` to: what is called after it is then as if it had not been."""
        return len(self._calls)

    def rewind(self, mark: int) -> None:
        del self._calls[mark:]

    @property
    def calls(self) -> Sequence[Call]:
        return self._calls

    @property
    def values(self) -> Sequence[Value]:
        return self._values

    @property
    def module(self) -> str:
        """Dotted path of the innermost module that is running."""
        return self._stack[-1] if self._stack else ""

    @property
    def last_op(self) -> str:
        return str(self._calls[-1].op) if self._calls else "no op"

    def entering(self, name: str) -> Callable[..., None]:
        def push(*_: Any) -> None:
            self._stack.append(name)
            self.python.enter(name)

        return push

    def left(self, *_: Any) -> None:
        """Forward hook of any module."""
        self._stack.pop()
        self.python.leave()

    def register(self, tensor: Tensor, origin: str, name: str = "") -> Ref:
        ref = Ref(len(self._values))
        number = _number(tensor) if origin == "constant" else None
        self._values.append(Value(tuple(tensor.shape), tensor.dtype, origin, name, number))
        self._refs[tensor] = ref
        return ref

    def ref(self, tensor: Tensor) -> Ref:
        return self._refs.get(tensor) or self.register(tensor, "constant")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        noted_args = map_tensors(self.ref, tuple(args))
        noted_kwargs = map_tensors(self.ref, dict(kwargs)) if kwargs else {}
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, tuple | list) else (result,)
        if not any(isinstance(item, FakeTensor) for item in outputs) and decided(func, args, outputs):
            self._decisions.append(noted(len(self._calls), func, outputs))
        refs = tuple(self.register(item, "op") if isinstance(item, Tensor) else None for item in outputs)
        self._calls.append(Call(func, noted_args, noted_kwargs, refs, self.module, self.python.current))
        return result

    def trace(self, outputs: Nested, fake: bool) -> Trace:
        refs = tuple(self.ref(tensor) for tensor in tensors_in(outputs))
        calls = _without_life(self._calls, refs, self._values)
        return Trace(calls, tuple(self._values), refs, tuple(self.python.made), tuple(self._decisions), fake)


def _without_life(calls: Sequence[Call], outputs: Sequence[Ref], values: Sequence[Value]) -> tuple[Call, ...]:
    """The calls, with those marked on which no output depends; one that writes in place, or tells Python, counts.

    Whole numbers of which Python is told only whether something is true of them do not count, such as how many places
    are masked: where it goes on from there, it shows by its ops.
    """
    needed, asked = {ref.id for ref in outputs}, set[int]()
    out = []
    for call in reversed(calls):
        made = {ref.id for ref in call.outputs if ref is not None}
        read = set(_refs((call.args, call.kwargs)))
        dead = bool(made) and not call.op._schema.is_mutable and needed.isdisjoint(made)
        asks = not made and op_name(call) in TRUTHS and all(values[i].dtype == torch.bool for i in read)
        if asks or (dead and made & asked and not any(values[i].dtype.is_floating_point for i in made)):
            asked |= read
        elif not dead or made & asked:
            needed |= read
            dead = False
        out.append(dataclasses.replace(call, dead=dead) if dead else call)
    return tuple(reversed(out))


def _refs(nested: Any) -> Iterator[int]:
    if isinstance(nested, Ref):
        yield nested.id
    elif isinstance(nested, tuple | list):
        for item in nested:
            yield from _refs(item)
    elif isinstance(nested, dict):
        yield from _refs(list(nested.values()))


def _number(tensor: Tensor) -> float | None:
    """The value of a tensor without axes that Python made of a number."""
    if tensor.ndim or tensor.is_complex() or isinstance(tensor, FakeTensor):
        return None
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        return float(tensor)
