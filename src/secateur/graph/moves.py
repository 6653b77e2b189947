"""Rules of the ops that move data without mixing it: they move the units, and nothing is special about any of them.

The one with an algorithm is `view`; the others are the op itself, carried out on the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.graph.axes import Block, Step
from secateur.graph.capture import Ref, op_name
from secateur.graph.units import Ids


def permute(step: Step) -> None:
    """permute, transpose, t, movedim, swapaxes: output axis i is input axis order[i]."""
    x: Ref = step.arg(0)
    rank = len(step.shape(x))
    name = step.call.op.overloadpacket.__name__.rstrip("_")
    if name == "permute":
        order = [d % rank for d in step.arg(1)]
    else:
        a, b = (step.arg(1) % rank, step.arg(2) % rank) if name == "transpose" else (0, rank - 1)
        order = list(range(rank))
        order[a], order[b] = order[b], order[a]
    step.carry(relabel(block, {old: new for new, old in enumerate(order)}) for block in step.blocks(x))


def relabel(block: Block, to: dict[int, int]) -> Block:
    """The block with its axes at new places, kept in ascending order."""
    dims = [to[d] for d in block.dims]
    rank = np.argsort(dims)
    return Block(tuple(sorted(dims)), block.ids.transpose(list(rank)))


def unsqueeze(step: Step) -> None:
    """A new axis of size 1: the axes behind it move by one."""
    x: Ref = step.arg(0)
    at = step.arg(1) % (len(step.shape(x)) + 1)
    step.carry(relabel(b, {d: d + (d >= at) for d in b.dims}) for b in step.blocks(x))


def squeeze(step: Step) -> None:
    """Axes of size 1 go; the output's shape tells which, since axes of size 1 carry no units."""
    x: Ref = step.arg(0)
    rank = len(step.shape(x))
    wanted = step.arg(1, default=None)
    dims = range(rank) if wanted is None else [wanted] if isinstance(wanted, int) else wanted
    gone = {d % rank for d in dims if step.shape(x)[d] == 1}
    kept = {old: new for new, old in enumerate(d for d in range(rank) if d not in gone)}
    step.carry(relabel(b, kept) for b in step.blocks(x))


def slice_axis(step: Step) -> None:
    """slice keeps a range of one axis; the units outside it are other slices' business."""
    x: Ref = step.arg(0)
    dim = step.arg(1, "dim", 0) % len(step.shape(x))
    start, stop = step.arg(2, "start"), step.arg(3, "end")
    piece = slice(start, stop, step.arg(4, "step", 1))
    if piece.step > 1 and not _whole_strides(step, x, dim, piece):
        step.carry(block for block in step.blocks(x) if dim not in block.dims)
        return
    number = step.field.slices.setdefault(step.call.python, 0)
    step.field.slices[step.call.python] += 1
    ids = next((b.ids for b in step.blocks(x) if b.dims == (dim,)), None)
    if ids is not None and start is not None and stop is not None:
        first, last, _ = slice(start, stop).indices(len(ids))
        step.counts(ids[:first], first, place=("start", number))
        step.counts(ids[:last], last, place=("stop", number))
    step.carry([_cut(step, block, dim, piece) for block in step.blocks(x)])


def _whole_strides(step: Step, x: Ref, dim: int, piece: slice) -> bool:
    """With x[::2], pairs must go together, or what stays changes places: unite them, if the axis is made of such."""
    n, start = step.shape(x)[dim], piece.indices(step.shape(x)[dim])[0]
    if not any(dim in block.dims for block in step.blocks(x)):
        return True
    ids = step.axis(x, dim)
    if ids is None or n % piece.step or start >= piece.step or piece.indices(n)[1] <= n - piece.step + start:
        return ids is None
    rows = ids.reshape(-1, piece.step)
    step.units.unite(rows[:, :1], rows)
    return True


def flip(step: Step) -> None:
    """flip reverses each axis named."""
    x: Ref = step.arg(0)
    at = {d % len(step.shape(x)) for d in step.arg(1)}
    blocks = [(block, tuple(axis for axis, dim in enumerate(block.dims) if dim in at)) for block in step.blocks(x)]
    step.carry(Block(block.dims, np.flip(block.ids, axes)) for block, axes in blocks)


