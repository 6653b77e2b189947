"""Labelled images kept as one uint8 tensor, and the batches that training and evaluation read from it.

Decoded once, a data set the size of CIFAR fits in memory whole. A batch is then four operations on the whole
batch (gather, crop, flip, normalise), never a Python loop over images, so loading stays far below the cost of
a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import DataError, UnknownName

AUGMENTATIONS = ("crop", "flip")


@dataclass(frozen=True, eq=False)
class Images:
    """Images and their class numbers: `pixels` uint8 (n, c, h, w), `labels` int64 (n,).

    >>> images = Images(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6))
    >>> len(images), images.take([4, 1]).labels.tolist()
    (6, [4, 1])
    """

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.dim() != 4:
            found = f"{self.pixels.dtype} {tuple(self.pixels.shape)}"
            raise DataError(f"pixels must be torch.uint8 of shape (n, c, h, w), and these are {found}.")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.pixels.shape[:1]:
            found = f"{self.labels.dtype} {tuple(self.labels.shape)}"
            raise DataError(f"labels must be torch.int64, one for each image, and these are {found}.")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int] | Tensor) -> Images:
        """The images at `indices`, in that order, as a copy."""
        where = torch.as_tensor(indices, dtype=torch.int64, device=self.pixels.device)
        return Images(self.pixels.index_select(0, where), self.labels.index_select(0, where))

    def batches(
        self,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        shuffle: int | None = None,
        augment: Sequence[str] = (),
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over all images: (float32 (b, c, h, w), int64 (b,)), the last batch shorter where n asks
        for it.

        Pixels are scaled to 0..1, then `(x - mean) / std` per channel. `shuffle` is the seed of the order and
        of the augmentation: the same seed gives the same batches bit for bit, and None keeps the images in
        order. Random numbers are drawn on the CPU, so every device sees the same crops.

        `augment` may hold "crop" (zero-pad by an eighth of the side, the usual 4 for 32 pixels, and cut a
        random window of the old size) and "flip" (left to right, with probability one half), as He et al. do
        on CIFAR (Deep Residual Learning, 2016, section 4.2). Both need a seed.

        >>> images = Images(torch.full((5, 1, 8, 8), 255, dtype=torch.uint8), torch.arange(5))
        >>> [(x.shape[0], x.max().item()) for x, y in images.batches(2, mean=[0.5], std=[0.25])]
        [(2, 2.0), (2, 2.0), (1, 2.0)]
        """
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; it must be at least 1.")
        for name in augment:
            if name not in AUGMENTATIONS:
                raise UnknownName("augmentation", name, AUGMENTATIONS)
        if augment and shuffle is None:
            raise DataError(f"augment={tuple(augment)!r} draws random numbers; give their seed as shuffle=.")
        if not len(mean) == len(std) == self.pixels.shape[1]:
            given = f"{len(mean)} and {len(std)} values"
            raise DataError(f"mean and std have {given} and the images {self.pixels.shape[1]} channels.")
        return self._batches(batch_size, mean, std, shuffle, frozenset(augment), device, channels_last)

    def _batches(
        self,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        shuffle: int | None,
        augment: frozenset[str],
        device: torch.device | str,
        channels_last: bool,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(shuffle or 0)
        count, source = len(self), self.pixels.device
        order = None if shuffle is None else torch.randperm(count, generator=generator).to(source)
        for start in range(0, count, batch_size):
            rows = slice(start, min(start + batch_size, count))
            part = Images(self.pixels[rows], self.labels[rows]) if order is None else self.take(order[rows])
            pixels = part.pixels.to(device)
            if "crop" in augment:
                pixels = _random_crop(pixels, generator)
            if "flip" in augment:
                pixels = _random_flip(pixels, generator)
            batch = normalise(pixels, mean, std)
            if channels_last:
                batch = batch.contiguous(memory_format=torch.channels_last)
            yield batch, part.labels.to(device, copy=True)


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`(pixels / 255 - mean) / std` per channel as float32, computed as one multiply and one add.

    >>> pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    >>> normalise(pixels, [0.5, 0.5], [0.5, 0.25]).flatten().tolist()
    [-1.0, 2.0]
    """
    centre = torch.tensor(mean, dtype=torch.float64)
    spread = torch.tensor(std, dtype=torch.float64)
    scale = (1 / (255 * spread)).view(-1, 1, 1).to(pixels.device, torch.float32)
    shift = (-centre / spread).view(-1, 1, 1).to(pixels.device, torch.float32)
    return pixels.to(torch.float32).mul_(scale).add_(shift)


def _random_crop(pixels: Tensor, generator: torch.Generator) -> Tensor:
    n, c, h, w = pixels.shape
    pad_h, pad_w = max(1, h // 8), max(1, w // 8)
    padded = F.pad(pixels, (pad_w, pad_w, pad_h, pad_h))
    tall, wide = padded.shape[2:]
    top = torch.randint(0, 2 * pad_h + 1, (n,), generator=generator)
    left = torch.randint(0, 2 * pad_w + 1, (n,), generator=generator)
    # A crop is rows of w consecutive bytes: copying whole rows is four times as fast as indexing windows.
    image = torch.arange(n) * (c * tall * wide) + top * wide + left
    row = torch.arange(c)[:, None] * (tall * wide) + torch.arange(h) * wide
    starts = (image[:, None] + row.flatten()).flatten().to(pixels.device)
    return padded.flatten().unfold(0, w, 1).index_select(0, starts).view(n, c, h, w)


def _random_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    chosen = (torch.rand(len(pixels), generator=generator) < 0.5).nonzero().flatten().to(pixels.device)
    return pixels.index_copy(0, chosen, pixels.index_select(0, chosen).flip(-1))
