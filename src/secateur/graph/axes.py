"""Why any model can be pruned: axes that carry units.

Each index along each axis of each parameter gets a number of its own: a unit. Running the model's ops over these
numbers instead of over values shows which indices must go together:

- an op that *moves* data (reshape, permute, cat, slice, ...) moves the numbers;
- an op that *combines* data (add, convolution, matmul, norm, ...) says that two numbers are one unit: it *unites* them;
- an axis that is summed over against another (the input channels of a convolution) is *contracted*: there a unit ends;
- whatever an op neither carries on nor contracts is *frozen*, with the reason, by `Step.close` and not by the rule.
  So a rule that forgets an axis costs prunability, never correctness.

An op is usually one line in `rules.py`, written as in einops: `"n i ..., o i ..., o -> n o ..."` is a convolution.
Same name, same axis: united. In the result: carried. In several operands but not in the result: contracted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from secateur.graph.capture import Call, Ref, Value
from secateur.graph.units import Ids, Split, Units

Name = str | None


@dataclass(frozen=True)
class Block:
    """Units along one axis, or along several that a reshape split from one (heads x head width).

    `ids` has one dimension for each of `dims`, which ascend; `ids[i]` is the unit at index i.
    Axes in no block carry no units: batch, positions, the model's input.
    """

    dims: tuple[int, ...]
    ids: Ids


@dataclass(frozen=True)
class Contraction:
    """A place where units end: argument number `operand` of call `call`, summed over the axes of `block`."""

    call: int
    operand: int
    block: Block


@dataclass(frozen=True)
class PythonInt:
    """An integer in Python that counts the units `ids` (rows of units, if it counts a split axis).

    It is looked for in the attributes of the module that made the call: those called `names`, and with `search` any
    that has this value; `position` is its place if the value is a tuple. `python` is the torch function that was given
    it and `place` which of its sizes it is, so that it can be replayed where no attribute holds it.
    """

    python: int | None
    place: tuple[str, int] | None
    module: str
    ids: Ids
    value: int | tuple[int, ...]
    names: tuple[str, ...]
    position: int | None
    search: bool


@dataclass
class Field:
    """Everything known so far: the units on each value, and what the rules reported on the way."""

    values: Sequence[Value]
    split: Split = "outer"
    units: Units = field(default_factory=Units)
    blocks: dict[int, tuple[Block, ...]] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    ints: list[PythonInt] = field(default_factory=list)
    owners: list[tuple[int, str, int]] = field(default_factory=list)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    static: set[int] = field(default_factory=set)
    splits: list[tuple[Ids, int | None]] = field(default_factory=list)
    merges: list[tuple[Ids, Ids, Ids]] = field(default_factory=list)
    read: frozenset[int] = frozenset()
    free: set[int] = field(default_factory=set)
    slices: dict[int | None, int] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)  # of the owners

    def on(self, ref: Ref) -> tuple[Block, ...]:
        """The units on a value; parameters and floating buffers get fresh ones at first sight."""
        if ref.id not in self.blocks:
            value = self.values[ref.id]
            self.blocks[ref.id] = ()
            if value.origin in ("parameter", "buffer") and value.dtype.is_floating_point:
                self.static.add(ref.id)
                self.blocks[ref.id] = tuple(
                    Block((d,), self.own(value.name, d, n)) for d, n in enumerate(value.shape) if n > 1
                )
        return self.blocks[ref.id]

    def own(self, tensor: str, dim: int, size: int) -> Ids:
        """Fresh units for an axis of a parameter."""
        ids = self.units.fresh(size)
        self.owners.append((int(ids[0]), tensor, dim))
        self.starts.append(int(ids[0]))
        return ids

    def plays(self, ids: Ids, role: str) -> None:
        """The parameter axes from which `ids` came play this role; the first role said is kept."""
        first, last = (bisect_right(self.starts, int(end)) - 1 for end in (ids.min(), ids.max()))
        for index in [first] if first == last else np.unique(np.searchsorted(self.starts, ids, side="right") - 1):
            if index >= 0:
                _, tensor, dim = self.owners[index]
                self.roles.setdefault((tensor, dim), role)


class Step:
    """One call as its rule sees it: read operands, unite, carry to outputs; then the framework closes it."""

    def __init__(self, state: Field, index: int, call: Call) -> None:
        self.field, self.units, self.index, self.call = state, state.units, index, call
        self.operands: list[Ref] = list(refs_in((call.args, call.kwargs)))
        self._ended: list[Ids] = []

    def arg(self, position: int, name: str = "", default: Any = None) -> Any:
        """Argument by position, or by name where it was given so."""
        if position < len(self.call.args):
            return self.call.args[position]
        return self.call.kwargs.get(name, default)

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return self.field.values[ref.id].shape

    def blocks(self, ref: Ref) -> tuple[Block, ...]:
        return self.field.on(ref)

    @property
    def output(self) -> Ref:
        first = self.call.outputs[0]
        assert first is not None
        return first

    def carry(self, blocks: Iterable[Block], output: int = 0) -> None:
        """These units are on the output now; axes of size 1 carry none."""
        ref = self.call.outputs[output]
        if ref is not None:
            self.field.blocks[ref.id] = tuple(block for block in blocks if block.ids.size > 1)

    def splits(self, ids: Ids, whole: int | None = None) -> None:
        """A block that must stay rectangular, whatever is cut; along axis `whole` nothing may go."""
        self.field.splits.append((ids, whole))

    def abandon(self, error: Exception) -> None:
        """The rule did not fit this call: nothing goes on from here, so `close` freezes all that came in."""
        self._ended.clear()
        for ref in self.call.outputs:
            if ref is not None:
                self.field.blocks[ref.id] = ()
        for ref in self.operands:
            for block in self.blocks(ref):
                self.freeze(block.ids, f"the op's rule does not fit this call: {error}")

    def end(self, ids: Ids) -> None:
        """These units need not go on: they are summed over, or their absence is accounted for."""
        self._ended.append(ids)

    def contract(self, ref: Ref, block: Block) -> None:
        """Units end here, in a sum over the axes of `block`."""
        self.end(block.ids)
        self.field.contractions.append(Contraction(self.index, self.operands.index(ref), block))

    def freeze(self, ids: Ids, reason: str) -> None:
        self.units.freeze(ids, f"{reason} ({self.call.where})")

    def counts(
        self,
        ids: Ids | None,
        value: int | Sequence[int],
        *names: str,
        position: int | None = None,
        search: bool = False,
        place: tuple[str, int] | None = None,
    ) -> None:
        """The integer `value` counts `ids`: it must shrink with them (see `PythonInt`)."""
        if ids is not None:
            whole = value if isinstance(value, int) else tuple(value)
            call = self.call
            self.field.ints.append(PythonInt(call.python, place, call.module, ids, whole, names, position, search))

    def axis(self, ref: Ref, dim: int) -> Ids | None:
        """The units along one axis; an axis that was split off by a reshape is folded (see `fold`)."""
        dim %= len(self.shape(ref))
        for block in self.blocks(ref):
            if dim in block.dims:
                single = self.fold(block)
                return single.ids if single.dims == (dim,) else None
        return None

    def fold(self, block: Block) -> Block:
        """A block of several axes as one: whole rows along that one are one unit, and it stays prunable.

        By default it is the axis that was outermost before the reshape: heads, not the width of a head.
        """
        if len(block.dims) == 1:
            return block
        axis = factor(block.ids, self.field.split)
        rows = np.moveaxis(block.ids, axis, 0).reshape(block.ids.shape[axis], -1)
        self.units.unite(rows[:, :1], rows)
        self.end(np.setdiff1d(rows, rows[:, 0]))
        return Block((block.dims[axis],), rows[:, 0])

    def close(self) -> None:
        """Freeze every unit that came in and was neither carried on nor ended: the rule did not account for it."""
        gone = [block.ids for ref in self.operands for block in self.blocks(ref) if not self.call.dead]
        if self.operands and all(ref.id in self.field.static for ref in self.operands):
            self.field.static.update(ref.id for ref in self.call.outputs if ref is not None)
        on = [block.ids for ref in self.call.outputs if ref is not None for block in self.blocks(ref)]
        known = {id(ids) for ids in (*on, *self._ended)}  # mostly the very same arrays
        gone = [ids.ravel() for ids in gone if id(ids) not in known]
        if not gone:
            return
        accounted = np.zeros(self.units.count, bool)
        for ids in (*on, *self._ended):
            accounted[ids] = True
        lost = np.concatenate(gone)
        lost = lost[~accounted[lost]]
        if lost.size:
            self.freeze(lost, "the op reads this axis in a way that no rule accounts for")


Rule = Callable[[Step], None]


def refs_in(nested: Any) -> Iterable[Ref]:
    """The values among a call's arguments, in order."""
    if isinstance(nested, Ref):
        yield nested
    elif isinstance(nested, tuple | list):
        for item in nested:
            yield from refs_in(item)
    elif isinstance(nested, dict):
        for item in nested.values():
            yield from refs_in(item)


