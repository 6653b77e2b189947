"""What a layer takes in and gives, as rows of numbers, and its weights as the matrix between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.recover.layers import Layer

PIECE = 1 << 22
"""Numbers in a piece."""


def inputs(operand: int, args: Sequence[Any], places: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """The input of a call in pieces (groups, rows, columns), and which of the `places` they are.

    A row is an output position, counted with the batch as the outermost axis; its columns are the channels, and for a
    convolution channels x places in the kernel, in the weight's order.

    Args:
        operand: which of the arguments the input is.
        args: of the call.
        places: (rows,) the positions that are wanted.
    """
    x = args[operand].detach()
    x = x.float() if x.dtype.itemsize < 4 else x
    if len(args) < 9:
        for at in _pieces(len(places), x.shape[-1]):
            yield x[places[at]].unsqueeze(0), at
        return
    weight, groups = args[1], args[8]
    kernel = weight.shape[2:]
    stride, padding, dilation = (_each(args[i], len(kernel)) for i in (3, 4, 5))
    x = F.pad(x, [side for pad in reversed(padding) for side in (pad, pad)]).movedim(1, -1)
    space = x.shape[1:-1]
    length = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(space, kernel, stride, dilation)]
    steps = [math.prod(space[i + 1 :]) for i in range(len(space))]
    starts, rest = torch.zeros_like(places), places
    for count, jump, step in reversed(list(zip(length, stride, steps))):
        starts, rest = starts + rest % count * (jump * step), rest // count
    starts = starts + rest * math.prod(space)
    offsets = [
        sum(at * d * step for at, d, step in zip(place, dilation, steps))
        for place in itertools.product(*(range(k) for k in kernel))
    ]
    shifts, flat = torch.tensor(offsets, device=x.device), x.reshape(-1, x.shape[-1])
    for at in _pieces(len(places), len(offsets) * flat.shape[1]):
        rows = flat[starts[at, None] + shifts]  # (rows, places in the kernel, channels)
        yield rows.unflatten(2, (groups, -1)).permute(2, 0, 3, 1).flatten(2), at


def outputs(y: Tensor, axes: int, kept: Tensor | None) -> Tensor:
    """What a layer gives, or a value of its shape, as (rows, outputs).

    Args:
        axes: how many the layer's weight has: of a convolution, three or more.
        kept: the outputs that are wanted; None for all.
    """
    channels = 1 if axes > 2 else -1
    if kept is not None:
        y = y.index_select(channels, kept.to(y.device))
    y = y.detach().movedim(channels, -1)
    return y.reshape(-1, y.shape[-1])


def places(count: int, rows: int, positions: int | None, random: torch.Generator) -> Tensor | None:
    """Positions of each image, drawn at random without repetition: (images x positions,); None for all.

    Args:
        count: of images; where it does not divide the rows, all are taken.
    """
    each, rest = divmod(rows, max(count, 1))
    if positions is None or rest or each <= positions:
        return None
    drawn = torch.rand(count, each, generator=random).topk(positions, 1).indices.sort(1).values
    return (drawn + torch.arange(count).unsqueeze(1) * each).flatten()


def matrix(layer: Layer, weight: Tensor, groups: int) -> Tensor:
    """A weight as (groups, outputs, columns), in float64 on the CPU."""
    flat = weight.detach().double().cpu()
    flat = flat.T if layer.turned else flat.flatten(1)
    grouped: Tensor = flat.unflatten(0, (groups, -1))
    return grouped


def shaped(layer: Layer, found: Tensor, weight: Tensor) -> Tensor:
    """The weight that a matrix is."""
    flat = found.flatten(0, 1)
    return (flat.T if layer.turned else flat).reshape(weight.shape)


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, PIECE // max(1, columns))
    yield from (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _each(value: Sequence[int], count: int) -> list[int]:
    return list(value) * count if len(value) == 1 else list(value)
