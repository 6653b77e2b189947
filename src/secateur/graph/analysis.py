"""Trace -> which units are one, and where they are: run every op's rule, then solve.

`analyse` is what `find_groups`, the masks and the certificate share: the groups for the caller, and for each
value of the trace the units along its axes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from secateur.graph.aside import Aside, join
from secateur.graph.axes import Contraction, Field, Step, refs_in
from secateur.graph.capture import Ref, Trace
from secateur.graph.costs import find_products, item_sizes
from secateur.graph.decisions import Decision, numbered
from secateur.graph.grouping import form_groups
from secateur.graph.integers import find_ints, find_sizes, guesses
from secateur.graph.records import Groups
from secateur.graph.rules import rule_for
from secateur.graph.slots import Size, TensorInfo
from secateur.graph.twin import tensors_of
from secateur.graph.units import Ids, Solution, Split, UnitBlock
from secateur.graph.views import MERGED
from secateur.graph.watch import Attribute


@dataclass(frozen=True)
class Analysis:
    """The groups of a trace, the units on each of its values, and the places where units end.

    `sizes[i]` are the numbers that the torch function `trace.python[i]` can be given anew; `guessed` are the (module,
    attribute) that were found by their value and not by name.
    """

    trace: Trace
    groups: Groups
    blocks: Mapping[int, tuple[UnitBlock, ...]]
    contractions: tuple[tuple[Contraction, UnitBlock], ...]
    sizes: Mapping[int, tuple[Size, ...]]
    guessed: frozenset[Attribute]

    def units_of(self, ref: Ref) -> tuple[UnitBlock, ...]:
        return self.blocks.get(ref.id, ())

    @cached_property
    def decisions(self) -> dict[tuple[str, int], Decision | None]:
        """What another run is to follow: the decisions of this one, but for those along axes with units."""
        calls = [self.trace.calls[decision.call] for decision in self.trace.decisions]
        refs = [[*refs_in((c.args, c.kwargs)), *(r for r in c.outputs if r is not None)] for c in calls]
        live = [any((b.units >= 0).any() for ref in row for b in self.units_of(ref)) for row in refs]
        return numbered(self.trace.decisions, live)


def analyse(
    trace: Trace,
    model: nn.Module,
    frozen: Sequence[tuple[int, str]] = (),
    unbound: Collection[Attribute] = (),
    split: Split = "outer",
    aside: Aside | None = None,
) -> Analysis:
    """Groups of a captured model.

    Args:
        trace: what `capture` recorded of `model` (or of its twin).
        model: read for its tensors' names and its modules' integers; not run.
        frozen: (value, reason): units on these values may not be cut, found out by the probe.
        unbound: (module, attribute): integers that only happen to have the value of a count.
        split: as for `find_groups`.
        aside: what runs in training only.
    """
    tensors = _describe(model)
    shapes = {info.name: info.shape for info in tensors}
    state = propagate(trace, split)
    if aside is not None:
        training = propagate(aside.trace, split)
        join(state, training, _rectangular(training), shapes, aside)
    for value, reason in frozen:
        for block in state.blocks.get(value, ()):
            state.units.freeze(block.ids, reason)
    solution = _rectangular(state)
    unread = _unread(state, solution)
    if unread.size:  # such as the rest of a table of positions
        state.units.freeze(unread, "no op reads these indices on the example inputs; on others it might")
        solution = state.units.solve()
    units, groups, rest = form_groups(state, solution, shapes)
    arrays = {id(b.ids): b.ids for blocks in state.blocks.values() for b in blocks}  # one is on many values
    renamed = {key: units[solution.root[ids]] for key, ids in arrays.items()}
    numbered = {
        ref: tuple(UnitBlock(b.dims, renamed[id(b.ids)]) for b in blocks if b.ids.size)
        for ref, blocks in state.blocks.items()
        if blocks
    }
    found = Groups(
        groups=groups,
        frozen=rest,
        ints=find_ints(state.ints, solution, units, model, unbound),
        sizes=(),
        tensors=tensors,
        products=find_products(trace, numbered),
        split=split,
    )
    ends = tuple((c, UnitBlock(c.block.dims, units[solution.root[c.block.ids]])) for c in state.contractions)
    sizes = find_sizes(trace, state.ints, solution, units)
    return Analysis(trace, found, numbered, ends, sizes, guesses(state.ints, model))


def _describe(model: nn.Module) -> tuple[TensorInfo, ...]:
    saved, tensors = item_sizes(model), tensors_of(model)
    return tuple(TensorInfo(n, tuple(t.shape), isinstance(t, nn.Parameter), saved[n]) for n, t in tensors.items())


def propagate(trace: Trace, split: Split = "outer") -> Field:
    """Run every op's rule over the units."""
    arguments = {ref.id for call in trace.calls for ref in refs_in((call.args, call.kwargs))}
    state = Field(trace.values, split, read=frozenset(arguments.union(ref.id for ref in trace.outputs)))
    for index, call in enumerate(trace.calls):
        step = Step(state, index, call)
        rule = rule_for(call)
        if rule is not None and any(ref is not None for ref in call.outputs):
            try:
                rule(step)
            except (ValueError, IndexError, TypeError, AssertionError) as error:
                step.abandon(error)
        step.close()
    for ref in trace.outputs:
        for block in state.on(ref):
            state.units.freeze(block.ids, "reaches the model's output")
    return state