def factor(ids: Ids, split: Split) -> int:
    """The axis along which neighbouring units are farthest apart, which varied slowest before a reshape; or nearest."""
    jumps = [np.abs(np.diff(ids, axis=axis)) for axis in range(ids.ndim)]
    # Repeated heads, as of grouped queries, lie no jump apart: only what changes tells.
    apart = [float(np.median(jump[jump > 0])) if jump.any() else None for jump in jumps]
    sign = 1 if split == "outer" else -1
    return int(np.argmax([-np.inf if jump is None else sign * jump for jump in apart]))


def equate(step: Step, operands: Sequence[Ref | None], names: Sequence[Sequence[Name]], out: Sequence[Name]) -> None:
    """The whole meaning of a spec: unite the axes of one name, carry those in `out`, contract the others.

    Args:
        operands: the tensors; None for an absent one, such as a bias.
        names: for each operand, a name for each axis; None for an axis that the op treats otherwise.
        out: the names of the first output's axes.
    """
    present = [(ref, list(row)) for ref, row in zip(operands, names) if ref is not None]
    table = [{tuple(row[d] for d in b.dims): b for b in step.blocks(ref)} for ref, row in present]
    joints = _joints(table, [row for _, row in present], out)
    found: dict[frozenset[Name], list[tuple[int, tuple[Name, ...], Block]]] = {}
    for index, blocks in enumerate(table):
        for key, block in blocks.items():
            if len(key) > 1 and frozenset(key) not in joints:
                block = step.fold(block)
                key = (present[index][1][block.dims[0]],)
            if None not in key:
                found.setdefault(frozenset(key), []).append((index, key, block))
    carried: list[Block] = []
    for key_set, places in found.items():
        order = places[0][1]
        ids = places[0][2].ids
        for _, other, block in places[1:]:
            same = other == order
            step.units.unite(ids, block.ids if same else block.ids.transpose([other.index(name) for name in order]))
            step.end(block.ids)
        readers = [i for i, (_, row) in enumerate(present) if key_set <= set(row)]
        if len(readers) > len(places):
            step.freeze(ids, "meets an axis that cannot be cut, such as the model's input or positions")
            continue  # frozen units need not be carried: what meets this axis later is frozen as well
        if key_set <= set(out):
            dims = [out.index(name) for name in order]
            rank = sorted(range(len(dims)), key=dims.__getitem__)
            carried.append(Block(tuple(sorted(dims)), ids if len(dims) == 1 else ids.transpose(rank)))
        elif len(readers) > 1:
            _contract(step, present, places)
    step.carry(carried)
    _note_roles(step, present, out)


