"""Fine-tuning against a slow copy of SGD in float64, schedules against torch's, every parameter by its effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur.errors import TrainingError
from secateur.recover.checkpoint import LATEST, model_state
from secateur.recover.history import EpochRow, History
from secateur.recover.schedule import Schedule, learning_rate
from secateur.recover.train import Stage, fine_tune
from training import STEPS, Data, batches, network, tune


def tuned(**changes: Any) -> Tensor:
    """All weights after a run, in one row."""
    model = network()
    tune(model, **changes)
    return torch.cat([tensor.flatten() for tensor in model_state(model).values()])


# The replica: softmax regression by hand, and SGD line by line as torch.optim.SGD's documentation gives it.


class Replica:
    def __init__(self, weight: np.ndarray, bias: np.ndarray, **settings: float) -> None:
        self.values, self.buffers, self.settings = [weight.copy(), bias.copy()], [None, None], settings

    def loss(self, images: np.ndarray, labels: np.ndarray, epsilon: float) -> tuple[float, list[np.ndarray]]:
        logits = images @ self.values[0].T + self.values[1]
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        target = (1 - epsilon) * np.eye(logits.shape[1])[labels] + epsilon / logits.shape[1]
        slope = (np.exp(logs) - target) / len(labels)
        return -(target * logs).sum() / len(labels), [slope.T @ images, slope.sum(0)]

    def step(self, images: np.ndarray, labels: np.ndarray, lr: float) -> float:
        loss, gradients = self.loss(images, labels, self.settings["label_smoothing"])
        for index, gradient in enumerate(gradients):
            g = gradient + self.settings["weight_decay"] * self.values[index]
            if self.settings["momentum"]:
                before = self.buffers[index]
                buffer = g if before is None else self.settings["momentum"] * before + g
                self.buffers[index] = buffer
                g = g + self.settings["momentum"] * buffer if self.settings["nesterov"] else buffer
            self.values[index] = self.values[index] - lr * g
        return loss


@pytest.mark.parametrize(
    ("momentum", "nesterov", "weight_decay", "label_smoothing"),
    [(0.0, False, 0.0, 0.0), (0.9, False, 0.0, 0.0), (0.9, False, 0.05, 0.1), (0.8, True, 0.05, 0.2)],
)
def test_staged_sgd_is_the_documented_algorithm(
    momentum: float, nesterov: bool, weight_decay: float, label_smoothing: float
) -> None:
    torch.manual_seed(2)
    model = nn.Linear(5, 3).double()
    images, labels = torch.randn(64, 5, dtype=torch.float64), torch.randint(3, (64,))
    settings = {
        "momentum": momentum,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "label_smoothing": label_smoothing,
    }
    replica = Replica(model.weight.detach().numpy(), model.bias.detach().numpy(), **settings)
    train, held_out = (images[:48], labels[:48]), (images[48:], labels[48:])
    stages = [Stage(0.5, 3), Stage(0.05, 0), Stage(0.01, 2)]

    def order(epoch: int) -> Data:
        chosen = torch.randperm(48, generator=torch.Generator().manual_seed(epoch))
        return [(train[0][part], train[1][part]) for part in chosen.split(20)]  # the last batch has 8

    history = fine_tune(model, order, lambda: [held_out], stages, **settings)

    best: tuple[float, float, list[np.ndarray]] | None = None
    for epoch, lr in enumerate([0.5, 0.5, 0.5, 0.01, 0.01]):
        sums = [replica.step(x.numpy(), y.numpy(), lr) * len(y) for x, y in order(epoch)]
        loss, _ = replica.loss(held_out[0].numpy(), held_out[1].numpy(), 0.0)
        logits = held_out[0].numpy() @ replica.values[0].T + replica.values[1]
        accuracy = (logits.argmax(1) == held_out[1].numpy()).mean()
        row = history.rows[epoch]
        assert (row.epoch, row.lr) == (epoch + 1, lr)
        assert row.train_loss == pytest.approx(sum(sums) / 48, rel=1e-12)
        assert row.validation_loss == pytest.approx(loss, rel=1e-12)
        assert row.validation_accuracy == accuracy
        if best is None or (accuracy, -loss) > best[:2]:
            best = (accuracy, -loss, list(replica.values))
    assert best is not None
    np.testing.assert_allclose(model.weight.detach().numpy(), best[2][0], rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(model.bias.detach().numpy(), best[2][1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("epochs", "length"), [(1, 7), (3, 5), (10, 20)])
def test_the_schedules_are_those_of_torch(epochs: int, length: int) -> None:
    def torchs(make: Callable[[torch.optim.SGD], Any]) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        scheduler, rates = make(optimizer), []
        for _ in range(epochs * length):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step() if len(rates) < epochs * length else None
        return rates

    def ours(schedule: Schedule) -> list[float]:
        return [
            learning_rate([Stage(0.3, epochs)], epoch, step, schedule=schedule, batches_per_epoch=length)
            for epoch in range(epochs)
            for step in range(length)
        ]

    total = epochs * length
    one_cycle = torchs(
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total, cycle_momentum=False)
    )
    cosine = torchs(lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total))
    assert ours("one-cycle") == pytest.approx(one_cycle, rel=1e-9, abs=1e-12)
    assert ours("cosine") == pytest.approx(cosine, rel=1e-9, abs=1e-12)
    assert ours("staged") == [0.3] * total


def test_a_schedule_takes_the_peak_of_each_stage() -> None:
    stages = [Stage(1.0, 1), Stage(0.0, 0), Stage(0.1, 1)]
    rates = [learning_rate(stages, epoch, 0, schedule="cosine", batches_per_epoch=10) for epoch in range(2)]
    assert rates == pytest.approx([1.0, 0.05])
    short = learning_rate([Stage(1.0, 1)], 0, 0, schedule="one-cycle", batches_per_epoch=1)
    assert short == 1.0


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
def test_the_schedule_reaches_the_weights(schedule: Schedule) -> None:
    # With gradients of a constant sign and no momentum, the way a bias went is the sum of the learning rates.
    model = nn.Linear(1, 1, bias=True)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    shifted = nn.Sequential(model, Appended())
    data = [(torch.zeros(1, 1), torch.tensor([1]))] * 5
    rows = fine_tune(
        shifted, lambda epoch: data, lambda: data, [Stage(1e-3, 2)],
        momentum=0.0, schedule=schedule, batches_per_epoch=5,
    ).rows  # fmt: skip
    rates = [
        learning_rate([Stage(1e-3, 2)], epoch, step, schedule=schedule, batches_per_epoch=5)
        for epoch in range(2)
        for step in range(5)
    ]
    assert [row.lr for row in rows] == [rates[4], rates[9]]
    # softmax of (b, 0) at b near 0: the slope is 1/2.
    assert model.bias.item() == pytest.approx(-sum(rates) / 2, rel=1e-2)


class Appended(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.zeros_like(x)], 1)


KNOBS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({}, {"train": lambda epoch: batches(200 + epoch)}),
    ({}, {"stages": (Stage(0.1, 1), Stage(0.01, 2))}),
    ({}, {"stages": (Stage(0.2, 2), Stage(0.01, 1))}),
    ({}, {"momentum": 0.8}),
    ({}, {"weight_decay": 0.1}),
    ({}, {"nesterov": True}),
    ({}, {"label_smoothing": 0.1}),
    ({}, {"schedule": "cosine", "batches_per_epoch": STEPS}),
    (
        {"schedule": "cosine", "batches_per_epoch": STEPS},
        {"schedule": "one-cycle", "batches_per_epoch": STEPS},
    ),
)


@pytest.mark.parametrize(("one", "other"), KNOBS)
def test_a_knob_changes_the_weights(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert torch.equal(tuned(**one), tuned(**one))
    assert not torch.equal(tuned(**one), tuned(**other))


def test_train_is_asked_for_epochs_from_0_and_batches_per_epoch_is_checked() -> None:
    asked: list[int] = []

    def train(epoch: int) -> Data:
        asked.append(epoch)
        return batches(epoch)

    tune(network(), train=train, batches_per_epoch=STEPS)
    assert asked == [0, 1, 2]
    with pytest.raises(TrainingError, match="epoch 1 has more batches than batches_per_epoch, 3"):
        tune(network(), batches_per_epoch=3)
    with pytest.raises(TrainingError, match="epoch 1 has 4 batches, and batches_per_epoch is 5"):
        tune(network(), batches_per_epoch=5)


def test_validation_chooses_the_epoch_and_the_model_holds_it_exactly() -> None:
    seen: list[dict[str, Tensor]] = []

    def run(model: nn.Module, right: Sequence[int]) -> History:
        # Validation labels are what the model says, right for so many of the 4: the accuracy is ours to set.
        counts = iter(right)

        def validation() -> Data:
            seen.append({name: tensor.clone() for name, tensor in model_state(model).items()})
            images = batches(7, 1)[0][0][:4]
            model.eval()
            with torch.no_grad():
                said = model(images).argmax(1)
            wrong = 4 - next(counts)
            said[:wrong] = (said[:wrong] + 1) % 3
            return [(images, said)]

        return tune(model, validation=validation)

    for best, right in ((1, (3, 2, 1)), (2, (1, 3, 2)), (3, (1, 2, 3))):
        seen.clear()
        model = network()
        model.register_buffer("unsaved", torch.zeros(1), persistent=False)
        history = run(model, right)
        assert history.best_epoch == best
        assert [row.validation_accuracy for row in history.rows] == [count / 4 for count in right]
        assert all(torch.equal(tensor, seen[best - 1][name]) for name, tensor in model_state(model).items())
        assert not torch.equal(seen[0]["1.running_mean"], seen[1]["1.running_mean"])


def test_after_step_keeps_masked_weights_at_zero() -> None:
    model = network()
    mask = (torch.rand(model[5].weight.shape) > 0.5).float()
    with torch.no_grad():
        model[5].weight.mul_(mask)
    calls, escaped = 0, []

    @torch.no_grad()
    def after_step() -> None:
        nonlocal calls
        calls += 1
        escaped.append(bool((model[5].weight[mask == 0] != 0).any()))
        model[5].weight.mul_(mask)

    before = model[5].weight.detach().clone()
    tune(model, after_step=after_step, weight_decay=0.01)
    assert calls == 3 * STEPS
    # Without the call they would have moved: the gradient and momentum do not know the mask.
    assert all(escaped)
    assert (model[5].weight[mask == 0] == 0).all()
    assert not torch.equal(model[5].weight, before)


def test_modes_are_left_as_found_and_are_right_meanwhile() -> None:
    model = network()
    model.train()
    model[1].eval()
    modes: list[bool] = []
    model[1].register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    tune(model)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert modes == ([True] * STEPS + [False] * 2) * 3
    with pytest.raises(TrainingError, match="gave no batch"):
        tune(model, validation=list)
    assert (model.training, model[1].training) == (True, False)


def test_channels_last_holds_while_training_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(8, 3, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator))]
    seen: list[tuple[bool, bool]] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        held = (inputs[0], model[0].weight)
        seen.append(tuple(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in held))

    model[0].register_forward_pre_hook(look)
    for channels_last in (False, True):
        seen.clear()
        fine_tune(model, lambda epoch: data, lambda: data, [Stage(0.1, 1)], channels_last=channels_last)
        assert set(seen) == {(channels_last, channels_last)}
        assert model[0].weight.is_contiguous()


def test_frozen_parameters_stay() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    tune(model, weight_decay=0.1)
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[0].bias, network()[0].bias)
    with pytest.raises(TrainingError, match="no parameter of the model needs a gradient"):
        tune(network().requires_grad_(False))


def test_on_epoch_and_on_step_are_told() -> None:
    rows: list[EpochRow] = []
    steps: list[tuple[int, int, float]] = []
    history = tune(network(), on_epoch=rows.append, on_step=lambda *told: steps.append(told))
    assert tuple(rows) == history.rows
    assert [told[:2] for told in steps] == [(step, epoch * 4 + step) for epoch in range(3) for step in range(1, 5)]
    assert [steps[index][2] for index in (3, 7, 11)] == [row.train_loss for row in rows]
    assert all(row.seconds > 0 for row in rows)


def test_checkpoint_is_where_it_was_asked_for(tmp_path: Path) -> None:
    written: list[bool] = []
    path = tmp_path / "here" / LATEST
    tune(network(), checkpoint=tmp_path / "here", on_epoch=lambda row: written.append(path.exists()))
    assert written == [True] * 3
    tune(network())
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_device() -> None:
    assert torch.equal(tuned(device="cpu"), tuned(device=torch.device("cpu")))
    with pytest.raises(TrainingError, match="the device 'cuda:99' cannot be used on this machine"):
        tune(network(), device="cuda:99")
    with pytest.raises(TrainingError, match="the device 'gpu' cannot be used"):
        tune(network(), device="gpu")


def test_small_integer_labels_will_do() -> None:
    narrow = [(images, labels.to(torch.uint8)) for images, labels in batches()]
    assert torch.equal(tuned(train=lambda epoch: narrow), tuned(train=lambda epoch: batches()))
