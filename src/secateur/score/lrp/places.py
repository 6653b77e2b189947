"""Where the units of a model's groups are found on a tape: at the sums where they end, or where layers make them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.graph.analysis import Analysis, analyse
from secateur.graph.capture import Trace
from secateur.graph.records import Groups
from secateur.graph.units import Ids, UnitBlock
from secateur.score.lrp.propagate import Flow, is_layer
from secateur.score.lrp.starts import Fold
from secateur.score.lrp.tape import Tape, operands


@dataclass(frozen=True)
class Places:
    """Where units are looked at, on the tapes of one trace: by call and operand (or output), the units there.

    Units are numbered as `Groups.offsets` count them; the last number is for all that is in no group.
    """

    trace: Trace
    at: Mapping[tuple[int, int], tuple[UnitBlock, ...]]
    made: bool
    count: Tensor

    def fit(self, trace: Trace) -> bool:
        """Whether another run did the same."""
        shapes = [[value.shape for value in t.values] for t in (trace, self.trace)]
        return trace.calls == self.trace.calls and shapes[0] == shapes[1]

    def add(self, flow: Flow, fold: Fold, sums: Tensor) -> None:
        for position, relevance in enumerate(flow.made if self.made else flow.taken):
            for block in self.at.get((flow.index, position), ()):
                if relevance is not None:
                    others = [d for d in range(relevance.ndim) if d not in block.dims]
                    rows = relevance.permute(*others, *block.dims).reshape(-1, block.units.size)
                    sums.index_add_(0, torch.from_numpy(block.units.ravel()), fold(rows).to("cpu", torch.float64))

    def check(self, groups: Groups) -> None:
        """PlanError for a group that is nowhere, but for one that no op has read, such as a head for training."""
        read = {self.trace.values[ref.id].name for call in self.trace.calls for ref in operands(call)}
        for first, group in zip(groups.offsets, groups.groups):
            found = bool(self.count[first : first + group.size].all())
            if not found and any(slot.tensor in read for slot in group.slots):
                raise PlanError(
                    f"no relevance comes to group {group.name!r}: its units meet no activation where they are looked "
                    f"at. Try made={not self.made}, or score it by another criterion."
                )


def find_places(tape: Tape, model: nn.Module, groups: Groups, made: bool) -> Places:
    """Where the units of `groups` end, or are made, on a tape of the model."""
    analysis = analyse(tape.trace, model, split=groups.split)
    numbers = _numbers(analysis, groups)
    at: dict[tuple[int, int], tuple[UnitBlock, ...]] = {}
    for call, position, block in _made(analysis, tape) if made else _ends(analysis, tape):
        units = numbers[block.units]
        if (units < groups.offsets[-1]).any():
            at[call, position] = (*at.get((call, position), ()), UnitBlock(block.dims, units))
    count = torch.zeros(groups.offsets[-1] + 1, dtype=torch.float64)
    for blocks in at.values():
        for block in blocks:
            count[torch.from_numpy(np.unique(block.units))] += 1
    return Places(tape.trace, MappingProxyType(at), made, count)


def _ends(analysis: Analysis, tape: Tape) -> Iterator[tuple[int, int, UnitBlock]]:
    """(call, operand, units), wherever units of an activation end in a sum."""
    for end, block in analysis.contractions:
        if tape.is_live(operands(tape.trace.calls[end.call])[end.operand]):
            yield end.call, end.operand, block


def _made(analysis: Analysis, tape: Tape) -> Iterator[tuple[int, int, UnitBlock]]:
    """(call, output, units), wherever a linear layer makes units."""
    for index, call in enumerate(tape.trace.calls):
        for ref in call.outputs[:1]:
            if ref is not None and is_layer(tape, call):
                yield from ((index, 0, block) for block in analysis.units_of(ref))


def _numbers(analysis: Analysis, groups: Groups) -> Ids:
    """For each unit of the analysis, and for none, its number in `groups`; they are found by their places."""
    known: dict[tuple[str, int, int], int] = {}
    for first, group in zip(groups.offsets, groups.groups):
        for slot in group.slots:
            known |= {(slot.tensor, slot.dim, i): unit for unit, spots in enumerate(slot.index, first) for i in spots}
    out = np.full(analysis.groups.offsets[-1] + 1, groups.offsets[-1], np.int64)
    for first, group in zip(analysis.groups.offsets, analysis.groups.groups):
        for slot in group.slots:
            for unit, spots in enumerate(slot.index, first):
                out[unit] = known.get((slot.tensor, slot.dim, spots[0]), out[unit])
    return out
