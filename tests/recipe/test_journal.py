"""The journal of a run: a line per finished step, and what the report makes of the lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.errors import RunError
from secateur.measure.sparsity import SparsityRow, SparsityTable
from secateur.recipe.journal import JOURNAL, Entry, Outcome, metrics, read_entries, record, write_entry
from secateur.recover.history import EpochRow, History
from secateur.report.ledger import ChannelRow, CheckRow, FrozenRow

FIRST, SECOND = EpochRow(1, 0.1, 0.7, 0.5, 0.6, 0.75, 1.5), EpochRow(2, 0.1, 0.6, 0.6, 0.5, 0.8, 1.5)
HISTORY = History().with_row(FIRST).with_row(SECOND)
ENTRIES = (
    Entry(0, Outcome("original"), None),
    Entry(1, Outcome("trained", note="2 epochs", history=HISTORY), None),
    Entry(
        2,
        Outcome(
            "cut",
            notes=("a note",),
            sparsity=SparsityTable((SparsityRow("conv", 3, 4),)),
            channels=(ChannelRow("conv", 8, 6), ChannelRow("fc", 4, 3)),
            frozen=(FrozenRow("fc.weight", "reaches the output"),),
            certificate=(CheckRow("masked equals cut", "off by 1e-15", True),),
        ),
        None,
    ),
    Entry(3, Outcome("cut", notes=("a note",), channels=(ChannelRow("conv", 6, 2),)), None),
)


def written(folder: Path) -> Path:
    for entry in ENTRIES:
        write_entry(folder, entry)
    return folder / JOURNAL


def test_entries_come_back_as_they_were_written(tmp_path):
    written(tmp_path)
    assert read_entries(tmp_path) == ENTRIES


def test_no_journal_is_no_entries(tmp_path):
    assert read_entries(tmp_path) == ()


def test_a_last_line_that_was_cut_off_does_not_count(tmp_path):
    path = written(tmp_path)
    path.write_text(path.read_text()[:-40])
    assert read_entries(tmp_path) == ENTRIES[:-1]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    path = written(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]))
    with pytest.raises(RunError, match=r"line 2 of .*journal\.jsonl' is not a finished step .* --force"):
        read_entries(tmp_path)


def test_the_record_has_what_the_steps_had_to_show():
    made = record(ENTRIES, title="t", created="2024-05-01", recipe="seed = 0", conditions=(("seed", "0"),))
    assert made.notes == ("a note",)
    assert made.channels == (ChannelRow("conv", 8, 2), ChannelRow("fc", 4, 3))
    assert made.sparsity == ENTRIES[2].outcome.sparsity
    assert made.frozen == ENTRIES[2].outcome.frozen
    assert made.certificate == ENTRIES[2].outcome.certificate
    assert made.histories == (("trained", HISTORY),)
    assert (made.title, made.recipe, made.conditions) == ("t", "seed = 0", (("seed", "0"),))


def test_metrics_are_a_line_for_each_epoch():
    lines = [json.loads(line) for line in metrics(ENTRIES).splitlines()]
    assert [(line["step"], line["epoch"], line["validation_accuracy"]) for line in lines] == [(1, 1, 0.75), (1, 2, 0.8)]
