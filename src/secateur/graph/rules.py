"""The table of ops: what each does with axes, most of them in one line.

To add an op: put its ATen name (without overload and trailing underscore) into the table, with a spec as
`axes.spec` reads it, or a function of a `Step`. An op that is missing here is safe: the axes it touches are frozen
with its name as the reason, and all else stays prunable.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from secateur.graph import lookups, moves, products, statistics, views
from secateur.graph.axes import Block, Rule, Step, aligned, equate, letters, spec
from secateur.graph.capture import Call, Ref, op_name


def rule_for(call: Call) -> Rule | None:
    """The rule of an op; None if there is none, or if the op makes no tensor."""
    return RULES.get(op_name(call))


def elementwise(step: Step) -> None:
    """Any number of tensors, broadcast: axes are aligned at the right; those of size 1 meet nothing."""
    rank = len(step.shape(step.output))
    equate(step, step.operands, [aligned(step, ref) for ref in step.operands], letters(rank))
    for ref in step.operands:  # a norm that is written out, or that torch takes apart, as `nn.RMSNorm`
        if ref.id in step.field.static:
            for block in step.blocks(ref):
                step.counts(block.ids, step.shape(ref), "normalized_shape", position=block.dims[0])


def spatial(count: int) -> Rule:
    """Pooling, interpolation and padding of the last `count` axes: the others are carried."""

    def rule(step: Step) -> None:
        x: Ref = step.arg(0)
        first = len(step.shape(x)) - count
        kept = [block for block in step.blocks(x) if all(d < first for d in block.dims)]
        for index in range(len(step.call.outputs)):
            step.carry(kept, output=index)

    return rule


def constant(step: Step) -> None:
    """zeros, ones, full, empty: units that nothing holds, free to go with whatever they meet."""
    for ref in step.operands:  # new_zeros and its like take a tensor for its dtype and device only
        for block in step.blocks(ref):
            step.end(block.ids)
    blocks = [Block((d,), step.units.fresh(n)) for d, n in enumerate(step.shape(step.output)) if n > 1]
    for block in blocks:
        views.sizes(step, block)
    step.carry(blocks)


def like(step: Step) -> None:
    """zeros_like and its like: the axes of the model tensor, on every output that has its shape."""
    x: Ref = step.arg(0)
    for output, ref in enumerate(step.call.outputs):
        if ref is not None and step.shape(ref) == step.shape(x):
            step.carry(step.blocks(x), output)


def fractional(step: Step) -> None:
    """fractional_max_pool2d: (x, kernel, size, samples for each channel)."""
    x, samples = step.arg(0), step.arg(3)
    channels, drawn = step.axis(x, -3), step.axis(samples, 1)
    if channels is not None and drawn is not None:
        step.units.unite(channels, drawn)
        step.end(drawn)
    for block in step.blocks(samples):
        if block.dims != (1,):
            step.end(block.ids)
    spatial(2)(step)


ELEMENTWISE = frozenset(
    """
    abs add addcdiv addcmul alias atan2 bitwise_and bitwise_not bitwise_or ceil celu clamp clamp_max clamp_min clone
    contiguous copy cos detach div elu eq erf exp exp2 expm1 fill floor floor_divide fmod ge gelu gt hardshrink
    hardsigmoid hardswish hardtanh isnan le leaky_relu lerp log log10 log1p log2
    logical_and logical_not logical_or logit lt masked_fill maximum minimum mish mul nan_to_num ne neg pow prelu_kernel
    reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sgn sigmoid sign silu sin softplus softshrink sqrt
    square sub tan tanh threshold to_copy true_divide trunc where xlogy
    """.split()
)

_ATTENTION = """
    scaled_dot_product_flash_attention_for_cpu scaled_dot_product_flash_attention
    scaled_dot_product_efficient_attention scaled_dot_product_cudnn_attention
    scaled_dot_product_fused_attention_overrideable
"""
_BATCH_NORM = """
    native_batch_norm native_batch_norm_legit native_batch_norm_legit_no_training batch_norm_with_update
    batch_norm_no_update cudnn_batch_norm miopen_batch_norm
