"""Replicated features: a small map enlarged by repeating its pixels, then flattened and read by a linear layer.

An adaptive average pool to a map that is a whole multiple of its input repeats each pixel, since each window is one
pixel: torchvision's VGG16 makes 7 x 7 of 1 x 1 for images of 32 x 32, so its classifier reads 49 copies of each
feature. Nearest upsampling does the same. Without the repetition, and with the columns of the copies summed,
sum(w_i x) = (sum w_i) x: the same output from 1/49 of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.graph.axes import refs_in
from secateur.graph.capture import Call, Ref, op_name
from secateur.graph.rules import ELEMENTWISE
from secateur.surgery.wiring import Wiring, is_random

POOLS = frozenset(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"))
NEAREST = frozenset(("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"))
FLATTENS = frozenset(("view", "unsafe_view", "reshape"))
SAME = frozenset((*ELEMENTWISE, "clone", "squeeze", "unsqueeze"))
"""Ops after which equal numbers are equal still, and in the same order."""


Attribute = int | tuple[int, ...]


@dataclass(frozen=True)
class Replica:
    """A map that module `pool` repeats, from `small` to `large`, read by the linear layer `reader`.

    `attributes`: module -> attribute -> value without the repetition.
    """

    pool: str
    reader: str
    weight: str
    channels: int
    small: tuple[int, ...]
    large: tuple[int, ...]
    attributes: Mapping[str, Mapping[str, Attribute]]


def find_replicas(wiring: Wiring, model: nn.Module) -> tuple[tuple[Replica, ...], tuple[tuple[str, str], ...]]:
    """The repeated maps that can be folded, and (where, why not) for the others that are read by a linear layer."""
    out: list[Replica] = []
    left: list[tuple[str, str]] = []
    for call in wiring.trace.calls:
        sizes = _enlarged(wiring, call)
        reader = _reader(wiring, call) if sizes is not None else None
        if sizes is None or reader is None:
            continue
        attributes = _attributes(wiring, model, call, reader, *sizes)
        if isinstance(attributes, str):
            left.append((call.module or call.where, attributes))
            continue
        weight = wiring.name(reader.args[-1])
        channels = wiring.trace.values[call.args[0].id].shape[1]
        out.append(Replica(call.module, reader.module, weight, channels, *sizes, attributes))
    return tuple(out), tuple(left)


def folded(replica: Replica, weight: Tensor) -> Tensor:
    """The linear layer's weight (outputs, channels * large) with the copies' columns summed."""
    split = [n for small, large in zip(replica.small, replica.large) for n in (small, large // small)]
    whole = weight.reshape(len(weight), replica.channels, *split)
    copies = tuple(range(3, whole.ndim, 2))
    return whole.sum(copies).reshape(len(weight), -1)


def _enlarged(wiring: Wiring, call: Call) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(map, repeated map), if the call repeats each pixel of its input the same number of times."""
    name = op_name(call)
    if name not in POOLS | NEAREST:
        return None
    x, made = call.args[0], call.outputs[0]
    small, large = (wiring.trace.values[ref.id].shape[2:] for ref in (x, made) if ref is not None)
    whole = len(wiring.trace.values[x.id].shape) == int(name[-2]) + 2
    multiple = whole and all(big % little == 0 for little, big in zip(small, large))
    return (small, large) if multiple and small != large else None


def _reader(wiring: Wiring, call: Call) -> Call | None:
    """The linear layer that alone reads the call's output, flattened; None if anything else happens to it."""
    value = call.outputs[0]
    assert value is not None
    shape, flat = wiring.trace.values[value.id].shape, False
    while (reader := wiring.only_reader(value)) is not None:
        made = reader.outputs[0]
        if made is None or is_random(reader):
            return None
        if op_name(reader) in ("addmm", "mm"):
            return reader if flat and reader.args[-2] == value else None
        after = wiring.trace.values[made.id].shape
        if op_name(reader) in FLATTENS:
            if after != (shape[0], math.prod(shape[1:])):
                return None
            flat = True
        elif op_name(reader) not in SAME or len(list(refs_in(reader.args))) != 1:
            return None
        value = made
    return None


def _attributes(
    wiring: Wiring, model: nn.Module, call: Call, reader: Call, small: tuple[int, ...], large: tuple[int, ...]
) -> dict[str, dict[str, Attribute]] | str:
    """What the two modules are told; or why they cannot be."""
    calls = [op_name(other) for other in wiring.trace.calls if other.module == call.module]
    pool, linear = model.get_submodule(call.module), model.get_submodule(reader.module)
    if not isinstance(linear, nn.Linear) or not _own(wiring, reader, linear, model):
        return "its map is repeated, but the weight that reads it is not one linear layer's own"
    features: dict[str, Attribute] = {"in_features": linear.in_features // math.prod(large) * math.prod(small)}
    if calls.count(op_name(call)) > 1:
        return "its map is repeated, but the module is called more than once"
    if isinstance(pool, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d):
        # torch pools a length as a map of 1 x length
        size: Attribute = small[-1] if isinstance(pool, nn.AdaptiveAvgPool1d) else tuple(small)
        return {call.module: {"output_size": size}, reader.module: features}
    if isinstance(pool, nn.Upsample) and pool.mode == "nearest":
        told: dict[str, Attribute] = {"scale_factor": 1} if pool.size is None else {"size": tuple(small)}
        return {call.module: told, reader.module: features}
    return "its map is repeated by a function, not by a module that could be told not to"


def _own(wiring: Wiring, reader: Call, linear: nn.Linear, model: nn.Module) -> bool:
    weight = reader.args[-1]
    name = wiring.name(weight) if isinstance(weight, Ref) else ""
    held = dict(model.named_parameters()).get(name)
    return held is not None and held is linear.weight and wiring.read_once(weight)
