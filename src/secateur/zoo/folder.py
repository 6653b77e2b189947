"""A folder of images, one sub-folder per class, as torchvision's `ImageFolder` reads it -> Parts.

Either `train/` with `val/` and `test/` beside it, each with a folder per class, or the folders of the classes
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder

from secateur.errors import DataError
from secateur.zoo.decode import Source, check_memory, decode, image_shape, resize_notes
from secateur.zoo.images import Images
from secateur.zoo.split import Parts

_PARTS = (("train", "train"), ("val", "val"), ("valid", "val"), ("validation", "val"), ("test", "test"))


@dataclass(frozen=True)
class _Listing:
    """The files of one part, each with the name of its class."""

    classes: tuple[str, ...]
    files: tuple[tuple[Path, str], ...]

    def sources(self) -> Iterator[Source]:
        return ((str(path), path) for path, _ in self.files)


def read_imagefolder(folder: Path, *, image_size: int = 224) -> Parts:
    """All parts below `folder`, each image brought to `image_size` on its shorter side and cut at the centre.

    Without a `train` folder, every image belongs to train. Raises `DataError` where there are no images or
    classes, or where the result would take more than half of the free memory.
    """
    listings = {part: _list(path) for part, path in _folders(folder).items()}
    classes = listings["train"].classes
    number = {name: i for i, name in enumerate(classes)}
    for part, listing in listings.items():
        unknown = [name for name in listing.classes if name not in number]
        if unknown:
            raise DataError(
                f"{folder}: the {part} part has class {unknown[0]!r}, which is not among those of train."
            )
    shape = image_shape(listings["train"].sources(), image_size)
    check_memory(sum(len(listing.files) for listing in listings.values()), shape)
    parts = {
        part: Images(
            decode(listing.sources(), len(listing.files), shape, resize=True),
            torch.tensor([number[name] for _, name in listing.files]),
        )
        for part, listing in listings.items()
    }
    return Parts(classes, parts["train"], parts.get("val"), parts.get("test"), resize_notes(image_size))


def _folders(folder: Path) -> Mapping[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the folder that holds the images.")
    found = {part: folder / name for name, part in _PARTS if (folder / name).is_dir()}
    if found and "train" not in found:
        raise DataError(f"{folder} has a {' and a '.join(found)} folder but no train folder; add one.")
    return found or {"train": folder}


def _list(folder: Path) -> _Listing:
    try:
        listed = ImageFolder(str(folder))
    except FileNotFoundError as problem:
        reason = str(problem).partition(" Supported")[0].rstrip(".")
        raise DataError(f"{folder} should hold one folder of images per class: {reason}.") from problem
    files = tuple((Path(path), listed.classes[number]) for path, number in listed.samples)
    return _Listing(tuple(listed.classes), files)
