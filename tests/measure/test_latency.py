"""Latency counts its runs, keeps torch's threads and the model's mode, and takes turns when comparing."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import CaptureError, ModelError
from secateur.measure import latency as room
from secateur.measure.latency import Latency, compare_latency, latency


class Noting(nn.Module):
    """Notes each call: its own name, the threads, the device of the input, the modes."""

    def __init__(self, name: str, log: list[tuple[str, int, str, bool, bool]]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def forward(self, x: Tensor) -> Tensor:
        modes = (self.training, torch.is_grad_enabled())
        self.log.append((self.name, torch.get_num_threads(), x.device.type, *modes))
        return x


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of whole seconds: each run takes 1, 3, 5, ... of them."""
    readings = iter(value for i in range(1000) for value in (100 * i, 100 * i + 2 * i + 1))
    monkeypatch.setattr(room, "time", SimpleNamespace(perf_counter=lambda: next(readings)))


@pytest.mark.usefixtures("ticks")
def test_median_and_percentiles_after_the_warmup() -> None:
    found = latency(nn.Identity(), torch.zeros(4, 3), runs=11, warmup=2)
    # Runs 2 to 12 take 5, 7, ..., 25 seconds: the 10th percentile of eleven values is the second.
    assert (found.low_ms, found.median_ms, found.high_ms) == (7000, 15000, 23000)
    assert (found.runs, found.batch) == (11, 4)


@pytest.mark.usefixtures("ticks")
def test_speedup_is_the_median_over_pairs() -> None:
    first, second, speedup = compare_latency(nn.Identity(), nn.Identity(), torch.zeros(4, 3), runs=3, warmup=0)
    assert (first.median_ms, second.median_ms) == (5000, 7000)
    assert speedup == 5 / 7


def test_runs_and_warmup_are_the_number_of_calls() -> None:
    for runs, warmup in ((3, 0), (5, 0), (3, 4)):
        model = Noting("a", [])
        assert latency(model, torch.zeros(1, 3), runs=runs, warmup=warmup).runs == runs
        assert len(model.log) == runs + warmup


def test_models_take_turns() -> None:
    log: list[tuple[str, int, str, bool, bool]] = []
    compare_latency(Noting("a", log), Noting("b", log), torch.zeros(1, 3), runs=2, warmup=1)
    assert "".join(name for name, *_ in log) == "ababab"


def test_threads_hold_during_the_runs_and_come_back() -> None:
    before = torch.get_num_threads()
    for threads in (1, 2):
        model = Noting("a", [])
        assert latency(model, torch.zeros(1, 3), runs=1, warmup=0, threads=threads).threads == threads
        assert model.log[0][1] == threads
    assert latency(nn.Identity(), torch.zeros(1, 3), runs=1).threads == before
    assert torch.get_num_threads() == before


def test_knobs_of_the_comparison() -> None:
    log: list[tuple[str, int, str, bool, bool]] = []
    first, second = Noting("a", log), Noting("b", log)
    one, two, _ = compare_latency(first, second, torch.zeros(6, 3), runs=2, warmup=0, threads=1, device="meta")
    assert (one.runs, one.batch, one.threads, one.device) == (2, 6, 1, "meta")
    assert (two.runs, two.batch, two.threads, two.device) == (2, 6, 1, "meta")
    assert [entry[2] for entry in log] == ["meta"] * 4


def test_the_inputs_go_to_the_device() -> None:
    model = Noting("a", [])
    assert latency(model, torch.zeros(1, 3), runs=1, warmup=0).device == "cpu"
    assert latency(model, {"x": torch.zeros(1, 3)}, runs=1, warmup=0, device="meta").device == "meta"
    assert [entry[2] for entry in model.log] == ["cpu", "meta"]


def test_eval_mode_without_gradients_and_back() -> None:
    model = Noting("a", [])
    latency(model, torch.zeros(1, 3), runs=1, warmup=0)
    assert model.log[0][3:] == (False, False)
    assert model.training


def test_everything_comes_back_after_an_error() -> None:
    before, model = torch.get_num_threads(), nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        latency(model, torch.zeros(1, 4), threads=1)
    assert (model.training, torch.get_num_threads()) == (True, before)


def test_bad_arguments() -> None:
    model, inputs = nn.Linear(3, 2), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="need runs >= 1, warmup >= 0 and threads >= 1; got 0, 5, None"):
        latency(model, inputs, runs=0)
    with pytest.raises(ValueError, match="got 30, -1, None"):
        latency(model, inputs, warmup=-1)
    with pytest.raises(ValueError, match="got 30, 5, 0"):
        latency(model, inputs, threads=0)
    with pytest.raises(ModelError, match="'weight' is on cpu but the measurement was asked for on meta"):
        latency(model, inputs, device="meta")
    with pytest.raises(CaptureError, match="hold no tensor; give a batch"):
        latency(nn.Identity(), 3.5, runs=1)


def test_json_round_trip() -> None:
    record = Latency(3.5, 3.0, 4.25, 30, 64, 2, "cpu")
    assert Latency.from_json(json.loads(json.dumps(record.to_json()))) == record
