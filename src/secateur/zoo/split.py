"""Splitting labelled images: stratified by class, decided by a seed, and without a second copy in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import DataError
from secateur.zoo.images import Images


@dataclass(frozen=True)
class Parts:
    """What a source publishes, before anything is split off: a part is None where it has none."""

    classes: tuple[str, ...]
    train: Images
    validation: Images | None
    test: Images | None
    notes: tuple[str, ...]


def hold_out(images: Images, share: float, seed: int, classes: tuple[str, ...]) -> tuple[Images, Images]:
    """(the rest, the held-out part): `share` of each class, rounded, at least one image and never all of
    them.

    Both parts are views of the memory of `images`, whose rows are moved in place: hand `images` over.

    >>> images = Images(torch.zeros(20, 1, 4, 4, dtype=torch.uint8), torch.arange(20) % 2)
    >>> rest, held = hold_out(images, 0.2, 0, ("cat", "dog"))
    >>> len(rest), held.labels.bincount().tolist()
    (16, [2, 2])
    """
    chosen = stratified(images.labels, share, seed, classes)
    boundary = len(images) - len(chosen)
    is_chosen = torch.zeros(len(images), dtype=torch.bool)
    is_chosen[chosen] = True
    # Chosen rows ahead of the boundary change places with as many unchosen rows behind it.
    ahead = is_chosen[:boundary].nonzero().flatten()
    behind = (~is_chosen[boundary:]).nonzero().flatten() + boundary
    for tensor in (images.pixels, images.labels):
        moved = tensor.index_select(0, ahead)
        tensor[ahead] = tensor.index_select(0, behind)
        tensor[behind] = moved
    pixels, labels = images.pixels, images.labels
    return Images(pixels[:boundary], labels[:boundary]), Images(pixels[boundary:], labels[boundary:])


def stratified(labels: Tensor, share: float, seed: int, classes: tuple[str, ...]) -> Tensor:
    """Indices drawn at random from each class: `share` of it, rounded, at least one and never all."""
    generator = torch.Generator().manual_seed(seed)
    by_class = torch.split(labels.argsort(stable=True), labels.bincount(minlength=len(classes)).tolist())
    drawn = []
    for name, members in zip(classes, by_class):
        if len(members) == 1:
            raise DataError(
                f"class {name!r} has 1 image, and a split needs at least 2, one on either side; "
                "add images or leave the class out."
            )
        count = min(max(1, round(len(members) * share)), len(members) - 1)
        drawn.append(members[torch.randperm(len(members), generator=generator)[: max(0, count)]])
    return torch.cat(drawn)
