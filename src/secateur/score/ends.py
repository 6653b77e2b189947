"""The places where units end in a sum, met in real runs: what is summed there, over any number of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import CaptureError, PlanError
from secateur.graph.analysis import Analysis, analyse
from secateur.graph.attention import see_heads
from secateur.graph.axes import refs_in
from secateur.graph.capture import COPIES, Call, Trace, op_name, record
from secateur.graph.decisions import name_of
from secateur.graph.nested import Nested, map_tensors, tensors_in
from secateur.graph.rebuild import share
from secateur.graph.records import Groups
from secateur.graph.twin import run
from secateur.graph.units import Ids

NORMS = frozenset(
    """
    native_batch_norm native_batch_norm_legit_no_training batch_norm_no_update cudnn_batch_norm miopen_batch_norm
    """.split()
)
"""Batch norms, whose arguments begin with (x, weight, bias, running mean, running variance)."""


@dataclass(frozen=True)
class Norm:
    """The batch norm that takes in what a call gives: the names of its scale and variance, and its epsilon."""

    weight: str
    variance: str
    eps: float


@dataclass(frozen=True, eq=False)
class End:
    """A place where units end: tensor number `operand` of an op, summed over the axes `dims`.

    Args:
        key: what the place is known by in other runs. Calls of one module that read by the same weights are one place.
        op: the op's name, without overload.
        units: the unit at each index along `dims`, as `Groups.offsets` count them; -1 is one that always stays.
        norm: the batch norm right behind it.
        joins: the number of the call whose result is the sum that the output goes into, through the batch norm if
            there is one: the residual stream. Of an output that is added to nothing, the call that makes it.
    """

    key: tuple[Any, ...]
    op: str
    operand: int
    dims: tuple[int, ...]
    units: Ids
    norm: Norm | None
    joins: int


@dataclass(frozen=True)
class Sight:
    """One call at an end, as it was run: its arguments, its result, and the operand in which units end."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operand: Tensor
    result: Any


