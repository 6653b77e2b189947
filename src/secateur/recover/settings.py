"""What a run was asked for, checked, and as JSON values: a checkpoint is gone on from under the same only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from secateur.allocate.plan import Plan
from secateur.errors import TrainingError, UnknownName
from secateur.graph.records import Groups
from secateur.recover.schedule import Schedule, Stage, learning_rate

Keep = Literal["best", "last"]


@dataclass(frozen=True)
class Settings:
    """The numbers that decide the outcome; what they mean is told at `fine_tune`."""

    stages: tuple[Stage, ...]
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False
    schedule: Schedule = "staged"
    label_smoothing: float = 0.0
    batches_per_epoch: int | None = None
    warmup: int = 0
    rewind: int | None = None
    clip: float | None = None
    ema: float | None = None
    bf16: bool = False
    proximal: bool = False
    keep: Keep = "best"

    def __post_init__(self) -> None:
        if not self.all_epochs:
            raise TrainingError(f"the stages {list(self.stages)} have no epoch; give one or more.")
        if not 0 <= self.momentum < 1:
            raise TrainingError(f"momentum is {self.momentum}; give a number in [0, 1), usually 0.9.")
        if not 0 <= self.weight_decay < math.inf:
            raise TrainingError(f"weight_decay is {self.weight_decay}; give 0 or more, such as 5e-4.")
        if self.nesterov and not self.momentum:
            raise TrainingError("nesterov needs a momentum above 0; give one, usually 0.9, or turn it off.")
        if not 0 <= self.label_smoothing <= 1:
            raise TrainingError(f"label_smoothing is {self.label_smoothing}; give a number in [0, 1].")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise TrainingError(f"clip is {self.clip}; give a norm above 0, such as 1.0.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise TrainingError(f"ema is {self.ema}; give a decay in (0, 1), such as 0.999.")
        if self.keep not in get_args(Keep):
            raise UnknownName("epoch to keep", self.keep, get_args(Keep))
        self._check_schedule()

    def _check_schedule(self) -> None:
        if self.schedule not in get_args(Schedule):
            raise UnknownName("schedule", self.schedule, get_args(Schedule))
        if self.batches_per_epoch is None and self.schedule != "staged":
            raise TrainingError(f"the {self.schedule} schedule runs over all steps; give batches_per_epoch.")
        if self.batches_per_epoch is not None and self.batches_per_epoch < 1:
            raise TrainingError(f"batches_per_epoch is {self.batches_per_epoch}; give a whole number from 1.")
        if not 0 <= self.warmup < self.all_epochs:
            few = f"warmup is {self.warmup}, of {self.all_epochs} epochs"
            raise TrainingError(f"{few}; give a whole number from 0, fewer than there are.")
        if self.warmup and self.schedule == "one-cycle":
            raise TrainingError("the one-cycle schedule has a warm-up of its own; leave warmup out.")
        if self.warmup and self.batches_per_epoch is None:
            raise TrainingError("the warm-up goes step by step; give batches_per_epoch.")
        if self.rewind is not None and not 1 <= self.rewind <= self.all_epochs:
            what = f"rewind is {self.rewind}, and the stages have {self.all_epochs} epochs"
            raise TrainingError(f"{what}; give how many of the last ones are to be trained again.")

    @property
    def all_epochs(self) -> int:
        """The epochs of the whole schedule."""
        return sum(stage.epochs for stage in self.stages)

    @property
    def epochs(self) -> int:
        """The epochs of the run."""
        return self.all_epochs if self.rewind is None else self.rewind

    @property
    def steps(self) -> int | None:
        """The optimizer steps of the run, if they are known beforehand."""
        return None if self.batches_per_epoch is None else self.epochs * self.batches_per_epoch

    def lr(self, epoch: int, step: int) -> float:
        """The learning rate of a step of an epoch of the run, both counted from 0."""
        return learning_rate(
            self.stages,
            self.all_epochs - self.epochs + epoch,
            step,
            schedule=self.schedule,
            warmup=self.warmup,
            batches_per_epoch=self.batches_per_epoch or 1,
        )


def described(value: object) -> Any:
    """A setting as JSON values: records by their fields; plans, groups, modules, bytes by a hash; functions by name.

    >>> described(Stage(0.1, 2)), described(sum), described((1, None))
    ({'Stage': {'lr': 0.1, 'epochs': 2}}, 'builtins.sum', [1, None])
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Plan):
        return value.hash
    if isinstance(value, Groups):
        return hashlib.sha256(json.dumps(value.to_json(), sort_keys=True).encode()).hexdigest()
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, nn.Module | torch.Tensor):
        return _fingerprint(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {field.name: described(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {type(value).__name__: held}
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [described(item) for item in value]
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _fingerprint(value: nn.Module | torch.Tensor) -> str:
    tensors = {"": value} if isinstance(value, torch.Tensor) else value.state_dict()
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            continue  # a module's extra state
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