def _rectangular(state: Field) -> Solution:
    """Solve; where a reshape split an axis and a cut could leave a ragged block, tie whole rows; solve again.

    Where a view merged two axes, cuts follow the one along which its cells are alike, by default the outer.
    """
    for cells, outer, inner in state.merges:
        solution = state.units.solve()
        sides = [(cells, outer, inner), (cells.T, inner, outer)]
        sides = [side for side in sides if not solution.frozen(solution.root[side[1]]).all()] or sides
        alike = (side for side in sides if _alike(solution.root[side[0]]))
        rows, followed, other = next(alike, sides[0])
        state.units.unite(followed[:, None], rows)
        state.units.freeze(other, MERGED)
    while True:
        solution = state.units.solve()
        ragged = [(ids, whole) for ids, whole in state.splits if not _is_rectangular(ids, whole, solution)]
        if not ragged:
            return solution
        for ids, whole in ragged:
            axis = max((a for a in range(ids.ndim) if a != whole), key=lambda a: (ids.shape[a], -a))
            rows = np.moveaxis(ids, axis, 0).reshape(ids.shape[axis], -1)
            state.units.unite(rows[:, :1], rows)


def _alike(rows: Ids) -> bool:
    return bool((rows == rows[:, :1]).all())


def _unread(state: Field, solution: Solution) -> Ids:
    """Units on parameters, and on what is made of parameters only, that never meet a value nor end in a sum."""
    met = [b.ids.ravel() for ref, blocks in state.blocks.items() if ref not in state.static for b in blocks]
    met += [contraction.block.ids.ravel() for contraction in state.contractions]
    seen = np.zeros(len(solution.root) + 1, bool)
    for ids in met:
        seen[solution.root[ids]] = True
    held = [b.ids.ravel() for ref in state.static for b in state.blocks.get(ref, ())]
    ids = np.concatenate([*held, np.empty(0, np.int64)])
    return ids[~seen[solution.root[ids]] & ~solution.frozen(solution.root[ids])]


def _is_rectangular(ids: Ids, whole: int | None, solution: Solution) -> bool:
    """Whether there is an axis along which every slice is one unit, or frozen."""
    roots = solution.root[ids]
    for axis in range(ids.ndim):
        rows = np.moveaxis(roots, axis, 0).reshape(ids.shape[axis], -1)
        same = (rows == rows[:, :1]).all(axis=1)
        if (same | solution.frozen(rows).all(axis=1)).all() and axis != whole:
            return True
    return bool(solution.frozen(roots).all())
