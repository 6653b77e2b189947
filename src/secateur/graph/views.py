"""Rules of views: reshape, expand and their like. Old and new axes pair off, and the units follow their axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from secateur.graph.axes import Block, Step
from secateur.graph.capture import Ref
from secateur.graph.moves import relabel

Segment = tuple[tuple[int, ...], tuple[int, ...]]
"""Old axes and the new ones that they became."""

MERGED = "a view merges this axis with another, which is the one that can be cut"


def view(step: Step) -> None:
    """view, reshape, flatten: old and new axes fall into segments of equal size; units follow their segment.

    A segment that splits an axis gives one block of several axes; a segment that merges axes repeats each unit
    for every index of the axes merged with it.
    """
    x: Ref = step.arg(0)
    old, new = step.shape(x), step.shape(step.output)
    if 0 in old:
        return
    parts = segments(old, new)
    blocks = step.blocks(x)
    out = []
    for block in blocks:
        own = [part for part in parts if set(part[0]) & set(block.dims)]
        before = [d for part in own for d in part[0]]
        after = [d for part in own for d in part[1]]
        met = [other for other in blocks if other is not block and set(other.dims) & set(before)]
        held = [other for other in met if not is_free(step, other)]
        if held and not is_free(step, block) and all(len(other.dims) == 1 for other in (block, *held)):
            if all(block.dims < other.dims for other in held):
                out.append(_merged(step, block, held, parts, new))
            continue
        if met and (is_free(step, block) or held):
            continue  # Axes that were split merge with others; `close` freezes all.
        sparse = block.ids.reshape([old[d] if d in block.dims else 1 for d in before])
        ids = np.broadcast_to(sparse, [old[d] for d in before]).reshape([new[d] for d in after])
        out.append(_trim(Block(tuple(after), ids)))
    for block in out:
        if len(block.dims) > 1:
            step.splits(block.ids)
        sizes(step, block)
    step.carry(out)


def _merged(step: Step, outer: Block, inner: Sequence[Block], parts: Sequence[Segment], new: Sequence[int]) -> Block:
    """Axes become one: each pair of indices is a cell, and which axis a cut of cells follows is settled later.

    Of more than two, such as the channels and the positions of a kernel, only the outer one stays prunable.
    """
    dims = {d for block in (outer, *inner) for d in block.dims}
    own = [part for part in parts if set(part[0]) & dims]
    before, after = [d for part in own for d in part[0]], [d for part in own for d in part[1]]
    rest = inner[0].ids
    for block in inner:
        step.end(block.ids)
        if len(inner) > 1:
            step.freeze(block.ids, MERGED)
    if len(inner) > 1:
        rest = step.units.fresh(math.prod(block.ids.size for block in inner))
        step.freeze(rest, MERGED)
    cells = step.units.fresh(outer.ids.size * rest.size).reshape(outer.ids.size, rest.size)
    step.field.merges.append((cells, outer.ids, rest))
    step.end(outer.ids)
    old = step.shape(step.arg(0))
    sparse = cells.reshape([old[d] if d in dims else 1 for d in before])
    ids = np.broadcast_to(sparse, [old[d] for d in before]).reshape([new[d] for d in after])
    return _trim(Block(tuple(after), ids))


def restride(step: Step) -> None:
    """as_strided with the sizes and the strides that a contiguous tensor has: what torch does after some reductions."""
    x: Ref = step.arg(0)
    sizes_, strides = tuple(step.arg(1)), tuple(step.arg(2))
    expected = [math.prod(sizes_[d + 1 :]) for d in range(len(sizes_))]
    if sizes_ == step.shape(x) and all(n == 1 or a == b for n, a, b in zip(sizes_, strides, expected)):
        step.carry(step.blocks(x))


def complex_parts(step: Step) -> None:
    """view_as_real adds a last axis of two parts, view_as_complex takes it away."""
    rank = min(len(step.shape(step.arg(0))), len(step.shape(step.output)))
    blocks = []
    for block in step.blocks(step.arg(0)):
        if block.dims[-1] == rank and len(block.dims) > 1:  # the two parts of one number go together
            step.units.unite(block.ids[..., :1], block.ids)
            step.end(block.ids)
            block = Block(block.dims[:-1], block.ids[..., 0])
        blocks.append(block)
    step.carry(block for block in blocks if block.dims[-1] < rank)


def _trim(block: Block) -> Block:
    """Without the axes along which the units do not change."""
    dims, ids = list(block.dims), block.ids
    for axis in range(ids.ndim - 1, -1, -1):
        first = np.take(ids, [0], axis=axis)
        if ids.ndim > 1 and bool((ids == first).all()):
            ids = np.take(ids, 0, axis=axis)
            del dims[axis]
    return Block(tuple(dims), ids)


def segments(old: Sequence[int], new: Sequence[int]) -> list[Segment]:
    """The finest pairing of runs of old axes with runs of new axes of the same size.

    >>> segments((2, 12, 49), (2, 3, 4, 49))
    [((0,), (0,)), ((1,), (1, 2)), ((2,), (3,))]
    """
    out = []
    i = j = 0
    while i < len(old) or j < len(new):
        before, after = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(before), j + len(after)
        while math.prod(old[d] for d in before) != math.prod(new[d] for d in after):
            if math.prod(old[d] for d in before) < math.prod(new[d] for d in after):
                before.append(i)
                i += 1
            else:
                after.append(j)
                j += 1
        out.append((tuple(before), tuple(after)))
    return out


def expand(step: Step) -> None:
    """expand: axes are aligned at the right, those of size 1 are repeated."""
    x: Ref = step.arg(0)
    shift = len(step.shape(step.output)) - len(step.shape(x))
    blocks = [relabel(b, {d: d + shift for d in b.dims}) for b in step.blocks(x)]
    old = (1,) * shift + step.shape(x)
    blocks += [_copies(step, d, n) for d, n in enumerate(step.shape(step.output)) if old[d] == 1 < n]
    for block in blocks:
        sizes(step, block)
    step.carry(blocks)


def repeat(step: Step) -> None:
    """repeat tiles the numbers as it tiles the data."""
    x: Ref = step.arg(0)
    times = step.arg(1)
    shift = len(times) - len(step.shape(x))
    blocks = []
    for block in step.blocks(x):
        moved = relabel(block, {d: d + shift for d in block.dims})
        blocks.append(Block(moved.dims, np.tile(moved.ids, [times[d] for d in moved.dims])))
    old = (1,) * shift + step.shape(x)
    blocks += [_copies(step, d, n) for d, n in enumerate(step.shape(step.output)) if old[d] == 1 < n]
    for block in blocks:
        sizes(step, block)
    step.carry(blocks)


def _copies(step: Step, dim: int, size: int) -> Block:
    """An axis along which all is alike has units that nothing holds, free to go with whatever they meet."""
    ids = step.units.fresh(size)
    step.field.free.add(int(ids[0]))
    return Block((dim,), ids)


def is_free(step: Step, block: Block) -> bool:
    """Whether nothing holds the units, for all is alike along them."""
    return int(block.ids.flat[0]) in step.field.free


def sizes(step: Step, block: Block) -> None:
    """The sizes of an output's axes are integers that Python may have written down."""
    shape = step.shape(step.output)
    for axis, dim in enumerate(block.dims):
        step.counts(np.moveaxis(block.ids, axis, 0), shape[dim], search=True, place=("size", dim))
