"""Where a training run stands, on disk, so that it can be broken off at any moment and gone on with.

A checkpoint is one safetensors file, without pickle. Its tensors are the model's (`model/...`), those of the
best epoch where they are others (`best/...`), the optimizer's (`optimizer/...`), the averaged weights
(`average/...`), which weights stay (`masks/...`) and the states of torch's generators (`random/...`). Its metadata
are the history, the settings and the optimizer's plain values as JSON, and a SHA-256 over all of this. The folder
holds two generations: the newer takes its place by renaming once it is whole, and one that got damaged all the same
is passed over for the older, with a note in the history.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.codec.state import load_state, read_metadata, save_state
from secateur.errors import RunError, TrainingError
from secateur.recover.history import History

NEXT = "checkpoint.next.safetensors"
LATEST = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the rest of a run depends on.

    Attributes:
        settings: what the run was asked for, as JSON values; a run with other settings may not go on from it.
        history: the finished epochs.
        steps: optimizer steps taken so far.
        model: parameters and buffers by name, after the last finished epoch.
        best: the same after the best epoch.
        optimizer: the tensors of the optimizer's state, by `key/parameter`.
        random: the states of torch's generators, uint8, by device type.
        average: the averaged weights by name, if there are any.
        values: what of the optimizer's state and options are plain values, as JSON values.
        masks: which weights stay by name, if some are held at zero.
    """

    settings: Mapping[str, Any]
    history: History
    steps: int
    model: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    random: Mapping[str, Tensor]
    average: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes `checkpoint` into `folder` (made if missing), beside the one before it; returns its path.

    Raises:
        RunError: the folder cannot be made or written, or the disk is full; what was there is as it was.

    >>> import tempfile
    >>> weights = {"weight": torch.ones(2)}
    >>> left = Checkpoint({"momentum": 0.9}, History(), 7, weights, weights, {}, {})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_checkpoint(Path(folder), left)
    ...     path.name, read_checkpoint(Path(folder)).steps
    ('checkpoint.safetensors', 7)
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"could not make the folder {folder} for checkpoints: {(error.strerror or str(error)).lower()}"
        raise RunError(f"{what}; choose another.") from error
    parts = {name: getattr(checkpoint, name) for name in ("model", "optimizer", "random", "average", "masks")}
    if checkpoint.history.best_epoch != len(checkpoint.history.rows) or checkpoint.average:
        parts["best"] = checkpoint.best
    tensors = {
        f"{part}/{name}": tensor.detach().cpu().contiguous()
        for part, named in parts.items()
        for name, tensor in named.items()
    }
    metadata = {
        "settings": json.dumps(dict(checkpoint.settings)),
        "history": json.dumps(checkpoint.history.to_json()),
        "steps": str(checkpoint.steps),
        "values": json.dumps(dict(checkpoint.values)),
    }
    metadata["sha256"] = _digest(tensors, metadata)
    latest, following = folder / LATEST, folder / NEXT
    save_state(following, tensors, metadata)
    # Only now that the new file is whole may the older generation go: at every moment one is on disk.
    if latest.exists():
        os.replace(latest, folder / PREVIOUS)
    os.replace(following, latest)
    return latest


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`, or None where there is none at all.

    If the newer generation is damaged or missing, the older is read, and a note in its history says so.

    Raises:
        TrainingError: there are checkpoints, but none that is whole.

    >>> read_checkpoint(Path("no-such-folder")) is None
    True
    """
    paths = [folder / LATEST, folder / PREVIOUS]
    if not any(path.exists() for path in paths):
        return None
    refused: list[str] = []
    for path in paths:
        try:
            checkpoint = _read(path)
        except RunError as error:
            refused.append(str(error))
            continue
        if not refused:
            return checkpoint
        went_on = f"Went on after epoch {len(checkpoint.history.rows)} from {path}"
        note = f"{went_on}, because the newer checkpoint cannot be used: {refused[0]}"
        return dataclasses.replace(checkpoint, history=checkpoint.history.with_notes(note))
    raise TrainingError(
        f"no checkpoint in {folder} can be used: {' '.join(refused)} "
        "Remove that folder to start from the beginning."
    )


def check_same_run(
    folder: Path, checkpoint: Checkpoint, settings: Mapping[str, Any], model: Mapping[str, Tensor]
) -> None:
    """Refuses to go on from a checkpoint that another run left: other settings, or another model.

    Args:
        folder: where the checkpoint came from, for the message.
        checkpoint: as read.
        settings: the JSON values of the run that wants to go on.
        model: its parameters and buffers by name.

    Raises:
        TrainingError: names the first setting or tensor that differs.

    >>> weights = {"weight": torch.ones(2)}
    >>> left = Checkpoint({"momentum": 0.9}, History(), 7, weights, weights, {}, {})
    >>> check_same_run(Path("run"), left, {"momentum": 0.9}, weights)
    >>> check_same_run(Path("run"), left, {"momentum": 0.5}, weights)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    secateur.errors.TrainingError: the checkpoint in run was made with momentum 0.9, and this run asks ...
    """
    advice = "or give another folder to start from the beginning."
    asked = json.loads(json.dumps(dict(settings)))
    for name in {**checkpoint.settings, **asked}:
        was, now = checkpoint.settings.get(name), asked.get(name)
        if was != now:
            raise TrainingError(
                f"the checkpoint in {folder} was made with {name} {was}, and this run asks for {now}; "
                f"go on with the same settings, {advice}"
            )
    for name in {**model, **checkpoint.model}:
        held, here = _kind(checkpoint.model.get(name)), _kind(model.get(name))
        if held != here:
            raise TrainingError(
                f"the checkpoint in {folder} belongs to another model: {name!r} is {held} there and {here} "
                f"here; go on with the model that was being trained, {advice}"
            )


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once; buffers that are not persistent too.

    >>> list(model_state(nn.Linear(2, 1)))
    ['weight', 'bias']
    """
    tensors: Iterable[tuple[str, Tensor]] = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors}


def set_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies what `model_state` gave into the model, in place.

    >>> model = nn.Linear(1, 1)
    >>> set_model_state(model, {"weight": torch.tensor([[2.0]]), "bias": torch.tensor([1.0])})
    >>> model(torch.tensor([3.0])).item()
    7.0
    """
    for name, tensor in model_state(model).items():
        tensor.copy_(state[name])


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators on the CPU and on `device`, by device type.

    >>> list(random_state(torch.device("cpu")))
    ['cpu']
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts the generators back to `states`, as far as those know the device.

    >>> states = random_state(torch.device("cpu"))
    >>> first = torch.rand(1)
    >>> set_random_state(states, torch.device("cpu"))
    >>> torch.equal(torch.rand(1), first)
    True
    """
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _read(path: Path) -> Checkpoint:
    metadata, tensors = read_metadata(path), load_state(path)
    found = _digest(tensors, {key: text for key, text in metadata.items() if key != "sha256"})
    if metadata.get("sha256") != found:
        raise RunError(f"{path} is damaged: its content does not have the checksum that was written with it.")
    names = ("model", "best", "optimizer", "random", "average", "masks")
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        if part not in parts:
            raise RunError(f"{path} is of another version: it holds {key!r}.")
        parts[part][name] = tensor
    return Checkpoint(
        settings=json.loads(metadata["settings"]),
        history=History.from_json(json.loads(metadata["history"])),
        steps=int(metadata["steps"]),
        model=parts["model"],
        best=parts["best"] or parts["model"],
        optimizer=parts["optimizer"],
        random=parts["random"],
        average=parts["average"],
        values=json.loads(metadata.get("values", "{}")),
        masks=parts["masks"],
    )


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over metadata, names, types, shapes and bytes: a file's size does not betray a flipped bit."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {_kind(tensor)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
