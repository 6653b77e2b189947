"""Tensors by name, to a safetensors file and back, bit for bit.

The layout is that of safetensors (8 bytes of header length, a JSON header, the tensors one after the other),
and files are read with that library. They are written here, because its writer wants a contiguous copy on the
CPU of every tensor at the same time, and does not say beforehand how large the file gets:

    save_state    one tensor at a time; the same tensors always give the same bytes
    file_size     the size of that file without writing it, from shapes alone (meta tensors will do)
    load_state    all tensors; tied ones come back as one object
    read_metadata, state_shapes    from the header alone

Tensors that are the same view of the same storage (tied weights) are stored once; the metadata entry
`secateur.tied` holds `{"other name": "name it is stored under"}` as JSON. A file has no checksum: values that
were altered are not noticed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.codec.files import replacing
from secateur.errors import ModelError, RunError

TIED = "secateur.tied"
CODES = MappingProxyType(
    {
        torch.bool: "BOOL",
        torch.uint8: "U8",
        torch.int8: "I8",
        torch.uint16: "U16",
        torch.int16: "I16",
        torch.uint32: "U32",
        torch.int32: "I32",
        torch.uint64: "U64",
        torch.int64: "I64",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
        torch.float8_e5m2: "F8_E5M2",
        torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
        torch.float8_e8m0fnu: "F8_E8M0",
        torch.float4_e2m1fn_x2: "F4",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float32: "F32",
        torch.float64: "F64",
        torch.complex64: "C64",
    }
)


def save_state(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes `tensors` and `metadata` to the safetensors file `path`, whole or not at all.

    Takes at most the memory of one tensor more, and that only for one that is not contiguous or not on the
    CPU. Views that overlap in part are each stored in full.

    Raises:
        ModelError: a tensor without values (meta), sparse, or of a dtype that safetensors does not have.
        RunError: the folder is missing or may not be written, or the disk is full.

    >>> weight = torch.eye(2)
    >>> save_state("tied.safetensors", {"embed": weight, "head": weight}, {"epoch": "3"})
    >>> loaded = load_state("tied.safetensors")
    >>> loaded["head"] is loaded["embed"], read_metadata("tied.safetensors")
    (True, {'epoch': '3'})
    >>> Path("tied.safetensors").unlink()
    """
    stored, header = _lay_out(tensors, metadata)
    for name, tensor in stored.items():
        if tensor.device.type == "meta":
            raise ModelError(f"tensor {name!r} is on the meta device: it has no values yet; load them first.")
    with replacing(path, needed=len(header) + _data_bytes(stored)) as temporary, temporary.open("wb") as file:
        file.write(header)
        for tensor in stored.values():
            if tensor.numel():
                file.write(_raw(tensor))


