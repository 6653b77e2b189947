"""Bake-offs of a recipe: cell by cell, gone on with after a kill, here and on a Ray cluster alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.cli import main
from secateur.errors import RecipeError, RunError, UnknownName
from secateur.recipe.bakeoff import CELLS, Field, bakeoff, read_cells
from secateur.recipe.reading import build
from secateur.recipe.run import Status
from secateur.recipe.schema import Recipe
from secateur.search.bakeoff import Cell

NETWORK = """
from torch import nn

def make(classes):
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(),
        nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, classes),
    )
"""
FIELD = Field(criteria=("magnitude", "taylor", "energy"), guides=("ranking", "uniform"), seeds=2)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr("secateur.recipe.run.save_plots", lambda record, folder: ())
    monkeypatch.setattr("secateur.recipe.run.write_page", lambda record, path: None)
    (tmp_path / "nets.py").write_text(NETWORK)
    train = {"kind": "train", "stages": [{"lr": 0.1, "epochs": 3}]}
    cut = {"kind": "cut", "guide": "ranking", "budget": {"macs": 0.4}, "images": 64}
    return build(
        data={"source": "digits", "batch_size": 64},
        model={"source": f"{tmp_path / 'nets.py'}:make"},
        steps=(train, cut, {**train, "stages": [{"lr": 0.05, "epochs": 1}]}),
        threads=1,
    )


def measured(cells: tuple[Cell, ...]) -> list[tuple[object, ...]]:
    """All but the seconds."""
    return [(c.entrant, c.seed, c.macs, c.params, c.validation, c.test) for c in cells]


def test_every_cell_is_measured_once_and_goes_on_after_a_kill(recipe, tmp_path):
    told: list[int] = []

    def stop(status: Status) -> None:
        if "seed" in status.text:
            told.append(status.done)
            if len(told) == 5:
                raise KeyboardInterrupt

    whole = bakeoff(recipe, FIELD, tmp_path / "whole")
    assert len(whole) == (3 * 2 + 2) * 2
    assert len({(cell.entrant, cell.seed) for cell in whole}) == len(whole)
    assert all(set(cell.validation) == {"cut", "reset", "recovered"} == set(cell.test) for cell in whole)
    assert len({cell.macs for cell in whole if cell.entrant.guide == "ranking"}) < 9
    assert all(cell.macs <= 0.4 * 12 * 9 * 64 + 0.4 * (48 * 16 + 16 * 10) for cell in whole)
    assert (tmp_path / "whole" / "standings.png").exists()
    with pytest.raises(KeyboardInterrupt):
        bakeoff(recipe, FIELD, tmp_path / "broken", progress=stop)
    with (tmp_path / "broken" / CELLS).open("a") as file:
        file.write('{"entrant": {"crit')
    assert len(read_cells(tmp_path / "broken")) == 5
    assert measured(bakeoff(recipe, FIELD, tmp_path / "broken")) == measured(whole)
    # More seeds and criteria later on: what is there is not run again.
    lines = (tmp_path / "whole" / CELLS).read_text()
    bakeoff(recipe, Field(criteria=("magnitude",), seeds=3), tmp_path / "whole")
    after = (tmp_path / "whole" / CELLS).read_text()
    assert after.startswith(lines)
    assert len(after.splitlines()) == len(lines.splitlines()) + 2


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_of_two_workers_measures_the_same(recipe, tmp_path):
    field = Field(criteria=("magnitude", "taylor"), seeds=1)
    here = bakeoff(recipe, field, tmp_path / "here")
    there = bakeoff(recipe, field, tmp_path / "there", ray="local")
    assert measured(there) == measured(here)


def test_refusals(recipe, tmp_path):
    with pytest.raises(UnknownName, match="unknown criterion 'tailor'; did you mean 'taylor'"):
        Field(criteria=("tailor",))
    with pytest.raises(UnknownName, match="unknown guide 'sparsity'"):
        Field(guides=("sparsity",))
    with pytest.raises(RecipeError, match="1 seed or more"):
        Field(seeds=0)
    with pytest.raises(RecipeError, match="one step that cuts, and that to a budget"):
        bakeoff(recipe.model_copy(update={"steps": recipe.steps[:1]}), FIELD, tmp_path / "none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="is no bake-off"):
        bakeoff(recipe, FIELD, tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        bakeoff(recipe, FIELD, tmp_path / "file")
    with pytest.raises(RunError, match=r"no Ray cluster answers at '127\.0\.0\.1:9'"):
        bakeoff(recipe, FIELD, tmp_path / "ray", ray="127.0.0.1:9")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.toml").write_text("seed = 1")
    with pytest.raises(RunError, match="bake-off of another recipe"):
        bakeoff(recipe, FIELD, tmp_path / "other")


def test_from_the_command_line(recipe, capsys):
    Path("mine.toml").write_text(recipe.to_toml())
    assert main(["bakeoff", "mine.toml", "--criteria", "magnitude", "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert "As cut" in out
    assert "random, ranking" in out
    rows = [json.loads(line) for line in (Path("runs/mine-bakeoff") / CELLS).read_text().splitlines()]
    assert sorted({row["entrant"]["criterion"] for row in rows}) == ["magnitude", "random"]
    assert main(["bakeoff", "mine.toml", "--criteria", "tailor"]) == 2
