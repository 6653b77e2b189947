"""Images mixed with one another, labels likewise: mixup, cutmix, and any function like these.

A mix gives the images, each with a part of another one in it, and says which other and how large its own share is; the
loss on the labels is shared out likewise. What it draws comes from torch's generator on the CPU, whose state is in the
checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from secateur.errors import TrainingError


@dataclass(frozen=True, eq=False)
class Mixed:
    """`images` (n, ...), each `share` its own and the rest of image number `other` (n,) of the batch.

    >>> Mixed(torch.zeros(2, 3), torch.tensor([1, 0]), 0.25).main(torch.tensor([7, 8]))
    tensor([8, 7])
    """

    images: Tensor
    other: Tensor
    share: float

    def main(self, labels: Tensor) -> Tensor:
        """The label with the larger share in each image."""
        return labels if self.share >= 0.5 else labels[self.other]


Mix = Callable[[Tensor], Mixed]
"""Images (n, channels, height, width) -> `Mixed`; draws from torch's generator on the CPU alone."""


@dataclass(frozen=True)
class Mixup:
    """x = s x_i + (1 - s) x_j with s from Beta(alpha, alpha), one for each batch (Zhang et al. 2018, mixup, eq. 1).

    Args:
        alpha: above 0; the paper's is 0.1 to 0.4 on ImageNet and 1 on CIFAR.

    Raises:
        TrainingError: an alpha that is not above 0.

    >>> _ = torch.manual_seed(0)
    >>> mixed = Mixup(1.0)(torch.tensor([[0.0], [1.0]]))
    >>> torch.equal(mixed.images[0], torch.tensor([0.0 if mixed.other[0] == 0 else 1 - mixed.share]))
    True
    """

    alpha: float

    def __post_init__(self) -> None:
        _check(self.alpha, "mixup")

    def __call__(self, images: Tensor) -> Mixed:
        """Mixes a batch."""
        share, other = _share(self.alpha), _other(images)
        return Mixed(torch.lerp(images[other], images, share), other, share)


@dataclass(frozen=True)
class CutMix:
    """A box of another image in the place of one's own (Yun et al. 2019, CutMix, section 3.1).

    Its sides are sqrt(1 - s) of the image's with s from Beta(alpha, alpha), its centre is anywhere, and what lies
    outside of the image is cut off; the share is that of the pixels which are an image's own in the end.

    Args:
        alpha: above 0; the paper's is 1.

    Raises:
        TrainingError: an alpha that is not above 0.

    >>> _ = torch.manual_seed(0)
    >>> mixed = CutMix(1.0)(torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 8, 8))
    >>> mixed.share == float((mixed.images[0] == 0).float().mean()) or mixed.other[0].item() == 0
    True
    """

    alpha: float

    def __post_init__(self) -> None:
        _check(self.alpha, "cutmix")

    def __call__(self, images: Tensor) -> Mixed:
        """Mixes a batch."""
        side, other = sqrt(1 - _share(self.alpha)), _other(images)
        spans = [_span(size, side) for size in images.shape[-2:]]
        (top, bottom), (left, right) = spans
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images[other, ..., top:bottom, left:right]
        gone = (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
        return Mixed(mixed, other, 1 - gone)


@dataclass(frozen=True)
class OneOf:
    """One of several mixes for each batch, each as likely as the others.

    >>> _ = torch.manual_seed(0)
    >>> OneOf((Mixup(0.2), CutMix(1.0)))(torch.zeros(4, 3, 8, 8)).images.shape
    torch.Size([4, 3, 8, 8])
    """

    mixes: tuple[Mix, ...]

    def __call__(self, images: Tensor) -> Mixed:
        """Mixes a batch."""
        return self.mixes[int(torch.randint(len(self.mixes), ()))](images)


def _check(alpha: float, name: str) -> None:
    if not alpha > 0:
        raise TrainingError(f"the alpha of {name} is {alpha}; give a number above 0, such as 0.2.")


def _share(alpha: float) -> float:
    return float(torch.distributions.Beta(alpha, alpha).sample())


def _other(images: Tensor) -> Tensor:
    return torch.randperm(len(images)).to(images.device, non_blocking=True)


def _span(size: int, side: float) -> tuple[int, int]:
    """From where to where a box of `side` reaches along an axis of `size`."""
    centre, half = int(torch.randint(size, ())), int(size * side) // 2
    return max(centre - half, 0), min(centre + half, size)
