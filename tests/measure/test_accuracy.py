"""Accuracy is counted right, says what is wrong with its inputs, and leaves the model as it was."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import DataError, ModelError
from secateur.measure.accuracy import Accuracy, accuracy, evaluating

Batches = list[tuple[Tensor, Tensor]]


def batches(n: int = 50, classes: int = 10, size: int = 16) -> Batches:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(n, classes, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    return list(zip(outputs.split(size), labels.split(size)))


def whole(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    outputs, labels = zip(*parts)
    return torch.cat(outputs), torch.cat(labels)


class Fixed(nn.Module):
    """Gives the same answer to every input, and notes the device and the mode that it was called in."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer
        self.seen: list[tuple[str, bool, bool]] = []

    def forward(self, x: Tensor) -> object:
        self.seen.append((x.device.type, self.training, torch.is_grad_enabled()))
        return self.answer


def test_equals_the_slow_count() -> None:
    parts = batches()
    outputs, labels = whole(parts)
    ranks = [sorted(row, reverse=True).index(row[label]) for row, label in zip(outputs.tolist(), labels.tolist())]
    found = accuracy(nn.Identity(), parts)
    assert found.images == 50
    assert found.top1 == sum(rank < 1 for rank in ranks) / 50
    assert found.top5 == sum(rank < 5 for rank in ranks) / 50
    assert found.loss == pytest.approx(float(F.cross_entropy(outputs.double(), labels)), rel=1e-6)
    assert (found.nonfinite, found.note) == (0, "")


def test_batch_size_does_not_matter() -> None:
    one, other = accuracy(nn.Identity(), batches(size=50)), accuracy(nn.Identity(), batches(size=7))
    assert (one.top1, one.top5, one.images) == (other.top1, other.top5, other.images)
    assert one.loss == pytest.approx(other.loss, rel=1e-12)


def test_an_empty_batch_among_others_is_nothing() -> None:
    parts = [*batches(), (torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64))]
    assert accuracy(nn.Identity(), parts) == accuracy(nn.Identity(), batches())


@pytest.mark.parametrize(("classes", "there"), [(2, False), (5, False), (6, True)])
def test_top5_needs_six_classes(classes: int, there: bool) -> None:
    assert (accuracy(nn.Identity(), batches(classes=classes)).top5 is not None) is there


def test_labels_of_any_integer_type() -> None:
    parts = [(x, y.to(torch.uint8)) for x, y in batches()]
    assert accuracy(nn.Identity(), parts) == accuracy(nn.Identity(), batches())


def test_nonfinite_outputs_are_counted_and_a_nan_is_never_right() -> None:
    outputs = torch.zeros(4, 6)
    outputs[0, 1] = outputs[1, 1] = 9.0
    outputs[2, 1] = torch.nan
    outputs[1, 3] = -torch.inf
    found = accuracy(nn.Identity(), [(outputs, torch.ones(4, dtype=torch.int64))])
    assert found.top1 == 0.5
    assert found.nonfinite == 2
    assert found.note == "2 of 4 images have outputs that are not finite numbers"
    assert found.loss != found.loss


def test_mode_and_gradients_are_as_found() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Dropout(), nn.BatchNorm1d(10).eval())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    accuracy(model, batches())
    assert [module.training for module in model] == [True, True, False]
    assert torch.is_grad_enabled()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_runs_in_eval_mode_without_gradients_on_the_device() -> None:
    model = Fixed(torch.zeros(2, 3))
    accuracy(model, [(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))])
    accuracy(model, [(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))], device="meta")
    assert model.seen == [("cpu", False, False), ("meta", False, False)]


def test_the_mode_comes_back_after_an_error() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(KeyError, match="oh"), evaluating(model):
        raise KeyError("oh")
    assert model.training


@pytest.mark.parametrize("parts", [[], [(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))]])
def test_no_images(parts: Batches) -> None:
    with pytest.raises(DataError, match="the batches hold no images"):
        accuracy(nn.Identity(), parts)


def test_a_label_beyond_the_outputs() -> None:
    with pytest.raises(ModelError, match=r"has 10 outputs but a label is 99: .* 100 classes or more"):
        accuracy(nn.Identity(), [(torch.zeros(2, 10), torch.tensor([3, 99]))])


def test_a_negative_label() -> None:
    with pytest.raises(DataError, match="a label is -1; class numbers start at 0"):
        accuracy(nn.Identity(), [(torch.zeros(2, 10), torch.tensor([3, -1]))])


@pytest.mark.parametrize("labels", [torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 10)])
def test_labels_that_are_not_one_class_each(labels: Tensor) -> None:
    with pytest.raises(DataError, match=r"labels of a batch of 2 images are torch\.\w+ of shape .* of shape \(2,\)"):
        accuracy(nn.Identity(), [(torch.zeros(2, 10), labels)])


@pytest.mark.parametrize(
    ("answer", "shown"),
    [(torch.zeros(2, 3, 4, 4), r"shape \(2, 3, 4, 4\)"), (torch.zeros(5, 3), r"shape \(5, 3\)"), ({}, "dict")],
)
def test_outputs_that_are_not_of_a_classifier(answer: object, shown: str) -> None:
    with pytest.raises(ModelError, match=f"gave {shown} for a batch of 2 images; .* outputs .2, classes."):
        accuracy(Fixed(answer), [(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))])


def test_a_model_on_another_device() -> None:
    with pytest.raises(ModelError, match="'weight' is on cpu but the measurement was asked for on meta"):
        accuracy(nn.Linear(10, 10), batches(), device="meta")


@pytest.mark.parametrize("record", [Accuracy(0.915, 0.99, 0.3, 200), Accuracy(0.5, None, 0.7, 2, nonfinite=1)])
def test_json_round_trip(record: Accuracy) -> None:
    assert Accuracy.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize("loss", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_null_in_json(loss: float) -> None:
    value = json.loads(json.dumps(Accuracy(0.1, None, loss, 2, nonfinite=1).to_json(), allow_nan=False))
    assert value["loss"] is None
    found = Accuracy.from_json(value)
    assert found.loss != found.loss
    assert (found.top1, found.nonfinite) == (0.1, 1)
