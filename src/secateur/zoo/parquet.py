"""A folder of parquet files in the Hugging Face layout -> Parts.

The layout: `train*.parquet`, `test*.parquet` and `validation*.parquet` (or a folder so named), each with a
struct column of images {bytes, path} and at least one column of integer labels. Class names come from the
`huggingface` metadata of the schema or from a comma-separated `class_names` entry, where there is one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from secateur.errors import DataError, nearest
from secateur.zoo.decode import Source, check_memory, decode, image_shape, resize_notes
from secateur.zoo.images import Images
from secateur.zoo.split import Parts

_PART = re.compile(r"(train|test|val)(?:ing|id|idation)?(?![a-z])", re.IGNORECASE)
_LABELS = ("label", "fine_label")
_ROWS = 256


@dataclass(frozen=True)
class _Layout:
    """Which columns hold what; `others` are the integer columns that could be labels too."""

    image: str
    label: str
    others: tuple[str, ...]
    classes: tuple[str, ...] | None


def read_parquet(folder: Path, *, label: str | None = None, image_size: int | None = None) -> Parts:
    """All parts below `folder`, decoded. `label` names the label column; None infers it (`label`,
    `fine_label`, the only integer column). `image_size` resizes and centre-crops. Raises `DataError` for any
    other layout."""
    files = _files(folder)
    layout = _layout(files["train"][0], label)
    labels = {part: _labels(paths, layout) for part, paths in files.items()}
    classes = layout.classes or tuple(str(i) for i in range(max(0, int(labels["train"].max())) + 1))
    for part, paths in files.items():
        _check_labels(labels[part], classes, layout.label, f"the {part} files ({paths[0].name})")
    shape = image_shape(_sources(files["train"], layout.image, folder), image_size)
    check_memory(sum(map(len, labels.values())), shape)
    resize = image_size is not None
    parts = {
        part: Images(decode(_sources(paths, layout.image, folder), len(known), shape, resize), known)
        for (part, paths), known in zip(files.items(), labels.values())
    }
    return Parts(classes, parts["train"], parts.get("val"), parts.get("test"), _notes(layout, image_size))


def _files(folder: Path) -> Mapping[str, list[Path]]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the folder that holds the parquet files.")
    paths = sorted(folder.rglob("*.parquet"))
    if not paths:
        raise DataError(f"{folder} holds no *.parquet files; give the folder that does.")
    files: dict[str, list[Path]] = {}
    for path in paths:
        names = reversed(path.relative_to(folder).parts)
        found = next((match for name in names if (match := _PART.match(name))), None)
        if found:
            files.setdefault(found[1].lower(), []).append(path)
    if "train" not in files:
        shown = ", ".join(path.name for path in paths[:5])
        raise DataError(f"{folder} holds no parquet file whose name starts with 'train'; it holds {shown}.")
    return {part: files[part] for part in ("train", "val", "test") if part in files}


def _layout(path: Path, label: str | None) -> _Layout:
    schema = _opened(path).schema_arrow
    listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
    images = [field.name for field in schema if field.name in ("img", "image") and _holds_bytes(field.type)]
    if not images:
        raise DataError(f"{path} has no image column, 'img' or 'image' with bytes in it; it has {listed}.")
    integers = [field.name for field in schema if pa.types.is_integer(field.type)]
    only = integers[0] if len(integers) == 1 else None
    default = next((name for name in _LABELS if name in integers), only)
    chosen = label if label is not None else default
    if chosen is None:
        raise DataError(
            f"{path} has no column 'label' or 'fine_label', and {len(integers)} integer columns; name one "
            f"with label=. Its columns are {listed}."
        )
    if chosen not in integers:
        missing = f"there is no column {chosen!r}"
        what = f"column {chosen!r} is not integer" if chosen in schema.names else missing
        choices = ", ".join(nearest(chosen, integers)) or "none"
        raise DataError(f"{path}: {what}, so it cannot be the label; integer columns: {choices}.")
    others = tuple(name for name in integers if name != chosen)
    return _Layout(images[0], chosen, others, _class_names(schema, chosen, chosen == default))


def _holds_bytes(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    inner = kind.field("bytes").type
    return bool(pa.types.is_binary(inner) or pa.types.is_large_binary(inner))


def _class_names(schema: pa.Schema, label: str, is_default: bool) -> tuple[str, ...] | None:
    metadata = schema.metadata or {}
    if b"huggingface" in metadata:
        try:
            names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
        except (ValueError, KeyError, TypeError):
            names = None
        if isinstance(names, list) and names:
            return tuple(map(str, names))
    # This entry does not say which column it is about; it is taken to mean the default one.
    if b"class_names" in metadata and is_default:
        return tuple(metadata[b"class_names"].decode().split(","))
    return None


def _labels(paths: list[Path], layout: _Layout) -> Tensor:
    found = []
    for path in paths:
        names = _opened(path).schema_arrow.names
        for column in (layout.image, layout.label):
            if column not in names:
                raise DataError(f"{path} has no column {column!r}, unlike the first train file, but {names}.")
        for batch in _batches(path, [layout.label]):
            labels = batch.column(layout.label)
            if labels.null_count:
                raise DataError(f"{path}: column {layout.label!r} has rows without a label.")
            found.append(torch.tensor(labels.to_numpy(), dtype=torch.int64))
    if not sum(map(len, found)):
        raise DataError(f"{paths[0]} holds no rows.")
    return torch.cat(found)


def _check_labels(labels: Tensor, classes: tuple[str, ...], column: str, where: str) -> None:
    wrong = labels[(labels < 0) | (labels >= len(classes))]
    if len(wrong):
        raise DataError(
            f"{where} hold label {int(wrong[0])} in column {column!r} ({len(wrong):,} such rows), and the "
            f"{len(classes)} classes are numbered 0 to {len(classes) - 1}."
        )


def _sources(paths: list[Path], column: str, folder: Path) -> Iterator[Source]:
    for path in paths:
        name, row = path.relative_to(folder), 0
        for batch in _batches(path, [f"{column}.bytes"]):
            for encoded in batch.column(column).field("bytes").to_pylist():
                yield f"{name}, row {row}", encoded or b""
                row += 1


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    file = _opened(path)
    try:
        yield from file.iter_batches(batch_size=_ROWS, columns=columns)
    except (pa.ArrowException, OSError) as problem:
        raise _unreadable(path, problem) from problem


def _opened(path: Path) -> pq.ParquetFile:
    try:
        # Buffering ahead would hold the whole file in memory beside the images.
        return pq.ParquetFile(path, pre_buffer=False)
    except (pa.ArrowException, OSError) as problem:
        raise _unreadable(path, problem) from problem


def _unreadable(path: Path, problem: BaseException) -> DataError:
    reason = (str(problem).splitlines() or ["no reason given"])[0].rstrip(".")
    return DataError(f"{path} cannot be read as parquet, perhaps cut short: copy it again ({reason}).")


def _notes(layout: _Layout, image_size: int | None) -> tuple[str, ...]:
    choice = "".join(f", and label={name!r} would take {name!r}" for name in layout.others)
    unnamed = () if layout.classes else ("The files do not name the classes: they are numbered.",)
    return (f"Labels are column {layout.label!r}{choice}.", *unnamed, *resize_notes(image_size))
