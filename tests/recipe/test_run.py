"""Whole runs on a tiny network: what a run folder holds, what is refused, and how a run that was broken off goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from secateur.errors import DataError, RunError, TrainingError, UnknownName
from secateur.recipe.folder import load
from secateur.recipe.journal import JOURNAL
from secateur.recipe.reading import read_recipe
from secateur.recipe.run import read_record, resume, run
from secateur.recipe.schema import Cut, DataPart, ModelPart, Recipe, Sparsify, StagePart, Train
from secateur.report.ledger import ChannelRow

NETWORK = """
from torch import nn

def make(classes):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4),
        nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, classes),
    )
"""
TRAIN = Train(stages=(StagePart(lr=0.1, epochs=2),))
CUT = Cut(sparsity=0.5)


@pytest.fixture
def network(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The spec of a tiny network; runs draw their pictures, which takes seconds, only where a test is marked so."""
    if request.node.name != "test_a_run_folder_holds_all_there_is_to_show":
        monkeypatch.setattr("secateur.recipe.run.save_plots", lambda record, folder: ())
        monkeypatch.setattr("secateur.recipe.run.write_page", lambda record, path: None)
    (tmp_path / "nets.py").write_text(NETWORK)
    return f"{tmp_path / 'nets.py'}:make"


def recipe(network: str, *steps: Train | Sparsify | Cut, **changes: object) -> Recipe:
    data = DataPart(source="digits", batch_size=256)
    return Recipe(data=data, model=ModelPart(source=network), steps=steps or (TRAIN, CUT, TRAIN), threads=1, **changes)


def outputs(folder: Path) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return load(folder)(torch.randn(4, 1, 8, 8))


class Break:
    """Ctrl-C, as the progress of the `epoch`-th epoch is told."""

    def __init__(self, done: int) -> None:
        self.done = done

    def __call__(self, status: object) -> None:
        if status.done == self.done and "validation" in status.text:
            raise KeyboardInterrupt


def test_a_run_folder_holds_all_there_is_to_show(tmp_path, network):
    folder = tmp_path / "run"
    made = run(recipe(network, title="mine"), folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "recipe.toml", "journal.jsonl", "ledger.json", "metrics.jsonl", "run.json", "report.html", "plots", "model",
    }  # fmt: skip
    assert read_recipe(folder / "recipe.toml") == recipe(network, title="mine")
    assert [row.step for row in made.ledger.rows] == ["trained", "cut", "fine-tuned"]
    assert json.loads((folder / "ledger.json").read_text()) == made.ledger.to_json()
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in epochs] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    assert [path.suffix for path in (folder / "plots").iterdir()].count(".png") >= 4
    assert "mine" in (folder / "report.html").read_text()
    assert all(check.passed for check in made.certificate)
    assert read_record(folder) == made


def test_what_was_cut_is_what_is_loaded(tmp_path, network):
    made = run(recipe(network), tmp_path / "run")
    before, after = made.ledger.rows[0].measurement, made.ledger.rows[-1].measurement
    model = load(tmp_path / "run")
    assert sum(parameter.numel() for parameter in model.parameters()) == after.params < before.params
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_size == after.bytes
    assert made.channels[0] == ChannelRow("0", 8, model[0].out_channels)
    assert not model.training


def test_the_same_recipe_gives_the_same_model(tmp_path, network):
    run(recipe(network), tmp_path / "one")
    torch.manual_seed(123)
    run(recipe(network), tmp_path / "two")
    assert torch.equal(outputs(tmp_path / "one"), outputs(tmp_path / "two"))


def test_another_seed_gives_another_model(tmp_path, network):
    run(recipe(network), tmp_path / "one")
    run(recipe(network, seed=1), tmp_path / "two")
    assert load(tmp_path / "one")[0].weight.shape != load(tmp_path / "two")[0].weight.shape or not torch.equal(
        outputs(tmp_path / "one"), outputs(tmp_path / "two")
    )


