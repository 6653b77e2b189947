"""The way through a module: from what it is given to what it gives, by additions, with the branches left aside.

It is followed forwards through the ops of one call. A value is on the way if it is the input, or a value on the way
moved, added to, or taken through an activation, or through a module that has no products, such as a norm. Of the two
operands of an addition, the one that is on the way is the stream, and the other is the branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from secateur.codec.ops import to_plain
from secateur.errors import SecateurError
from secateur.graph.axes import refs_in
from secateur.graph.blocks import Step
from secateur.graph.capture import COPIES, Call, Ref, Trace, op_name
from secateur.graph.costs import LOOPS
from secateur.graph.ranges import INF, Range, is_move, leaves, range_of, ranges, told
from secateur.graph.runs import Given, Run, Watched


@dataclass(frozen=True)
class Stream:
    """A value on the way, and how it was come to from the input `given`.

    Args:
        steps: what stays when the branches are taken as 0: with the value that each was given.
        moves: (call, after how many steps).
        added: (call, operand that is the branch).
        range: bounds of the value when the branches are 0.
        assumed: what lets an activation go.
    """

    given: Given
    range: Range
    steps: tuple[Step, ...] = ()
    moves: tuple[tuple[int, int], ...] = ()
    added: tuple[tuple[int, int], ...] = ()
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scene:
    """A watched run, and what is worked out of it once for all calls of modules."""

    watched: Watched

    @property
    def trace(self) -> Trace:
        return self.watched.trace

    @cached_property
    def ranges(self) -> list[Range]:
        return ranges(self.trace)

    @cached_property
    def products(self) -> list[bool]:
        """Of each call, whether it sums up products with weights or of values."""
        return [op_name(call) == "convolution" or op_name(call) in LOOPS for call in self.trace.calls]

    @cached_property
    def alias(self) -> list[int]:
        """Of each value, the first value of those that lie in the same memory."""
        out = list(range(len(self.trace.values)))
        for call in self.trace.calls:
            if call.op.is_view or call.op._schema.is_mutable:
                first = next(iter(refs_in((call.args, call.kwargs))), None)
                for ref in call.outputs if first is not None else ():
                    if ref is not None and first is not None:
                        out[ref.id] = out[first.id]
        return out

    @cached_property
    def readers(self) -> dict[int, list[int]]:
        """Of each value, the calls that take it and that count; the model's outputs are read after the last call."""
        out: dict[int, list[int]] = {}
        for index, call in enumerate(self.trace.calls):
            for ref in () if call.dead else refs_in((call.args, call.kwargs)):
                out.setdefault(ref.id, []).append(index)
        for ref in self.trace.outputs:
            out.setdefault(ref.id, []).append(len(self.trace.calls))
        return out

    def read_outside(self, value: int, run: Run) -> bool:
        """Whether a call after `run` reads a value, or one before; or the model gives it."""
        return any(not run.start <= index < run.stop for index in self.readers.get(value, ()))


