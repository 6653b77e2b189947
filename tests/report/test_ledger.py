"""Ledger, headline and verdict, and that every record survives JSON."""

import dataclasses
import json
from dataclasses import replace

import pytest

from secateur.errors import RunError
from secateur.measure.accuracy import Accuracy
from secateur.measure.latency import Latency
from secateur.measure.macs import Macs
from secateur.measure.measurement import Measurement
from secateur.measure.sparsity import SparsityTable
from secateur.report.ledger import Ledger, LedgerRow, RunRecord, latency_change

BASE = Measurement(
    accuracy=Accuracy(0.989, None, 0.1, 1000),
    params=1000,
    macs=Macs(2000, (), (), 2),
    bytes=10_000_000,
    latency=Latency(4.0, 3.9, 4.1, 30, 1, 2, "cpu"),
    sparsity=SparsityTable(()),
)


def ledger(speedup=None, **changes):
    last = LedgerRow("last", "", replace(BASE, **changes), 1.0, speedup)
    return Ledger((LedgerRow("original", "", BASE, 0.0), last))


def timed(ms, **changes):
    return replace(Latency(ms, 0.98 * ms, 1.02 * ms, 30, 1, 2, "cpu"), **changes)


def test_verdict_names_what_was_gained_and_what_it_cost():
    last = ledger(
        bytes=500_000, macs=Macs(500, (), (), 2), latency=timed(2.0), accuracy=Accuracy(0.983, None, 0.1, 1000)
    )
    assert last.verdict == (
        "20.0x smaller file, 4.0x fewer MACs, 2.0x faster, accuracy 98.90 % -> 98.30 % (-0.60 points)"
    )
    assert [figure.worse for figure in last.headline] == [False, False, False, True]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"latency": timed(4.8)}, "1.2x slower"),
        ({"latency": timed(4.1)}, "same speed"),
        ({"latency": timed(4.36)}, "9.0 % slower"),
        ({"latency": timed(3.0, low_ms=1.0, high_ms=9.0), "speedup": 1.9}, "1.9x faster"),
        ({"latency": timed(3.0, low_ms=1.0, high_ms=9.0), "speedup": 0.5}, "2.0x slower"),
        ({"latency": timed(2.0, threads=1)}, "2.00 ms under other conditions"),
        ({"bytes": 12_000_000}, "1.2x larger file"),
        ({"bytes": 9_700_000}, "3.0 % smaller file"),
        ({}, "same file size, same MACs, same speed, accuracy 98.90 % -> 98.90 % (+0.00 points)"),
        ({"macs": Macs(4000, (), (), 2)}, "2.0x more MACs"),
        ({"macs": Macs(4000, (), (), 4)}, "same MACs"),
        ({"accuracy": Accuracy(0.9925, None, 0.1, 1000)}, "accuracy 98.90 % -> 99.25 % (+0.35 points)"),
    ],
)
def test_verdict_is_honest_in_both_directions(changes, part):
    assert part in ledger(**changes).verdict


def test_what_was_not_measured_is_not_spoken_of():
    verdict = ledger(latency=None, accuracy=None).verdict
    assert verdict == "same file size, same MACs"


def test_one_row_and_no_row():
    assert Ledger((LedgerRow("original", "", BASE, 0.0),)).verdict.startswith("Measured once (original)")
    assert Ledger(()).headline == ()


@pytest.mark.parametrize("change", [{"batch": 2}, {"threads": 4}, {"device": "cuda"}])
def test_latencies_under_other_conditions_are_not_compared(change):
    assert latency_change(timed(4.0), timed(2.0, **change)) == "other conditions"


def test_a_difference_counts_only_outside_the_spread():
    busy = timed(7.0, low_ms=2.66, high_ms=11.3), timed(10.6, low_ms=2.75, high_ms=11.6)
    assert latency_change(*busy) == "within the spread"
    assert latency_change(timed(4.0), timed(3.9)) == "within the spread"
    assert latency_change(timed(4.0), timed(3.8, low_ms=3.79, high_ms=3.81)) == "5.0 % faster"


def test_models_timed_by_turns_are_compared_by_the_pairs():
    busy = timed(7.0, low_ms=2.66, high_ms=11.3), timed(10.6, low_ms=2.75, high_ms=11.6)
    assert latency_change(*busy, speedup=1.5) == "1.5x faster"
    assert latency_change(*busy, speedup=0.5) == "2.0x slower"
    assert latency_change(*busy, speedup=1.09) == "within the spread"
    assert latency_change(timed(4.0), timed(3.8, low_ms=3.79, high_ms=3.81), speedup=1.04) == "3.8 % faster"
    assert latency_change(timed(4.0), timed(2.0, threads=1), speedup=2.0) == "other conditions"


def test_one_timing_for_two_rows_is_no_change():
    assert latency_change(timed(4.0), timed(4.0)) == "unchanged"


def test_record_survives_json(demo):
    demo = replace(demo, ledger=Ledger(tuple(replace(row, speedup=1.5) for row in demo.ledger.rows)))
    assert RunRecord.from_json(json.loads(json.dumps(demo.to_json()))) == demo


def test_empty_record_survives_json():
    record = RunRecord("tiny", "2024-05-01", Ledger(()))
    assert RunRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(RunRecord)])
def test_a_record_without_a_part_is_refused_by_its_name(demo, key):
    value = demo.to_json()
    del value[key]
    with pytest.raises(RunError, match=f"run record has no '{key}'; was it written by another version"):
        RunRecord.from_json(value)


def test_damaged_parts_are_refused(demo):
    with pytest.raises(RunError, match="this ledger cannot be read"):
        Ledger.from_json({"rows": 3})
    with pytest.raises(RunError, match="this ledger row has no 'measurement'"):
        Ledger.from_json({"rows": [{"step": "cut"}]})
    with pytest.raises(RunError, match="this run record cannot be read"):
        RunRecord.from_json({**demo.to_json(), "channels": [{"layer": "a", "width": 3}]})
