"""A data set by name -> Data: train, validation and test images in memory, with what was inferred put in
words.

Selection never sees the test set: validation is split off train, by class and by seed, and test is only
reported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import DataError, UnknownName
from secateur.zoo.images import Images, normalise
from secateur.zoo.split import Parts, hold_out

SPECS = ("digits", "cifar10", "cifar100", "imagefolder:DIR", "parquet:DIR")
NORMALISATIONS = ("data", "imagenet")
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TEST_SHARE = 0.2


@dataclass(frozen=True)
class Data:
    """A data set in memory. `mean` and `std` are per channel, of pixels scaled to 0..1."""

    name: str
    classes: tuple[str, ...]
    train: Images
    validation: Images
    test: Images
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...]

    def batches(
        self,
        split: Literal["train", "validation", "test"],
        batch_size: int,
        *,
        shuffle: int | None = None,
        augment: Sequence[str] = (),
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over a split, normalised with `mean` and `std`; see `Images.batches`."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        if split not in splits:
            raise UnknownName("split", split, splits)
        return splits[split].batches(
            batch_size,
            mean=self.mean,
            std=self.std,
            shuffle=shuffle,
            augment=augment,
            device=device,
            channels_last=channels_last,
        )

    def example(self, n: int = 1, device: torch.device | str = "cpu") -> Tensor:
        """The first `n` training images, normalised: float32 (n, c, h, w)."""
        return normalise(self.train.pixels[:n].to(device), self.mean, self.std)


def load_data(
    spec: str,
    *,
    validation: float = 0.1,
    seed: int = 0,
    image_size: int | None = None,
    label: str | None = None,
    folder: str | Path | None = None,
    normalise: str = "data",
    download: bool = False,
) -> Data:
    """Read a data set into memory.

    `spec` is `digits` (scikit-learn's 8 x 8 grey images), `cifar10` or `cifar100` (torchvision's, kept in
    `folder`, by default `~/.cache/secateur`, fetched if `download`), `imagefolder:DIR` or `parquet:DIR`.

    `validation` is the share of each class of train that is held out, drawn with `seed`; a validation part
    that the source publishes beside a test part is taken as it is. A source with a single held-out part has
    it as its test part, and one with none has a fifth of each class split off. `image_size` resizes the
    shorter side and cuts the centre (default for `imagefolder:` 224, for the others as they are). `label`
    names the label column of a parquet folder. `normalise` is "data" (mean and deviation of all pixels of the
    train split) or "imagenet".

    Raises `UnknownName` or `DataError`; what was inferred is said in `notes`.

    >>> data = load_data("digits", validation=0.2)
    >>> len(data.train), len(data.validation), len(data.test), data.example().shape
    (1151, 287, 359, torch.Size([1, 1, 8, 8]))
    """
    if not 0 < validation < 1:
        raise DataError(f"validation is {validation}; it is the share of train to hold out, between 0 and 1.")
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size is {image_size}; it is a side in pixels, at least 1.")
    if normalise not in NORMALISATIONS:
        raise UnknownName("normalisation", normalise, NORMALISATIONS)
    parts = _read(spec, image_size, label, folder, download)
    if normalise == "imagenet" and parts.train.pixels.shape[1] != 3:
        raise DataError(f"normalise='imagenet' is for colour images; {spec} is grey, so use 'data'.")
    train, held, test, notes = _split(parts, validation, seed)
    mean, std = _IMAGENET if normalise == "imagenet" else _mean_and_std(train.pixels)
    of = "of ImageNet" if normalise == "imagenet" else "of the train split"
    told = (*parts.notes, *notes, f"Pixels are normalised with the mean and standard deviation {of}.")
    return Data(spec, parts.classes, train, held, test, mean, std, told)


def _read(
    spec: str, image_size: int | None, label: str | None, folder: str | Path | None, download: bool
) -> Parts:
    kind, colon, place = spec.partition(":")
    if kind + (":DIR" if colon else "") not in SPECS:
        raise UnknownName("data set", spec, SPECS)
    if colon and not place:
        raise DataError(f"{spec!r} names no folder; write {kind}:DIR.")
    if label is not None and kind != "parquet":
        raise DataError(f"label={label!r} is for a parquet folder; {spec} has no columns, so leave it out.")
    where = Path(place).expanduser()
    if kind == "parquet":
        from secateur.zoo.parquet import read_parquet

        return read_parquet(where, label=label, image_size=image_size)
    if kind == "imagefolder":
        from secateur.zoo.folder import read_imagefolder

        return read_imagefolder(where, image_size=image_size or 224)
    return _resized(_digits() if kind == "digits" else _cifar(kind, folder, download), image_size)


def _digits() -> Parts:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    grey = torch.from_numpy(bundle.images)[:, None]
    # The published values are 0 to 16.
    pixels = (grey * (255 / 16)).round().to(torch.uint8)
    images = Images(pixels, torch.from_numpy(bundle.target).to(torch.int64))
    return Parts(tuple(str(name) for name in bundle.target_names), images, None, None, ())


def _cifar(kind: str, folder: str | Path | None, download: bool) -> Parts:
    from torchvision import datasets

    source = datasets.CIFAR10 if kind == "cifar10" else datasets.CIFAR100
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "secateur"
    root = Path(folder if folder is not None else cache).expanduser()
    try:
        train, test = (source(str(root), train=is_train, download=download) for is_train in (True, False))
    except (RuntimeError, OSError) as problem:
        if download:
            raise DataError(f"{kind} could not be fetched to {root} ({problem}).") from problem
        todo = "fetch it (about 170 MB) with download=True, or name its folder"
        raise DataError(f"{kind} is not in {root}, or not whole; {todo}.") from problem
    parts = [
        Images(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test)
    ]
    return Parts(tuple(train.classes), parts[0], None, parts[1], ())


def _resized(parts: Parts, image_size: int | None) -> Parts:
    if image_size is None:
        return parts
    from secateur.zoo.decode import check_memory

    total = len(parts.train) + (len(parts.test) if parts.test is not None else 0)
    check_memory(total, (parts.train.pixels.shape[1], image_size, image_size))
    note = f"Images are resized to {image_size} x {image_size} pixels."
    train = _resize(parts.train, image_size)
    test = None if parts.test is None else _resize(parts.test, image_size)
    return replace(parts, train=train, test=test, notes=(*parts.notes, note))


def _resize(images: Images, side: int) -> Images:
    pixels = torch.empty(*images.pixels.shape[:2], side, side, dtype=torch.uint8)
    for old, new in zip(torch.split(images.pixels, 256), torch.split(pixels, 256)):
        new.copy_(F.interpolate(old, (side, side), mode="bilinear", antialias=True))
    return Images(pixels, images.labels)


def _split(parts: Parts, share: float, seed: int) -> tuple[Images, Images, Images, list[str]]:
    train, validation, test = parts.train, parts.validation, parts.test
    notes: list[str] = []
    if test is None and validation is not None:
        test, validation = validation, None
        notes.append("The source has one held-out part, its validation part: it is taken as the test part.")
    if test is None:
        before = len(train)
        train, test = hold_out(train, _TEST_SHARE, seed, parts.classes)
        notes.append(_held_out("test", before, len(test), _TEST_SHARE, seed))
    if validation is None:
        before = len(train)
        train, validation = hold_out(train, share, seed, parts.classes)
        notes.append(_held_out("validation", before, len(validation), share, seed))
    else:
        notes.append("Validation is the part that the source publishes; nothing is split off train.")
    counts = train.labels.bincount(minlength=len(parts.classes)).tolist()
    absent = [name for name, count in zip(parts.classes, counts) if not count]
    if absent:
        notes.append(f"Train has no images of {', '.join(absent)}.")
    return train, validation, test, notes


def _held_out(part: str, before: int, held: int, share: float, seed: int) -> str:
    return (
        f"{held:,} of {before:,} train images are held out as the {part} part "
        f"({100 * share:g} % of each class, seed {seed})."
    )


def _mean_and_std(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = pixels.shape[1]
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    for part in torch.split(pixels, 1000):
        for channel in range(channels):
            counts[channel] += torch.bincount(part[:, channel].flatten(), minlength=256)
    share = counts.double() / counts.sum(1, keepdim=True)
    level = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ level
    std = (share * (level - mean[:, None]).square()).sum(1).sqrt()
    # A channel that never varies carries nothing; dividing by one keeps it finite.
    std[std == 0] = 1.0
    return tuple(mean.tolist()), tuple(std.tolist())
