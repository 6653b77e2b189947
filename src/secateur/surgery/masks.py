"""Which single weights stay: `find_masks(model, sparsity)` gives `Masks`, one bit for each weight; `find_zeros` too.

Unstructured pruning by magnitude leaves every shape as it is and sets the smallest weights to zero. The masks
are a record apart from the model: they zero a model in place (`apply_`), hold it at zero during training
(`enforcer`), tell whether it still is (`holds`), and go to a file and back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal, Self

import numpy
import torch
from torch import Tensor, nn

from secateur.allocate.threshold import INTEGERS, Threshold, chunks, global_threshold, keys
from secateur.codec.state import load_state, read_metadata, save_state
from secateur.errors import PlanError, UnknownName
from secateur.measure.latency import torch_threads
from secateur.measure.sparsity import SparsityRow, SparsityTable, find_weights

KIND = "secateur.masks"


@dataclass(frozen=True)
class Mask:
    """One weight tensor: bit i, the highest of each byte first, says whether element i (row-major) stays."""

    name: str
    shape: tuple[int, ...]
    bits: bytes

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def kept(self) -> int:
        return int.from_bytes(self.bits).bit_count()

    def pieces(self, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The pieces of `weight` that `chunks` gives, each with its part of the mask, of the same shape."""
        start = 0
        for piece in chunks(weight):
            yield piece, _unpack(self.bits, start, piece.numel()).view(piece.shape).to(piece.device)
            start += piece.numel()


