"""Who reads each value of a trace, and which parameter a value is, only moved: what may be rewritten alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from secateur.graph.axes import refs_in
from secateur.graph.capture import Call, Ref, Trace, op_name

MOVES = frozenset(
    """
    view unsafe_view reshape reshape_alias t transpose permute unsqueeze squeeze expand slice select unbind split
    split_with_sizes unsafe_split chunk detach alias lift_fresh contiguous clone
    """.split()
)
"""Ops that give their operand's numbers, or some of them, in another shape."""

BATCH_NORMS = frozenset(
    ("native_batch_norm", "native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm")
)


@dataclass(frozen=True)
class Wiring:
    """What each call reads and writes.

    `uses[value]`: the calls that take it. `root[value]`: the parameter or buffer that it is, moved at most.
    `readers[root]`: (call, value) of those that take it other than to move it. `written`: names of those written to.
    """

    trace: Trace
    uses: Mapping[int, tuple[int, ...]]
    root: Mapping[int, int]
    readers: Mapping[int, tuple[tuple[int, int], ...]]
    written: frozenset[str]

    def name(self, ref: Ref) -> str:
        """The parameter or buffer that a value is, after moves; empty if it is none."""
        return self.trace.values[self.root[ref.id]].name if ref.id in self.root else ""

    def only_reader(self, ref: Ref) -> Call | None:
        """The one call that reads a value; None if several do, or if it is an output of the model."""
        uses = self.uses.get(ref.id, ())
        if len(uses) != 1 or ref in self.trace.outputs:
            return None
        return self.trace.calls[uses[0]]

    def read_once(self, ref: object) -> bool:
        """Whether a value is a parameter or buffer as it is, or moved, that a single call reads in all."""
        return isinstance(ref, Ref) and ref.id in self.root and len(self.readers[self.root[ref.id]]) == 1


def wire(trace: Trace) -> Wiring:
    """The wiring of a trace."""
    uses: dict[int, list[int]] = {}
    root = {i: i for i, value in enumerate(trace.values) if value.origin in ("parameter", "buffer")}
    readers: dict[int, list[tuple[int, int]]] = {i: [] for i in root}
    written: set[str] = set()
    for index, call in enumerate(trace.calls):
        operands = list(refs_in((call.args, dict(call.kwargs))))
        for ref in operands:
            uses.setdefault(ref.id, []).append(index)
        held = [ref for ref in operands if ref.id in root]
        if op_name(call) in MOVES and len(operands) == 1:
            root.update({ref.id: root[held[0].id] for ref in call.outputs if ref is not None} if held else {})
            continue
        for ref in held:
            readers[root[ref.id]].append((index, ref.id))
        written.update(trace.values[root[ref.id]].name for ref in _written(call) if ref.id in root)
    for ref in trace.outputs:
        if ref.id in root:
            readers[root[ref.id]].append((len(trace.calls), ref.id))
    return Wiring(
        trace,
        {ref: tuple(calls) for ref, calls in uses.items()},
        root,
        {ref: tuple(calls) for ref, calls in readers.items()},
        frozenset(written),
    )


def _written(call: Call) -> list[Ref]:
    """The operands that a call writes to."""
    given = {**dict(zip((a.name for a in call.op._schema.arguments), call.args)), **call.kwargs}
    writes = [a.name for a in call.op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return list(refs_in([given.get(name) for name in writes]))


def factors(call: Call) -> tuple[tuple[Ref, int], tuple[Ref, int]] | None:
    """((operand, axis), (operand, axis)) of the sum of products that a call is: the axis that is summed over.

    None for other ops, and for a grouped convolution, whose units go on.
    """
    name = op_name(call)
    if name == "convolution":
        transposed, groups = call.args[6], call.args[8]
        return None if groups != 1 else ((call.args[0], 1), (call.args[1], 0 if transposed else 1))
    if name in ("mm", "bmm"):
        return (call.args[0], -1), (call.args[1], -2)
    if name in ("addmm", "baddbmm"):
        return (call.args[1], -1), (call.args[2], -2)
    return None


def is_random(call: Call) -> bool:
    """Whether an op draws random numbers; fused attention says so even if it drops nothing."""
    if "scaled_dot_product" in op_name(call):
        return any(isinstance(item, float) and item > 0 for item in (*call.args[3:], call.kwargs.get("dropout_p")))
    return torch.Tag.nondeterministic_seeded in call.op.tags


def trains(call: Call) -> bool:
    """Whether a batch norm takes its statistics from the batch."""
    return op_name(call) != "native_batch_norm_legit_no_training" and call.args[5] is True
