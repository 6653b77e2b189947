"""A model's run that stops at chosen ops and goes on later: how two networks are run side by side, layer by layer."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
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
        self._go: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
        self._instead: Any = None
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._work, model, inputs), daemon=True)
        self._started = False
        self._last: tuple[int, Any] = (-1, None)

    def until(self, number: int) -> Any:
        """Run on to a stop, if the run is not there yet: the arguments (before) or the results (after) of that call."""
        while self._last[0] != number:
            if self._started:
                self._go.put((True, self._instead))
                self._instead = None
            else:
                self._started = True
                self._thread.start()
            self._last = found, given = self._events.get()
            if isinstance(given, BaseException):
                raise given
            if found < 0:
                raise CaptureError("a batch made the model run other ops than the first; give batches of one kind.")
        return self._last[1]

    @property
    def last(self) -> Any:
        """What was handed over where the run is."""
        return self._last[1]

    def instead(self, args: tuple[Any, ...]) -> None:
        """From the stop before a call where the run is, it goes on with these arguments of that call."""
        self._instead = args

    def close(self) -> None:
        """End the run where it is."""
        if self._started and self._thread.is_alive():
            self._go.put((False, None))
            self._thread.join()
        self.results.clear()
        self._last = (-1, None)

    def stop(self, number: int, given: Any) -> Any:
        """Called by the run's own thread, which waits here; what it goes on with."""
        self._events.put((number, given))
        on, instead = self._go.get()
        if not on:
            raise _Closed
        return given if instead is None else instead

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
            args = self._owner.stop(number, args)
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
        self.layers, self.trace = layers, trace
        self._models, self._batches, self._most = (whole, pruned), batches, held
        self._held: list[tuple[int, HeldRun, HeldRun]] = []
        self._all = False

    def at(self, layer: Layer) -> Iterator[tuple[int, Tensor, tuple[Any, ...], Tensor | None]]:
        """For each batch: its size, the whole model's target, the smaller one's arguments and what is added to it."""
        for size, whole, pruned in self._runs():
            target, args = whole.until(layer.target), pruned.until(layer.call)
            yield size, target, args, None if layer.added is None else pruned.results[layer.added]

    def both(self, first: Layer, second: Layer) -> Iterator[tuple[Any, Tensor, Any, Tensor | None]]:
        """For each batch: the smaller model's arguments of one layer, the whole one's target of a later layer, the
        smaller one's arguments of that, and what is added to it."""
        for _, whole, pruned in self._runs():
            before, target, args = pruned.until(first.call), whole.until(second.target), pruned.until(second.call)
            yield before, target, args, None if second.added is None else pruned.results[second.added]

    def go_on(self, inputs: Sequence[Tensor]) -> None:
        """Held runs, stopped before a layer, go on with these inputs of it, which it would now be given."""
        for (_, _, pruned), x in zip(self._held, inputs):
            pruned.instead((x, *pruned.last[1:]))

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
            HeldRun(self._models[0], copies[0], self.trace, after=targets),
            HeldRun(self._models[1], copies[1], self.trace, before=calls, noted=noted),
        )
