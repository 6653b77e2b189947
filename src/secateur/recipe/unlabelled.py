"""A recipe's images: the data set itself, and others without labels that training steps put beside it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from secateur.errors import RecipeError
from secateur.recipe.schema import Recipe, Train
from secateur.recipe.training import Batch
from secateur.recover.objective import UNLABELLED
from secateur.zoo.data import Data, load_data
from secateur.zoo.images import Images


def images_of(recipe: Recipe) -> tuple[Data, dict[str, Images], tuple[str, ...]]:
    """The data set, the others by the names that steps give them, and a sentence on each of these.

    Raises:
        DataError, UnknownName: as `load_data`. RecipeError: the others are not of the same channels.
    """
    data = _load(recipe, recipe.data.source, recipe.data.image_size)
    named = [step.distill.unlabelled for step in recipe.steps if isinstance(step, Train) and step.distill]
    others = {name: _without_labels(recipe, name, data) for name in dict.fromkeys(named) if name is not None}
    notes = (f"{len(images):,} images of {name} are learned from without labels." for name, images in others.items())
    return data, others, tuple(notes)


def beside(own: Iterator[Batch], passes: Callable[[int], Iterator[tuple[Tensor, Tensor]]]) -> Iterator[Batch]:
    """Batches with as many other images behind their own; `passes(n)` goes through the others for the nth time.

    >>> own = iter([(torch.zeros(2, 1), torch.tensor([7, 8]))])
    >>> other = (torch.ones(3, 1), torch.full((3,), UNLABELLED))
    >>> [(images.flatten().tolist(), labels.tolist()) for images, labels in beside(own, lambda n: iter([other]))]
    [([0.0, 0.0, 1.0, 1.0], [7, 8, -100, -100])]
    """
    others = itertools.chain.from_iterable(passes(number) for number in itertools.count())
    for (images, labels, *_), (more, none) in zip(own, others):
        count = len(labels)
        yield torch.cat([images, more[:count]]), torch.cat([labels, none[:count]])


def _load(recipe: Recipe, source: str, image_size: int | None) -> Data:
    part = recipe.data
    return load_data(
        source,
        validation=part.validation,
        seed=recipe.seed,
        image_size=image_size,
        label=part.label if source == part.source else None,
        folder=part.folder,
        normalise=part.normalise,
        download=part.download,
    )


def _without_labels(recipe: Recipe, name: str, data: Data) -> Images:
    """The train part alone, as large as those of the data set, in case it is the very same one."""
    pixels = _load(recipe, name, data.train.pixels.shape[3]).train.pixels
    have, want = ("x".join(map(str, images.shape[1:])) for images in (pixels, data.train.pixels))
    if have != want:
        raise RecipeError(
            f"the images of {name} are {have} (channels, height, width), and those of {data.name} are {want}; the "
            "teacher cannot judge them: name a set of the same kind in distill.unlabelled."
        )
    return Images(pixels, torch.full((len(pixels),), UNLABELLED))
