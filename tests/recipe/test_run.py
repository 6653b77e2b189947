"""Whole runs on a tiny network: what a run folder holds, what is refused, and how a run that was broken off goes on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from secateur.codec.files import locked
from secateur.errors import DataError, ModelError, RunError, TrainingError, UnknownName
from secateur.measure.latency import Latency
from secateur.recipe.folder import load
from secateur.recipe.journal import JOURNAL
from secateur.recipe.parts import DataPart, LimitsPart, ModelPart, StagePart
from secateur.recipe.reading import read_recipe
from secateur.recipe.run import read_record, resume, run
from secateur.recipe.schema import Cut, Recipe, Sparsify, Train
from secateur.recipe.steps import prepare
from secateur.report.ledger import ChannelRow

NETWORK = """
from torch import nn

def make(classes):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4),
        nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, classes),
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
    """Ctrl-C, as something is told that begins like this, with so many epochs done."""

    def __init__(self, done: int, text: str = "") -> None:
        self.done, self.text = done, text

    def __call__(self, status: object) -> None:
        if status.done == self.done and (status.text.startswith(self.text) if self.text else "valid" in status.text):
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


def test_a_network_that_was_made_wider_since_is_not_taken_for_the_one_that_was_cut(tmp_path, network):
    run(recipe(network, CUT), tmp_path / "run")
    assert load(tmp_path / "run")[5].out_features == 8
    (tmp_path / "nets.py").write_text(NETWORK.replace("16", "24"))
    with pytest.raises(ModelError, match=r"builds another model .*: 5.weight is \(24, 32\) there and was \(16, 32\)"):
        load(tmp_path / "run")


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


def test_the_models_are_timed_by_turns_with_the_first_and_the_ledger_uses_it(tmp_path, network, monkeypatch):
    widths = []

    def compare(first, second, example, *, threads, device):
        widths.append((first[0].out_channels, second[0].out_channels))
        assert (tuple(example.shape), threads, device.type) == ((1, 1, 8, 8), 1, "cpu")
        # The medians say slower: what counts is the median over the pairs.
        return Latency(2.0, 1.0, 9.0, 30, 1, 1, "cpu"), Latency(3.0, 1.0, 9.0, 30, 1, 1, "cpu"), len(widths) + 1.0

    monkeypatch.setattr("secateur.recipe.run.compare_latency", compare)
    steps = (CUT, TRAIN, Cut(sparsity=0.5), Sparsify(sparsity=0.5))
    made = run(recipe(network, *steps), tmp_path / "run")
    rows = made.ledger.rows
    assert [row.speedup for row in rows] == [None, 2.0, 2.0, 3.0, 3.0]
    assert [row.measurement.latency.median_ms for row in rows] == [2.0, 3.0, 3.0, 3.0, 3.0]
    assert "3.0x faster" in made.ledger.verdict
    assert [first for first, _ in widths] == [8, 8]
    assert 8 > widths[0][1] > widths[1][1]


def test_a_run_of_one_shape_is_timed_once(tmp_path, network):
    made = run(recipe(network, TRAIN, Sparsify(sparsity=0.5)), tmp_path / "run")
    trained, sparsified = made.ledger.rows
    assert trained.measurement.latency == sparsified.measurement.latency
    assert (trained.speedup, sparsified.speedup) == (None, None)
    assert trained.measurement.latency.runs == 30
    assert "same speed" in made.ledger.verdict


def test_a_run_broken_off_while_it_times_goes_on(tmp_path, network, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("secateur.recipe.run.compare_latency", stop)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(network), tmp_path / "run")
    made = resume(tmp_path / "run")
    assert [row.speedup is None for row in made.ledger.rows] == [True, False, False]


def test_progress_moves_within_an_epoch(tmp_path, network):
    told = []
    run(recipe(network), tmp_path / "run", progress=told.append)
    places = [status.done + status.share for status in told]
    assert places == sorted(places)
    assert {status.share for status in told if status.done == 0} == {0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1}
    assert all(status.text == "step 1 of 3: train" for status in told if status.done == 0)
    within = [status.text for status in told if status.done == 1 and status.share]
    assert all(text.startswith("step 1 of 3: validation ") for text in within)
    assert len(within) == 6
    assert {status.total for status in told} == {4}


