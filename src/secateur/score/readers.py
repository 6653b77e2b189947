"""What the op at an end takes in, sample by sample, and the weights that it takes it in with.

A reader's output is `weights @ sample`: for a matrix product a sample is a vector of the operand, for a convolution a
patch of the image, so that the sum over the kernel is part of it. Columns are cells (indices along the axes where units
end) x places in the kernel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.graph.nested import tensors_in
from secateur.score.ends import End, Sight

PIECE = 1 << 22
"""Numbers in a piece: memory does not grow with the batch either."""

PRODUCTS = frozenset("mm bmm addmm baddbmm mv addmv dot vdot".split())


def samples_of(end: End, sight: Sight, patches: bool) -> Iterator[Tensor]:
    """The samples (cells, places, n) that a call at an end takes in, in pieces.

    Args:
        patches: a convolution's patches; without, its pixels, which have one place.
    """
    x, dims = sight.operand, end.dims
    if end.op == "mkldnn_rnn_layer" and end.operand == 2:  # read between the steps: what the layer gives at each
        x, dims = sight.result[0], (sight.result[0].ndim - 1,)
    if x.is_complex():
        x = torch.stack([x.real, x.imag])
        dims = tuple(dim + 1 for dim in dims)
    if not x.dtype.is_floating_point or x.dtype.itemsize < 4:
        x = x.float()
    if patches and _is_convolution(end, sight):
        size = max(1, PIECE // max(1, math.prod(sight.args[1].shape[2:]) * x[0].numel()))
        for piece in x.split(size):
            yield _patches(piece, sight)
        return
    others = [d for d in range(x.ndim) if d not in dims]
    cells = math.prod(x.shape[d] for d in dims)
    yield from x.permute(*dims, *others).reshape(cells, 1, -1).split(max(1, PIECE // max(1, cells)), 2)


def weights_of(end: End, sight: Sight, patches: bool) -> Tensor:
    """(outputs, cells, places): what samples are multiplied with; outputs of one channel lie together.

    Of a product with several matrices, the outputs of all, divided by the root of their number; so what follows from
    their squares is the mean over them. Where a unit is read by itself alone (a convolution in groups), zeros: what
    reads it goes with it. A sum reads with ones, and so does any op that is not known here.
    """
    cells = end.units.size
    found = _matrix(end, sight)
    if end.op == "convolution" and end.operand == 0:
        weight = sight.args[1]
        if sight.args[8] > 1:
            found = weight.new_zeros(1, cells, 1)
        elif _is_convolution(end, sight) and patches:
            found = weight.flatten(2)
        else:
            made = weight.movedim(0, 1) if not sight.args[6] else weight  # (inputs, outputs, places)
            found = made.flatten(1).T.unsqueeze(-1)
    if found is None or found.shape[1] != cells:
        share = 1 / cells if end.op == "mean" else 1.0
        return torch.full((1, cells, 1), share, dtype=torch.float64, device=sight.operand.device)
    return found.abs() if found.is_complex() else found


def _is_convolution(end: End, sight: Sight) -> bool:
    """A plain one, that reads patches of its first operand's channels."""
    plain = end.op == "convolution" and end.operand == 0 and end.dims == (1,)
    return plain and not sight.args[6] and sight.args[8] == 1


def _patches(x: Tensor, sight: Sight) -> Tensor:
    """(n, channels, *space) -> (channels, places in the kernel, n x positions), one shift for each place."""
    kernel = sight.args[1].shape[2:]
    stride, padding, dilation = (_each(sight.args[i], len(kernel)) for i in (3, 4, 5))
    x = F.pad(x, [side for pad in reversed(padding) for side in (pad, pad)]).transpose(0, 1)
    length = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation)]
    shifts = []
    for place in itertools.product(*(range(k) for k in kernel)):
        starts = [at * d for at, d in zip(place, dilation)]
        window = [slice(at, at + (n - 1) * s + 1, s) for at, n, s in zip(starts, length, stride)]
        shifts.append(x[(slice(None), slice(None), *window)])
    return torch.stack(shifts, 1).flatten(2)


def _each(value: list[int], count: int) -> list[int]:
    return list(value) * count if len(value) == 1 else list(value)


def _matrix(end: End, sight: Sight) -> Tensor | None:
    """The weights of a product that is no convolution, (outputs, cells, 1), if it is known here."""
    tensors = list(tensors_in((sight.args, sight.kwargs)))
    if end.op in PRODUCTS:
        left = len(tensors) - 2
        if end.operand < left:
            return None
        other = tensors[left + 1 if end.operand == left else left]
        reads = other.mT if end.operand == left and other.ndim > 1 else other
    elif end.op == "grouped_mm" and end.operand == 0:
        reads = tensors[1].mT
    elif end.op == "deform_conv2d" and end.operand == 0:
        reads = tensors[1].movedim(1, 0).flatten(1).T
    elif end.op.startswith("scaled_dot_product") and end.operand == 0:
        scale = sight.kwargs.get("scale") or tensors[0].shape[-1] ** -0.5
        reads = tensors[1] * scale
    elif end.op == "mkldnn_rnn_layer":
        reads = tensors[1] if end.operand == 0 else tensors[2]
    else:
        return None
    several = math.prod(reads.shape[:-2])
    matrix: Tensor = reads.reshape(-1, reads.shape[-1]) / several**0.5
    return matrix.unsqueeze(-1)
