"""All figures in one record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.codec.state import save_state
from secateur.errors import ModelError
from secateur.measure.accuracy import accuracy
from secateur.measure.macs import count_macs
from secateur.measure.measurement import Measurement, measure
from secateur.measure.sparsity import sparsity

INPUTS = torch.zeros(2, 3, 8, 8)
BATCHES = ((torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])),)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def test_holds_what_the_verbs_of_the_parts_give() -> None:
    model = network()
    found = measure(model, INPUTS, batches=BATCHES, latency_runs=2)
    save_state("model.safetensors", model.state_dict())
    assert found.accuracy == accuracy(model, BATCHES)
    assert found.params == 4 * 27 + 4 + 1440 + 10
    assert found.macs == count_macs(model, INPUTS)
    assert found.bytes == Path("model.safetensors").stat().st_size
    assert (found.mb, found.mib) == (found.bytes / 1_000_000, found.bytes / 1_048_576)
    assert found.latency is not None
    assert (found.latency.runs, found.latency.batch) == (2, 2)
    assert found.sparsity == sparsity(model)
    assert model.training


def test_accuracy_and_latency_are_left_out_when_not_asked_for() -> None:
    found = measure(network(), INPUTS, latency_runs=0)
    assert (found.accuracy, found.latency) == (None, None)


def test_threads_of_the_latency() -> None:
    found = [measure(network(), INPUTS, latency_runs=1, threads=threads).latency for threads in (1, 2)]
    assert [entry.threads for entry in found if entry] == [1, 2]


def test_a_model_on_another_device() -> None:
    with pytest.raises(ModelError, match=r"'0\.weight' is on cpu but the measurement was asked for on meta"):
        measure(network(), INPUTS, device="meta")


@pytest.mark.parametrize("full", [True, False])
def test_json_round_trip(full: bool) -> None:
    record = measure(network(), INPUTS, batches=BATCHES if full else None, latency_runs=int(full))
    assert Measurement.from_json(json.loads(json.dumps(record.to_json()))) == record