def load_state(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of the safetensors file `path` on `device`, in memory of their own.

    Tensors that `save_state` found tied are one and the same object.

    Raises:
        RunError: no such file, not a safetensors file, or one that was cut off or damaged.

    >>> save_state("one.safetensors", {"weight": torch.tensor([1.0, 2.0])})
    >>> load_state("one.safetensors")
    {'weight': tensor([1., 2.])}
    >>> Path("one.safetensors").unlink()
    """
    with _opened(path) as file:
        # A copy, for the library hands out views of one mapped storage: they would all look tied, and would
        # change or end the process with the file.
        tensors = {name: file.get_tensor(name).to(device, copy=True) for name in file.keys()}  # noqa: SIM118
        return tensors | {alias: tensors[name] for alias, name in _tied(path, file).items()}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of the safetensors file `path` as given to `save_state`; reads the header alone.

    Raises:
        RunError: as `load_state`.

    >>> save_state("one.safetensors", {}, {"dataset": "digits"})
    >>> read_metadata("one.safetensors")
    {'dataset': 'digits'}
    >>> Path("one.safetensors").unlink()
    """
    with _opened(path) as file:
        return {key: text for key, text in (file.metadata() or {}).items() if key != TIED}


def state_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in the safetensors file `path`, by name; reads the header alone.

    Raises:
        RunError: as `load_state`.

    >>> save_state("one.safetensors", {"weight": torch.zeros(3, 2)})
    >>> state_shapes("one.safetensors")
    {'weight': (3, 2)}
    >>> Path("one.safetensors").unlink()
    """
    with _opened(path) as file:
        shapes = {}
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            shape = tuple(part.get_shape())
            # The header counts values; torch counts bytes, of two values each.
            shapes[name] = (*shape[:-1], shape[-1] // 2) if part.get_dtype() == "F4" else shape
        return shapes | {alias: shapes[name] for alias, name in _tied(path, file).items()}


def file_size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """The size in bytes of the file that `save_state` would write from these, without writing it.

    Values are not looked at, so tensors on the meta device will do.

    Raises:
        ModelError: as `save_state`.

    >>> file_size({"weight": torch.zeros(1000)})  # 8 of length, 72 of header, 4000 of values
    4080
    """
    stored, header = _lay_out(tensors, metadata)
    return len(header) + _data_bytes(stored)


def _lay_out(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> tuple[dict[str, Tensor], bytes]:
    """The tensors to store in the order of the file, and all bytes that come before their values."""
    stored, tied = _distinct(tensors)
    # Widest first keeps every tensor aligned to its own item size; then by name.
    order = sorted(stored, key=lambda name: (-stored[name].dtype.itemsize, name))
    texts = dict(metadata or {})
    for key, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"metadata are texts, but {key!r} is {text!r}")
    if TIED in texts or "__metadata__" in tensors:
        raise ValueError(f"metadata key {TIED!r} and tensor name '__metadata__' are taken; choose another")
    if tied:
        texts[TIED] = json.dumps(tied, ensure_ascii=False, separators=(",", ":"))
    entries: dict[str, Any] = {"__metadata__": texts} if texts else {}
    end = 0
    for name in order:
        tensor = stored[name]
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        code, shape = CODES[tensor.dtype], list(tensor.shape)
        if code == "F4":
            shape[-1] *= 2
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return {name: stored[name] for name in order}, len(header).to_bytes(8, "little") + header


def _distinct(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors without repetitions, and for each name left out the name of the same tensor."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[Hashable, str] = {}
    for name, tensor in tensors.items():
        _check(name, tensor)
        # The address would be 0 for all tensors that are empty or on the meta device.
        storage = tensor.untyped_storage()._cdata
        flags = (tensor.dtype, tensor.is_conj(), tensor.is_neg())
        view = (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), flags)
        if seen.setdefault(view, name) == name:
            stored[name] = tensor
        else:
            tied[name] = seen[view]
    return stored, tied


def _check(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ModelError(f"{name!r} is a {type(tensor).__name__}; a safetensors file holds tensors alone.")
    if tensor.layout != torch.strided:
        raise ModelError(f"tensor {name!r} has layout {tensor.layout}; call .to_dense() on it before saving.")
    if tensor.dtype not in CODES:
        raise ModelError(f"tensor {name!r} is {tensor.dtype}, which safetensors has not; convert it first.")


def _data_bytes(stored: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in stored.values())


def _raw(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    try:
        if not Path(path).is_file():
            what = "is a folder, not a file" if Path(path).is_dir() else "is not there"
            raise RunError(f"could not read the weights: {path} {what}; check the path.")
        with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            yield file
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RunError(f"could not read the weights in {path}: {reason}; check the path.") from error
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise RunError(
            f"{path} is not a whole safetensors file ({reason}; {Path(path).stat().st_size} bytes); "
            "it may have been cut off while copying: fetch or save it again."
        ) from error


def _tied(path: str | os.PathLike[str], file: Any) -> dict[str, str]:
    text = (file.metadata() or {}).get(TIED, "{}")
    names = set(file.keys())
    try:
        tied = json.loads(text)
    except (ValueError, RecursionError):
        tied = None
    if not isinstance(tied, dict) or any(
        alias in names or not isinstance(name, str) or name not in names for alias, name in tied.items()
    ):
        raise RunError(
            f"{path} says {text!r:.80} of tied tensors, which does not fit the tensors in it ({len(names)}); "
            "the file was edited or damaged: fetch or save it again."
        )
    return tied
