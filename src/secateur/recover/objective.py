"""What a training step makes smaller: the loss on the labels, a teacher's part in it, and a penalty on the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.recover.distillation import Lesson
from secateur.recover.mixing import Mixed
from secateur.recover.penalties import Penalty, Strength

UNLABELLED = -100
"""The label of an image that has none: only a teacher judges it. (What torch calls `ignore_index`.)"""


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch on the device: images as the model takes them, labels, the images' numbers, how they are mixed."""

    images: Tensor
    labels: Tensor
    numbers: Tensor | None = None
    mixed: Mixed | None = None

    @property
    def main(self) -> Tensor:
        """The label that has the larger share in each image."""
        return self.labels if self.mixed is None else self.mixed.main(self.labels)


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss of a batch; what is left out has no part in it.

    >>> import torch
    >>> objective = Objective(nn.Linear(1, 1), penalty=lambda model: torch.tensor(3.0), strength=2.0)
    >>> batch = Batch(torch.zeros(4, 1), torch.tensor([0, 1, 0, 1]))
    >>> round(objective(torch.zeros(4, 2), batch, 0).item(), 4)  # log(2) + 2 * 3
    6.6931
    """

    model: nn.Module
    smoothing: float = 0.0
    lesson: Lesson | None = None
    penalty: Penalty | None = None
    strength: Strength = 1.0

    def __call__(self, outputs: Tensor, batch: Batch, steps: int) -> Tensor:
        """The mean over the batch, of logits (n, classes), when so many steps have been taken."""
        loss = label_loss(outputs, batch.labels, self.smoothing, batch.mixed)
        if self.lesson is not None:
            loss = self.lesson.loss(batch.images, outputs, loss, batch.numbers)
        if self.penalty is not None:
            loss = loss + strength_at(self.strength, steps) * self.penalty(self.model)
        return loss


def label_loss(outputs: Tensor, labels: Tensor, smoothing: float = 0.0, mixed: Mixed | None = None) -> Tensor:
    """Cross-entropy of logits (n, classes) with labels (n,), or with both labels of mixed images; mean over n.

    An image that is `UNLABELLED` adds nothing to the sum, and is counted in n. Any other label out of range would end
    the process on a GPU; here it is moved into it, to be found by `Tally`.

    >>> outputs = torch.zeros(2, 4)
    >>> label_loss(outputs, torch.tensor([3, 1])) == 2 * label_loss(outputs, torch.tensor([3, UNLABELLED]))
    tensor(True)
    """
    labels = torch.where(labels == UNLABELLED, labels, labels.clamp(0, outputs.shape[1] - 1))

    def loss(targets: Tensor) -> Tensor:
        total = functional.cross_entropy(
            outputs, targets, ignore_index=UNLABELLED, label_smoothing=smoothing, reduction="sum"
        )
        return total / len(targets)

    if mixed is None:
        return loss(labels)
    return mixed.share * loss(labels) + (1 - mixed.share) * loss(labels[mixed.other])


def strength_at(strength: Strength, steps: int) -> float:
    """The factor of a penalty when so many steps have been taken."""
    return strength(steps) if callable(strength) else strength
