"""Weights from a file into a network: all of them, or a sentence that names the tensors that do not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.codec.state import load_state, read_metadata
from secateur.errors import ModelError

WRAPPERS = ("module.", "_orig_mod.")  # left in the names by DataParallel and by torch.compile
NESTED = ("state_dict", "model", "model_state_dict")
AUXILIARY = re.compile(r"(aux\d|AuxLogits|aux_classifier)\.")


def load_weights(model: nn.Module, path: str, spec: str, classes: int | None) -> tuple[str, ...]:
    """Loads the .safetensors, .pt or .pth file `path` into `model`; returns what a reader should know, in words.

    A PyTorch file may hold the tensors by name or nest them under `state_dict`, `model` or `model_state_dict`; it is
    read with `weights_only=True`. `spec` and `classes` serve the messages alone.

    Raises:
        ModelError: the file cannot be read, or its tensors are not those of the model; nothing is loaded then.
        RunError: the safetensors file is missing or damaged.

    >>> from secateur.codec.state import save_state
    >>> save_state("w.safetensors", {"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)})
    >>> load_weights(nn.Linear(2, 1), "w.safetensors", "mine.py:make", None)
    ('weights from w.safetensors', "names in it had the prefix 'module.', which was taken off")
    >>> Path("w.safetensors").unlink()
    """
    state, remark = _read(path)
    notes = [f"weights from {path}"]
    for prefix in WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            notes.append(f"names in it had the prefix {prefix!r}, which was taken off")
    expected = model.state_dict()
    extra = [name for name in state if name not in expected and AUXILIARY.match(name)]
    if extra:
        state = {name: tensor for name, tensor in state.items() if name not in extra}
        notes.append(f"{len(extra)} tensors of auxiliary classifiers in it were left out")
    _check_fit(expected, state, path, spec, classes)
    # Old files lack the batch counters of batch norm; everything else has been checked.
    model.load_state_dict(expected | state)
    return (*notes, *remark)


def _read(path: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    suffix = Path(path).suffix.lower()
    if suffix == ".safetensors":
        state = load_state(path)
        normalisation = read_metadata(path).get("normalisation")
        return state, (f"these weights expect inputs normalised with {normalisation}",) if normalisation else ()
    if suffix not in (".pt", ".pth"):
        raise ModelError(f"weights are read from .safetensors, .pt and .pth files; {path} is none of them.")
    if not Path(path).is_file():
        raise ModelError(f"there is no weights file {path}; check the path.")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        raise ModelError(
            f"{path} could not be read as tensors by name ({_first_sentence(error)}); if it holds a whole model, "
            "save model.state_dict() instead; otherwise it may have been cut off: fetch it again."
        ) from error
    return _tensors(held, path), ()


def _tensors(held: Any, path: str) -> dict[str, Tensor]:
    inner = held
    if isinstance(held, Mapping):
        inner = next((held[key] for key in NESTED if isinstance(held.get(key), Mapping)), held)
    if not isinstance(inner, Mapping):
        raise ModelError(f"{path} holds a {type(inner).__name__}, not tensors by name; save model.state_dict().")
    odd = [str(name) for name, value in inner.items() if not isinstance(value, Tensor)]
    if odd:
        raise ModelError(
            f"{path} holds more than tensors ({_some(odd)}); save model.state_dict() alone, or nest it "
            f"under one of {', '.join(NESTED)}."
        )
    return {str(name): value for name, value in inner.items()}


def _check_fit(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str, spec: str, classes: int | None
) -> None:
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    shared = [name for name in expected if name in state]
    other = [name for name in shared if expected[name].shape != state[name].shape]
    if not (missing or unexpected or other):
        return
    counts = {(tuple(state[name].shape)[:1], tuple(expected[name].shape)[:1]) for name in other}
    same_inputs = all(expected[name].shape[1:] == state[name].shape[1:] for name in other)
    if not missing and not unexpected and len(counts) == 1 and same_inputs:
        (theirs, ours) = next(iter(counts))
        if theirs and ours == (classes,):
            raise ModelError(
                f"the weights in {path} have {theirs[0]} classes, {spec} was to have {classes} ({_some(other)}); "
                f"take weights of {classes} classes or data of {theirs[0]}, or leave the weights out and train."
            )
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    if other:
        shapes = [f"{name} is {_shape(state[name])}, not {_shape(expected[name])}" for name in other]
        parts.append(f"{len(other)} of another shape ({_some(shapes)})")
    raise ModelError(
        f"the weights in {path} do not fit {spec}; of its tensors, {'; '.join(parts)}: "
        "name the model they were saved from, or leave the weights out."
    )


def _some(names: list[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _shape(tensor: Tensor) -> str:
    return " x ".join(str(size) for size in tensor.shape) or "a single number"


def _first_sentence(error: Exception) -> str:
    text = str(error).split("\n")[0].split(". ")[0].strip().rstrip(".")
    return f"{type(error).__name__}: {text[:160]}"
