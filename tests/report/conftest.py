"""A synthetic run for the report's tests: every figure here is made up, by formula."""

from __future__ import annotations

import pytest

from secateur.measure.accuracy import Accuracy
from secateur.measure.latency import Latency
from secateur.measure.macs import Macs
from secateur.measure.measurement import Measurement
from secateur.measure.sparsity import SparsityRow, SparsityTable
from secateur.recover.history import EpochRow, History
from secateur.report.ledger import ChannelRow, CheckRow, FrozenRow, Ledger, LedgerRow, RunRecord


def measurement(
    top1: float | None = 0.9889,
    params: int = 5_800_000,
    ms: float | None = 4.0,
    zeros: int = 0,
    loss: float = 0.05,
) -> Measurement:
    """A measurement whose MACs and bytes follow from `params`."""
    return Measurement(
        accuracy=None if top1 is None else Accuracy(top1, 0.9995, loss, 360),
        params=params,
        macs=Macs(40 * params, (("", 40 * params),), (("aten.relu", 8), ("aten.max_pool2d", 3)), 2),
        bytes=4 * params + 2_000,
        latency=None if ms is None else Latency(ms, 0.95 * ms, 1.1 * ms, 30, 1, 2, "cpu"),
        sparsity=SparsityTable((SparsityRow("all.weight", zeros, params),)),
    )


def history(epochs: int = 20) -> History:
    """Three stages of learning rates, smooth curves with a small wave in validation."""
    made = History()
    for epoch in range(1, epochs + 1):
        lr = 1e-3 if epoch <= epochs // 2 else 1e-4 if epoch <= 3 * epochs // 4 else 1e-6
        gap = 0.55 * 0.82**epoch
        wave = 0.006 * (-1) ** epoch if lr == 1e-3 else 0.001 * (-1) ** epoch
        train, validation = (0.04 + 1.9 * gap, 0.994 - gap), (0.11 + 1.7 * gap - 2 * wave, 0.983 - gap + wave)
        made = made.with_row(EpochRow(epoch, lr, *train, *validation, 2.0))
    return made


def layer_names(layers: int) -> list[str]:
    return [f"features.{i}.conv{i % 2 + 1}" for i in range(layers)]


def demo_record(layers: int = 16) -> RunRecord:
    """A run with every section filled."""
    names = layer_names(layers)
    rows = tuple(
        SparsityRow(f"{name}.weight", int(n * (0.05 + 0.85 * ((i * 7) % layers / layers) ** 1.5)), n)
        for i, (name, n) in enumerate((name, 1728 * (i + 1)) for i, name in enumerate(names))
    )
    widths = [64 * 2 ** (4 * i // layers) for i in range(layers)]
    channels = tuple(
        ChannelRow(name, width, int(width * (1 - 0.8 * ((i * 5) % 7) / 7)))
        for i, (name, width) in enumerate(zip(names, widths))
    )
    joined = "joined to the input of a residual sum that is frozen"
    frozen = (
        FrozenRow("classifier.weight", "its rows are the model's outputs"),
        *(FrozenRow(f"{name}.weight", joined) for name in names[:9]),
    )
    before, masked = measurement(), measurement(0.9611, 5_800_000, 4.1, 4_640_000, 0.21)
    cut, tuned = measurement(0.4167, 250_000, 2.1, loss=2.3), measurement(0.9833, 250_000, 2.1, loss=0.0612)
    stage = "[[stages]]\nlr = 1e-3\nepochs = 10\n"
    return RunRecord(
        title="Synthetic VGG on made-up digits",
        created="2024-05-01T12:00:00",
        ledger=Ledger(
            (
                LedgerRow("original", "", before, 0.0),
                LedgerRow("masked", "global L1, 80 %", masked, 0.4),
                LedgerRow("cut", "channels by sparsity", cut, 1.3),
                LedgerRow("fine-tuned", "best epoch of 20", tuned, 41.0),
            )
        ),
        recipe=f'model = "synthetic"  # <not a tag>\n\n[prune]\nsparsity = 0.8\n\n{stage}',
        conditions=(
            ("secateur", "0.1.0"),
            ("torch", "2.15.0"),
            ("device", "cpu, 2 threads"),
            ("seed", "0"),
            ("data", "made-up digits: 1,293 train, 144 validation, 360 test"),
        ),
        notes=("The head was changed from 1,000 to 10 classes, because the data has 10.",),
        sparsity=SparsityTable(rows),
        channels=channels,
        frozen=frozen,
        certificate=(
            CheckRow("permutation", "off by 2.2e-15", True),
            CheckRow("masked equals cut", "off by 3.1e-15", True),
            CheckRow("parameters as predicted", "250,000 of 250,000", True),
        ),
        histories=(("fine-tuning", history()),),
    )


@pytest.fixture(scope="session")
def demo() -> RunRecord:
    return demo_record()


@pytest.fixture(scope="session")
def long_demo() -> RunRecord:
    return demo_record(layers=150)
