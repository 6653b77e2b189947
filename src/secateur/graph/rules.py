"""The table of ops: what each does with axes, most of them in one line.

To add an op: put its ATen name (without overload and trailing underscore) into the table, with a spec as
`axes.spec` reads it, or a function of a `Step`. An op that is missing here is safe: the axes it touches are frozen
with its name as the reason, and all else stays prunable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
import torch

from secateur.graph import moves
from secateur.graph.axes import Block, Name, Rule, Step, equate, spec
from secateur.graph.capture import Call, Ref, op_name
from secateur.graph.units import Ids

MIXES = "the result is a statistic over these units"
KERNEL = "a position in a kernel"
_BATCH_NORM = spec("n c ..., c, c, c, c -> n c ...")


def rule_for(call: Call) -> Rule | None:
    """The rule of an op; None if there is none, or if the op makes no tensor."""
    return RULES.get(op_name(call))


def elementwise(step: Step) -> None:
    """Any number of tensors, broadcast: axes are aligned at the right; those of size 1 meet nothing."""
    rank = len(step.shape(step.output))
    equate(step, step.operands, [_aligned(step, ref) for ref in step.operands], _letters(rank))
    for ref in step.operands:  # a norm that is written out, or that torch takes apart, as `nn.RMSNorm`
        if ref.id in step.field.static:
            for block in step.blocks(ref):
                step.counts(block.ids, step.shape(ref), "normalized_shape", position=block.dims[0])


def _letters(rank: int) -> list[Name]:
    return [f"d{i}" for i in range(rank)]


def _aligned(step: Step, ref: Ref) -> list[Name]:
    shape, out = step.shape(ref), step.shape(step.output)
    shift = len(out) - len(shape)
    return [f"d{i + shift}" if n == out[i + shift] and n > 1 else None for i, n in enumerate(shape)]


def matmul(step: Step) -> None:
    """mm, bmm, addmm, baddbmm, addmv: ([bias,] a, b), the last axis of a against the one before the last of b."""
    *bias, a, b = step.operands[:3]
    rank = len(step.shape(step.output))
    batch: list[Name] = [f"d{i}" for i in range(rank - 2)]
    last: Name = f"d{rank - 1}"
    rows: list[list[Name]] = [_aligned(step, ref) for ref in bias]
    equate(step, [*bias, a, b], [*rows, [*batch, f"d{rank - 2}", "k"], [*batch, "k", last]], _letters(rank))
    step.counts(step.axis(a, -1), step.shape(a)[-1], "in_features")
    step.counts(step.axis(step.output, -1), step.shape(step.output)[-1], "out_features")


def convolution(step: Step) -> None:
    """(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    x, weight, bias = (step.arg(i) for i in range(3))
    transposed, groups = step.arg(6), step.arg(8)
    spatial: list[Name] = [None] * (len(step.shape(x)) - 2)
    made, read = ("i", "o") if transposed else ("o", "i")
    if groups == 1:
        names: list[list[Name]] = [["n", "i", *spatial], [made, read, *spatial], ["o"]]
        equate(step, [x, weight, bias], names, ["n", "o", *spatial])
        inputs = step.axis(x, 1)
    else:
        inputs = _grouped(step, x, weight, bias, groups, transposed)
    step.counts(inputs, step.shape(x)[1], "in_channels")
    step.counts(step.axis(step.output, 1), step.shape(step.output)[1], "out_channels")
    for kernel in step.blocks(weight):
        if kernel.dims[0] > 1:
            step.units.freeze(kernel.ids, KERNEL)
            step.end(kernel.ids)


def _grouped(step: Step, x: Ref, weight: Ref, bias: Ref | None, groups: int, transposed: bool) -> Ids | None:
    """Grouped convolution: a group goes whole, with all its inputs and outputs, and the count of groups shrinks."""
    inputs, outer = step.axis(x, 1), step.axis(weight, 0)
    rows = [axis.reshape(groups, -1) for axis in (inputs, outer) if axis is not None]
    inner = step.axis(weight, 1)
    if inner is not None:
        step.freeze(inner, "position within a group of a grouped convolution; whole groups can go")
    if inputs is None or outer is None:
        return None
    lead = rows[0][:, 0]
    for row in rows:
        step.units.unite(lead[:, None], row)
    made = outer if not transposed else np.repeat(lead, step.shape(step.output)[1] // groups)
    offsets = step.axis(bias, 0) if bias is not None else None
    if offsets is not None:
        step.units.unite(offsets, made)
        step.end(offsets)
    step.field.plays(outer, "write")
    step.contract(x, Block((1,), inputs))
    step.end(outer)
    step.carry([Block((1,), made)])
    step.counts(lead, groups, "groups", search=True)
    return inputs


def batch_norm(step: Step) -> None:
    """(x, weight, bias, running mean, running variance), each unit by itself."""
    _BATCH_NORM(step)
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
    names = _letters(rank)
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


def weight_norm(step: Step) -> None:
    """(v, g, dim) -> g v / |v|, |v|: the length of each slice along `dim` runs over all other axes."""
    v, g = step.arg(0), step.arg(1)
    dim, rank = step.arg(2, "dim", 0), len(step.shape(v))
    _statistic(step, v, [d for d in range(rank) if d != dim % rank])
    equate(step, [v, g], [_letters(rank), _aligned(step, g)], _letters(rank))
    step.carry(step.blocks(g), output=1)


def _statistic(step: Step, x: Ref, dims: Iterable[int]) -> None:
    rank = len(step.shape(x))
    over = {d % rank for d in dims}
    for block in step.blocks(x):
        if set(block.dims) & over:
            step.units.inexact(block.ids, f"{MIXES} ({step.call.where})")


def reduction(exact: bool) -> Rule:
    """sum, mean, amax, ...: (x, dims, keepdim). A sum over units is a contraction; anything else is inexact too."""

    def rule(step: Step) -> None:
        x: Ref = step.arg(0)
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
            if set(block.dims) & over:
                step.contract(x, block)
                if not exact:
                    step.units.inexact(block.ids, f"{MIXES} ({step.call.where})")
            else:
                kept.append(moves.relabel(block, place))
        for index in range(len(step.call.outputs)):
            step.carry(kept, output=index)

    return rule


def spatial(count: int) -> Rule:
    """Pooling, interpolation and padding of the last `count` axes: the others are carried."""

    def rule(step: Step) -> None:
        x: Ref = step.arg(0)
        first = len(step.shape(x)) - count
        kept = [block for block in step.blocks(x) if all(d < first for d in block.dims)]
        for index in range(len(step.call.outputs)):
            step.carry(kept, output=index)

    return rule


def embedding(step: Step) -> None:
    """(weight, indices): the width is carried to the last axis; the vocabulary is looked up, so it is frozen."""
    width = step.axis(step.arg(0), 1)
    if width is not None:
        step.field.plays(width, "write")
        step.carry([Block((len(step.shape(step.output)) - 1,), width)])
        step.counts(width, len(width), "embedding_dim")


def attention(step: Step) -> None:
    """Fused attention (q, k, v): batch, heads, positions, width. The default scale is computed from the width."""
    q, k, v = (step.arg(i) for i in range(3))
    width = [b.ids for ref in (q, k) for b in step.blocks(ref) if b.dims == (3,)]
    if step.call.kwargs.get("scale") is None:
        for ids in width:
            step.freeze(ids, "the default scale of attention is computed from this width")
    names: list[list[Name]] = [["b", "h", "i", "k"], ["b", "h", "j", "k"], ["b", "h", "j", "d"]]
    mask = step.call.kwargs.get("attn_mask")  # what is added to the scores, such as a bias of each head
    if isinstance(mask, Ref):
        scores: list[Name] = ["b", "h", "i", "j"]
        shape = step.shape(mask)
        names.append([name if n > 1 else None for name, n in zip(scores[4 - len(shape) :], shape)])
    equate(step, [q, k, v, mask], names, ["b", "h", "i", "d"])
    heads = step.axis(step.output, 1)
    for output, ref in enumerate(step.call.outputs[1:], 1):  # the log of each head's sum
        if ref is not None and heads is not None and step.shape(ref)[1:2] == heads.shape:
            step.carry([Block((1,), heads)], output)


def constant(step: Step) -> None:
    """zeros, ones, full, empty: units that nothing holds, free to go with whatever they meet."""
    for ref in step.operands:  # new_zeros and its like take a tensor for its dtype and device only
        for block in step.blocks(ref):
            step.end(block.ids)
    blocks = [Block((d,), step.units.fresh(n)) for d, n in enumerate(step.shape(step.output)) if n > 1]
    for block in blocks:
        moves.sizes(step, block)
    step.carry(blocks)


def like(step: Step) -> None:
    """zeros_like and its like: the axes of the model tensor."""
    step.carry(step.blocks(step.arg(0)))


def index(step: Step) -> None:
    """x[..., i, ...] with one tensor of indices: the axis it picks from is frozen, the others are carried."""
    x: Ref = step.arg(0)
    picks: list[Ref | None] = list(step.arg(1))
    used = [d for d, pick in enumerate(picks) if pick is not None]
    if len(used) != 1:
        return
    chosen = picks[used[0]]
    if chosen is not None and step.field.values[chosen.id].dtype == torch.bool:
        return  # what a mask leaves is not known before it is computed
    grown = len(step.shape(chosen)) - 1 if chosen is not None else 0
    blocks = [block for block in step.blocks(x) if used[0] not in block.dims]
    step.carry(moves.relabel(b, {d: d + grown * (d > used[0]) for d in b.dims}) for b in blocks)


ELEMENTWISE = frozenset(
    """
    abs add addcdiv addcmul alias atan2 bitwise_and bitwise_not bitwise_or ceil celu clamp clamp_max clamp_min clone
    contiguous copy cos detach div elu eq erf exp exp2 expm1 fill floor floor_divide fmod ge gelu gt hardshrink
    hardsigmoid hardswish hardtanh isnan le leaky_relu lerp lift_fresh log log10 log1p log2 log_sigmoid_forward
    logical_and logical_not logical_or logit lt masked_fill maximum minimum mish mul nan_to_num ne neg pow prelu_kernel
    reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sgn sigmoid sign silu sin softplus softshrink sqrt
    square sub tan tanh threshold to_copy true_divide trunc where xlogy
    """.split()
)

RULES: Mapping[str, Rule] = MappingProxyType(
    dict.fromkeys(ELEMENTWISE, elementwise)
    # products
    | dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), matmul)
    | {"mv": spec("i k, k -> i"), "addmv": spec("i, i k, k -> i"), "dot": spec("k, k ->")}
    | {"convolution": convolution}
    | dict.fromkeys(
        (
            "scaled_dot_product_flash_attention_for_cpu",
            "scaled_dot_product_flash_attention",
            "scaled_dot_product_efficient_attention",
            "scaled_dot_product_cudnn_attention",
        ),
        attention,
    )
    | {"vdot": spec("k, k ->"), "weight_norm_interface": weight_norm, "cumsum": running}
    # norms
    | dict.fromkeys(
        (
            "native_batch_norm",
            "native_batch_norm_legit",
            "native_batch_norm_legit_no_training",
            "cudnn_batch_norm",
            "miopen_batch_norm",
        ),
        batch_norm,
    )
    | {"native_layer_norm": layer_norm, "native_group_norm": group_norm}
    | dict.fromkeys(("softmax", "log_softmax", "safe_softmax"), along_axis)
    # reductions
    | {"sum": reduction(exact=True)}
    | dict.fromkeys(
        ("mean", "amax", "amin", "var", "std", "var_mean", "linalg_vector_norm", "logsumexp"), reduction(exact=False)
    )
    # pooling, interpolation, padding in space
    | dict.fromkeys(("avg_pool1d", "adaptive_avg_pool1d", "reflection_pad1d", "replication_pad1d"), spatial(1))
    | dict.fromkeys(("upsample_nearest1d", "upsample_linear1d", "max_pool1d_with_indices"), spatial(1))
    | dict.fromkeys(
        (
            "max_pool2d_with_indices",
            "avg_pool2d",
            "adaptive_avg_pool2d",
            "adaptive_max_pool2d",
            "reflection_pad2d",
            "replication_pad2d",
            "upsample_nearest2d",
            "upsample_nearest_exact2d",
            "upsample_bilinear2d",
            "upsample_bicubic2d",
            "upsample_bilinear2d_aa",
            "upsample_bicubic2d_aa",
        ),
        spatial(2),
    )
    | dict.fromkeys(
        (
            "max_pool3d_with_indices",
            "avg_pool3d",
            "adaptive_avg_pool3d",
            "adaptive_max_pool3d",
            "replication_pad3d",
            "upsample_nearest3d",
            "upsample_trilinear3d",
        ),
        spatial(3),
    )
    # moves
    | dict.fromkeys(("view", "unsafe_view", "reshape", "reshape_alias"), moves.view)
    | dict.fromkeys(("permute", "transpose", "t"), moves.permute)
    | {"unsqueeze": moves.unsqueeze, "squeeze": moves.squeeze, "expand": moves.expand}
    | {"slice": moves.slice_axis, "select": moves.select, "unbind": moves.unbind}
    | dict.fromkeys(("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk"), moves.split)
    | {"cat": moves.cat, "stack": moves.stack, "constant_pad_nd": moves.pad, "repeat": moves.repeat}
    | {"flip": moves.flip, "roll": moves.roll}
    | {"pixel_shuffle": moves.pixel_shuffle, "pixel_unshuffle": moves.pixel_unshuffle}
    | dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), moves.channel_shuffle)
    # look-ups and constants
    | {"embedding": embedding, "index": index}
    | dict.fromkeys(
        ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"), constant
    )
    | dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), like)
)
