"""Tiny networks of many lanes: in each lane a layer, one op on what it gives, and a layer that reads the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Op = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Lane:
    """`make` gives an op on eight units, `read` is the width that comes out, `sizes` are those of the groups."""

    make: Callable[[], Op]
    read: int = 8
    sizes: tuple[int, ...] = (8,)
    inexact: bool = False


@dataclass(frozen=True)
class Family:
    """Lanes between layers of one kind: `layer(i, o)` makes one, and `inputs` gives what the first ones take."""

    layer: Callable[[int, int], nn.Module]
    inputs: Callable[[], Tensor]
    lanes: Mapping[str, Lane]

    def make(self) -> nn.Module:
        return Lanes({name: Between(self.layer, lane) for name, lane in self.lanes.items()})


class Between(nn.Module):
    """A layer, what is done to its output, and a layer that reads the result."""

    def __init__(self, layer: Callable[[int, int], nn.Module], lane: Lane) -> None:
        super().__init__()
        self.into, self.op, self.out = layer(4, 8), lane.make(), layer(lane.read, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.op(self.into(x)))


class Lanes(nn.ModuleDict):
    """All lanes on one input, as one forward: their calls are told apart by number, as in a long model."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: lane.forward(x) for name, lane in self.items()}


def each(functions: Mapping[str, Op], **kwargs: Any) -> dict[str, Lane]:
    """A lane for each function."""
    return {name: Lane(lambda op=op: op, **kwargs) for name, op in functions.items()}


def noise(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def conv1(i: int, o: int) -> nn.Module:
    return nn.Conv1d(i, o, 3, padding=1)


def conv2(i: int, o: int) -> nn.Module:
    return nn.Conv2d(i, o, 3, padding=1)


def conv3(i: int, o: int) -> nn.Module:
    return nn.Conv3d(i, o, 3, padding=1)
