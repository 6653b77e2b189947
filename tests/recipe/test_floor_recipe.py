"""A recipe with a floor: the smallest size above it is searched, shown and saved, and goes on after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from secateur.errors import PlanError, RecipeError, RunError
from secateur.measure.accuracy import accuracy
from secateur.recipe.folder import load
from secateur.recipe.launch import resume, run
from secateur.recipe.options import recipe_from
from secateur.recipe.reading import build, parse
from secateur.recipe.run import Status, read_record
from secateur.recipe.schema import Recipe
from secateur.report.page import page_html, summary_text
from secateur.zoo.data import load_data

NETWORK = """
from torch import nn

def make(classes):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, classes),
    )
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Trains, cuts and fine-tunes within seconds; no pictures."""
    monkeypatch.setattr("secateur.recipe.run.save_plots", lambda record, folder: ())
    monkeypatch.setattr("secateur.recipe.run.write_page", lambda record, path: None)
    (tmp_path / "nets.py").write_text(NETWORK)
    train = {"kind": "train", "stages": [{"lr": 0.1, "epochs": 4}]}
    cut = {"kind": "cut", "guide": "ranking", "budget": {"macs": 0.5}, "limits": {"least": 2}}
    return build(
        data={"source": "digits", "batch_size": 64},
        model={"source": f"{tmp_path / 'nets.py'}:make"},
        floor={"accuracy": -3.0, "tries": 4},
        steps=(train, cut, {**train, "stages": [{"lr": 0.05, "epochs": 1}]}),
        threads=1,
    )


def validation(folder: Path) -> float:
    return accuracy(load(folder), load_data("digits", validation=0.1, seed=0).batches("validation", 256)).top1


class Stop:
    """Ctrl-C the `count`-th time that a recovery is told of."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, status: Status) -> None:
        if "left, step 2 of 2" in status.text:
            self.count -= 1
            if not self.count:
                raise KeyboardInterrupt


def test_the_smallest_above_the_floor_is_searched_shown_and_saved(recipe, tmp_path):
    folder = tmp_path / "run"
    record = run(recipe, folder)
    rows = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert len(rows) == 1 + len(record.trials)
    assert rows[0]["floor"] == pytest.approx(rows[0]["whole"] - 0.03)
    assert rows[0]["whole"] == validation(folder / "start")
    above = [row for row in rows[1:] if row["accuracy"] is not None and row["accuracy"] >= rows[0]["floor"]]
    smallest = min(above, key=lambda row: row["share"])
    assert validation(folder) == smallest["accuracy"]
    assert [row.verdict for row in record.trials].count("chosen") == 1
    assert record.trials[rows[1:].index(smallest)].verdict == "chosen"
    whole, last = record.ledger.rows[0].measurement, record.ledger.rows[-1].measurement
    assert last.macs.total <= smallest["share"] * whole.macs.total
    assert record.notes[0].startswith("Validation accuracy: ")
    assert read_record(folder) == record
    assert "How small it may be" in page_html(record)
    assert "chosen" in summary_text(record)
    assert parse((folder / "recipe.toml").read_text()) == recipe
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(load(folder)(x), load(folder / "trials" / f"{smallest['share']:.6f}")(x))
    with pytest.raises(RunError, match="is finished"):
        resume(folder)


def test_a_search_that_was_broken_off_ends_as_an_unbroken_one(recipe, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = run(recipe, whole)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, broken, progress=Stop(3))
    with pytest.raises(RunError, match="holds no finished run"):
        read_record(broken)
    record = resume(broken)
    assert [(row.size, row.accuracy, row.verdict) for row in record.trials] == [
        (row.size, row.accuracy, row.verdict) for row in expected.trials
    ]
    for name, tensor in load(whole).state_dict().items():
        assert torch.equal(load(broken).state_dict()[name], tensor)


def test_measure_tries_and_width_of_a_floor(recipe, tmp_path):
    given = {"measure": "params", "tries": 5, "width": 0.9}
    record = run(recipe.model_copy(update={"floor": recipe.floor.model_copy(update=given)}), tmp_path / "run")
    assert all(row.size.endswith("of the parameters") for row in record.trials)
    shares = sorted(float(folder.name) for folder in (tmp_path / "run" / "trials").iterdir())
    assert len(record.trials) <= 5
    assert len(record.trials) == 5 or any(b / a <= 1.9 for a, b in zip(shares, [*shares[1:], 1.0]))


def test_without_steps_before_the_cut_the_model_itself_is_the_whole(recipe, tmp_path):
    made = tmp_path / "made"
    run(recipe.model_copy(update={"floor": None, "steps": recipe.steps[:1]}), made)
    source = recipe.model.model_copy(update={"weights": str(made / "model" / "model.safetensors")})
    rest = recipe.model_copy(update={"model": source, "steps": recipe.steps[1:]})
    record = run(rest, tmp_path / "run")
    assert not (tmp_path / "run" / "start").exists()
    assert len(record.trials) == 4


def test_no_size_above_the_floor_is_refused_and_kept(recipe, tmp_path):
    floor = recipe.floor.model_copy(update={"accuracy": -0.01, "tries": 1})
    hard = recipe.model_copy(update={"floor": floor, "steps": recipe.steps[:2]})  # nothing recovers
    with pytest.raises(PlanError, match=r"None is above the floor of .*: the best is 50.0 % left has"):
        run(hard, tmp_path / "run")
    assert (tmp_path / "run" / "trials" / "0.500000" / "run.json").exists()


def test_floors_in_words(tmp_path):
    text = '[data]\nsource = "digits"\n[model]\nsource = "secateur:digits_vgg"\n[floor]\naccuracy = -1\n{}'
    cut = '[[steps]]\nkind = "cut"\nguide = "ranking"\nbudget = {params = 0.5}\n'
    assert parse(text.format(cut)).floor.accuracy == -1
    with pytest.raises(RecipeError, match="one step that cuts, and this one has 2"):
        parse(text.format(cut + cut))
    with pytest.raises(RecipeError, match=r"unknown key 'acuracy' in \[floor\]; did you mean 'accuracy'"):
        parse(text.format(cut).replace("accuracy", "acuracy"))
    (tmp_path / "mine.toml").write_text(text.format(cut))
    given = recipe_from(tmp_path / "mine.toml", floor=-0.5, budget=["params=0.4"])
    assert (given.floor.accuracy, given.floor.measure) == (-0.5, "params")
    made = recipe_from(None, data="digits", model="secateur:digits_vgg", floor=97.0)
    assert (made.floor.accuracy, made.floor.measure, made.steps[0].guide) == (97.0, "macs", "ranking")
    assert (made.steps[0].criterion, made.steps[0].recover) == ("energy", "statistics")