@pytest.mark.parametrize(
    "moment", [(0, "step 1"), (1,), (2,), (2, "step 2"), (2, "step 3"), (3,), (4,), (4, "writing the report")]
)
def test_a_run_broken_off_comes_out_the_same(tmp_path, network, moment):
    run(recipe(network), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(recipe(network), tmp_path / "broken", progress=Break(*moment))
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


def test_what_was_asked_is_what_the_notes_say(tmp_path, network):
    steps = (Sparsify(sparsity=0.125), Cut(sparsity=0.125), Cut(sparsity=0.255, guide="uniform"))
    made = run(recipe(network, *steps, Sparsify(sparsity=0.4, scope="layer")), tmp_path / "run")
    assert [row.note for row in made.ledger.rows[1:]] == [
        "12.5 % of all weights together", "12.5 %, guided by sparsity", "25.5 % of each layer", "40 % of each layer",
    ]  # fmt: skip


def test_a_model_that_is_trained_already_is_measured_first(tmp_path, network):
    made = run(recipe(network, CUT), tmp_path / "run")
    assert [row.step for row in made.ledger.rows] == ["original", "cut"]
    assert [row.seconds > 0 for row in made.ledger.rows] == [False, True]


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


def test_a_folder_that_another_process_works_in_is_left_alone(tmp_path, network):
    with pytest.raises(KeyboardInterrupt):
        run(recipe(network), tmp_path / "run", progress=Break(1))
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    with locked(tmp_path / "run"):
        with pytest.raises(RunError, match=r"another process is at work in .*run'; wait until"):
            run(recipe(network), tmp_path / "run", force=True)
        with pytest.raises(RunError, match=r"another process is at work in .*run'; wait until"):
            resume(tmp_path / "run")
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*")) == before
    assert resume(tmp_path / "run") == read_record(tmp_path / "run")


def test_of_two_that_start_at_once_the_second_does_not_replace_the_first(tmp_path, network, monkeypatch):
    def prepare_slowly(wanted):
        monkeypatch.setattr("secateur.recipe.run.prepare", prepare)
        run(recipe(network, CUT), tmp_path / "run")
        return prepare(wanted)

    monkeypatch.setattr("secateur.recipe.run.prepare", prepare_slowly)
    with pytest.raises(RunError, match="holds a run already"):
        run(recipe(network), tmp_path / "run")
    assert [row.step for row in read_record(tmp_path / "run").ledger.rows] == ["original", "cut"]


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
        ({"steps": (Cut(sparsity=0.5, limits=LimitsPart(keep=("9",))),)}, UnknownName, "unknown layer to keep '9'"),
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


def test_a_measured_loss_that_is_not_finite_is_kept_as_null(tmp_path, network):
    code = NETWORK.replace("return nn.Sequential(", "net = nn.Sequential(")
    (tmp_path / "nets.py").write_text(f"{code}    net[-1].bias.data[3] = float('nan')\n    return net\n")
    made = run(recipe(network, Sparsify(sparsity=0.5)), tmp_path / "run")
    assert math.isnan(made.ledger.rows[-1].measurement.accuracy.loss)
    for name in ("run.json", "ledger.json"):
        assert '"loss": null' in (tmp_path / "run" / name).read_text()
    found = read_record(tmp_path / "run").ledger.rows[-1].measurement.accuracy
    assert math.isnan(found.loss)
    assert "359 of 359 images have outputs that are not finite" in found.note


def test_the_threads_are_those_of_the_recipe(tmp_path, network):
    for threads in (1, 2):
        wanted = recipe(network, CUT).model_copy(update={"threads": threads})
        made = run(wanted, tmp_path / str(threads))
        assert made.ledger.rows[-1].measurement.latency.threads == threads
        assert ("threads", str(threads)) in made.conditions


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
