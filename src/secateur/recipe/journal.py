"""What a run has done so far, a line of JSON for each finished step: all that a run folder shows but the latencies.

A line is written only once the model that the step left is on disk, so a run that was broken off goes on after
the last line. `record` makes of the lines what the report shows; `metrics` is every epoch in order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.allocate.sensitivity import Sensitivity
from secateur.codec.files import append_line
from secateur.errors import RunError
from secateur.measure.sparsity import SparsityTable
from secateur.recover.history import History
from secateur.report.ledger import ChannelRow, CheckRow, FrozenRow, Ledger, LedgerRow, RunRecord

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What a step has to show besides the model.

    Attributes:
        label: what was done, in a word or two.
        note: what to add in the ledger, or "".
        notes: whole sentences for the reader.
        sparsity: the zeros that a magnitude prune put, or would put, into each layer.
        sensitivity: the loss with each group cut alone, where the cut went by it.
        channels: of each layer, before and after.
        frozen: what could not be cut.
        certificate: the checks of the proof.
        history: the epochs of a training step.
    """

    label: str
    note: str = ""
    notes: tuple[str, ...] = ()
    sparsity: SparsityTable | None = None
    sensitivity: Sensitivity | None = None
    channels: tuple[ChannelRow, ...] = ()
    frozen: tuple[FrozenRow, ...] = ()
    certificate: tuple[CheckRow, ...] = ()
    history: History | None = None


@dataclass(frozen=True)
class Entry:
    """A finished step: its number (0 is the model as it came), what it did, and what the model then measured."""

    step: int
    outcome: Outcome
    row: LedgerRow | None

    def to_json(self) -> dict[str, Any]:
        """The entry as JSON values."""
        outcome = self.outcome
        return {
            "step": self.step,
            "label": outcome.label,
            "note": outcome.note,
            "notes": list(outcome.notes),
            "row": self.row and self.row.to_json(),
            "sparsity": outcome.sparsity and outcome.sparsity.to_json(),
            "sensitivity": outcome.sensitivity and outcome.sensitivity.to_json(),
            "channels": [asdict(row) for row in outcome.channels],
            "frozen": [asdict(row) for row in outcome.frozen],
            "certificate": [asdict(row) for row in outcome.certificate],
            "history": outcome.history and outcome.history.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Entry:
        """The entry that `to_json` gave; KeyError or TypeError where it is not one."""
        outcome = Outcome(
            label=value["label"],
            note=value["note"],
            notes=tuple(value["notes"]),
            sparsity=value["sparsity"] and SparsityTable.from_json(value["sparsity"]),
            sensitivity=value["sensitivity"] and Sensitivity.from_json(value["sensitivity"]),
            channels=tuple(ChannelRow(**row) for row in value["channels"]),
            frozen=tuple(FrozenRow(**row) for row in value["frozen"]),
            certificate=tuple(CheckRow(**row) for row in value["certificate"]),
            history=value["history"] and History.from_json(value["history"]),
        )
        return cls(value["step"], outcome, value["row"] and LedgerRow.from_json(value["row"]))


def write_entry(folder: Path, entry: Entry) -> None:
    """Adds a line to the journal of the run folder `folder`."""
    append_line(folder / JOURNAL, json.dumps(entry.to_json()))


def read_entries(folder: Path) -> tuple[Entry, ...]:
    """The finished steps of the run folder `folder`; a last line that was cut off does not count.

    Raises `RunError` where a line before the last cannot be read.
    """
    path = folder / JOURNAL
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries: list[Entry] = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(Entry.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not isinstance(error, KeyError):
                break
            raise RunError(
                f"line {number} of {str(path)!r} is not a finished step ({error}); was it edited, or written by "
                "another version? Start the run again with --force."
            ) from error
    return tuple(entries)


def record(
    entries: Sequence[Entry], *, title: str, created: str, recipe: str, conditions: Sequence[tuple[str, str]]
) -> RunRecord:
    """All that the report shows of a run with these finished steps."""
    outcomes = [entry.outcome for entry in entries]
    return RunRecord(
        title=title,
        created=created,
        ledger=Ledger(tuple(entry.row for entry in entries if entry.row is not None)),
        recipe=recipe,
        conditions=tuple(conditions),
        notes=tuple(dict.fromkeys(note for outcome in outcomes for note in outcome.notes)),
        sparsity=next((found.sparsity for found in reversed(outcomes) if found.sparsity), None),
        sensitivity=next((found.sensitivity for found in reversed(outcomes) if found.sensitivity), None),
        channels=_channels(outcomes),
        frozen=next((found.frozen for found in reversed(outcomes) if found.frozen), ()),
        certificate=tuple(check for outcome in outcomes for check in outcome.certificate),
        histories=tuple((outcome.label, outcome.history) for outcome in outcomes if outcome.history is not None),
    )


def metrics(entries: Sequence[Entry]) -> str:
    """Every epoch of every training step as lines of JSON, each with the number of its step."""
    return "".join(
        metrics_line(entry.step, asdict(row)) + "\n"
        for entry in entries
        if entry.outcome.history is not None
        for row in entry.outcome.history.rows
    )


def metrics_line(step: int, row: Mapping[str, Any]) -> str:
    """One epoch as a line of JSON.

    >>> metrics_line(2, {"epoch": 1, "lr": 0.1})
    '{"step": 2, "epoch": 1, "lr": 0.1}'
    """
    return json.dumps({"step": step, **row})


def _channels(outcomes: Sequence[Outcome]) -> tuple[ChannelRow, ...]:
    """Each layer's channels before its first cut and after its last."""
    found: dict[str, ChannelRow] = {}
    for row in (row for outcome in outcomes for row in outcome.channels):
        first = found.get(row.layer, row)
        found[row.layer] = ChannelRow(row.layer, first.before, row.after)
    return tuple(found.values())
