"""Images of another data set, without labels, beside those of a training step that distils."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from secateur.errors import RecipeError, UnknownName
from secateur.recipe.launch import run
from secateur.recipe.parts import DataPart, DistillPart, ModelPart, StagePart
from secateur.recipe.reading import read_recipe
from secateur.recipe.schema import Cut, Recipe, Train
from secateur.recipe.steps import prepare
from secateur.recipe.unlabelled import UNLABELLED, beside

DATA = DataPart(source="digits", validation=0.5, batch_size=64)
NETWORK = ModelPart(source="secateur:digits_vgg")
TRAIN = Train(stages=(StagePart(lr=0.1, epochs=1),))
CUT = Cut(sparsity=0.5)


def learning(source: str) -> Train:
    return Train(stages=(StagePart(lr=0.01, epochs=1),), distill=DistillPart(weight=1.0, unlabelled=source))


def noise(folder: Path, count: int = 30, shape: tuple[int, ...] = (16, 16)) -> Path:
    """Images in two folders, for what they show is not known."""
    random = numpy.random.default_rng(0)
    for number in range(count):
        place = folder / "train" / ("a", "b")[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, shape, dtype=numpy.uint8)).save(place)
    return folder


def test_as_many_others_stand_behind_each_batch_and_begin_again_when_they_end() -> None:
    own = [(torch.zeros(n, 1), torch.zeros(n, dtype=torch.int64), torch.arange(n)) for n in (4, 4, 2)]
    calls = []

    def passes(number: int):
        calls.append(number)
        value = torch.full((4, 1), number + 1.0)
        return iter([(value, torch.full((4,), UNLABELLED)), (value[:1], torch.full((1,), UNLABELLED))])

    found = list(beside(iter(own), passes))
    assert [len(images) for images, *_ in found] == [8, 5, 4]
    assert [images.flatten().tolist()[-1] for images, *_ in found] == [1.0, 1.0, 2.0]
    assert calls == [0, 1]
    assert all((labels == UNLABELLED).eq(images.flatten() > 0).all() for images, labels, *_ in found)


def test_a_run_learns_from_images_that_have_no_labels(tmp_path: Path) -> None:
    source = f"imagefolder:{noise(tmp_path / 'other')}"
    recipes = {
        name: Recipe(data=DATA, model=NETWORK, steps=(TRAIN, CUT, step))
        for name, step in (("with", learning(source)), ("without", Train(stages=learning(source).stages)))
    }
    made = {name: run(recipe, tmp_path / name) for name, recipe in recipes.items()}
    assert f"12 images of {source} are learned from without labels." in made["with"].notes
    loss = {name: record.ledger.rows[-1].measurement.accuracy.loss for name, record in made.items()}
    assert loss["with"] != loss["without"]
    text = (tmp_path / "with" / "metrics.jsonl").read_text()
    assert '"step": 3' in text
    assert "NaN" not in text


@pytest.mark.parametrize(
    ("source", "error", "sentence"),
    [
        ("colours", RecipeError, r"images of imagefolder:.* are 3x8x8 .* and those of digits are 1x8x8"),
        ("digit", UnknownName, "'digits'"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(
    tmp_path: Path, source: str, error: type[Exception], sentence: str
) -> None:
    other = f"imagefolder:{noise(tmp_path / 'other', shape=(16, 16, 3))}" if source == "colours" else source
    with pytest.raises(error, match=sentence):
        prepare(Recipe(data=DATA, model=NETWORK, steps=(TRAIN, CUT, learning(other))))


def test_the_folder_is_taken_from_where_the_recipe_is(tmp_path: Path) -> None:
    recipe = Recipe(data=DATA, model=NETWORK, steps=(TRAIN, CUT, learning("parquet:mine/pictures")))
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    step = read_recipe(tmp_path / "recipe.toml").steps[-1]
    assert isinstance(step, Train)
    assert step.distill is not None
    assert step.distill.unlabelled == f"parquet:{tmp_path / 'mine/pictures'}"
