"""`torchrun -m secateur`: one run folder, one voice, an end in seconds, and the numbers of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from secateur.cli import main
from secateur.recipe.run import read_record

NETWORK = """
import os
from torch import nn

def make(classes=10):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(),
        nn.Dropout(0.1), nn.Linear(32, classes)
    )

def odd(classes=10):
    if os.environ.get("RANK") == "1":
        raise ValueError("one of them cannot")
    return make(classes)
"""
RECIPE = """
threads = 1
[data]
source = "digits"
batch_size = 250
[model]
source = "nets.py:make"
[[steps]]
kind = "train"
stages = [{lr = 0.1, epochs = 3}]
mixup = 0.2
[[steps]]
kind = "cut"
sparsity = 0.5
[[steps]]
kind = "train"
stages = [{lr = 0.02, epochs = 40}]
"""
FILES = sorted(
    ["journal.jsonl", "ledger.json", "metrics.jsonl", "model", "plots", "recipe.toml", "report.html", "run.json"]
)


@pytest.fixture(autouse=True)
def files(empty_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("nets.py").write_text(NETWORK)
    Path("long.toml").write_text(RECIPE)
    Path("short.toml").write_text(RECIPE.replace("40", "2").replace("nets.py:make", "nets.py:odd"))
    monkeypatch.setattr("secateur.recipe.run.save_plots", lambda record, folder: ())
    monkeypatch.setattr("secateur.recipe.run.write_page", lambda record, path: None)


def two_processes(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "secateur"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, env=environment)


def spoken(text: str) -> list[str]:
    """What secateur itself has said, without progress and torchrun's own words."""
    return [line for line in text.splitlines() if line.startswith("secateur:")]


def epochs(folder: str) -> list[dict[str, float]]:
    path = Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(epoch: int, going: subprocess.Popen[str]) -> None:
    while len(epochs("run")) < epoch:
        assert going.poll() is None, going.stderr and going.stderr.read()
        time.sleep(0.05)


def test_a_run_in_two_processes_is_broken_off_and_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    going = two_processes("compress", "long.toml", "--out", "run")
    wait_for(6, going)
    going.send_signal(signal.SIGINT)  # as Ctrl-C: torchrun passes it on to each
    start = time.monotonic()
    assert spoken(going.communicate(timeout=60)[1]) == ["secateur: interrupted; go on with: secateur resume run"]
    assert time.monotonic() - start < 30
    assert not Path("run/run.json").exists()

    going = two_processes("resume", "run")
    assert not spoken(going.communicate(timeout=200)[1])
    assert going.returncode == 0
    assert capfd.readouterr().out.count("report: run/report.html") == 1
    assert ("processes", "2") in read_record("run").conditions
    assert sorted(path.name for path in Path("run").iterdir()) == FILES

    assert main(["compress", "long.toml", "--out", "alone"]) == 0
    assert len(epochs("alone")) == 43
    for found, expected in zip(epochs("run"), epochs("alone"), strict=True):
        assert found["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-4)
        assert found["validation_accuracy"] == expected["validation_accuracy"]


def test_a_failure_in_one_process_ends_both_with_one_message() -> None:
    start = time.monotonic()
    going = two_processes("compress", "short.toml", "--out", "run")
    error = going.communicate(timeout=100)[1]
    assert going.returncode == 1
    assert time.monotonic() - start < 90
    assert len([line for line in error.splitlines() if "one of them cannot" in line]) == 1