def roll(step: Step) -> None:
    """roll shifts other axes round; along an axis with units, how far would depend on which are cut."""
    x: Ref = step.arg(0)
    dims = {d % len(step.shape(x)) for d in step.arg(2, "dims", [])}
    step.carry(block for block in step.blocks(x) if dims and not set(block.dims) & dims)


def select(step: Step) -> None:
    """select takes one index of an axis away; on an axis with units only the outer part of a split can go so."""
    x: Ref = step.arg(0)
    dim, index = step.arg(1) % len(step.shape(x)), step.arg(2)
    step.carry(_without(step, block, dim, index) for block in step.blocks(x))


def unbind(step: Step) -> None:
    """unbind is one select for each index."""
    x: Ref = step.arg(0)
    dim = step.arg(1, "dim", 0) % len(step.shape(x))
    for index in range(len(step.call.outputs)):
        step.carry([_without(step, block, dim, index) for block in step.blocks(x)], output=index)


def _without(step: Step, block: Block, dim: int, index: int) -> Block:
    """The block with axis `dim` taken at `index`; a block on that axis alone is lost, so `close` freezes it."""
    ids, dims = block.ids, block.dims
    if dim in dims:
        ids = np.take(ids, index, axis=dims.index(dim))
        if len(dims) > 1:
            step.end(block.ids)
            step.splits(block.ids, whole=block.dims.index(dim))
        else:
            ids = ids.reshape(())
        dims = tuple(d for d in dims if d != dim)
    return Block(tuple(d - (d > dim) for d in dims), ids)


def split(step: Step) -> None:
    """split, split_with_sizes, chunk: the pieces in order."""
    x: Ref = step.arg(0)
    dim = step.arg(2, "dim", 0) % len(step.shape(x))
    start = 0
    ids = next((b.ids for b in step.blocks(x) if b.dims == (dim,)), None)
    for index, ref in enumerate(step.call.outputs):
        size = step.shape(ref)[dim] if ref is not None else 0
        piece = slice(start, start + size)
        step.counts(ids[piece] if ids is not None else None, size, search=True, place=("piece", index))
        step.carry([_cut(step, block, dim, piece) for block in step.blocks(x)], output=index)
        start += size


def _cut(step: Step, block: Block, dim: int, piece: slice) -> Block:
    if dim not in block.dims:
        return block
    at = [slice(None)] * len(block.dims)
    at[block.dims.index(dim)] = piece
    step.end(block.ids)
    if block.dims == (dim,) and block.ids[piece].size == 1:
        step.freeze(block.ids[piece], "is a piece of its own")
    return Block(block.dims, block.ids[tuple(at)])


def cat(step: Step) -> None:
    """cat along an axis puts the units one behind the other; along the others it unites them."""
    refs: list[Ref] = [ref for ref in step.arg(0) if len(step.shape(ref)) > 1 or step.shape(ref)[0] > 0]
    rank = len(step.shape(step.output))
    dim = step.arg(1, "dim", 0) % rank
    along: list[Ids] = []
    live = any(dim in block.dims for ref in refs for block in step.blocks(ref))
    across: dict[int, list[Ids | None]] = {d: [] for d in range(rank) if d != dim}
    for ref in refs:
        axes = {d: step.axis(ref, d) for d in range(rank)}
        own = axes[dim]
        if live and own is None:
            own = step.units.fresh(step.shape(ref)[dim])
            step.freeze(own, "is concatenated from parts that cannot be cut")
        if own is not None:
            along.append(own)
        for d, row in across.items():
            row.append(axes[d])
    blocks = [Block((dim,), np.concatenate(along))] if live else []
    for d, row in across.items():
        blocks += _united(step, d, row)
    step.carry(blocks)


def stack(step: Step) -> None:
    """stack unites all axes; the new one carries no units."""
    refs: list[Ref] = list(step.arg(0))
    rank = len(step.shape(step.output))
    at = step.arg(1, "dim", 0) % rank
    blocks: list[Block] = []
    for d in range(rank - 1):
        blocks += _united(step, d + (d >= at), [step.axis(ref, d) for ref in refs])
    step.carry(blocks)


