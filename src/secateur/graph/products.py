"""Rules of the ops that multiply and sum: products, convolutions, attention."""

from __future__ import annotations

import numpy as np

from secateur.graph.axes import Block, Name, Step, aligned, equate, letters
from secateur.graph.capture import Ref
from secateur.graph.units import Ids

KERNEL = "a position in a kernel"


def matmul(step: Step) -> None:
    """mm, bmm, addmm, baddbmm, addmv: ([bias,] a, b), the last axis of a against the one before the last of b."""
    *bias, a, b = step.operands[:3]
    rank = len(step.shape(step.output))
    batch: list[Name] = [f"d{i}" for i in range(rank - 2)]
    last: Name = f"d{rank - 1}"
    rows: list[list[Name]] = [aligned(step, ref) for ref in bias]
    equate(step, [*bias, a, b], [*rows, [*batch, f"d{rank - 2}", "k"], [*batch, "k", last]], letters(rank))
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
    _close_convolution(step, x, weight, inputs)


def _close_convolution(step: Step, x: Ref, weight: Ref, inputs: Ids | None) -> None:
    """The counts of channels, and the positions in the kernel, which stay."""
    step.counts(inputs, step.shape(x)[1], "in_channels")
    step.counts(step.axis(step.output, 1), step.shape(step.output)[1], "out_channels")
    for kernel in step.blocks(weight):
        if kernel.dims[0] > 1:
            step.units.freeze(kernel.ids, KERNEL)
            step.end(kernel.ids)


def deformed_convolution(step: Step) -> None:
    """torchvision's (x, weight, offset, mask, bias, ...): a convolution that samples at places of its own."""
    x, weight, bias = step.arg(0), step.arg(1), step.arg(4)
    if step.shape(weight)[1] != step.shape(x)[1]:
        return  # in groups
    spatial: list[Name] = [None, None]
    equate(step, [x, weight, bias], [["n", "i", *spatial], ["o", "i", *spatial], ["o"]], ["n", "o", *spatial])
    _close_convolution(step, x, weight, step.axis(x, 1))


def recurrent(step: Step) -> None:
    """One layer of an LSTM, (x, to gates, between gates, two biases, hidden, cell, ...): four gates of each unit."""
    x, to_gates, between = (step.arg(i) for i in range(3))
    biases = [step.arg(i) for i in (3, 4)]
    rows, across = step.axis(to_gates, 0), step.axis(between, 1)
    if rows is None or across is None or len(rows) != 4 * len(across):
        return  # an LSTM with a projection
    equate(step, [x, to_gates], [[None, None, "i"], [None, "i"]], [None] * len(step.shape(step.output)))
    gates = [rows, step.axis(between, 0), *(step.axis(bias, 0) for bias in biases if bias is not None)]
    for axis in (axis for axis in gates if axis is not None):
        step.units.unite(across[None, :], axis.reshape(4, -1))
        step.end(axis)
    for state in (step.arg(5), step.arg(6)):
        ids = step.axis(state, -1)
        if ids is not None:
            step.units.unite(across, ids)
            step.end(ids)
    step.end(across)
    step.field.plays(rows, "write")
    step.contract(between, Block((1,), across))
    for output, ref in enumerate(step.call.outputs[:3]):
        if ref is not None:
            step.carry([Block((len(step.shape(ref)) - 1,), across)], output=output)
    step.counts(across, len(across), "hidden_size")
    step.counts(step.axis(x, -1), step.shape(x)[-1], "input_size")


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


def attention(step: Step) -> None:
    """Fused attention (q, k, v): batch, heads, positions, width; the default scale, from the width, is replayed."""
    q, k, v = (step.arg(i) for i in range(3))
    if step.shape(q)[1] != step.shape(k)[1]:
        _grouped_queries(step, q, k, v)
    else:
        _queries(step, q, k, v)
    heads = step.axis(step.output, 1)
    for output, ref in enumerate(step.call.outputs[1:], 1):  # the log of each head's sum
        if ref is not None and heads is not None and step.shape(ref)[1:2] == heads.shape:
            step.carry([Block((1,), heads)], output)


def _queries(step: Step, q: Ref, k: Ref, v: Ref) -> None:
    """As many heads of the keys and values as of the queries; the width of q and k is summed over."""
    names: list[list[Name]] = [["b", "h", "i", "k"], ["b", "h", "j", "k"], ["b", "h", "j", "d"]]
    mask = step.arg(3, "attn_mask")  # added to the scores, such as a bias of each head; no tensor where there is none
    if isinstance(mask, Ref):
        scores: list[Name] = ["b", "h", "i", "j"]
        shape = step.shape(mask)
        names.append([name if n > 1 else None for name, n in zip(scores[4 - len(shape) :], shape)])
    equate(step, [q, k, v, mask], names, ["b", "h", "i", "d"])


def _grouped_queries(step: Step, q: Ref, k: Ref, v: Ref) -> None:
    """Each head of the keys and values serves several of the queries, side by side: they go together."""
    width: list[list[Name]] = [["b", None, "i", "k"], ["b", None, "j", "k"], ["b", None, "j", "d"]]
    equate(step, [q, k, v], width, ["b", None, "i", "d"])
    many, *few = (step.axis(ref, 1) for ref in (q, k, v))
    for heads in few:
        if many is None or heads is None:
            return
        step.units.unite(np.repeat(heads, len(many) // len(heads)), many)
        step.end(heads)
    if many is not None:
        step.carry([*step.blocks(step.output), Block((1,), many)])
