"""What a training run did: one row per epoch, and which epoch was best.

`EpochRow` and `History` are plain records of numbers: they go to JSON and back unchanged, so the checkpoint,
the run folder and the report all keep the same thing. The rule for the best epoch stands here, once; `tally.py`
gathers the figures of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.errors import RunError, TrainingError


@dataclass(frozen=True)
class EpochRow:
    """The figures of one epoch.

    Attributes:
        epoch: counted from 1.
        lr: learning rate of the epoch's last step.
        train_loss: mean over the epoch's images of the loss that was minimised (label smoothing, distillation and
            penalty included; weight decay and proximal steps not), in training mode, while the weights were changing.
        train_accuracy: fraction in [0, 1] of those images that were classified correctly, likewise; of a mixed image
            the label with the larger share counts, and images without a label do not.
        validation_loss: mean cross-entropy over the validation images, in evaluation mode, without smoothing; of the
            averaged weights, where they are averaged.
        validation_accuracy: fraction in [0, 1], likewise.
        seconds: wall-clock time of training and validation, without writing the checkpoint.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    seconds: float


@dataclass(frozen=True)
class History:
    """The rows of a run in order, the number of its best epoch, and what else there is to say.

    Attributes:
        rows: one per finished epoch; `rows[i].epoch == i + 1`.
        best_epoch: the one whose weights are kept, counted from 1; 0 while no epoch is finished.
        notes: sentences for the report, such as that a damaged checkpoint was passed over, or bf16 not used.

    >>> row = EpochRow(1, 0.1, 0.7, 0.5, 0.6, 0.75, 1.5)
    >>> history = History().with_row(row)
    >>> history.best_epoch, history.best.validation_accuracy
    (1, 0.75)
    >>> History.from_json(history.to_json()) == history
    True
    """

    rows: tuple[EpochRow, ...] = ()
    best_epoch: int = 0
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> EpochRow:
        """The row of the best epoch.

        Raises:
            TrainingError: no epoch is finished.
        """
        if not self.best_epoch:
            raise TrainingError("there is no best epoch, because no epoch is finished; train for one.")
        return self.rows[self.best_epoch - 1]

    def with_row(self, row: EpochRow, *, last: bool = False) -> History:
        """This history with one more epoch, which is the new best if `better` says so, or if the `last` is to be it.

        >>> History().with_row(EpochRow(1, 0.1, 0.7, 0.5, 0.6, 0.75, 1.5)).rows[0].lr
        0.1
        """
        best = row.epoch if last or not self.best_epoch or better(row, self.best) else self.best_epoch
        return dataclasses.replace(self, rows=(*self.rows, row), best_epoch=best)

    def with_notes(self, *notes: str) -> History:
        """This history with more notes, but for those it has.

        >>> History(notes=("checked",)).with_notes("checked", "resumed").notes
        ('checked', 'resumed')
        """
        return dataclasses.replace(self, notes=tuple(dict.fromkeys((*self.notes, *notes))))

    def to_json(self) -> dict[str, Any]:
        """The history as JSON values.

        >>> History(notes=("checked",)).to_json()
        {'rows': [], 'best_epoch': 0, 'notes': ['checked']}
        """
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {"rows": rows, "best_epoch": self.best_epoch, "notes": list(self.notes)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> History:
        """The history that `to_json` wrote.

        Raises:
            RunError: `value` is not such a history.

        >>> History.from_json({"rows": [], "best_epoch": 0, "notes": []})
        History(rows=(), best_epoch=0, notes=())
        """
        try:
            rows = tuple(EpochRow(**row) for row in value["rows"])
            best, notes = int(value["best_epoch"]), tuple(value["notes"])
        except (KeyError, TypeError, ValueError) as error:
            what = f"this is not a training history ({type(error).__name__}: {error})"
            raise RunError(f"{what}; it may be of another version: make it again.") from error
        if not min(1, len(rows)) <= best <= len(rows):
            what = f"this training history has {len(rows)} epochs and calls epoch {best} its best"
            raise RunError(f"{what}; it was edited or damaged, so make it again.")
        return cls(rows, best, notes)


def better(row: EpochRow, other: EpochRow) -> bool:
    """Whether `row` beats the earlier row `other`: higher validation accuracy, else lower validation loss.

    >>> first = EpochRow(1, 0.1, 0.7, 0.5, 0.6, 0.75, 1.5)
    >>> better(EpochRow(2, 0.1, 0.2, 0.9, 0.5, 0.75, 1.5), first), better(first, first)
    (True, False)
    """
    if row.validation_accuracy == other.validation_accuracy:
        return row.validation_loss < other.validation_loss
    return row.validation_accuracy > other.validation_accuracy