def _joints(
    table: Sequence[dict[tuple[Name, ...], Block]], rows: Sequence[Sequence[Name]], out: Sequence[Name]
) -> set[frozenset[Name]]:
    """The sets of axes that can stay one block: every operand has all of them alike or none, and so has the output."""
    candidates = {frozenset(key) for blocks in table for key in blocks if len(key) > 1 and None not in key}
    good = set()
    for joint in candidates:
        alike = all(
            not (joint & set(row)) or (joint <= set(row) and any(frozenset(key) == joint for key in blocks))
            for blocks, row in zip(table, rows)
        )
        whole = joint <= set(out) or not (joint & set(out))
        if alike and whole and not any(joint & other for other in candidates - {joint}):
            good.add(joint)
    return good


def _contract(
    step: Step, present: Sequence[tuple[Ref, list[Name]]], places: Sequence[tuple[int, tuple[Name, ...], Block]]
) -> None:
    """Note the contraction at one activation (or, failing that, any operand): zeros there end the unit."""
    moving = [present[index][0].id not in step.field.static for index, _, _ in places]
    chosen = moving.index(True) if any(moving) else 0
    for position, (index, _, block) in enumerate(places):
        if position == chosen:
            step.contract(present[index][0], block)
        else:
            step.end(block.ids)


def _note_roles(step: Step, present: Sequence[tuple[Ref, list[Name]]], out: Sequence[Name]) -> None:
    """Remember what each axis of a parameter does: it makes the unit, reads it, or scales it in passing."""
    for index, (ref, row) in enumerate(present):
        if ref.id not in step.field.static:
            continue
        others = {name for i, (_, names) in enumerate(present) if i != index for name in names}
        contracts = any(name in others and name not in out for name in row if name is not None)
        for block in step.blocks(ref):
            carried = any(row[dim] in out for dim in block.dims if row[dim] is not None)
            step.field.plays(block.ids, "scale" if not contracts else "write" if carried else "read")


def letters(rank: int) -> list[Name]:
    """A name for each of `rank` axes."""
    return [f"d{i}" for i in range(rank)]


def aligned(step: Step, ref: Ref) -> list[Name]:
    """Names for the axes of an operand that is broadcast to the output: none for those that are repeated."""
    shape, out = step.shape(ref), step.shape(step.output)
    shift = len(out) - len(shape)
    return [f"d{i + shift}" if n == out[i + shift] and n > 1 else None for i, n in enumerate(shape)]


def spec(text: str) -> Rule:
    """A rule from one line: `"n i ..., o i ..., o -> n o ..."`; operands are the call's first tensors, in order.

    `...` stands for axes that the op treats otherwise: units there are frozen.
    """
    left, _, right = text.partition("->")
    operands = tuple(tuple(part.split()) for part in left.split(","))
    out = tuple(right.split())

    def rule(step: Step) -> None:
        refs = [step.arg(i) for i in range(len(operands))]
        kept = [ref if isinstance(ref, Ref) else None for ref in refs]
        rows = [_spread(row, len(step.shape(ref))) if ref else () for row, ref in zip(operands, kept)]
        equate(step, kept, rows, _spread(out, len(step.shape(step.output))))

    return rule


def _spread(row: Sequence[str], rank: int) -> list[Name]:
    """The names of all `rank` axes: `...` becomes as many unnamed ones as are missing."""
    if "..." not in row:
        return list(row)
    at = row.index("...")
    return [*row[:at], *([None] * (rank - len(row) + 1)), *row[at + 1 :]]
