"""The figures of an epoch, gathered batch by batch without making the processor wait for the device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from secateur.recover.objective import UNLABELLED


class Tally:
    """Loss and hits over the batches of one epoch; they wait on the device until `every` are read at once.

    Reading makes the processor wait for all work under way on an accelerator; on the CPU it costs nothing.

    Args:
        where: the epoch in words, for messages.
        every: batches between two readings. The first batch is always read by itself.
        fail: called with a sentence at the first batch that has a wrong label or a loss that is not finite.
        unlabelled: images may be `UNLABELLED`; the accuracy is then that of the others.

    >>> tally = Tally("epoch 1", 1, fail=print)
    >>> tally.add(torch.tensor(0.5), torch.zeros(4, 2), torch.tensor([0, 1, 1, 1]), lr=0.1)
    >>> tally.loss, tally.accuracy
    (0.5, 0.25)
    """

    def __init__(
        self, where: str, every: int, fail: Callable[[str], object], unlabelled: bool = False
    ) -> None:
        self.where, self.every, self.fail, self.unlabelled = where, every, fail, unlabelled
        self.batches = self.images = self.labelled = self.hits = 0
        self.total = 0.0
        self._losses: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._known: list[tuple[int, int, float]] = []

    @property
    def loss(self) -> float:
        """Mean over the images read so far; NaN before the first."""
        return self.total / self.images if self.images else math.nan

    @property
    def accuracy(self) -> float:
        """Fraction in [0, 1] of the labelled images read so far; NaN before the first."""
        return self.hits / self.labelled if self.labelled else math.nan

    def add(self, loss: Tensor, outputs: Tensor, labels: Tensor, lr: float) -> None:
        """Notes a batch: its mean loss, `outputs` (n, classes), int64 `labels` (n,), and the learning rate."""
        self._losses.append(loss.detach())
        none = (labels == UNLABELLED) & self.unlabelled
        least, most = labels.masked_fill(none, 0).aminmax()
        self._counts += [(outputs.detach().argmax(1) == labels).sum(), none.sum(), least, most]
        self._known.append((len(labels), outputs.shape[1], lr))
        if len(self._known) == self.every or not self.batches:
            self.read()

    def read(self) -> None:
        """Takes in the batches that are waiting."""
        if not self._known:
            return
        losses, counts = torch.stack(self._losses).tolist(), torch.stack(self._counts).tolist()
        for index, (images, classes, lr) in enumerate(self._known):
            hits, without, least, most = counts[4 * index : 4 * index + 4]
            loss = losses[index]
            self.batches += 1
            if least < 0 or most >= classes:
                self.fail(
                    f"{self.where}, step {self.batches}: there is the label {least if least < 0 else most}, "
                    f"and the model has {classes} outputs, for labels 0 to {classes - 1}; put the labels or "
                    "the model's last layer right."
                )
            if not math.isfinite(loss):
                self.fail(
                    f"{self.where}, step {self.batches}: the loss is {loss}, at learning rate {lr:g}; start "
                    f"again with a lower one, such as {lr / 10:g}, and check that the images are finite."
                )
            self.images += images
            self.labelled += images - without
            self.hits += hits
            self.total += loss * images
        self._losses, self._counts, self._known = [], [], []
