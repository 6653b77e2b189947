"""Fine-tuning that cannot go on: the sentence it gives, what is left in the model, what is left on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import TrainingError, UnknownName
from secateur.recover.checkpoint import LATEST, model_state
from secateur.recover.train import Stage
from training import STEPS, Data, batches, network, tune


def broken(epoch: int, at: int, value: float = math.nan) -> Iterator[tuple[Tensor, Tensor]]:
    for step, (images, labels) in enumerate(batches(100 + epoch)):
        yield (images * value if epoch == at and step == 2 else images), labels


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    model, stepped = network(), []
    with pytest.raises(TrainingError, match="epoch 3, step 3") as caught:
        tune(
            model,
            train=lambda epoch: broken(epoch, 2),
            checkpoint=tmp_path,
            on_step=lambda *told: stepped.append(told),
        )
    assert str(caught.value) == (
        "epoch 3, step 3: the loss is nan, at learning rate 0.01; start again with a lower one, such as 0.001, and "
        "check that the images are finite. The model has the weights of its best epoch, 2, back; the checkpoint "
        f"after epoch 2 is kept in {tmp_path / LATEST}."
    )
    assert len(stepped) == 2 * STEPS + 2
    expected = network()
    assert tune(expected, stages=[Stage(0.1, 2)]).best_epoch == 2
    assert all(torch.equal(tensor, model_state(model)[name]) for name, tensor in model_state(expected).items())


def test_a_loss_that_is_not_finite_in_the_first_epoch(tmp_path: Path) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model_state(model).items()}
    with pytest.raises(TrainingError, match=r"epoch 1, step 3: the loss is .* The model is as it came\.$"):
        tune(model, train=lambda epoch: broken(epoch, 0), checkpoint=tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model_state(model).items())
    assert not list(tmp_path.iterdir())


def test_a_learning_rate_that_is_far_too_high() -> None:
    with pytest.raises(TrainingError, match=r"step \d: the loss is .*, at learning rate 1e\+30; .* such as 1e\+29"):
        tune(network(), stages=[Stage(1e30, 3)])


def test_weights_that_break_in_the_last_step_never_reach_a_checkpoint(tmp_path: Path) -> None:
    model = network()
    steps = 0

    @torch.no_grad()
    def after_step() -> None:
        nonlocal steps
        steps += 1
        if steps == 2 * STEPS:
            model[5].weight.fill_(math.nan)

    with pytest.raises(TrainingError, match=r"validation after epoch 2, step 1: the loss is nan.* best epoch, 1,"):
        tune(model, after_step=after_step, checkpoint=tmp_path)
    assert torch.isfinite(model[5].weight).all()
    resumed = tune(network(), checkpoint=tmp_path)
    assert len(resumed.rows) == 3


@pytest.mark.parametrize("label", [-100, -1, 3, 99])
def test_a_label_out_of_range(label: int) -> None:
    def train(epoch: int) -> Data:
        data = batches()
        data[1][1][5] = label
        return data

    with pytest.raises(TrainingError, match=f"epoch 1, step 2: there is the label {label}, and the model has 3"):
        tune(network(), train=train)
    with pytest.raises(TrainingError, match=f"the validation after epoch 1, step 2: there is the label {label}, "):
        tune(network(), validation=lambda: train(0))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train": lambda epoch: []}, r"train\(0\) gave no batch"),
        ({"train": lambda epoch: batches() if epoch < 1 else []}, r"train\(1\) gave no batch.* best epoch, 1, back\.$"),
        ({"validation": list}, r"validation\(\) gave no batch"),
        ({"stages": []}, r"the stages \[\] have no epoch"),
        ({"stages": [Stage(0.1, 0)]}, r"the stages \[Stage\(lr=0\.1, epochs=0\)\] have no epoch"),
        ({"momentum": 1.0}, r"momentum is 1\.0; give a number in \[0, 1\)"),
        ({"momentum": -0.1}, r"momentum is -0\.1"),
        ({"weight_decay": -1e-4}, r"weight_decay is -0\.0001; give 0 or more"),
        ({"weight_decay": math.inf}, "weight_decay is inf"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov needs a momentum above 0"),
        ({"label_smoothing": 1.5}, r"label_smoothing is 1\.5; give a number in \[0, 1\]"),
        ({"label_smoothing": math.nan}, "label_smoothing is nan"),
        ({"schedule": "cosine"}, "the cosine schedule runs over all steps; give batches_per_epoch"),
        ({"batches_per_epoch": 0}, "batches_per_epoch is 0; give a whole number from 1"),
    ],
)
def test_bad_input(changes: dict[str, Any], sentence: str) -> None:
    model = network()
    with pytest.raises(TrainingError, match=sentence):
        tune(model, **changes)
    assert model.training


@pytest.mark.parametrize(
    ("lr", "epochs", "sentence"),
    [
        (-0.1, 1, r"learning rate -0\.1; give a finite one of 0 or more"),
        (math.nan, 1, "learning rate nan"),
        (math.inf, 1, "learning rate inf"),
        (0.1, -1, "-1 epochs; give a whole number of 0 or more"),
        (0.1, 1.5, r"1\.5 epochs; give a whole number"),
    ],
)
def test_a_stage_out_of_range(lr: float, epochs: int, sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence):
        Stage(lr, epochs)


def test_unknown_schedule() -> None:
    with pytest.raises(UnknownName, match="unknown schedule 'cosin'; did you mean 'cosine'"):
        tune(network(), schedule="cosin")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x.flatten(1)), x


def test_outputs_and_labels_that_do_not_fit() -> None:
    with pytest.raises(TrainingError, match="the model gives a tuple; wrap it so that it gives logits alone"):
        tune(Pair())
    with pytest.raises(TrainingError, match=r"outputs \(16, 4, 4, 4\) and torch.int64 labels \(16,\) do not fit"):
        tune(network()[:3])
    for labels in (torch.zeros(16, 3), torch.zeros(16), torch.zeros(9, dtype=torch.int64)):
        data = [(torch.zeros(16, 1, 6, 6), labels)]
        with pytest.raises(TrainingError, match=r"do not fit each other; logits .* one whole number for each image"):
            tune(network(), train=lambda epoch, data=data: data)
