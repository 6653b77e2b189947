"""A model's run that stops at chosen ops and goes on later: how two networks are run side by side, layer by layer."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Collection, Iterable, Iterator
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import CaptureError
from secateur.graph.capture import COPIES, SAME, Trace, op_name
from secateur.graph.decisions import name_of
from secateur.graph.nested import Nested, map_tensors, tensors_in
from secateur.graph.twin import run
from secateur.recover.layers import Layer


class HeldRun:
    """One forward pass in a thread of its own, which runs only while `until` waits for it.

    Ops are known by their number in `trace`, that of a run of the same ops but for copies.

    Args:
        model: ours to run.
        trace: the same path, on the same model or on the one that it was cut from.
        before: calls to stop before, which are handed over with their arguments.
        after: calls to stop after, with what they gave.
        noted: calls whose first result is kept in `results`, for as long as the run lasts.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Nested,
        trace: Trace,
        *,
        before: Collection[int] = (),
        after: Collection[int] = (),
        noted: Collection[int] = (),
    ) -> None:
        self.results: dict[int, Any] = {}
        self._mode = _Stopping(self, trace, before, after, noted)
        self._events: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        self._go: SimpleQueue[bool] = SimpleQueue()
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._work, model, inputs), daemon=True)
        self._started = False
        self._last: tuple[int, Any] = (-1, None)

    def until(self, number: int) -> Any:
        """Run on to a stop, if the run is not there yet: the arguments (before) or the results (after) of that call."""
        while self._last[0] != number:
            if self._started:
                self._go.put(True)
            else:
                self._started = True
                self._thread.start()
            self._last = found, given = self._events.get()
            if isinstance(given, BaseException):
                raise given
            if found < 0:
                raise CaptureError("a batch made the model run other ops than the first; give batches of one kind.")
        return self._last[1]

    def close(self) -> None:
        """End the run where it is."""
        if self._started and self._thread.is_alive():
            self._go.put(False)
            self._thread.join()
        self.results.clear()
        self._last = (-1, None)

    def stop(self, number: int, given: Any) -> None:
        """Called by the run's own thread, which waits here."""
        self._events.put((number, given))
        if not self._go.get():
            raise _Closed

    def _work(self, model: nn.Module, inputs: Nested) -> None:
        try:
            with self._mode:
                run(model, inputs)
        except _Closed:
            return
        except BaseException as error:
            self._events.put((-1, error))
        else:
            self._events.put((-1, None))


class _Closed(BaseException):
    """The run is not wanted any more."""


class _Stopping(TorchDispatchMode):
    def __init__(
        self, owner: HeldRun, trace: Trace, before: Collection[int], after: Collection[int], noted: Collection[int]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls = [(i, name) for i, call in enumerate(trace.calls) if (name := op_name(call)) not in COPIES]
        self._owner, self._before, self._after, self._noted = owner, before, after, noted
        self._step = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, name_of(func)
        if func.namespace == "prim" or name in COPIES:
            return func(*args, **kwargs)
        number, expected = self._calls[self._step] if self._step < len(self._calls) else (-1, "no more")
        if SAME.get(expected, expected) != SAME.get(name, name):
            raise CaptureError(
                f"a batch made the model run {name} where the first ran {expected}: its path depends on the values, so "
                "its layers cannot be solved one by one."
            )
        self._step += 1
        if number in self._before:
            self._owner.stop(number, args)
        result = func(*args, **kwargs)
        first = result[0] if isinstance(result, tuple | list) else result
        if number in self._noted:
            self._owner.results[number] = first
        if number in self._after:
            self._owner.stop(number, first)
        return result


class SideBySide:
    """The runs of both models on each batch: some held where they are, the others run anew for each layer."""

    def __init__(
        self,
        whole: nn.Module,
        pruned: nn.Module,
        trace: Trace,
        layers: tuple[Layer, ...],
        batches: Iterable[Nested],
        held: int,
    ) -> None:
        self.layers = layers
        self._models, self._trace, self._batches, self._most = (whole, pruned), trace, batches, held
        self._held: list[tuple[int, HeldRun, HeldRun]] = []
        self._all = False

    def at(self, layer: Layer) -> Iterator[tuple[int, Tensor, tuple[Any, ...], Tensor | None]]:
        """For each batch: its size, the whole model's target, the smaller one's arguments and what is added to it."""
        for size, whole, pruned in self._runs():
            target, args = whole.until(layer.target), pruned.until(layer.call)
            yield size, target, args, None if layer.added is None else pruned.results[layer.added]

    def close(self) -> None:
        """End all runs."""
        for _, whole, pruned in self._held:
            whole.close()
            pruned.close()

    def _runs(self) -> Iterator[tuple[int, HeldRun, HeldRun]]:
        yield from self._held
        if self._all:
            return
        met = len(self._held)
        for number, batch in enumerate(self._batches):
            if number < met:
                continue
            pair = self._pair(batch)
            if len(self._held) < self._most:
                self._held.append(pair)
                yield pair
                continue
            try:
                yield pair
            finally:
                pair[1].close()
                pair[2].close()
        self._all = self._all or number < self._most

    def _pair(self, batch: Nested) -> tuple[int, HeldRun, HeldRun]:
        size = next((len(tensor) for tensor in tensors_in(batch) if tensor.ndim), 1)
        targets = frozenset(layer.target for layer in self.layers)
        calls = frozenset(layer.call for layer in self.layers)
        noted = frozenset(layer.added for layer in self.layers if layer.added is not None)
        copies = [map_tensors(torch.clone, batch) for _ in range(2)]
        return (
            size,
            HeldRun(self._models[0], copies[0], self._trace, after=targets),
            HeldRun(self._models[1], copies[1], self._trace, before=calls, noted=noted),
        )
