"""What the tests of training share: a small network with dropout and batch norm, and data that it can learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.recover.history import History
from secateur.recover.train import Stage, fine_tune

STEPS = 4
STAGES = (Stage(0.1, 2), Stage(0.01, 1))
Data = list[tuple[Tensor, Tensor]]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 3)
    )


def batches(seed: int = 1, count: int = STEPS) -> Data:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count * 16, 1, 6, 6, generator=generator)
    labels = images.mean((1, 2, 3)).sign().long() + 1
    return list(zip(images.split(16), labels.split(16), strict=True))


def tune(model: nn.Module, **changes: Any) -> History:
    given: dict[str, Any] = {
        "train": lambda epoch: batches(100 + epoch),
        "validation": lambda: batches(7, 2),
        "stages": STAGES,
    } | changes
    return fine_tune(model, **given)
