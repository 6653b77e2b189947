"""A recipe whose cut has a budget for latency: layers are timed once, kept in a file, and the plan goes by them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from secateur.codec.files import read_json, write_json
from secateur.errors import ModelError, RecipeError
from secateur.measure.table import LatencyTable
from secateur.recipe.launch import run
from secateur.recipe.options import recipe_from
from secateur.recipe.reading import build, read_recipe
from secateur.recipe.schema import Cut, Recipe
from secateur.recipe.steps import prepare

NETWORK = """
from torch import nn

def make(classes):
    return nn.Sequential(
        nn.Conv2d(1, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8192, classes),
    )
"""
TRAIN = {"kind": "train", "stages": [{"lr": 0.05, "epochs": 1}]}
CUT = {"kind": "cut", "guide": "knapsack", "criterion": "energy", "budget": {"latency": 0.6}}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Trains and cuts within seconds; no pictures."""
    monkeypatch.setattr("secateur.recipe.run.save_plots", lambda record, folder: ())
    monkeypatch.setattr("secateur.recipe.run.write_page", lambda record, path: None)
    (tmp_path / "nets.py").write_text(NETWORK)
    return {
        "data": {"source": "digits", "batch_size": 64},
        "model": {"source": f"{tmp_path / 'nets.py'}:make"},
        "threads": 1,
    }


def widths(record):
    return [row.after for row in record.channels]


def test_the_plan_is_fast_enough_by_the_table_that_is_kept(parts, tmp_path):
    record = run(build(**parts, steps=(TRAIN, CUT)), tmp_path / "run")
    table = LatencyTable.from_json(read_json(tmp_path / "run" / "latency-2.json"))
    assert (table.conditions.runtime, table.conditions.threads, table.conditions.batch) == ("eager", 1, 1)
    (said,) = [note for note in record.notes if "of the time" in note and note.startswith("the plan leaves")]
    assert float(said.split("by the table, ")[1].split(" %")[0]) <= 60
    assert min(widths(record)) < 128


def test_a_table_that_is_named_is_used_again_and_not_measured(parts, tmp_path, monkeypatch):
    step = {**CUT, "table": str(tmp_path / "times.json")}
    first = run(build(**parts, steps=(TRAIN, step)), tmp_path / "first")
    assert not (tmp_path / "first" / "latency-2.json").exists()
    monkeypatch.setattr("secateur.recipe.timing.measure_table", None)
    second = run(build(**parts, steps=(TRAIN, step)), tmp_path / "second")
    assert widths(second) == widths(first)


@pytest.mark.parametrize(("key", "value"), [("threads", 7), ("machine", "abacus"), ("runtime", "onnx_runtime")])
def test_a_table_of_other_conditions_is_refused(parts, tmp_path, key, value):
    step = {**CUT, "table": str(tmp_path / "times.json")}
    run(build(**parts, steps=(TRAIN, step)), tmp_path / "first")
    table = read_json(tmp_path / "times.json")
    write_json(tmp_path / "times.json", {**table, "conditions": {**table["conditions"], key: value}})
    with pytest.raises(RecipeError, match=f"measured with {key} {value!r}.*remove the file to measure anew"):
        run(build(**parts, steps=(TRAIN, step)), tmp_path / "second")


def test_a_floor_searches_the_fastest_and_times_the_layers_once(parts, tmp_path):
    floor = {"accuracy": -30.0, "measure": "latency", "tries": 2}
    record = run(build(**parts, floor=floor, steps=({**TRAIN}, CUT)), tmp_path / "run")
    assert record.trials[0].size.endswith("% of the latency")
    assert (tmp_path / "run" / "latency.json").exists()
    assert not list((tmp_path / "run" / "trials").glob("*/latency-*.json"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "trials.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert any(row["accuracy"] is not None for row in rows[1:]), "no size that was tried could be timed and trained"


def test_a_runtime_that_is_not_there_is_found_before_anything_is_written(parts, tmp_path, monkeypatch):
    def missing(model, inputs):
        raise ModelError("ONNX Runtime is not installed; install the extra: pip install secateur[onnx].")

    monkeypatch.setattr("secateur.recipe.steps.RUNTIMES", {"onnx": missing})
    with pytest.raises(ModelError, match="not installed"):
        run(build(**parts, steps=(TRAIN, {**CUT, "runtime": "onnx"})), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_penalty_on_what_a_cut_for_latency_would_take_is_refused(parts):
    train = {**TRAIN, "penalty": {"kind": "l2", "strength": 0.1, "units": "next-cut"}}
    with pytest.raises(RecipeError, match="let the penalty press on all units"):
        prepare(build(**parts, steps=(train, CUT)))


@pytest.mark.parametrize(
    ("budget", "guide", "said"),
    [
        ({"latency": 0.5}, "ranking", "needs the guide 'knapsack'"),
        ({"latency": 0.5, "macs": 0.5}, "knapsack", "stands alone"),
        ({"latency": 1.5}, "knapsack", "latency in step 2 \\(cut\\) must be at most 1, and is 1.5"),
    ],
)
def test_what_does_not_go_together_is_said(parts, budget, guide, said):
    with pytest.raises(RecipeError, match=said):
        build(**parts, steps=(TRAIN, {**CUT, "budget": budget, "guide": guide}))


def test_on_the_command_line_a_latency_is_planned_by_energy(tmp_path):
    recipe = recipe_from(None, data="digits", model="secateur:digits_vgg", budget=["latency=0.7"])
    cut = recipe.steps[0]
    assert isinstance(cut, Cut)
    assert (cut.latency, cut.guide, cut.criterion) == (0.7, "knapsack", "energy")


def test_the_path_of_a_table_is_relative_to_the_recipe(tmp_path: Path):
    step = {**CUT, "table": "t.json"}
    recipe = Recipe(data={"source": "digits"}, model={"source": "secateur:digits_vgg"}, steps=[step])
    (tmp_path / "mine.toml").write_text(recipe.to_toml())
    step = read_recipe(tmp_path / "mine.toml").steps[0]
    assert isinstance(step, Cut)
    assert step.table == str(tmp_path / "t.json")


def test_threads_are_those_of_the_recipe_and_given_back(parts, tmp_path):
    before = torch.get_num_threads()
    run(build(**parts, steps=(TRAIN, CUT)), tmp_path / "run")
    assert torch.get_num_threads() == before
