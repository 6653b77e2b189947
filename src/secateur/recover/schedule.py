"""The learning rate as a function of the step, not a scheduler's state: a run that goes on needs to know only where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from secateur.errors import TrainingError

Schedule = Literal["staged", "one-cycle", "cosine"]

# The shape of the one-cycle policy is that of `torch.optim.lr_scheduler.OneCycleLR` as it comes.
RISE, START_DIVISOR, END_DIVISOR = 0.3, 25.0, 25.0 * 1e4


@dataclass(frozen=True)
class Stage:
    """So many epochs at this learning rate (the peak, where the schedule is not staged).

    Raises:
        TrainingError: a learning rate below 0 or not finite, or epochs that are not a whole number from 0.

    >>> report = (Stage(1e-3, 10), Stage(1e-4, 5), Stage(1e-6, 5))
    >>> sum(stage.epochs for stage in report)
    20
    """

    lr: float
    epochs: int

    def __post_init__(self) -> None:
        if not 0 <= self.lr < math.inf:
            raise TrainingError(f"a stage has the learning rate {self.lr}; give a finite one of 0 or more.")
        if not isinstance(self.epochs, int) or self.epochs < 0:
            raise TrainingError(f"a stage has {self.epochs} epochs; give a whole number of 0 or more.")


def learning_rate(
    stages: Sequence[Stage],
    epoch: int,
    step: int = 0,
    *,
    schedule: Schedule = "staged",
    warmup: int = 0,
    batches_per_epoch: int = 1,
) -> float:
    """The learning rate of one step.

    - staged: that of the epoch's stage.
    - cosine: that times (1 + cos(pi t)) / 2, where t is the share of all steps already done (Loshchilov and
      Hutter, arXiv 1608.03983, eq. 5, without restarts).
    - one-cycle: that times a factor that rises from 1/25 to 1 over the first 30 % of all steps and then falls
      to 1/250000, both as half a cosine (Smith and Topin, arXiv 1708.07120, in PyTorch's form of it).

    In the first `warmup` epochs, of W steps together, the rate is instead (n + 1) / W of the stage's at step n (Goyal
    et al., arXiv 1706.02677, section 2.2); the curve runs over the steps after them.

    Args:
        stages: with `epoch + 1` epochs or more in all.
        epoch: counted from 0.
        step: counted from 0 within the epoch.
        schedule: see above.
        warmup: so many epochs, fewer than there are.
        batches_per_epoch: the steps of an epoch, for warm-up, cosine and one-cycle.

    >>> stages = (Stage(0.1, 2), Stage(0.01, 1))
    >>> [learning_rate(stages, epoch) for epoch in range(3)]
    [0.1, 0.1, 0.01]
    >>> learning_rate((Stage(0.1, 2),), 1, schedule="cosine", batches_per_epoch=5)
    0.05
    >>> [learning_rate((Stage(0.1, 2),), 0, step, warmup=1, batches_per_epoch=4) for step in range(4)]
    [0.025, 0.05, 0.07500000000000001, 0.1]
    """
    peak = [stage.lr for stage in stages for _ in range(stage.epochs)][epoch]
    rise = warmup * batches_per_epoch
    total = batches_per_epoch * sum(stage.epochs for stage in stages) - rise
    done = epoch * batches_per_epoch + step - rise
    if done < 0:
        return peak * ((done + rise + 1) / rise)
    if schedule == "staged":
        return peak
    if schedule == "cosine":
        return peak * _half_cosine(1.0, 0.0, done / total)
    top = max(RISE * total - 1, 0.0)
    if done < top:
        return peak * _half_cosine(1 / START_DIVISOR, 1.0, done / top)
    return peak * _half_cosine(1.0, 1 / END_DIVISOR, (done - top) / max(total - 1 - top, 1))


def _half_cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