@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_a_run_broken_off_comes_out_the_same(tmp_path, network, done):
    run(recipe(network), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(recipe(network), tmp_path / "broken", progress=Break(done))
    with pytest.raises(RunError, match=r"holds no finished run; go on with: secateur resume"):
        read_record(tmp_path / "broken")
    told = []
    made = resume(tmp_path / "broken", progress=told.append)
    assert [row.step for row in made.ledger.rows] == ["trained", "cut", "fine-tuned"]
    assert max(status.done for status in told) == 4
    assert torch.equal(outputs(tmp_path / "whole"), outputs(tmp_path / "broken"))
    whole, broken = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "broken"))
    assert [json.loads(a) | {"seconds": 0} for a in whole] == [json.loads(b) | {"seconds": 0} for b in broken]


def test_masks_hold_through_training_and_a_break(tmp_path, network):
    steps = (TRAIN, Sparsify(sparsity=0.75), TRAIN)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(network, *steps), tmp_path / "run", progress=Break(3))
    made = resume(tmp_path / "run")
    table = made.ledger.rows[-1].measurement.sparsity
    assert table.zeros == made.sparsity.zeros == round(0.75 * table.elements)


def test_a_cut_ends_the_masks_and_says_so(tmp_path, network):
    made = run(recipe(network, Sparsify(sparsity=0.5), CUT, TRAIN), tmp_path / "run")
    assert any("masks that were in force ended with the cut" in note for note in made.notes)


def test_a_model_that_is_trained_already_is_measured_first(tmp_path, network):
    made = run(recipe(network, CUT), tmp_path / "run")
    assert [row.step for row in made.ledger.rows] == ["original", "cut"]


def test_a_finished_run_is_not_resumed(tmp_path, network):
    run(recipe(network, CUT), tmp_path / "run")
    with pytest.raises(RunError, match=r"is finished; its report is .*report\.html"):
        resume(tmp_path / "run")


def test_no_run_is_not_resumed(tmp_path):
    with pytest.raises(RunError, match="holds no run; give the folder"):
        resume(tmp_path)


def test_a_run_is_replaced_only_by_force(tmp_path, network):
    run(recipe(network, CUT), tmp_path / "run")
    before = (tmp_path / "run" / JOURNAL).read_text()
    with pytest.raises(RunError, match=r"go on with it \(secateur resume .*\), replace it \(--force\)"):
        run(recipe(network, CUT), tmp_path / "run")
    assert (tmp_path / "run" / JOURNAL).read_text() == before
    made = run(recipe(network, Cut(sparsity=0.25)), tmp_path / "run", force=True)
    assert read_record(tmp_path / "run") == made


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, network):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="is not a run folder, so it is left alone"):
        run(recipe(network, CUT), tmp_path, force=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"data": DataPart(source="digit")}, UnknownName, "unknown data set 'digit'; did you mean 'digits'"),
        ({"data": DataPart(source="parquet:/nowhere")}, DataError, "nowhere"),
        ({"model": ModelPart(source="secateur:digits_vg")}, UnknownName, "did you mean 'digits_vgg'"),
        ({"steps": (Cut(sparsity=0.5, keep=("9",)),)}, UnknownName, "unknown layer to keep '9'"),
        ({"steps": (TRAIN, Sparsify(sparsity=0.5, layers=("9.weight",)))}, UnknownName, "unknown weight '9.weight'"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_replaced(tmp_path, network, changes, error, sentence):
    run(recipe(network, CUT), tmp_path / "run")
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(error, match=sentence):
        run(recipe(network, CUT).model_copy(update=changes), tmp_path / "run", force=True)
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*")) == before


def test_a_loss_that_is_not_finite_keeps_the_last_good_epoch(tmp_path, network):
    wild = Train(stages=(StagePart(lr=0.1, epochs=1), StagePart(lr=1e30, epochs=1)))
    with pytest.raises(TrainingError, match="the loss is"):
        run(recipe(network, wild), tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints" / "train-1").glob("*.safetensors"))


def test_the_callers_threads_and_random_numbers_are_left_alone(tmp_path, network):
    torch.manual_seed(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    run(recipe(network, CUT), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_run_folder_can_be_moved(tmp_path, network):
    run(recipe(network, CUT), tmp_path / "run")
    before = outputs(tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert torch.equal(outputs(tmp_path / "moved"), before)