def _united(step: Step, dim: int, row: Sequence[Ids | None]) -> list[Block]:
    ids = [axis for axis in row if axis is not None]
    for other in ids[1:]:
        step.units.unite(ids[0], other)
        step.end(other)
    if ids and len(ids) < len(row):
        step.freeze(ids[0], "meets an axis that cannot be cut")
    return [Block((dim,), ids[0])] if ids else []


def pad(step: Step) -> None:
    """constant_pad_nd: what is padded on gets units of its own, free to go with whatever they meet."""
    x: Ref = step.arg(0)
    rank, widths = len(step.shape(x)), step.arg(1)
    blocks = []
    for block in step.blocks(x):
        at = rank - 1 - np.arange(len(widths) // 2)
        padded = [d for d in block.dims if d in at and any(widths[2 * (rank - 1 - d) :][:2])]
        if not padded:
            blocks.append(block)
            continue
        single = step.fold(block)
        if single.dims[0] in padded:
            position = 2 * (rank - 1 - single.dims[0])
            before, after = (step.units.fresh(max(0, n)) for n in widths[position : position + 2])
            joined = np.concatenate([before, single.ids, after])
            joined = joined[max(0, -widths[position]) : len(joined) - max(0, -widths[position + 1])]
            step.end(single.ids)
            for number, ids in ((position, before), (position + 1, after)):
                step.counts(ids, widths, "padding", position=number, search=True, place=("pad", number))
            single = Block(single.dims, joined)
        blocks.append(single)
    step.carry(blocks)


def pixel_shuffle(step: Step) -> None:
    """pixel_shuffle: r x r channels become one; they go together."""
    x: Ref = step.arg(0)
    rank, factor = len(step.shape(x)), step.arg(1)
    ids = step.axis(x, rank - 3)
    if ids is not None:
        rows = ids.reshape(-1, factor * factor)
        step.units.unite(rows[:, :1], rows)
        step.end(ids)
        step.carry([Block((rank - 3,), rows[:, 0])])


def pixel_unshuffle(step: Step) -> None:
    """pixel_unshuffle: each channel becomes r x r."""
    x: Ref = step.arg(0)
    rank, factor = len(step.shape(x)), step.arg(1)
    ids = step.axis(x, rank - 3)
    if ids is not None:
        step.carry([Block((rank - 3,), np.repeat(ids, factor * factor))])


def channel_shuffle(step: Step) -> None:
    """channel_shuffle: (groups, width) transposed, as the op does it."""
    x: Ref = step.arg(0)
    groups = step.arg(1)
    ids = step.axis(x, 1)
    if ids is not None:
        split_ids = ids.reshape(groups, -1)
        step.splits(split_ids)
        step.carry([Block((1,), split_ids.T.ravel())])


def glu(step: Step) -> None:
    """glu: the first half of an axis, gated by the second; an index of each goes together."""
    x: Ref = step.arg(0)
    dim = step.arg(1, "dim", -1) % len(step.shape(x))
    ids = step.axis(x, dim)
    blocks = [block for block in step.blocks(x) if dim not in block.dims]
    if ids is not None:
        first, second = ids.reshape(2, -1)
        step.units.unite(first, second)
        step.end(ids)
        blocks.append(Block((dim,), first))
    step.carry(blocks)


def windows(step: Step) -> None:
    """Tensor.unfold: (x, dim, size, step): windows along one axis, which is frozen; their insides become the last."""
    x: Ref = step.arg(0)
    dim = step.arg(1) % len(step.shape(x))
    step.carry(block for block in step.blocks(x) if dim not in block.dims)


def columns(step: Step) -> None:
    """im2col: each channel becomes one for each place in the kernel; col2im: those go together and become one."""
    x: Ref = step.arg(0)
    at = len(step.shape(x)) - (3 if op_name(step.call) == "im2col" else 2)
    ids = step.axis(x, at)
    if ids is None:
        return
    after = step.shape(step.output)[at]
    if after >= len(ids):
        step.carry([Block((at,), np.repeat(ids, after // len(ids)))])
        return
    rows = ids.reshape(after, -1)
    step.units.unite(rows[:, :1], rows)
    step.contract(x, Block((at,), ids))
    step.carry([Block((at,), rows[:, 0])])