@dataclass(frozen=True)
class Masks:
    """The masks of some of a model's weight tensors, in the order of the model.

    The bits take 1/32 of the memory of float32 weights.
    """

    masks: tuple[Mask, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(mask.name for mask in self.masks)

    def table(self) -> SparsityTable:
        """What the masks zero, by tensor: a weight that is zero but stays is not counted.

        >>> find_masks(nn.Linear(4, 2), 0.5).table().rows
        (SparsityRow(name='weight', zeros=4, elements=8),)
        """
        return SparsityTable(
            tuple(SparsityRow(mask.name, mask.elements - mask.kept, mask.elements) for mask in self.masks)
        )

    def keep(self, name: str) -> Tensor:
        """The mask of one tensor, of its shape, on the CPU; True is a weight that stays.

        Raises:
            UnknownName: there is no mask of that name.

        >>> layer = nn.Linear(3, 1)
        >>> layer.weight.data = torch.tensor([[1.0, -3.0, 2.0]])
        >>> find_masks(layer, 0.4).keep("weight")
        tensor([[False,  True,  True]])
        """
        for mask in self.masks:
            if mask.name == name:
                return _unpack(mask.bits, 0, mask.elements).view(mask.shape)
        raise UnknownName("mask", name, self.names)

    def apply_(self, model: nn.Module) -> None:
        """Sets the weights that go to zero, in place.

        Raises:
            PlanError: the model lacks a tensor or has another shape there; nothing has been changed.

        >>> layer = nn.Linear(4, 2)
        >>> find_masks(layer, 0.5).apply_(layer)
        >>> int((layer.weight == 0).sum())
        4
        """
        with torch_threads(1):
            for mask, weight in self._pairs(model):
                for piece, keep in mask.pieces(weight):
                    _zero(piece, keep)

    def holds(self, model: nn.Module) -> bool:
        """Whether all weights that go are exactly zero.

        Raises:
            PlanError: as `apply_`.

        >>> layer = nn.Linear(4, 2)
        >>> masks = find_masks(layer, 0.5)
        >>> before = masks.holds(layer)
        >>> masks.apply_(layer)
        >>> before, masks.holds(layer)
        (False, True)
        """
        return all(
            not bool(piece[~keep].any())
            for mask, weight in self._pairs(model)
            for piece, keep in mask.pieces(weight)
        )

    def enforcer(self, model: nn.Module) -> Callable[[], None]:
        """A function that zeroes the weights that go, to be called after each optimizer step.

        It holds one byte for each weight as long as it lives, a quarter of the memory of float32 weights, on
        the devices where the weights are now: ask for a new one after moving the model.

        Raises:
            PlanError: as `apply_`.

        >>> layer = nn.Linear(4, 2)
        >>> enforce = find_masks(layer, 0.5).enforcer(layer)
        >>> _ = nn.init.ones_(layer.weight)  # an optimizer step
        >>> enforce()
        >>> int((layer.weight == 1).sum())
        4
        """
        pairs = [(weight, [keep for _, keep in mask.pieces(weight)]) for mask, weight in self._pairs(model)]

        def enforce() -> None:
            for weight, keeps in pairs:
                for piece, keep in zip(chunks(weight), keeps):
                    _zero(piece, keep)

        return enforce

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the masks to a safetensors file, whole or not at all.

        Raises:
            RunError: the folder is missing or may not be written, or the disk is full.

        >>> masks = find_masks(nn.Linear(4, 2), 0.5)
        >>> masks.save("masks.safetensors")
        >>> Masks.load("masks.safetensors") == masks
        True
        >>> os.remove("masks.safetensors")
        """
        bits = {
            mask.name: torch.from_numpy(numpy.frombuffer(mask.bits, numpy.uint8).copy())
            for mask in self.masks
        }
        shapes = {mask.name: mask.shape for mask in self.masks}
        save_state(path, bits, {KIND: json.dumps(shapes)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The masks that `save` wrote.

        Raises:
            RunError: no such file, or one that was cut off or damaged.
            PlanError: a safetensors file of something else.
        """
        text = read_metadata(path).get(KIND)
        if text is None:
            raise PlanError(f"{path} holds no masks; give a file that Masks.save wrote.")
        bits = load_state(path)
        shapes: dict[str, list[int]] = json.loads(text)
        for name, shape in shapes.items():
            if name not in bits or bits[name].numel() != -(-prod(shape) // 8):
                raise PlanError(f"{path} lacks the bits of mask {name!r}, shape {shape}; save it again.")
        return cls(
            tuple(Mask(name, tuple(shape), bits[name].numpy().tobytes()) for name, shape in shapes.items())
        )

    def _pairs(self, model: nn.Module) -> list[tuple[Mask, Tensor]]:
        """Each mask with its weight tensor, once all are known to fit."""
        weights = dict(model.named_parameters())
        for mask in self.masks:
            if mask.name not in weights:
                raise PlanError(f"the masks belong to another model: this one has no tensor {mask.name!r}.")
            if weights[mask.name].shape != mask.shape:
                raise PlanError(
                    f"the masks belong to another model: the mask of {mask.name!r} has shape {mask.shape}, "
                    f"the tensor {tuple(weights[mask.name].shape)}."
                )
        return [(mask, weights[mask.name]) for mask in self.masks]


def find_masks(
    model: nn.Module,
    sparsity: float,
    *,
    scope: Literal["global", "layer"] = "global",
    names: str | Iterable[str] | None = None,
) -> Masks:
    """Masks that drop the weights of smallest magnitude; the model is not touched.

    Exactly `round(sparsity * elements)` weights go, those that
    `torch.nn.utils.prune.global_unstructured(..., L1Unstructured, amount=sparsity)` drops, save that among
    equal magnitudes the first go. Han et al. 2015 (arXiv:1506.02626) is the source of the method.

    Args:
        model: any module.
        sparsity: the share of weights that go, 0 up to but not including 1.
        scope: "global" ranks the weights of all tensors together; "layer" takes the same share from each.
        names: which tensors, as `secateur.measure.sparsity.find_weights` reads them; all if left out.

    Raises:
        PlanError: a sparsity outside [0, 1), a NaN among the weights, or no weights at all.
        UnknownName: a name or pattern that fits no tensor, or another scope.

    >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    >>> find_masks(model, 0.9).table().zeros, find_masks(model, 0.9, scope="layer").table()["1.weight"].zeros
    (36, 7)
    """
    if not 0 <= sparsity < 1:
        raise PlanError(f"sparsity {sparsity} is out of range: the share of weights to prune is in [0, 1).")
    if scope not in ("global", "layer"):
        raise UnknownName("scope", scope, ["global", "layer"])
    weights = find_weights(model, names)
    if not weights:
        raise PlanError("the model has no convolution or linear layer to prune; name its weight tensors.")
    together = [weights] if scope == "global" else [{name: weight} for name, weight in weights.items()]
    found: list[Mask] = []
    with torch_threads(1):
        for group in together:
            count = round(sparsity * sum(weight.numel() for weight in group.values()))
            threshold = global_threshold(list(group.values()), count, names=list(group))
            found.extend(_cut(group.items(), threshold))
    return Masks(tuple(found))


def find_zeros(model: nn.Module, *, names: str | Iterable[str] | None = None) -> Masks:
    """Masks that hold the weights that are zero by now, as those of a model that was made sparse elsewhere.

    Args:
        model: any module.
        names: which tensors, as `find_masks` reads them; all if left out.

    Raises:
        PlanError: no weights at all. UnknownName: a name or pattern that fits no tensor.

    >>> layer = nn.Linear(3, 1)
    >>> layer.weight.data = torch.tensor([[0.5, 0.0, -1.0]])
    >>> find_zeros(layer).keep("weight")
    tensor([[ True, False,  True]])
    """
    weights = find_weights(model, names)
    if not weights:
        raise PlanError("the model has no convolution or linear layer; name its weight tensors.")
    return Masks(
        tuple(
            Mask(name, tuple(weight.shape), numpy.packbits((weight.detach() != 0).cpu().numpy()).tobytes())
            for name, weight in weights.items()
        )
    )


def _cut(weights: Iterable[tuple[str, Tensor]], threshold: Threshold) -> Iterator[Mask]:
    """A mask for each tensor: all below the threshold go, and of its ties the first, to the exact count."""
    limit, ties = threshold.key, threshold.count - threshold.below
    for name, weight in weights:
        packed = []
        for piece in chunks(weight):
            magnitudes = keys(piece, threshold.dtype).reshape(-1)
            keep = magnitudes >= limit
            if ties:
                first = (magnitudes == limit).nonzero()[:ties, 0]
                keep[first] = False
                ties -= len(first)
            packed.append(numpy.packbits(keep.cpu().numpy()).tobytes())
        yield Mask(name, tuple(weight.shape), b"".join(packed))


def _unpack(bits: bytes, start: int, count: int) -> Tensor:
    """`count` elements from element `start`, a multiple of 8, flat."""
    part = numpy.frombuffer(bits, numpy.uint8, count=-(-count // 8), offset=start // 8)
    return torch.from_numpy(numpy.unpackbits(part, count=count)).view(torch.bool)


def _zero(piece: Tensor, keep: Tensor) -> None:
    # On the bits, for a float product leaves -0.0, and NaN where the weight was not finite.
    piece.view(INTEGERS[piece.dtype]).mul_(keep)
