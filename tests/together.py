"""Runs of training that must come out alike in one process and in several: `torchrun tests/together.py OUT`.

Each case trains for 50 steps at most, on batches of 15 images and a last one of 5 or fewer, so that slices are uneven.
In float64, for training makes rounding grow, by another factor on every machine.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth

import secateur as sc
from secateur.recover.distillation import Attention, Distillation, Features
from secateur.recover.mixing import CutMix, Mixup, OneOf
from secateur.recover.moving import RigL
from secateur.recover.parallel import leave
from secateur.recover.penalties import GroupLasso
from secateur.recover.train import Stage, fine_tune

EPOCHS = 5


class Net(nn.Module):
    """Batch norm of two kinds, four kinds of draws, and a layer that nothing reads."""

    def __init__(self, seed: int = 0, *, rough: bool = True, recomputed: bool = False, flat: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.rough, self.recomputed = rough, recomputed
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.drop = nn.Sequential(nn.Dropout2d(0.1), nn.Dropout(0.1)) if rough else nn.Identity()
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.hidden = nn.Linear(128, 12, bias=not flat)
        self.norm = nn.BatchNorm1d(12, momentum=None) if flat else nn.Identity()
        self.head, self.unused = nn.Linear(12, 4), nn.Linear(3, 3)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        images = checkpoint(self.first, images, use_reentrant=False) if self.recomputed else self.first(images)
        x = self.drop(images)
        branch = self.second(x)
        if self.rough:
            branch = functional.dropout(stochastic_depth(branch, 0.2, "row", self.training), 0.1, self.training)
        x = functional.avg_pool2d(functional.relu(x + branch), 2).flatten(1)
        return self.head(functional.relu(self.norm(self.hidden(x))))


@dataclass(frozen=True)
class Result:
    """What came of a case: the losses as told step by step, the rows, and the model's state."""

    losses: list[float]
    rows: list[list[float]]
    best: int
    state: dict[str, Tensor]


class BrokenOffError(Exception):
    """Raised in the middle of a run."""


def batches(seed: int, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    for size in sizes:
        images = torch.randn(size, 3, 8, 8, generator=draw, dtype=torch.float64)
        yield images, (images.mean((1, 2, 3)) * 30 + 2).round().long().clamp(0, 3)


def train(net: nn.Module, *, last: int = 5, until: int = EPOCHS, rate: float = 0.05, **options: Any) -> Result:
    """Trains for 5 epochs of 10 steps, or breaks off after some."""
    losses: list[float] = []

    def epoch(number: int) -> list[tuple[Tensor, Tensor]]:
        if number == until:
            raise BrokenOffError
        return list(batches(100 + number, [15] * 9 + [last]))

    torch.manual_seed(5)
    history = fine_tune(
        net,
        epoch,
        lambda: batches(7, [21, 4, 1]),
        [Stage(rate, EPOCHS)],
        batches_per_epoch=10,
        on_step=lambda step, steps, loss: losses.append(loss),
        **options,
    )
    rows = [[r.train_loss, r.train_accuracy, r.validation_loss, r.validation_accuracy] for r in history.rows]
    return Result(losses, rows, history.best_epoch, {name: tensor.clone() for name, tensor in net.state_dict().items()})


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, weight_decay=0.05)


def plain(**options: Any) -> Result:
    return train(Net(), weight_decay=5e-4, nesterov=True, label_smoothing=0.1, **options)


def rich(net: nn.Module | None = None, **options: Any) -> Result:
    mix = OneOf((Mixup(0.4), CutMix(1.0)))
    given = {"optimizer": adamw, "ema": 0.9, "clip": 0.3, "mix": mix, "schedule": "one-cycle", "rate": 0.01}
    return train(net or Net(), **{**given, **options})


def taught() -> Result:
    whole = Net(1, rough=False).eval()
    example = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    groups = sc.find_groups(whole, example)
    plan = sc.allocate(sc.score(whole, groups, sc.Magnitude()), sc.Uniform(0.5))
    net = sc.apply(whole, plan)
    lesson = Distillation(whole, matches=(Features(plan, ("first.0", "second.0")), Attention(("second.0",), 10.0)))
    lasso = GroupLasso(sc.find_groups(net, example))
    return train(net, distill=lesson, penalty=lasso, strength=1e-3, rate=0.01)


def recomputed() -> Result:
    return train(Net(recomputed=True))


def masked() -> Result:
    """Masks that move: which weights come back is told by gradients of the whole batch."""
    net = Net()
    masks = sc.find_masks(net, 0.6)
    result = train(net, masks=RigL(masks, every=5), ema=0.9)
    assert all(int((result.state[row.name] == 0).sum()) >= row.zeros for row in masks.table().rows)
    return result


def few() -> Result:
    """The last batch has fewer images than processes; over two numbers batch norm would magnify rounding."""
    return train(Net(flat=False), last=2)


def sharded() -> Result:
    return rich(parallel="sharded")


CASES: tuple[Callable[[], Result], ...] = (plain, rich, taught, recomputed, sharded, masked)


def broken_off(folder: Path, **options: Any) -> None:
    """Leaves a checkpoint after two epochs of `rich`."""
    try:
        rich(checkpoint=folder, until=2, **options)
    except BrokenOffError:
        return
    raise AssertionError("the run was not broken off")


def refusals() -> dict[str, str]:
    """What each process says where batches differ, and where the loss is not finite."""
    said = {}
    own = int(os.environ["RANK"])

    def endless(number: int) -> list[tuple[Tensor, Tensor]]:
        return [(images * float("inf"), labels) for images, labels in batches(0, [6])]

    for name, data in (("other", lambda number: batches(own, [6])), ("endless", endless)):
        try:
            fine_tune(Net(), data, lambda: batches(7, [4]), [Stage(0.1, 1)])
        except sc.SecateurError as error:
            said[name] = str(error)
    return said


def save(result: Result, path: Path) -> None:
    said = {"losses": result.losses, "rows": result.rows, "best": result.best}
    save_file(result.state, f"{path}.safetensors", {"result": json.dumps(said)})


def main(out: Path) -> None:
    own, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    if size > 2:
        save(few(), out / f"few-{own}")
        save(rich(checkpoint=out / "two"), out / f"three-{own}")
        return
    for case in CASES:
        save(case(), out / f"{case.__name__}-{own}")
    broken_off(out / "two")
    broken_off(out / "shares", parallel="sharded")
    (out / f"said-{own}.json").write_text(json.dumps(refusals()))
    save(rich(checkpoint=out / "alone", parallel="sharded"), out / f"resumed-{own}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
    os._exit(0)  # as `recipe.together` ends: threads of gloo that are still there abort a usual exit now and then
