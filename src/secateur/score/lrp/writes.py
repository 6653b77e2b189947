"""Tensors that were written to by way of another: a slice of them, or what they are a view of.

On the tape such a tensor becomes a new value by an `alias` of the old one, and a `Rewrite` says what else is in it.
Relevance of a place goes to the last that wrote there, and what nobody wrote goes to the old value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.graph.capture import Ref


@dataclass(frozen=True)
class Region:
    """Where in its memory a tensor lies."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Region:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), tensor.dtype)

    @property
    def end(self) -> int:
        return self.offset + 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride) if n)

    def on(self, memory: Tensor) -> Tensor:
        return memory.as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class Rewrite:
    """A tensor in `region`, and what was written into its memory since, in order: the values, and where."""

    region: Region
    writes: tuple[tuple[Ref, Region], ...]

    def shares(self, relevance: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The relevance of the old value, and of what was written.

        >>> whole, right = Region((2, 2), (2, 1), 0, torch.float32), Region((2, 1), (2, 1), 1, torch.float32)
        >>> Rewrite(whole, ((Ref(0), right),)).shares(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        (tensor([[1., 0.],
                [3., 0.]]), [tensor([[2.],
                [4.]])])
        """
        memory = relevance.new_zeros(max(region.end for _, region in [(None, self.region), *self.writes]))
        self.region.on(memory).copy_(relevance)
        parts = []
        for _, region in reversed(self.writes):
            parts.append(region.on(memory).clone())
            region.on(memory).zero_()
        return self.region.on(memory).clone(), parts[::-1]

    @property
    def plain(self) -> bool:
        """Whether every place of the memory is one of the tensor's, and read as one kind of number."""
        repeats = any(n > 1 and step == 0 for n, step in zip(self.region.size, self.region.stride))
        return not repeats and all(region.dtype == self.region.dtype for _, region in self.writes)
