"""Trace -> which units are one, and where they are: run every op's rule, then solve.

`analyse` is what `find_groups`, the masks and the certificate share: the groups for the caller, and for each
value of the trace the units along its axes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor, nn

from secateur.graph.axes import Contraction, Field, PythonInt, Step, refs_in
from secateur.graph.capture import Ref, Trace
from secateur.graph.decisions import Decision, numbered
from secateur.graph.products import KERNEL
from secateur.graph.records import Frozen, Group, Groups, Int, Size, Slot, TensorInfo
from secateur.graph.replay import REPLAYABLE
from secateur.graph.rules import rule_for
from secateur.graph.units import Ids, Solution

ROLES = ("write", "read", "scale")


@dataclass(frozen=True)
class UnitBlock:
    """Units along some axes of a value, numbered as `Groups.unit_names` does; -1 is one that always stays."""

    dims: tuple[int, ...]
    units: Ids


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
    guessed: frozenset[tuple[str, str]]

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
    unbound: Collection[tuple[str, str]] = (),
) -> Analysis:
    """Groups of a captured model.

    Args:
        trace: what `capture` recorded of `model` (or of its twin).
        model: read for its tensors' names and its modules' integers; not run.
        frozen: (value, reason): units on these values may not be cut, found out by the probe.
        unbound: (module, attribute): integers that only happen to have the value of a count.
    """
    state = propagate(trace)
    for value, reason in frozen:
        for block in state.blocks.get(value, ()):
            state.units.freeze(block.ids, reason)
    solution = _rectangular(state)
    unread = _unread(state, solution)
    if unread.size:  # such as the rest of a table of positions
        state.units.freeze(unread, "no op reads these indices on the example inputs; on others it might")
        solution = state.units.solve()
    units, groups = _form_groups(state, solution, model, unbound)
    numbered = {
        ref: tuple(UnitBlock(b.dims, units[solution.root[b.ids]]) for b in blocks if b.ids.size)
        for ref, blocks in state.blocks.items()
        if blocks
    }
    ends = tuple((c, UnitBlock(c.block.dims, units[solution.root[c.block.ids]])) for c in state.contractions)
    guessed = frozenset(
        (item.module, name)
        for item in state.ints
        if (name := _searched(model.get_submodule(item.module), item)) is not None
    )
    return Analysis(trace, groups, numbered, ends, _find_sizes(trace, state.ints, solution, units), guessed)


def propagate(trace: Trace) -> Field:
    """Run every op's rule over the units."""
    arguments = {ref.id for call in trace.calls for ref in refs_in((call.args, call.kwargs))}
    state = Field(trace.values, read=frozenset(arguments.union(ref.id for ref in trace.outputs)))
    for index, call in enumerate(trace.calls):
        step = Step(state, index, call)
        rule = rule_for(call)
        if rule is not None and not call.dead and any(ref is not None for ref in call.outputs):
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
        state.units.freeze(other, "a view merges this axis with another, which is the one that can be cut")
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


def _form_groups(
    state: Field, solution: Solution, model: nn.Module, unbound: Collection[tuple[str, str]]
) -> tuple[Ids, Groups]:
    """Units that touch the same axes, of tensors and of values on the way, form a group: they are interchangeable.

    Returns the number of each class as well.
    """
    parameters = dict(model.named_parameters())
    tensors = {**parameters, **dict(model.named_buffers())}
    order = {name: i for i, name in enumerate(tensors)}
    owners = sorted(state.owners, key=lambda owner: (order[owner[1]], owner[2]))
    places: dict[int, list[tuple[int, int]]] = {}
    for slot, (start, tensor, dim) in enumerate(owners):
        roots = solution.root[start : start + tensors[tensor].shape[dim]]
        for position in np.flatnonzero(~solution.frozen(roots)):
            places.setdefault(int(roots[position]), []).append((slot, int(position)))
    path = _paths(state, solution)
    alike: dict[tuple[int, ...], list[int]] = {}
    for root, spots in places.items():
        alike.setdefault((int(path[root]), *sorted(slot for slot, _ in spots)), []).append(root)
    units = np.full(len(solution.root) + 1, -1, np.int64)
    groups: list[Group] = []
    count = 0
    for roots_of in alike.values():
        units[roots_of] = np.arange(count, count + len(roots_of))
        count += len(roots_of)
        groups.append(_group(state, solution, owners, places, roots_of, {g.name for g in groups}))
    found = Groups(
        groups=tuple(groups),
        frozen=_frozen_axes(owners, solution, tensors),
        ints=_find_ints(state.ints, solution, units, model, unbound),
        sizes=(),
        tensors=tuple(TensorInfo(n, tuple(t.shape), n in parameters) for n, t in tensors.items()),
    )
    return units, found


def _paths(state: Field, solution: Solution) -> Ids:
    """For each class a fingerprint of the values on which its units are."""
    marks = np.random.default_rng(0).integers(np.iinfo(np.int64).max, size=len(state.values))
    path = np.zeros(len(solution.root) + 1, np.int64)
    for ref, blocks in state.blocks.items():
        for block in blocks:
            path[np.unique(solution.root[block.ids])] ^= marks[ref] + sum(block.dims)
    return path


