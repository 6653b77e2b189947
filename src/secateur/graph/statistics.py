"""Rules of the ops that compute a statistic: norms, softmax, reductions.

Over units, a statistic changes with those that are cut: such groups are prunable, and marked inexact.
"""

from __future__ import annotations

from collections.abc import Iterable

from secateur.graph import moves
from secateur.graph.axes import Block, Name, Rule, Step, aligned, equate, letters
from secateur.graph.capture import Ref, op_name

MIXES = "the result is a statistic over these units"


def batch_norm(step: Step) -> None:
    """(x, weight, bias, running mean, running variance), each unit by itself; the others may share a statistic."""
    x: Ref = step.arg(0)
    names = letters(len(step.shape(x)))
    by_unit = [ref for ref in step.operands[1:] if len(step.shape(ref)) == 1]
    schema = [argument.name for argument in step.call.op._schema.arguments]
    if "training" in schema and step.arg(schema.index("training")):  # as of weights that are standardised
        _statistic(step, x, [d for d in range(len(names)) if d != 1])
    equate(step, [x, *by_unit], [names, *([names[1:2]] * len(by_unit))], names)
    units = step.axis(step.output, 1)
    for output, ref in enumerate(step.call.outputs[1:3], 1):  # the batch's mean and variance
        if ref is not None and units is not None and step.shape(ref) == units.shape:
            step.carry([Block((0,), units)], output)
    step.counts(step.axis(step.output, 1), step.shape(step.output)[1], "num_features")


def layer_norm(step: Step) -> None:
    """(x, normalized_shape, weight, bias): the statistic runs over the normalised axes."""
    x: Ref = step.arg(0)
    count, rank = len(step.arg(1)), len(step.shape(x))
    affine = [ref for ref in (step.arg(2), step.arg(3)) if isinstance(ref, Ref)]
    _statistic(step, x, range(rank - count, rank))
    names = letters(rank)
    equate(step, [x, *affine], [names, *([names[rank - count :]] * len(affine))], names)
    for i, d in enumerate(range(rank - count, rank)):
        step.counts(step.axis(step.output, d), step.arg(1), "normalized_shape", position=i)


def group_norm(step: Step) -> None:
    """(x, weight, bias, n, c, hw, groups, eps): a norm group goes whole, so that no statistic changes."""
    x, weight, bias = (step.arg(i) for i in range(3))
    groups = step.arg(6)
    ids = step.axis(x, 1)
    names: list[Name] = ["n", "c", *([None] * (len(step.shape(x)) - 2))]
    equate(step, [x, weight, bias], [names, ["c"], ["c"]], names)
    if ids is None:
        return
    if groups == 1:
        step.units.inexact(ids, MIXES)
    else:
        rows = ids.reshape(groups, -1)
        step.units.unite(rows[:, :1], rows)
        step.counts(rows[:, 0], groups, "num_groups", search=True)
        for output in (1, 2):  # each norm group's mean and deviation
            step.carry([Block((1,), rows[:, 0])], output)
    step.counts(ids, step.shape(x)[1], "num_channels")


def along_axis(step: Step) -> None:
    """softmax and its like: carried whole, but the values along one axis depend on each other."""
    x: Ref = step.arg(0)
    _statistic(step, x, [step.arg(1, "dim", -1)])
    step.carry(step.blocks(x))


def running(step: Step) -> None:
    """cumsum: a unit's value depends on all before it, so units along the axis itself are frozen."""
    x: Ref = step.arg(0)
    dim = step.arg(1, "dim") % len(step.shape(x))
    step.carry(block for block in step.blocks(x) if dim not in block.dims)


def transform(step: Step) -> None:
    """Fourier transforms: each result depends on all units along the axes transformed, so those are frozen."""
    over = {d % len(step.shape(step.arg(0))) for d in step.arg(1)}
    step.carry(block for block in step.blocks(step.arg(0)) if not set(block.dims) & over)


def weight_norm(step: Step) -> None:
    """(v, g, dim) -> g v / |v|, |v|: the length of each slice along `dim` runs over all other axes."""
    v, g = step.arg(0), step.arg(1)
    dim, rank = step.arg(2, "dim", 0), len(step.shape(v))
    _statistic(step, v, [d for d in range(rank) if d != dim % rank])
    equate(step, [v, g], [letters(rank), aligned(step, g)], letters(rank))
    step.carry(step.blocks(g), output=1)


def _statistic(step: Step, x: Ref, dims: Iterable[int]) -> None:
    rank = len(step.shape(x))
    over = {d % rank for d in dims}
    for block in step.blocks(x):
        if set(block.dims) & over:
            step.units.inexact(block.ids, f"{MIXES} ({step.call.where})")


def reduction(exact: bool) -> Rule:
    """sum, mean, amax, ...: (x, dims, keepdim). A sum over units is a contraction; anything else is inexact too.

    Of `max(x, dim)`, which also gives the place, units may end only where nobody reads the place.
    """

    def rule(step: Step) -> None:
        x: Ref = step.arg(0)
        if isinstance(step.arg(1), Ref):
            equate(step, step.operands, [aligned(step, ref) for ref in step.operands], letters(len(step.shape(x))))
            return
        place_read = op_name(step.call).startswith("arg") or any(
            ref is not None and ref.id in step.field.read for ref in step.call.outputs[1:]
        )
        rank = len(step.shape(x))
        wanted = step.arg(2 if op_name(step.call) == "linalg_vector_norm" else 1, "dim")
        dims = range(rank) if wanted in (None, []) else [wanted] if isinstance(wanted, int) else wanted
        over = {d % rank for d in dims}
        if len(step.shape(step.output)) == rank:
            place = {d: d for d in range(rank)}
        else:
            place = {d: i for i, d in enumerate(d for d in range(rank) if d not in over)}
        kept = []
        for block in step.blocks(x):
            if set(block.dims) & over and not set(block.dims) <= over:
                block = step.fold(block)
            if set(block.dims) & over and not (place_read and op_name(step.call) != "var_mean"):
                step.contract(x, block)
                if not exact:
                    step.units.inexact(block.ids, f"{MIXES} ({step.call.where})")
            elif not set(block.dims) & over:
                kept.append(moves.relabel(block, place))
        for index in range(len(step.call.outputs)):
            step.carry(kept, output=index)

    return rule