class AtEnds(TorchDispatchMode):
    """Runs what is within it and hands over each call at which units end; `see` is given the contraction's number.

    It is for runs of the model that was analysed, or of one that was cut from it: the same ops but for copies. Where
    a run takes other ops, it stops; `followed` says after how many. `result` is given the number of each call and what
    it gave.
    """

    def __init__(
        self,
        analysis: Analysis,
        see: Callable[[int, Sight], None],
        *,
        result: Callable[[int, Any], None] | None = None,
        skip: int = 0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        calls = [(i, name) for i, call in enumerate(analysis.trace.calls) if (name := op_name(call)) not in COPIES]
        self._calls = calls
        self._wanted: dict[int, list[int]] = {}
        for index, (end, _) in enumerate(analysis.contractions):
            self._wanted.setdefault(end.call, []).append(index)
        self._operands = [end.operand for end, _ in analysis.contractions]
        self._see, self._result, self._skip, self._lost = see, result, skip, False
        self.followed = 0

    @property
    def whole(self) -> bool:
        """Whether the run was that of the analysis to its end."""
        return not self._lost and self.followed == len(self._calls)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if func.namespace == "prim" or name in COPIES or self._lost:
            return func(*args, **kwargs)
        step = self.followed
        self._lost = step >= len(self._calls) or self._calls[step][1] != name
        result = func(*args, **kwargs)
        if self._lost:
            return result
        if step >= self._skip:
            number = self._calls[step][0]
            for index in self._wanted.get(number, ()):
                operand = list(tensors_in((tuple(args), kwargs)))[self._operands[index]].detach()
                self._see(index, Sight(tuple(args), kwargs, operand, result))
            if self._result is not None:
                self._result(number, result)
        self.followed += 1
        return result


def visit(
    model: nn.Module,
    groups: Groups,
    batches: Iterable[Nested],
    see: Callable[[End, Sight], None],
    joined: Callable[[End, Tensor], None] | None = None,
) -> None:
    """Run a copy of the model on every batch, in eval mode, and hand over each call at which its units end.

    Args:
        model: left as found.
        groups: those of the model.
        batches: model inputs, as `find_groups` takes them; their sizes may differ.
        see: called as the run meets the ends, under no_grad.
        joined: called with the sum that an end's output goes into (see `End.joins`).

    Raises:
        PlanError: there is no batch. CaptureError: the model does not run on one.
    """
    path: _Path | None = None
    for batch in batches:
        done = 0 if path is None else path.run(model, batch, see, joined)
        if path is None or done >= 0:  # its path depends on values, or on the batch's size
            path = _Path.of(model, groups, batch)
            # What has been seen so far is on both paths.
            if path.run(model, batch, see, joined, skip=done) >= 0:
                raise CaptureError("the model ran other ops than just before on the same inputs; seed it.")
    if path is None:
        raise PlanError("there are no batches to score the units by; give one or more.")


@dataclass(frozen=True)
class _Path:
    """The ops that a model ran, with the ends among them."""

    analysis: Analysis
    ends: tuple[End, ...]

    @classmethod
    def of(cls, model: nn.Module, groups: Groups, batch: Nested) -> _Path:
        twin = see_heads(share(model).eval())
        trace = record(twin, map_tensors(torch.clone, batch), fake=False)
        analysis = analyse(trace, model, split=groups.split)
        return cls(analysis, tuple(_ends(analysis, groups)))

    def run(
        self,
        model: nn.Module,
        batch: Nested,
        see: Callable[[End, Sight], None],
        joined: Callable[[End, Tensor], None] | None,
        *,
        skip: int = 0,
    ) -> int:
        """Run a batch; -1, or after how many ops it left the path."""

        def result(number: int, given: Any) -> None:
            for end in self.ends if joined is not None else ():
                if end.joins == number:
                    joined(end, given[0] if isinstance(given, tuple | list) else given)  # type: ignore[misc]

        twin = see_heads(share(model).eval())
        mode = AtEnds(self.analysis, lambda i, sight: see(self.ends[i], sight), result=result, skip=skip)
        with mode:
            run(twin, map_tensors(torch.clone, batch))
        return -1 if mode.whole else mode.followed


def _ends(analysis: Analysis, groups: Groups) -> Iterator[End]:
    trace, numbers, counts = analysis.trace, _numbers(analysis, groups), dict[tuple[Any, ...], int]()
    sources, readers = _sources(trace), _readers(trace)
    for end, block in analysis.contractions:
        call = trace.calls[end.call]
        units = numbers[block.units]
        others = [ref.id for i, ref in enumerate(refs_in((call.args, call.kwargs))) if i != end.operand]
        read_by = frozenset(name for ref in others for name in sources.get(ref, ()))
        key: tuple[Any, ...] = (call.module, op_name(call), end.operand, block.dims, units.tobytes(), read_by)
        if not read_by:
            counts[key] = counts.get(key, -1) + 1
            key = (*key, counts[key])
        at, norm = end.call, None
        behind = _only(trace, readers, at)
        if behind is not None and op_name(trace.calls[behind]) in NORMS:
            norm = _norm(trace, trace.calls[behind], call)
            at = at if norm is None else behind
            behind = _only(trace, readers, at)
        added = behind is not None and op_name(trace.calls[behind]) == "add"
        yield End(key, op_name(call), end.operand, block.dims, units, norm, behind if added and behind else at)


def _numbers(analysis: Analysis, groups: Groups) -> Ids:
    """For each unit of the analysis its number in `groups`, found by its places in the tensors; -1 for none."""
    known: dict[tuple[str, int, int], int] = {}
    for first, group in zip(groups.offsets, groups.groups):
        for slot in group.slots:
            known |= {(slot.tensor, slot.dim, i): unit for unit, spots in enumerate(slot.index, first) for i in spots}
    out = np.full(analysis.groups.offsets[-1] + 1, -1, np.int64)
    for first, group in zip(analysis.groups.offsets, analysis.groups.groups):
        for slot in group.slots:
            for unit, spots in enumerate(slot.index, first):
                out[unit] = known.get((slot.tensor, slot.dim, spots[0]), out[unit])
    return out


def _sources(trace: Trace) -> dict[int, frozenset[str]]:
    """For each value made of parameters and buffers only, their names."""
    out = {i: frozenset((v.name,)) for i, v in enumerate(trace.values) if v.origin in ("parameter", "buffer")}
    for call in trace.calls:
        operands = [ref.id for ref in refs_in((call.args, call.kwargs))]
        if operands and all(ref in out for ref in operands):
            names = frozenset[str]().union(*(out[ref] for ref in operands))
            out.update({ref.id: names for ref in call.outputs if ref is not None})
    return out


def _readers(trace: Trace) -> dict[int, list[int]]:
    """For each value the calls that take it in."""
    out: dict[int, list[int]] = {}
    for index, call in enumerate(trace.calls):
        for ref in () if call.dead else refs_in((call.args, call.kwargs)):
            out.setdefault(ref.id, []).append(index)
    return out


def _only(trace: Trace, readers: dict[int, list[int]], call: int) -> int | None:
    """The call that takes in what this one gives, if there is just one."""
    out = trace.calls[call].outputs[0]
    found = [] if out is None else readers.get(out.id, [])
    return found[0] if len(found) == 1 else None


def _norm(trace: Trace, call: Call, before: Call) -> Norm | None:
    """A batch norm with running statistics, of what the call before it gives."""
    x, weight, variance = call.args[0], call.args[1], call.args[4]
    if variance is None or x != before.outputs[0]:
        return None
    eps = next(i for i, argument in enumerate(call.op._schema.arguments) if argument.name.startswith("eps"))
    name = "" if weight is None else trace.values[weight.id].name  # "" too where it is computed from others
    return Norm(name, trace.values[variance.id].name, float(call.args[eps]))