def _group(
    state: Field,
    solution: Solution,
    owners: Sequence[tuple[int, str, int]],
    places: Mapping[int, Sequence[tuple[int, int]]],
    roots: Sequence[int],
    taken: set[str],
) -> Group:
    index: dict[int, list[tuple[int, ...]]] = {}
    for root in roots:
        here: dict[int, list[int]] = {}
        for slot, position in places[root]:
            here.setdefault(slot, []).append(position)
        for slot, positions in here.items():
            index.setdefault(slot, []).append(tuple(positions))
    slots = tuple(
        Slot(tensor, dim, state.roles.get((tensor, dim), "scale"), tuple(index[slot]))
        for slot, (_, tensor, dim) in enumerate(owners)
        if slot in index
    )
    lead = next((s for role in ROLES for s in slots if s.role == role), slots[0])
    base = lead.tensor.rpartition(".")[0] or lead.tensor
    name = next(n for k in range(1, len(taken) + 2) if (n := base if k == 1 else f"{base}#{k}") not in taken)
    return Group(name, len(roots), slots, solution.why_inexact(int(roots[0])))


def _frozen_axes(
    owners: Sequence[tuple[int, str, int]], solution: Solution, tensors: Mapping[str, Tensor]
) -> tuple[Frozen, ...]:
    """Each axis with frozen units and why, but for kernel positions, which nobody would cut."""
    out = []
    for start, tensor, dim in owners:
        size = tensors[tensor].shape[dim]
        roots = solution.root[start : start + size]
        stuck = roots[solution.frozen(roots)]
        if stuck.size and (reason := solution.why_frozen(int(stuck[0]))) != KERNEL:
            out.append(Frozen(tensor, dim, int(stuck.size), size, reason))
    return tuple(out)


def _find_ints(
    ints: Sequence[PythonInt],
    solution: Solution,
    units: Ids,
    model: nn.Module,
    unbound: Collection[tuple[str, str]],
) -> tuple[Int, ...]:
    """The module attribute that holds each integer, where there is exactly one."""
    found: dict[tuple[str, str, int | None], Int] = {}
    for item in ints:
        numbers = _by_row(units[solution.root[item.ids]])
        attribute = _attribute(model.get_submodule(item.module), item) if (numbers >= 0).any() else None
        if attribute is not None and (item.module, attribute[0]) not in unbound:
            key = (item.module, attribute[0], attribute[1])
            found.setdefault(key, Int(*key, item.value, tuple(numbers.tolist())))
    return tuple(found.values())


def _by_row(numbers: Ids) -> Ids:
    """One unit for each index of an axis: that of its row, or -1 (always there) where the row has several."""
    rows = numbers.reshape(len(numbers), int(np.prod(numbers.shape[1:])))
    return np.where((rows == rows[:, :1]).all(axis=1), rows[:, 0], -1)


def _find_sizes(
    trace: Trace, ints: Sequence[PythonInt], solution: Solution, units: Ids
) -> dict[int, tuple[Size, ...]]:
    """For each torch function that Python called, the numbers that it can be given anew.

    Calls of one site get the numbers of the first: where they disagree, the probe will see it.
    """
    found: dict[tuple[str, str, int, tuple[str, int]], Size] = {}
    out: dict[int, list[Size]] = {}
    for item in ints:
        if item.place is None or item.python is None or trace.python[item.python].function not in REPLAYABLE:
            continue
        key = (*trace.python[item.python].site, item.place)
        if key not in found:
            found[key] = Size(*key, tuple(_by_row(units[solution.root[item.ids]]).tolist()))
        out.setdefault(item.python, []).append(found[key])
    for index, call in enumerate(trace.python):
        factors = [Size(*call.site, ("float", position), (), value) for position, value in call.floats]
        if factors:
            out.setdefault(index, []).extend(factors)
    return {index: tuple(sizes) for index, sizes in out.items()}


def _attribute(module: nn.Module, item: PythonInt) -> tuple[str, int | None] | None:
    """(name, position) of the attribute with this value: by name, or the only one that has it."""
    held = _held(module, item)
    named = next((name for name in item.names if name in held), None)
    found = named or _searched(module, item)
    return None if found is None else (found, item.position)


def _searched(module: nn.Module, item: PythonInt) -> str | None:
    """The only attribute with this value, where none has it by name."""
    held = _held(module, item) if item.search else []
    return held[0] if len(held) == 1 and held[0] not in item.names else None


def _held(module: nn.Module, item: PythonInt) -> list[str]:
    """The attributes with this value."""

    def same(held: object) -> bool:
        if isinstance(item.value, tuple):
            return isinstance(held, tuple | list) and tuple(held) == item.value
        return isinstance(held, int) and not isinstance(held, bool) and held == item.value

    return [name for name, value in vars(module).items() if not name.startswith("_") and same(value)]
