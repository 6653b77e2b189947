"""Rules of the ops that look values up by index, rank or place: the axis looked up along is frozen."""

from __future__ import annotations

import torch

from secateur.graph import moves, views
from secateur.graph.axes import Block, Name, Step, aligned, equate, letters
from secateur.graph.capture import Ref


def embedding(step: Step) -> None:
    """(weight, indices): the width is carried to the last axis; the vocabulary is looked up, so it is frozen."""
    width = step.axis(step.arg(0), 1)
    if width is not None:
        step.field.plays(width, "write")
        step.carry([Block((len(step.shape(step.output)) - 1,), width)])
        step.counts(width, len(width), "embedding_dim")


def index(step: Step) -> None:
    """x[..., i, j, ...] with tensors of indices or masks: the axes they pick from are frozen."""
    x: Ref = step.arg(0)
    place, _ = _picked(step, x)
    step.carry(moves.relabel(b, place) for b in step.blocks(x) if set(b.dims) <= place.keys())


def index_put(step: Step) -> None:
    """x[..., i, j, ...] = values: the axes they do not pick from are one with those of the values, if these have them.

    Where one mask says which places get one number, the axes of the mask are those of x.
    """
    x, values = step.arg(0), step.arg(2)
    sizes, given = step.shape(x), step.shape(values)
    picks = [(d, pick) for d, pick in enumerate(step.arg(1)) if pick is not None]
    names = letters(len(sizes))
    if len(picks) == 1 and _is_mask(step, picks[0][1]) and set(given) <= {1}:
        first, mask = picks[0]
        equate(step, [x, mask], [names, names[first : first + len(step.shape(mask))]], names)
        return
    place, rank = _picked(step, x)
    own: list[Name] = [names[d] if d in place else None for d in range(len(sizes))]
    at = {p - rank + len(given): d for d, p in place.items()}  # aligned at the right
    alike = [names[at[p]] if p in at and n == sizes[at[p]] else None for p, n in enumerate(given)]
    equate(step, [x, values], [own, alike], own)


def masked_scatter(step: Step) -> None:
    """(x, mask, source): where the mask says, x gets the numbers of the source in their order: whole rows of the last
    axis, if the mask was repeated along it, which is then one with the source's."""
    x, mask, source = step.operands
    names, own = letters(len(step.shape(x))), aligned(step, mask)
    along = [block for block in step.blocks(mask) if len(own) - 1 in block.dims]
    alike = step.shape(mask)[-1] == 1 or any(views.is_free(step, block) for block in along)
    if not alike or step.shape(source)[-1] != step.shape(x)[-1]:
        names[-1] = None
    equate(step, [x, mask, source], [names, own, [*[None] * (len(step.shape(source)) - 1), names[-1]]], names)


def _is_mask(step: Step, pick: Ref) -> bool:
    return step.field.values[pick.id].dtype in (torch.bool, torch.uint8)


def _picked(step: Step, x: Ref) -> tuple[dict[int, int], int]:
    """For each axis of x that no index picks from, its place in x[..., i, j, ...]; and how many axes that has.

    A mask picks from as many axes as it has, and makes one of them.
    """
    used: list[int] = []
    axis, grown = 0, 0
    for pick in step.arg(1):
        rank = 0 if pick is None else len(step.shape(pick))
        mask = pick is not None and _is_mask(step, pick)
        wide = rank if mask else 1
        used += [] if pick is None else range(axis, axis + wide)
        grown = max(grown, 1 if mask else rank)
        axis += wide
    kept = [d for d in range(len(step.shape(x))) if d not in used]
    # Indices side by side put the new axes in their place, others put them first, as in numpy.
    first = used[0] if used and used == list(range(used[0], used[0] + len(used))) else 0
    return {d: i + grown * (i >= first) for i, d in enumerate(kept)}, grown + len(kept)


def index_select(step: Step) -> None:
    """(x, dim, index): the axis it picks from is frozen."""
    _carry_but(step, step.arg(1))


def index_add(step: Step) -> None:
    """(x, dim, index, source): x at the places that the index says grows by the source; the other axes are one."""
    x, source = step.arg(0), step.arg(3)
    rank = len(step.shape(x))
    names: list[Name] = [f"d{i}" if i != step.arg(1) % rank else None for i in range(rank)]
    equate(step, [x, source], [names, names], names)


def gather(step: Step) -> None:
    """gather, scatter: (x, dim, index[, source]): along the other axes, each index looks at its own place."""
    out = step.shape(step.output)
    dim = step.arg(1) % len(out)
    names: list[list[Name]] = [
        [f"d{i}" if n == out[i] and i != dim else None for i, n in enumerate(step.shape(ref))] for ref in step.operands
    ]
    equate(step, step.operands, names, [f"d{i}" if i != dim else None for i in range(len(out))])


def ranked(step: Step) -> None:
    """topk, sort, kthvalue and their like: the axis that is ranked is frozen, or gone where one value of it is left."""
    schema = [argument.name for argument in step.call.op._schema.arguments]
    _carry_but(step, step.arg(schema.index("dim"), "dim", -1))


def _carry_but(step: Step, dim: int) -> None:
    """Carry all axes to all outputs, except `dim`."""
    x: Ref = step.arg(0)
    rank = len(step.shape(x))
    kept = [block for block in step.blocks(x) if dim % rank not in block.dims]
    if len(step.shape(step.output)) < rank:
        kept = [moves.relabel(block, {d: d - (d > dim % rank) for d in block.dims}) for block in kept]
    for output in range(len(step.call.outputs)):
        step.carry(kept, output=output)


def sampled(step: Step) -> None:
    """roi_align, roi_pool, grid_sample: (x, places): channels are carried, and boxes or grid positions are not cut."""
    x: Ref = step.arg(0)
    kept = [block for block in step.blocks(x) if block.dims == (1,)]
    for output in range(len(step.call.outputs)):
        step.carry(kept, output=output)


def triangle(step: Step) -> None:
    """tril, triu: the last two axes are compared by place, so they are frozen."""
    x: Ref = step.arg(0)
    rank = len(step.shape(x))
    step.carry(block for block in step.blocks(x) if max(block.dims) < rank - 2)