class Way:
    """The way through one call of a module: `found` are the values on it, `lost` those at which it ends, and why."""

    def __init__(self, scene: Scene, run: Run, inner: Sequence[Run]) -> None:
        """`inner` are the calls of modules within this one, in the order in which they ended."""
        self._scene, self._run = scene, run
        self.found: dict[int, Stream] = {}
        self.lost: dict[int, str] = {}
        for given in run.given:
            self.found.setdefault(given.ref.id, Stream(given, scene.ranges[given.ref.id]))
        self._live = set(self.found)
        ending: dict[int, list[Run]] = {}
        for each in inner:
            ending.setdefault(each.stop, []).append(each)
        for index in range(run.start, run.stop):
            self._follow(index, scene.trace.calls[index])
            for each in ending.get(index + 1, ()):
                self._through(each)

    def _follow(self, index: int, call: Call) -> None:
        refs = list(refs_in((call.args, call.kwargs)))
        if not self._live.isdisjoint(ref.id for ref in refs):
            self._live.update(ref.id for ref in call.outputs if ref is not None)
        out = call.outputs[0] if len(call.outputs) == 1 else None
        on = [ref for ref in refs if ref.id in self.found]
        next_on = self._after(index, call, refs, out) if on and out is not None else None
        if next_on is not None and out is not None and not self._holds(next_on.given.ref, out):
            next_on = None
        if out is not None and next_on is None:
            why = self._why_lost(call, refs, out)
            if why:
                self.lost[out.id] = why
        if call.op._schema.is_mutable and refs:  # other views on the same memory are no longer what they were
            memory = self._scene.alias[refs[0].id]
            for value in [value for value in self.found if self._scene.alias[value] == memory]:
                del self.found[value]
        if out is not None and next_on is not None:
            self.found[out.id] = next_on

    def _after(self, index: int, call: Call, refs: Sequence[Ref], out: Ref) -> Stream | None:
        """The stream once it has gone through an op; None if it does not."""
        if is_move(call):
            before = self.found[refs[0].id]
            here = () if op_name(call) in COPIES and self._same(refs[0], out) else ((index, len(before.steps)),)
            return replace(before, moves=before.moves + here)
        if op_name(call) in ("add", "sub") and len(refs) == 2:
            return self._added(index, call, refs, out)
        if len(refs) != 1 or not isinstance(call.args[0], Ref) or not self._same(refs[0], out):
            return None
        before = self.found[refs[0].id]
        if leaves(call, before.range):
            return replace(before, assumed=(*before.assumed, self._assumption(call, before.range)))
        step = _kept_op(call)
        if step is None:
            return None
        return replace(before, steps=(*before.steps, step), range=range_of(call, index, [before.range]))

    def _added(self, index: int, call: Call, refs: Sequence[Ref], out: Ref) -> Stream | None:
        """The stream is the operand that is on the way; of two, the one that came with fewer steps, as x in
        x + pool(x)."""
        lengths = {i: len(self.found[ref.id].steps) for i, ref in enumerate(refs) if ref.id in self.found}
        (nearest, length), *others = sorted(lengths.items(), key=lambda item: item[1])
        scaled = nearest == 1 and (op_name(call) == "sub" or call.kwargs.get("alpha", 1) != 1)
        if scaled or any(other == length for _, other in others) or refs[1 - nearest].id not in self._live:
            return None
        before = self.found[refs[nearest].id]
        return replace(before, added=(*before.added, (index, 1 - nearest))) if self._same(refs[nearest], out) else None

    def _through(self, run: Run) -> None:
        """A module on the way that has no products stays, where no op has told of it already."""
        out = run.gave
        if not run.alone or not isinstance(out, Ref) or out.id in self.found or run.given[0].ref.id not in self.found:
            return
        if run.start == run.stop or any(self._scene.products[run.start : run.stop]):
            return
        before = self.found[run.given[0].ref.id]
        inside = run.module.startswith(f"{self._run.module}.")
        if inside and self._same(run.given[0].ref, out) and self._holds(before.given.ref, out):
            path = run.module.removeprefix(f"{self._run.module}.")
            self.found[out.id] = replace(before, steps=(*before.steps, Step(path)), range=Range())
            self.lost.pop(out.id, None)

    def _why_lost(self, call: Call, refs: Sequence[Ref], out: Ref) -> str:
        """Why the way ends here, if an addition that might have been the residual one stands on it."""
        on = [ref.id in self.found for ref in refs]
        both = op_name(call) == "add" and len(refs) == 2 and all(ref.id in self._live for ref in refs)
        if both and self._shape(refs[0]) == self._shape(refs[1]) == self._shape(out):
            where = call.module or "the model itself"
            if all(on):
                return f"the addition in {where} adds two of its inputs, or one to itself"
            earlier = [self.lost[ref.id] for ref in refs if ref.id in self.lost]
            return earlier[0] if earlier else f"on both sides of the addition in {where} stands a layer"
        through = len(refs) == 1 and (is_move(call) or torch.Tag.pointwise in call.op.tags)
        return self.lost.get(refs[0].id, "") if through else ""

    def _same(self, one: Ref, other: Ref) -> bool:
        return self._shape(one) == self._shape(other)

    def _holds(self, given: Ref, out: Ref) -> bool:
        """Whether the type of a value on the way holds that of the input."""
        first, last = (self._scene.trace.values[ref.id].dtype for ref in (given, out))
        return torch.promote_types(first, last) == last

    def _shape(self, ref: Ref) -> tuple[int, ...]:
        return self._scene.trace.values[ref.id].shape

    def _assumption(self, call: Call, held: Range) -> str:
        bounds = f"is at least {held.low:g}" if held.high == INF else f"lies between {held.low:g} and {held.high:g}"
        maker = "" if held.cause is None else f", made by {told(self._scene.trace.calls[held.cause])}"
        return f"its {op_name(call)} changes nothing: what that is given {bounds}{maker}"


def _kept_op(call: Call) -> Step | None:
    """An activation, which works number by number, as a step that stays."""
    if torch.Tag.pointwise not in call.op.tags or torch.Tag.nondeterministic_seeded in call.op.tags:
        return None
    packet = call.op.overloadpacket.__name__.rstrip("_")
    name = f"{call.op.namespace}.{packet}.{call.op._overloadname}"
    home = getattr(torch.ops, call.op.namespace)
    if call.op.namespace != "aten" or not hasattr(getattr(home, packet, None), call.op._overloadname):
        return None
    try:
        to_plain([*call.args[1:], *call.kwargs.values()], _refuse)
    except _NotPlain:
        return None
    return Step("", name, tuple(call.args[1:]), tuple(call.kwargs.items()))


class _NotPlain(SecateurError):
    """An argument that no file can hold."""


def _refuse(item: object) -> object:
    raise _NotPlain(f"{item!r} is no plain value.")


def comes_back(trace: Trace, stream: Stream) -> bool:
    """Whether the moves on the way, between the steps that stay, leave every number in its place.

    They are carried out on the numbers 0, 1, 2, ... in the place of the values.
    """
    shape = trace.values[stream.given.ref.id].shape
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    moves: dict[int, list[Call]] = {}
    for index, after in stream.moves:
        moves.setdefault(after, []).append(trace.calls[index])
    for calls in moves.values():
        moved = whole
        for call in calls:
            (ref,) = refs_in((call.args, call.kwargs))
            if moved.shape != trace.values[ref.id].shape:
                return False
            if op_name(call) not in COPIES:
                moved = call.op(*[moved if item == ref else item for item in call.args], **call.kwargs)
        if moved.shape != whole.shape or not torch.equal(moved, whole):
            return False
    return True
