"""Checkpoints: a run broken off anywhere ends in the same bits; damage is found; another run is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.codec.state import load_state, read_metadata
from secateur.errors import RunError, TrainingError
from secateur.recover.checkpoint import (
    LATEST,
    NEXT,
    PREVIOUS,
    Checkpoint,
    model_state,
    read_checkpoint,
    set_model_state,
    write_checkpoint,
)
from secateur.recover.history import EpochRow, History
from secateur.recover.train import Stage, fine_tune

STAGES = (Stage(0.2, 3), Stage(0.02, 2))
STEPS = 4


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
    )


def batches(seed: int, count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count * 16, 1, 6, 6, generator=generator)
    labels = images.mean((1, 2, 3)).sign().long() + 1
    # A fifth of wrong labels, so that the validation does not just rise to the last epoch.
    labels[::5] = torch.randint(3, labels[::5].shape, generator=generator)
    return list(zip(images.split(16), labels.split(16), strict=True))


def tune(model: nn.Module, folder: Path | None, **changes: Any) -> History:
    given: dict[str, Any] = {"weight_decay": 0.01, "checkpoint": folder, "stages": STAGES} | changes
    return fine_tune(model, lambda epoch: batches(100 + epoch), lambda: batches(7, 2), **given)


def unbroken() -> tuple[nn.Module, History]:
    model = network()
    return model, tune(model, None)


def assert_same_end(model: nn.Module, history: History, folder: Path) -> None:
    expected, rows = unbroken()
    for name, tensor in model_state(expected).items():
        assert torch.equal(model_state(model)[name], tensor), name
    assert [replace(row, seconds=0) for row in history.rows] == [replace(row, seconds=0) for row in rows.rows]
    assert history.best_epoch == rows.best_epoch
    # Or the best epoch's tensors would never have been needed beside the last one's.
    assert rows.best_epoch < len(rows.rows)
    assert any(key.startswith("best/") for key in load_state(folder / LATEST))


def stop_after_epoch(epoch: int) -> Callable[[EpochRow], None]:
    def on_epoch(row: EpochRow) -> None:
        torch.rand(3)  # what a caller draws between epochs must not matter
        if row.epoch == epoch:
            raise KeyboardInterrupt

    return on_epoch


def stop_at_step(steps: int) -> Callable[[int, int, float], None]:
    def on_step(step: int, so_far: int, loss: float) -> None:
        if so_far == steps:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.parametrize("epoch", [1, 2, 3, 4, 5])
def test_broken_off_after_an_epoch(tmp_path: Path, epoch: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(network(), tmp_path, on_epoch=stop_after_epoch(epoch))
    torch.manual_seed(999)
    model = network(seed=5)
    seen: list[int] = []
    history = tune(model, tmp_path, on_epoch=lambda row: seen.append(row.epoch))
    assert seen == list(range(epoch + 1, 6))
    assert_same_end(model, history, tmp_path)


@pytest.mark.parametrize("steps", [STEPS + 1, 2 * STEPS, 4 * STEPS + 2])
def test_broken_off_within_an_epoch(tmp_path: Path, steps: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(network(), tmp_path, on_step=stop_at_step(steps))
    model, counted = network(seed=5), []
    history = tune(model, tmp_path, on_step=lambda step, so_far, loss: counted.append(so_far))
    # The epoch that was broken off is done again from its beginning.
    assert counted == list(range((steps - 1) // STEPS * STEPS + 1, 5 * STEPS + 1))
    assert_same_end(model, history, tmp_path)


def test_broken_off_in_every_epoch_and_in_the_same_process(tmp_path: Path) -> None:
    model = network()
    for epoch in range(1, 6):
        with pytest.raises(KeyboardInterrupt):
            tune(model, tmp_path, on_epoch=stop_after_epoch(epoch))
    assert_same_end(model, tune(model, tmp_path), tmp_path)


def test_broken_off_in_the_first_epoch_starts_again(tmp_path: Path) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model_state(model).items()}
    with pytest.raises(KeyboardInterrupt):
        tune(model, tmp_path, on_step=stop_at_step(2))
    assert not (tmp_path / LATEST).exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model_state(model).items())


def test_an_interrupt_gives_back_the_best_weights(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(KeyboardInterrupt):
        tune(model, tmp_path, on_step=stop_at_step(3 * STEPS + 1))
    found = read_checkpoint(tmp_path)
    assert found is not None
    assert len(found.history.rows) == 3
    assert all(torch.equal(tensor, found.best[name]) for name, tensor in model_state(model).items())


@pytest.mark.parametrize("target", [NEXT, PREVIOUS, LATEST])
def test_broken_off_while_a_checkpoint_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(network(), tmp_path, on_epoch=stop_after_epoch(3))
    really = os.replace

    def breaks_off(source: Any, goal: Any) -> None:
        if Path(goal).name == target:
            raise KeyboardInterrupt
        really(source, goal)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", breaks_off)
        with pytest.raises(KeyboardInterrupt):
            tune(network(), tmp_path)
    model = network(seed=5)
    history = tune(model, tmp_path)
    assert_same_end(model, history, tmp_path)
    assert len(history.notes) == (1 if target == LATEST else 0)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = tune(network(), tmp_path)
    written = (tmp_path / LATEST).stat().st_mtime_ns
    model = network(seed=5)
    history = tune(model, tmp_path, on_step=stop_at_step(1))
    assert history == first
    assert_same_end(model, history, tmp_path)
    assert (tmp_path / LATEST).stat().st_mtime_ns == written


def test_two_generations_and_no_more(tmp_path: Path) -> None:
    tune(network(), tmp_path / "made" / "here")
    files = sorted(path.name for path in (tmp_path / "made" / "here").iterdir())
    assert files == sorted([LATEST, PREVIOUS])
    epochs = [read_metadata(tmp_path / "made" / "here" / name)["history"].count('"epoch"') for name in files]
    assert sorted(epochs) == [4, 5]


def flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def cut(path: Path, where: int) -> None:
    path.write_bytes(path.read_bytes()[:where])


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("where", [0, 4, 300, -3000, -1])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, damage: Callable[[Path, int], None], where: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(network(), tmp_path, on_epoch=stop_after_epoch(4))
    damage(tmp_path / LATEST, where)
    model = network(seed=5)
    history = tune(model, tmp_path)
    assert_same_end(model, history, tmp_path)
    (note,) = history.notes
    assert note.startswith(f"Went on after epoch 3 from {tmp_path / PREVIOUS}, because")
    assert str(tmp_path / LATEST) in note
    assert tune(network(), tmp_path).notes == history.notes


def test_both_generations_damaged(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(network(), tmp_path, on_epoch=stop_after_epoch(3))
    flip(tmp_path / LATEST, -1)
    cut(tmp_path / PREVIOUS, 100)
    model = network()
    with pytest.raises(TrainingError, match=r"no checkpoint in .* can be used: .* Remove that folder to start"):
        tune(model, tmp_path)
    assert torch.equal(model_state(model)["0.weight"], model_state(network())["0.weight"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stages": (Stage(0.2, 3), Stage(0.02, 3))}, r"stages \[.*'epochs': 2}\], .* asks for .*'epochs': 3}\]"),
        ({"momentum": 0.5}, r"momentum 0\.9, and this run asks for 0\.5"),
        ({"weight_decay": 0.0}, r"weight_decay 0\.01, and this run asks for 0\.0"),
        ({"nesterov": True}, "nesterov False, and this run asks for True"),
        ({"label_smoothing": 0.1}, r"label_smoothing 0\.0, and this run asks for 0\.1"),
        ({"schedule": "cosine", "batches_per_epoch": STEPS}, "schedule staged, and this run asks for cosine"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(network(), tmp_path, on_epoch=stop_after_epoch(1))
    written = (tmp_path / LATEST).read_bytes()
    with pytest.raises(TrainingError, match=sentence):
        tune(network(), tmp_path, **changes)
    assert (tmp_path / LATEST).read_bytes() == written


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(network(), tmp_path, on_epoch=stop_after_epoch(1))
    wider = network()
    wider[5] = nn.Linear(64, 4)
    with pytest.raises(TrainingError, match=r"'5.weight' is float32 \(3, 64\) there and .* \(4, 64\) here"):
        tune(wider, tmp_path)
    without = network()
    without[1] = nn.Identity()
    with pytest.raises(TrainingError, match=r"'1.bias' is float32 \(4,\) there and missing here"):
        tune(without, tmp_path)
    frozen = network()
    frozen[0].requires_grad_(False)
    with pytest.raises(TrainingError, match=r"frozen parameters \[\], .* asks for \['0.weight', '0.bias'\]"):
        tune(frozen, tmp_path)


def test_a_checkpoint_gives_back_what_was_written(tmp_path: Path) -> None:
    row = EpochRow(1, 0.1, 0.7, 0.5, 0.6, 0.75, 1.5)
    history = History().with_row(row).with_row(replace(row, epoch=2, validation_accuracy=0.5))
    model = {"half": torch.tensor([1.5, -0.0]).bfloat16(), "count": torch.tensor(7), "none": torch.zeros(0, 3)}
    best = {name: tensor + 1 for name, tensor in model.items()}
    turned = {"a": torch.arange(6.0).reshape(2, 3).T}
    before = Checkpoint({"lr": 0.1}, history, 12, model, best, turned, {"cpu": torch.get_rng_state()})
    assert write_checkpoint(tmp_path, before) == tmp_path / LATEST
    after = read_checkpoint(tmp_path)
    assert after is not None
    assert (after.settings, after.history, after.steps) == ({"lr": 0.1}, history, 12)
    for part in ("model", "best", "optimizer", "random"):
        held, given = getattr(after, part), getattr(before, part)
        assert held.keys() == given.keys()
        assert all(held[name].dtype == given[name].dtype for name in held)
        assert all(torch.equal(held[name], given[name]) for name in held)
    # The best epoch is stored by itself only where it is not the last one.
    write_checkpoint(tmp_path, replace(before, history=History().with_row(row)))
    again = read_checkpoint(tmp_path)
    assert again is not None
    assert torch.equal(again.best["count"], model["count"])


def test_no_checkpoint(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path) is None
    assert read_checkpoint(tmp_path / "missing") is None


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunError, match=r"could not make the folder .*taken for checkpoints: .*; choose another"):
        tune(network(), tmp_path / "taken")


def test_model_state_has_tied_tensors_once_and_buffers_that_are_not_persistent() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model.register_buffer("scale", torch.ones(1), persistent=False)
    assert list(model_state(model)) == ["0.weight", "0.bias", "1.bias", "scale"]
    state = {name: torch.full_like(tensor, 3.0) for name, tensor in model_state(model).items()}
    parameter = model[0].weight
    set_model_state(model, state)
    assert model[0].weight is parameter is model[1].weight
    assert all(torch.equal(tensor, state[name]) for name, tensor in model_state(model).items())
