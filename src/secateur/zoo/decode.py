"""Encoded images (bytes or files) -> one uint8 tensor, decoded by Pillow in a few threads.

A source is a pair: where the image comes from, in words for an error message, and its bytes or path. Sources
are iterables that are read as they are needed, so memory stays near the size of the result.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from secateur.errors import DataError

Source = tuple[str, bytes | Path]

# Named, so that Pillow neither probes all its plug-ins for each image nor opens one that runs other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
_GREY = ("1", "L", "LA")
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_PER_THREAD = 64


def image_shape(sources: Iterable[Source], image_size: int | None) -> tuple[int, int, int]:
    """(channels, height, width) that `decode` needs: one channel if all images are grey, else three.

    Reads headers only, and no further than the first image in colour.
    """
    size: tuple[int, int] | None = None
    for where, source in sources:
        with _opened(where, source) as image:
            size = size or (image.height, image.width)
            if image.mode not in _GREY:
                return (3, *((image_size, image_size) if image_size else size))
    if size is None:
        raise DataError("there are no images to read.")
    return (1, *((image_size, image_size) if image_size else size))


def decode(sources: Iterable[Source], count: int, shape: tuple[int, int, int], resize: bool) -> Tensor:
    """`count` images as uint8 (count, c, h, w), where `shape` is (c, h, w).

    With `resize`, the shorter side is brought to h == w pixels (bilinear, antialiased) and the centre is cut
    out, as torchvision's `Resize` and `CenterCrop` do; without, an image of another size raises `DataError`.
    EXIF rotation is not applied, as in torchvision. Threads: `torch.get_num_threads()`.
    """
    pixels = torch.empty(count, *shape, dtype=torch.uint8)
    out = pixels.numpy()

    def fill(job: tuple[int, list[Source]]) -> None:
        start, group = job
        for offset, (where, source) in enumerate(group):
            out[start + offset] = _decode_one(where, source, shape, resize)

    workers = torch.get_num_threads()
    remaining, start = iter(sources), 0
    with ThreadPoolExecutor(workers) as pool:
        while block := list(itertools.islice(remaining, workers * _PER_THREAD)):
            share = -(-len(block) // workers)
            jobs = [(start + i, block[i : i + share]) for i in range(0, len(block), share)]
            for _ in pool.map(fill, jobs):
                pass
            start += len(block)
    return pixels


def resize_notes(image_size: int | None) -> tuple[str, ...]:
    """What `decode` does to the size of the images, in words."""
    if image_size is None:
        return ()
    size = f"{image_size} x {image_size}"
    return (f"Images are resized to {image_size} pixels on the shorter side and cut to {size} at the centre.",)


def check_memory(count: int, shape: tuple[int, int, int]) -> None:
    """Raise `DataError` if `count` images of (c, h, w) bytes would take more than half of the free memory."""
    needed, free = count * shape[0] * shape[1] * shape[2], free_memory()
    if free is not None and needed > free / 2:
        size = " x ".join(map(str, shape))
        raise DataError(
            f"{count:,} images of {size} would take {needed / 1e6:,.0f} MB of memory, and no more than half "
            f"of the {free / 1e6:,.0f} MB that are free is used; give a smaller image_size or fewer images."
        )


def free_memory() -> int | None:
    """Bytes of memory that this process may still take, or None where the system does not say."""
    try:
        free = _counters(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    except (OSError, KeyError):
        try:
            # macOS publishes the memory it has but not how much of it is free.
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        held = _counters(group / "memory.stat")
        # The cache of files counts as used but is given back on demand.
        return min(free, limit - used + held["active_file"] + held["inactive_file"])
    except (OSError, ValueError, KeyError):
        return free


def _counters(path: Path) -> dict[str, int]:
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows}


@contextmanager
def _opened(where: str, source: bytes | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS) as image:
            yield image
    except _BROKEN as problem:
        reason = str(problem).partition("<")[0].strip()
        raise DataError(f"{where}: this image cannot be decoded ({reason}); replace it.") from problem


def _decode_one(where: str, source: bytes | Path, shape: tuple[int, int, int], resize: bool) -> np.ndarray:
    with _opened(where, source) as image:
        if image.mode in _DEEP:
            raise DataError(f"{where}: this image has more than 8 bits a channel ({image.mode}); convert it.")
        mode = "L" if shape[0] == 1 else "RGB"
        decoded = image if image.mode == mode else image.convert(mode)
        if resize:
            decoded = _centre(decoded, shape[1])
        array = np.asarray(decoded)
    if array.shape[:2] != shape[1:]:
        raise DataError(
            f"{where}: this image is {array.shape[0]} x {array.shape[1]} pixels and the first is "
            f"{shape[1]} x {shape[2]}; give image_size to bring all to one size."
        )
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _centre(image: Image.Image, side: int) -> Image.Image:
    scale = side / min(image.size)
    width, height = (side if edge == min(image.size) else int(edge * scale) for edge in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))
