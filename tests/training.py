"""What the tests of training share: a small network with dropout and batch norm, and data that it can learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

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


def one_epoch(model: nn.Module, **changes: Any) -> float:
    """Trains for an epoch of 4 steps at rate 0.1, the draws from seed 3, and gives the mean loss."""
    torch.manual_seed(3)
    (row,) = tune(model, **({"stages": [Stage(0.1, 1)]} | changes)).rows
    return row.train_loss


def plain_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
    rates: list[float] | None = None,
    data: Data | None = None,
) -> float:
    """The same in a bare PyTorch loop: `before` and `after` are called around each step of the optimizer."""
    torch.manual_seed(3)
    losses = []
    model.train()
    for step, (images, labels) in enumerate(batches(100) if data is None else data):
        if rates is not None:
            optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.zero_grad()
        value = functional.cross_entropy(model(images), labels) if loss is None else loss(images, labels)
        value.backward()
        before()
        optimizer.step()
        after()
        losses.append(value.item())
    return sum(losses) / len(losses)


def assert_same_weights(model: nn.Module, other: nn.Module, within: float = 1e-6) -> None:
    """Parameters and buffers alike, to rounding."""
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=within, atol=within, msg=name)
