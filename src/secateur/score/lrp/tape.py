"""A run of the model written down with the values that it computed: what relevance is propagated back along.

It is the trace that the graph room takes (`graph.capture`), so the places where units end are known on it, and every
addition, whoever makes it, is a call like any other. A value that is about to be overwritten in place is copied first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.errors import CaptureError
from secateur.graph.attention import see_heads
from secateur.graph.axes import refs_in
from secateur.graph.capture import Call, Recorder, Ref, Trace, recording
from secateur.graph.nested import Nested, map_tensors, tensors_in
from secateur.graph.rebuild import share
from secateur.graph.replay import PythonCalls
from secateur.graph.twin import run
from secateur.score.lrp.writes import Region, Rewrite


@dataclass(frozen=True)
class Tape:
    """A trace, the tensor `values[ref]` at each `Ref(ref)`, and which values are `live`.

    Those are the floating ones that depend on the model's inputs. `rewrites[call]` says what else is in the value that
    a call makes by `alias`.
    """

    trace: Trace
    values: Sequence[Tensor]
    rewrites: Mapping[int, Rewrite]
    live: frozenset[int]

    def is_live(self, ref: Ref) -> bool:
        return ref.id in self.live


def take(model: nn.Module, inputs: Nested) -> Tape:
    """Run a copy of the model that shares its parameters, in eval mode, on real inputs.

    Fused attention is taken apart into its matrix products.

    Raises:
        CaptureError: the model does not run on these inputs.

    >>> tape = take(nn.Linear(2, 1), torch.ones(1, 2))
    >>> [str(call.op) for call in tape.trace.calls], tape.values[tape.trace.outputs[0].id].shape
    (['aten.t.default', 'aten.addmm.default'], torch.Size([1, 1]))
    """
    twin = see_heads(share(model).eval())
    given = map_tensors(torch.clone, inputs)
    keeper = Keeper(PythonCalls())
    for tensor in tensors_in(given):
        keeper.register(tensor, "input")
    with recording(twin, keeper), sdpa_kernel(SDPBackend.MATH):
        try:
            outputs = run(twin, given)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"the model did not run on a batch: module {keeper.module!r} stopped after {keeper.last_op}: "
                f"{type(error).__name__}: {error}. A batch is the model's inputs; with labels, a pair of both."
            ) from error
        trace = keeper.trace(outputs, fake=False)
    values = tuple(keeper.kept)
    keeper.kept.clear()  # the recorder is part of a circle, and would hold them until it is collected
    return Tape(trace, values, keeper.rewrites, _live(trace, keeper.rewrites))


class Keeper(Recorder):
    """The recorder, which keeps the tensors as well, and sees what is written by way of another tensor."""

    def __init__(self, python: PythonCalls) -> None:
        super().__init__(python)
        self.kept: list[Tensor] = []
        self.rewrites: dict[int, Rewrite] = {}
        self._log: dict[int, list[tuple[Ref, Region]]] = {}
        self._seen: list[int] = []
        self._on: dict[int, list[int]] = {}

    def register(self, tensor: Tensor, origin: str, name: str = "") -> Ref:
        ref = super().register(tensor, origin, name)
        self.kept.append(tensor)
        self._seen.append(len(self._log.get(_place(tensor), ())))
        self._on.setdefault(_place(tensor), []).append(ref.id)
        return ref

    def ref(self, tensor: Tensor) -> Ref:
        old = super().ref(tensor)
        writes = self._log.get(_place(tensor), [])[self._seen[old.id] :]
        if not writes:
            return old
        new = self.register(tensor, "op")
        self.rewrites[len(self._calls)] = Rewrite(Region.of(tensor), tuple(writes))
        self._calls.append(Call(torch.ops.aten.alias.default, (old,), {}, (new,), self.module, self.python.current))
        return new

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim" or not func._schema.is_mutable:
            return super().__torch_dispatch__(func, types, args, kwargs)
        written = list(_written(func, args, kwargs or {}))
        before = [self.ref(tensor) for tensor in written]
        for tensor in written:
            for ref in self._on.pop(_place(tensor), []):
                self.kept[ref] = self.kept[ref].clone()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor, old in zip(written, before):
            new = self._refs[tensor]
            if new is old:  # the op returns nothing: what it made is no value of the trace
                new = self.register(tensor, "op")
            log = self._log.setdefault(_place(tensor), [])
            log.append((new, Region.of(tensor)))
            self._seen[new.id] = len(log)
        return result


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an op writes into."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors_in(args[position] if position < len(args) else kwargs.get(argument.name))


def _place(tensor: Tensor) -> int:
    """Where a tensor's memory is; what views one another has the same."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def _live(trace: Trace, rewrites: Mapping[int, Rewrite]) -> frozenset[int]:
    """The values that are made of the inputs."""
    live = {ref for ref, value in enumerate(trace.values) if value.origin == "input"}
    for index, call in enumerate(trace.calls):
        read = operands(call) + [ref for ref, _ in rewrites[index].writes] if index in rewrites else operands(call)
        if any(ref.id in live for ref in read):
            live.update(ref.id for ref in call.outputs if ref is not None)
    return frozenset(ref for ref in live if trace.values[ref].dtype.is_floating_point)


def operands(call: Call) -> list[Ref]:
    """The values among a call's arguments, as `Contraction.operand` counts them."""
    return list(refs_in((call.args, call.kwargs)))


def filled(nested: Any, tensors: Sequence[Tensor]) -> Any:
    """A call's arguments with tensors in the places of its operands."""
    left = iter(tensors)

    def fill(item: Any) -> Any:
        if isinstance(item, Ref):
            return next(left)
        if isinstance(item, dict):
            return {key: fill(value) for key, value in item.items()}
        return type(item)(map(fill, item)) if type(item) in (tuple, list) else item

    return fill(nested)


def named_arguments(call: Call) -> dict[str, Any]:
    """A call's arguments by the names that the op gives them."""
    names = [argument.name for argument in call.op._schema.arguments]
    return {**dict(zip(names, call.args)), **call.kwargs}
