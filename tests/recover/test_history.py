"""The rule for the best epoch, the round trip through JSON, and the tally's sums and refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from secateur.errors import RunError, TrainingError
from secateur.recover.history import EpochRow, History, better
from secateur.recover.objective import label_loss
from secateur.recover.tally import Tally


def row(epoch: int, accuracy: float, loss: float) -> EpochRow:
    return EpochRow(epoch, 0.1 / 3, 1.0, 0.5, loss, accuracy, 0.25)


def history(*figures: tuple[float, float]) -> History:
    found = History()
    for epoch, (accuracy, loss) in enumerate(figures, start=1):
        found = found.with_row(row(epoch, accuracy, loss))
    return found


@pytest.mark.parametrize(
    ("figures", "best"),
    [
        ([(0.5, 1.0)], 1),
        ([(0.5, 1.0), (0.7, 2.0), (0.6, 0.1)], 2),  # accuracy before loss
        ([(0.5, 1.0), (0.5, 0.9), (0.5, 0.95)], 2),  # at a tie the lower loss
        ([(0.5, 1.0), (0.5, 1.0), (0.5, 1.0)], 1),  # at a full tie the earlier
        ([(0.0, 9.0), (0.0, 8.0)], 2),
    ],
)
def test_best_epoch(figures: list[tuple[float, float]], best: int) -> None:
    found = history(*figures)
    assert found.best_epoch == best
    assert found.best == found.rows[best - 1]


def test_better_is_strict() -> None:
    assert better(row(2, 0.6, 1.0), row(1, 0.5, 0.1))
    assert better(row(2, 0.5, 0.1), row(1, 0.5, 0.2))
    assert not better(row(2, 0.5, 0.2), row(1, 0.5, 0.2))
    assert not better(row(2, 0.4, 0.1), row(1, 0.5, 0.2))


def test_json_round_trip_keeps_every_bit() -> None:
    before = History((*history((1 / 3, math.pi), (0.1 + 0.2, 1e-17)).rows,), 2, ("one", "two"))
    after = History.from_json(json.loads(json.dumps(before.to_json())))
    assert after == before
    assert after.rows[1].validation_accuracy == 0.1 + 0.2


def test_no_best_before_the_first_epoch() -> None:
    with pytest.raises(TrainingError, match="no epoch is finished"):
        History().best  # noqa: B018


@pytest.mark.parametrize("value", [{}, {"rows": [{"epoch": 1}], "best_epoch": 1, "notes": []}, {"rows": 3}])
def test_json_of_something_else(value: dict[str, object]) -> None:
    with pytest.raises(RunError, match="not a training history"):
        History.from_json(value)


@pytest.mark.parametrize("best", [0, 3, -1])
def test_json_with_a_best_epoch_that_is_not_there(best: int) -> None:
    value = history((0.5, 1.0), (0.6, 1.0)).to_json() | {"best_epoch": best}
    with pytest.raises(RunError, match=f"2 epochs and calls epoch {best} its best"):
        History.from_json(value)


def fail(sentence: str) -> None:
    raise TrainingError(sentence)


def batches(sizes: tuple[int, ...] = (5, 3, 4, 2, 1)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(n, 4, generator=generator, dtype=torch.float64),
            torch.randint(4, (n,), generator=generator),
        )
        for n in sizes
    ]


@pytest.mark.parametrize("every", [1, 2, 3, 32])
def test_tally_is_the_mean_over_images(every: int) -> None:
    tally = Tally("epoch 1", every, fail)
    for outputs, labels in batches():
        tally.add(functional.cross_entropy(outputs, labels), outputs, labels, 0.1)
    tally.read()
    outputs, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    by_hand = -sum(
        math.log(math.exp(logits[label]) / sum(math.exp(logit) for logit in logits))
        for logits, label in zip(outputs.tolist(), labels.tolist(), strict=True)
    )
    assert tally.loss == pytest.approx(by_hand / 15, rel=1e-12)
    assert tally.accuracy == (outputs.argmax(1) == labels).sum().item() / 15
    assert (tally.batches, tally.images) == (5, 15)


def test_tally_reads_the_first_batch_and_then_every_so_many() -> None:
    tally, read = Tally("epoch 1", 3, fail), []
    assert math.isnan(tally.loss)
    assert math.isnan(tally.accuracy)
    for outputs, labels in batches((1,) * 8):
        tally.add(functional.cross_entropy(outputs, labels), outputs, labels, 0.1)
        read.append(tally.batches)
    assert read == [1, 1, 1, 4, 4, 4, 7, 7]
    tally.read()
    tally.read()
    assert tally.batches == 8


@pytest.mark.parametrize("every", [1, 4, 32])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tally_names_the_first_step_that_is_not_finite(every: int, value: float) -> None:
    tally = Tally("epoch 7", every, fail)

    def run() -> None:
        for step, (outputs, labels) in enumerate(batches((2,) * 9)):
            outputs = outputs * (value if step >= 4 else 1)
            tally.add(functional.cross_entropy(outputs, labels), outputs, labels, 0.5)
        tally.read()

    with pytest.raises(TrainingError, match=r"epoch 7, step 5: the loss is nan, at learning rate 0\.5; .* 0\.05,"):
        run()


@pytest.mark.parametrize("label", [-1, -100, 4, 250])
def test_tally_names_a_label_out_of_range(label: int) -> None:
    tally = Tally("epoch 2", 32, fail)
    tally.add(torch.tensor(1.0), torch.zeros(2, 4), torch.tensor([0, 3]), 0.1)
    tally.add(torch.tensor(1.0), torch.zeros(2, 4), torch.tensor([1, label]), 0.1)
    with pytest.raises(TrainingError, match=f"epoch 2, step 2: there is the label {label}, .* 4 outputs"):
        tally.read()


def test_label_smoothing_is_its_formula() -> None:
    (outputs, labels), epsilon = batches((6,))[0], 0.3
    expected = 0.0
    for logits, label in zip(outputs.tolist(), labels.tolist(), strict=True):
        logs = [logit - math.log(sum(math.exp(other) for other in logits)) for logit in logits]
        target = [(1 - epsilon) * (index == label) + epsilon / 4 for index in range(4)]
        expected -= sum(share * log for share, log in zip(target, logs, strict=True)) / 6
    assert label_loss(outputs, labels, epsilon).item() == pytest.approx(expected, rel=1e-12)
    assert label_loss(outputs, labels).item() != pytest.approx(expected, rel=1e-3)
