"""Small images of known content, and folders of them in the layouts that load_data reads."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from secateur.zoo.data import Data
from secateur.zoo.images import Images


def array(key: int, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    pixels = np.random.default_rng(key).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    column: str = "img",
    metadata: dict[str, str] | None = None,
    **labels: Sequence[object],
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({column: [{"bytes": image, "path": "x.png"} for image in images], **labels})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = table.set_column(0, column, table.column(0).cast(kind))
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=7)
    return path


def folder_of(root: Path, train: int = 20, test: int = 6, **extra: Sequence[object]) -> Path:
    """Parquet files of 8 x 8 images in two classes; image i of train is array(i), of test array(1000 + i)."""
    write_parquet(root / "train-0.parquet", [encoded(array(i)) for i in range(train)], label=parity(train), **extra)
    write_parquet(root / "test-0.parquet", [encoded(array(1000 + i)) for i in range(test)], label=parity(test))
    return root


def parity(n: int) -> list[int]:
    return [i % 2 for i in range(n)]


def rows(images: Images) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.pixels}


def everything(data: Data) -> tuple[Images, Images, Images]:
    return data.train, data.validation, data.test


def write_images(root: Path, per_class: int = 10, first: int = 0, classes: Sequence[str] = ("cat", "dog")) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            image = array(first + 100 * number + i, 12 + i % 3, 15)
            (root / name / f"{i:03}.png").write_bytes(encoded(image))
    return root