"""
_SPATIAL = MappingProxyType(
    {
        1: """
            avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d max_pool1d_with_indices reflection_pad1d
            replication_pad1d upsample_nearest1d upsample_nearest_exact1d upsample_linear1d
        """,
        2: """
            avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices
            reflection_pad2d replication_pad2d upsample_nearest2d upsample_nearest_exact2d upsample_bilinear2d
            upsample_bicubic2d upsample_bilinear2d_aa upsample_bicubic2d_aa
        """,
        3: """
            avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d max_pool3d_with_indices reflection_pad3d
            replication_pad3d upsample_nearest3d upsample_nearest_exact3d upsample_trilinear3d
        """,
    }
)


def _each(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: Mapping[str, Rule] = MappingProxyType(
    dict.fromkeys(ELEMENTWISE, elementwise)
    # products
    | _each("mm bmm addmm baddbmm", products.matmul)
    | {"mv": spec("i k, k -> i"), "addmv": spec("i, i k, k -> i"), "dot": spec("k, k ->"), "vdot": spec("k, k ->")}
    | {"grouped_mm": spec("s k, e k n -> s n")}
    | {"convolution": products.convolution, "deform_conv2d": products.deformed_convolution}
    | {"mkldnn_rnn_layer": products.recurrent}
    | _each(_ATTENTION, products.attention)
    # statistics
    | _each(_BATCH_NORM, statistics.batch_norm)
    | {"native_layer_norm": statistics.layer_norm, "native_group_norm": statistics.group_norm}
    | {"weight_norm_interface": statistics.weight_norm}
    | _each("softmax log_softmax safe_softmax", statistics.along_axis)
    | _each("cumsum cumprod logcumsumexp", statistics.running)
    | {"sum": statistics.reduction(exact=True)}
    | _each("mean amax amin var std var_mean linalg_vector_norm logsumexp", statistics.reduction(exact=False))
    | _each("max min argmax argmin prod any all median", statistics.reduction(exact=False))
    # pooling, interpolation, padding in space
    | {name: spatial(count) for count, names in _SPATIAL.items() for name in names.split()}
    | _each("roi_align roi_pool", lookups.sampled)
    | _each("grid_sampler_2d grid_sampler_3d", spec("n c ..., n ... -> n c ..."))
    | {"fractional_max_pool2d": fractional}
    # moves
    | _each("view unsafe_view reshape reshape_alias", views.view)
    | {"expand": views.expand, "repeat": views.repeat, "as_strided": views.restride}
    | _each("permute transpose t", moves.permute)
    | {"unsqueeze": moves.unsqueeze, "squeeze": moves.squeeze}
    | {"slice": moves.slice_axis, "select": moves.select, "unbind": moves.unbind}
    | _each("split split_with_sizes chunk unsafe_split unsafe_chunk", moves.split)
    | {"cat": moves.cat, "stack": moves.stack, "constant_pad_nd": moves.pad}
    | {"flip": moves.flip, "roll": moves.roll, "unfold": moves.windows}
    | {"pixel_shuffle": moves.pixel_shuffle, "pixel_unshuffle": moves.pixel_unshuffle}
    | _each("channel_shuffle native_channel_shuffle", moves.channel_shuffle)
    | {"glu": moves.glu}
    | _each("im2col col2im", moves.columns)
    | _each("fft_r2c fft_c2c fft_c2r", statistics.transform)
    | _each("view_as_real view_as_complex", views.complex_parts)
    # look-ups and constants
    | {"embedding": lookups.embedding, "index_select": lookups.index_select}
    | {"index": lookups.index, "index_put": lookups.index_put, "masked_scatter": lookups.masked_scatter}
    | _each("gather scatter scatter_add", lookups.gather)
    | _each("index_add index_copy index_reduce", lookups.index_add)
    | _each("topk kthvalue sort argsort", lookups.ranked)
    | _each("tril triu", lookups.triangle)
    | _each("zeros ones full empty rand randn new_zeros new_ones new_full new_empty", constant)
    | _each("zeros_like ones_like full_like empty_like rand_like randn_like", like)
    | _each("bernoulli uniform normal exponential", like)
    | _each("native_dropout rrelu_with_noise log_sigmoid_forward", like)
)
