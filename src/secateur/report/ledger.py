"""What a report is made from: the ledger over the whole run, and the run's other plain records.

`Ledger` holds one `Measurement` per step; `headline` and `verdict` say what became of the first one, for
better or worse. `RunRecord` is all that the tables, plots and page of this room ever see. Everything goes to
JSON and back unchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from secateur.allocate.sensitivity import Sensitivity
from secateur.errors import RunError
from secateur.measure.latency import Latency
from secateur.measure.measurement import Measurement
from secateur.measure.sparsity import SparsityTable
from secateur.recover.history import History
from secateur.report import numbers

OTHER_CONDITIONS = "other conditions"


@dataclass(frozen=True)
class LedgerRow:
    """What the model measured after one step.

    Attributes:
        step: what was done, in a few words ("original", "cut", "fine-tuned").
        note: what there is to add, or "".
        measurement: the model as it then was.
        seconds: wall-clock time of the step, without the measuring.
        speedup: how many times as fast it is as the first row's model, where the two were timed by turns.
    """

    step: str
    note: str
    measurement: Measurement
    seconds: float
    speedup: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        return {
            "step": self.step,
            "note": self.note,
            "measurement": self.measurement.to_json(),
            "seconds": self.seconds,
            "speedup": self.speedup,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LedgerRow:
        """The row that `to_json` wrote; raises `RunError` if `value` is not such a row."""
        with _reading("ledger row"):
            measured = Measurement.from_json(value["measurement"])
            speedup = None if value["speedup"] is None else float(value["speedup"])
            return cls(str(value["step"]), str(value["note"]), measured, float(value["seconds"]), speedup)


@dataclass(frozen=True)
class Figure:
    """One figure of the headline, such as "23.1x" "smaller file" "(553.4 MB -> 24.0 MB)".

    Attributes:
        value: the number.
        words: what it is a number of.
        detail: the two figures it was taken from.
        worse: whether the model lost by it.
    """

    value: str
    words: str
    detail: str
    worse: bool = False


@dataclass(frozen=True)
class Ledger:
    """One row per step, the first being the model as it came.

    >>> Ledger(()).verdict
    'Nothing was measured.'
    """

    rows: tuple[LedgerRow, ...]

    @property
    def headline(self) -> tuple[Figure, ...]:
        """File size, MACs, speed and accuracy: the last row against the first, those that both rows have."""
        if len(self.rows) < 2:
            return ()
        first, last = self.rows[0].measurement, self.rows[-1].measurement
        return tuple(_figures(first, last, self.rows[-1].speedup))

    @property
    def verdict(self) -> str:
        """The headline as one line, such as "23.1x smaller file, 4.2x fewer MACs, 1.1x slower"."""
        if not self.rows:
            return "Nothing was measured."
        if len(self.rows) == 1:
            return f"Measured once ({self.rows[0].step}); there is nothing yet to compare it with."
        parts = []
        for figure in self.headline:
            if figure.words == "accuracy":
                parts.append(f"accuracy {figure.detail}")
            else:
                parts.append(f"{figure.value} {figure.words}")
        return ", ".join(parts) or "The first and the last step have no measured figure in common."

    def to_json(self) -> dict[str, Any]:
        """The ledger as JSON values.

        >>> Ledger(()).to_json()
        {'rows': []}
        """
        return {"rows": [row.to_json() for row in self.rows]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        """The ledger that `to_json` wrote; raises `RunError` if `value` is not one.

        >>> Ledger.from_json({"rows": []})
        Ledger(rows=())
        """
        with _reading("ledger"):
            return cls(tuple(LedgerRow.from_json(row) for row in value["rows"]))


@dataclass(frozen=True)
class ChannelRow:
    """How many output channels (or features) a layer had and has."""

    layer: str
    before: int
    after: int


@dataclass(frozen=True)
class FrozenRow:
    """A tensor that could not be cut, and why, in words."""

    tensor: str
    reason: str


@dataclass(frozen=True)
class CheckRow:
    """One check of the certificate.

    Attributes:
        check: what was checked, such as "masked equals cut".
        value: what it gave, such as "off by 3e-15".
        passed: whether that is as it must be.
    """

    check: str
    value: str
    passed: bool


@dataclass(frozen=True)
class TrialRow:
    """A size that was tried on the way to an accuracy floor.

    Attributes:
        size: the share that was allowed to stay, such as "50.0 % of the MACs".
        accuracy: on the validation images, after recovery; None if no plan was so small.
        seconds: wall-clock time, recovery and measuring included.
        verdict: "chosen", "above", "below" or "out of reach".
    """

    size: str
    accuracy: float | None
    seconds: float
    verdict: str


@dataclass(frozen=True)
class RunRecord:
    """All that the report of one run shows; parts that a run does not have are empty.

    Attributes:
        title: the heading, such as "ResNet-56 on CIFAR-10".
        created: when, as an ISO 8601 date or date and time.
        ledger: the measured steps.
        recipe: the recipe as run, as TOML text.
        conditions: pairs of (name, value): versions, threads, device, seed, data and the sizes of its parts.
        notes: whole sentences that the reader should know.
        sparsity: zeros of each layer, as the magnitude prune found them.
        sensitivity: the loss with each group cut alone, as the last cut that went by it measured it.
        channels: channels before and after, in the order of the model.
        frozen: what could not be cut.
        certificate: the checks of the proof.
        histories: pairs of (name, history), one per training run.
        trials: the sizes that were tried, for a run with a floor.

    >>> record = RunRecord("tiny", "2024-05-01", Ledger(()))
    >>> RunRecord.from_json(record.to_json()) == record
    True
    """

    title: str
    created: str
    ledger: Ledger
    recipe: str = ""
    conditions: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    sparsity: SparsityTable | None = None
    sensitivity: Sensitivity | None = None
    channels: tuple[ChannelRow, ...] = ()
    frozen: tuple[FrozenRow, ...] = ()
    certificate: tuple[CheckRow, ...] = ()
    histories: tuple[tuple[str, History], ...] = ()
    trials: tuple[TrialRow, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values.

        >>> RunRecord("tiny", "2024-05-01", Ledger(())).to_json()["title"]
        'tiny'
        """
        return {
            "title": self.title,
            "created": self.created,
            "ledger": self.ledger.to_json(),
            "recipe": self.recipe,
            "conditions": [list(pair) for pair in self.conditions],
            "notes": list(self.notes),
            "sparsity": None if self.sparsity is None else self.sparsity.to_json(),
            "sensitivity": None if self.sensitivity is None else self.sensitivity.to_json(),
            "channels": [asdict(row) for row in self.channels],
            "frozen": [asdict(row) for row in self.frozen],
            "certificate": [asdict(row) for row in self.certificate],
            "histories": [[name, history.to_json()] for name, history in self.histories],
            "trials": [asdict(row) for row in self.trials],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunRecord:
        """The record that `to_json` wrote.

        Raises:
            RunError: `value` is not such a record; names the part.

        >>> RunRecord.from_json({"title": "tiny"})
        Traceback (most recent call last):
        secateur.errors.RunError: this run record has no 'created'; was it written by another version?
        """
        with _reading("run record"):
            return cls(
                title=str(value["title"]),
                created=str(value["created"]),
                ledger=Ledger.from_json(value["ledger"]),
                recipe=str(value["recipe"]),
                conditions=tuple((str(name), str(text)) for name, text in value["conditions"]),
                notes=tuple(str(note) for note in value["notes"]),
                sparsity=None if value["sparsity"] is None else SparsityTable.from_json(value["sparsity"]),
                sensitivity=None if value["sensitivity"] is None else Sensitivity.from_json(value["sensitivity"]),
                channels=tuple(ChannelRow(**row) for row in value["channels"]),
                frozen=tuple(FrozenRow(**row) for row in value["frozen"]),
                certificate=tuple(CheckRow(**row) for row in value["certificate"]),
                histories=tuple((str(name), History.from_json(rows)) for name, rows in value["histories"]),
                trials=tuple(TrialRow(**row) for row in value["trials"]),
            )


def latency_change(before: Latency | None, after: Latency | None, speedup: float | None = None) -> str:
    """What became of the latency: "1.9x faster", "1.1x slower", or why that cannot be said.

    Two latencies with other threads, batch or device are not compared. No difference is claimed below 1.1x while
    the ranges overlap, nor, where the two were timed apart, while one median lies in the other's range. "" where one
    of them is missing.

    Args:
        before, after: the two latencies.
        speedup: how many times as fast the second is, where both were timed by turns, so that whatever else the
            machine did slowed both; else the medians are compared.

    >>> before = Latency(4.0, 3.9, 4.2, runs=30, batch=1, threads=2, device="cpu")
    >>> latency_change(before, Latency(2.0, 1.9, 2.1, runs=30, batch=1, threads=2, device="cpu"))
    '2.0x faster'
    >>> latency_change(before, Latency(3.9, 3.8, 4.1, runs=30, batch=1, threads=2, device="cpu"))
    'within the spread'
    >>> busy = Latency(3.0, 1.9, 9.1, runs=30, batch=1, threads=2, device="cpu")
    >>> latency_change(before, busy), latency_change(before, busy, speedup=2.0)
    ('within the spread', '2.0x faster')
    """
    if before is None or after is None:
        return ""
    if (before.batch, before.threads, before.device) != (after.batch, after.threads, after.device):
        return OTHER_CONDITIONS
    if before == after:
        return "unchanged"
    one, two = sorted((before, after), key=lambda latency: latency.median_ms)
    overlap = two.low_ms <= one.high_ms
    inside = speedup is None and (one.high_ms >= two.median_ms or two.low_ms <= one.median_ms)
    times = (before.median_ms, after.median_ms) if speedup is None else (speedup, 1.0)
    if inside or (overlap and max(times) < 1.1 * min(times)):
        return "within the spread"
    return numbers.change(*times, "faster", "slower")


def _figures(first: Measurement, last: Measurement, speedup: float | None) -> Iterator[Figure]:
    size = numbers.megabytes
    yield from _counted(first.bytes, last.bytes, ("smaller file", "larger file", "file size"), size)
    macs = first.macs.per_image, last.macs.per_image
    yield from _counted(*macs, ("fewer MACs", "more MACs", "MACs"), numbers.scaled)
    if first.latency is not None and last.latency is not None:
        before, after = first.latency.median_ms, last.latency.median_ms
        said = latency_change(first.latency, last.latency, speedup)
        value, _, words = said.rpartition(" ")
        if said == OTHER_CONDITIONS:
            value, words = numbers.milliseconds(after), "under other conditions"
        elif words not in ("faster", "slower"):
            value, words = "same", "speed"
        yield Figure(value, words, _from_to(before, after, numbers.milliseconds), words == "slower")
    if first.accuracy is not None and last.accuracy is not None:
        before, after = first.accuracy.top1, last.accuracy.top1
        detail = f"{_from_to(before, after, numbers.percent)} ({numbers.points(before, after)})"
        yield Figure(numbers.percent(after), "accuracy", detail, after < before)


def _counted(
    before: float | None, after: float | None, words: tuple[str, str, str], form: Callable[[float], str]
) -> Iterator[Figure]:
    less, more, same = words
    size = numbers.change_size(before, after)
    if before is None or after is None or not size:
        return
    if before == after:
        yield Figure("same", same, form(after))
    else:
        yield Figure(size, less if after < before else more, _from_to(before, after, form), after > before)


def _from_to(before: float, after: float, form: Callable[[float], str]) -> str:
    return f"{form(before)} -> {form(after)}"


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turns what a damaged JSON value raises into a sentence."""
    try:
        yield
    except KeyError as error:
        raise RunError(f"this {what} has no {error}; was it written by another version?") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise RunError(f"this {what} cannot be read ({error}); was it written by another version?") from error
