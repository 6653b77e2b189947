"""A recipe text to a Recipe, and each mistake in it to its sentence with the line."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from secateur.errors import RecipeError
from secateur.recipe.parts import BudgetPart, LimitsPart
from secateur.recipe.reading import build, embedded, line_of, parse, read_recipe
from secateur.recipe.schema import Cut, Sparsify, Train

TEXT = """\
title = "mine"
[data]
source = "digits"
[model]
source = "secateur:digits_vgg"
[[steps]]
kind = "train"
stages = [
  {lr = 0.1, epochs = 10},  # a comment with ] and }
  {lr = 0.01, epochs = 3},
]
[[steps]]
kind = "sparsify"
sparsity = 0.5
[[steps]]
kind = "cut"
sparsity = 0.8
p = "inf"
"""


def test_what_is_said_is_what_is_read():
    recipe = parse(TEXT)
    train, sparsify, cut = recipe.steps
    assert isinstance(train, Train)
    assert [(stage.lr, stage.epochs) for stage in train.stages] == [(0.1, 10), (0.01, 3)]
    assert isinstance(sparsify, Sparsify)
    assert sparsify.scope == "global"
    assert isinstance(cut, Cut)
    assert cut.p == math.inf
    assert (recipe.title, recipe.data.source, recipe.model.source) == ("mine", "digits", "secateur:digits_vgg")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("sparsity = 0.8", "sparsity = 1.2", "line 17: sparsity in step 3 (cut) must be less than 1, and is 1.2."),
        ("sparsity = 0.8", "sparsity = -1", "line 17: sparsity in step 3 (cut) must be at least 0, and is -1."),
        ("sparsity = 0.8", "sparsty = 0.8", "line 17: unknown key 'sparsty' in step 3 (cut); did you mean 'sparsity'?"),
        ("sparsity = 0.8", "sparsity = true", "line 17: sparsity in step 3 (cut) must be a number, and is true."),
        ("sparsity = 0.8", "sparsity = '0.8'", 'line 17: sparsity in step 3 (cut) must be a number, and is "0.8".'),
        ("sparsity = 0.8\n", "", "line 15: in step 3 (cut), the guide 'sparsity' needs a sparsity."),
        ("sparsity = 0.8", "guide = 'ranking'", "line 15: in step 3 (cut), the guide 'ranking' needs a budget, such"),
        ('p = "inf"', "guide = 'knapsack'", "line 15: in step 3 (cut), the guide 'knapsack' takes no sparsity."),
        ("sparsity = 0.8", "guide = 'uniform'", "line 15: in step 3 (cut), the guide 'uniform' needs a sparsity or a"),
        ('p = "inf"', "budget = {macs = 1.5}", "line 18: in step 3 (cut), the budget for macs is 1.5; give a share"),
        ('p = "inf"', "budget = {macs = 0}", "line 18: in step 3 (cut), the budget for macs is 0; give a share"),
        ('p = "inf"', "[steps.budget]\nbytes = 'x'", "line 19: in step 3 (cut), the budget for bytes is 'x'; give"),
        ('p = "inf"', "budget = {}", "line 18: in step 3 (cut), the budget is empty; say what may be left of params"),
        ('p = "inf"', "budget = {mac = 1}", "line 18: unknown key 'mac' in step 3 (cut); did you mean 'macs'? Choices"),
        ('p = "inf"', "budget = 0.5", "line 18: budget in step 3 (cut) must be a table, and is 0.5."),
        ('p = "inf"', "limits = {least = 0}", "line 18: in step 3 (cut), least is a number of units, 1 or more, and"),
        ('p = "inf"', "[steps.limits]\ncap = {a = 2}", "line 19: in step 3 (cut), cap is the share of a group that"),
        ('p = "inf"', "limits = {tied = 'a'}", "line 18: in step 3 (cut), tied is a list whose elements are patterns"),
        ('p = "inf"', "limits = {lest = 1}", "line 18: unknown key 'lest' in step 3 (cut); did you mean 'least'?"),
        ("epochs = 3", "epochs = '3'", 'line 10: epochs in a stage of step 1 (train) must be a whole number'),
        ("epochs = 3", "epochs = 0", "line 10: epochs in a stage of step 1 (train) must be at least 1, and is 0."),
        ("epochs = 3", "epoch = 3", "line 10: unknown key 'epoch' in a stage of step 1 (train); did you mean"),
        ("lr = 0.1", "lr = 0", "line 9: lr in a stage of step 1 (train) must be greater than 0, and is 0."),
        ('"cut"', '"cutt"', "line 16: unknown kind of step 'cutt'; did you mean 'cut'? Choices: cut,"),
        ('kind = "cut"\n', "", "line 15: step 3 has no 'kind'; choose one of train, sparsify, cut."),
        ('p = "inf"', 'criterion = "magnitud"', "line 18: unknown criterion 'magnitud'; did you mean 'magnitude'?"),
        ('p = "inf"', "guide = 3", "line 18: guide in step 3 (cut) must be 'sparsity', 'uniform', 'ranking',"),
        ('p = "inf"', "limits = {keep = 'a'}", "line 18: in step 3 (cut), keep is a list of patterns, and not 'a'."),
        ('p = "inf"', "p = 0", "line 18: p in step 3 (cut) must be greater than 0, and is 0."),
        ('[data]\nsource = "digits"\n', "", "r.toml: the recipe has no 'data', which it needs."),
        ('title = "mine"', "title = 3", "r.toml, line 1: title in the recipe must be a text in quotes, and is 3."),
        ('title = "mine"', "tittle = 'x'", "line 1: unknown key 'tittle' in the recipe; did you mean 'title'?"),
        ('title = "mine"', "device = 'gpu'", "line 1: unknown device 'gpu'; did you mean 'cpu'?"),
        ('title = "mine"', "threads = 0", "line 1: threads in the recipe must be at least 1, and is 0."),
        ('title = "mine"', "seed = 1.5", "line 1: seed in the recipe must be a whole number, and is 1.5."),
        ('"digits"', '"digits"\naugment = ["flop"]', "line 4: unknown augment 'flop'; did you mean 'flip'?"),
        ('"digits"', '"digits"\nvalidation = 1', "line 4: validation in [data] must be less than 1, and is 1."),
        ('title = "mine"', 'title = "mine', "r.toml is not TOML: Illegal character '\\n' (at line 1, column 14)."),
    ],
)
def test_each_mistake_is_told_with_its_line(old, new, sentence):
    assert old in TEXT
    with pytest.raises(RecipeError, match=re.escape(sentence)):
        parse(TEXT.replace(old, new), "r.toml")


def test_budgets_and_limits_are_read():
    text = TEXT.replace("sparsity = 0.8", "guide = 'ranking'\nbudget = {macs = 0.5, params = 1_000}")
    text = text.replace('p = "inf"', '[steps.limits]\nleast = {"*" = 8, "head*" = 2}\ntied = ["a*", ["b", "c"]]')
    cut = parse(text).steps[2]
    assert isinstance(cut, Cut)
    assert cut.budget == BudgetPart(macs=0.5, params=1000)
    assert cut.limits == LimitsPart(least={"*": 8, "head*": 2}, tied=("a*", ("b", "c")))


def test_a_mistake_in_the_only_step_is_one_mistake():
    head = TEXT[: TEXT.index("[[steps]]")]
    with pytest.raises(RecipeError, match=r"unknown criterion 'magnitud'") as caught:
        parse(head + '[[steps]]\nkind = "cut"\nsparsity = 0.5\ncriterion = "magnitud"\n')
    assert "more problem" not in str(caught.value)


def test_more_mistakes_are_counted():
    wrong = TEXT.replace("sparsity = 0.8", "sparsity = 2").replace("lr = 0.1", "lr = 0")
    with pytest.raises(RecipeError, match=re.escape("(1 more problem after this one.)")):
        parse(wrong)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("title",), 1),
        (("data", "source"), 3),
        (("steps", 0, "stages"), 8),
        (("steps", 0, "stages", 1, "epochs"), 10),
        (("steps", 2), 15),
        (("steps", 2, "p"), 18),
        (("steps", 3), None),
        (("model", "nothing"), None),
    ],
)
def test_the_line_of_a_key(path, line):
    assert line_of(TEXT, path) == line


def test_paths_are_relative_to_the_recipe(tmp_path: Path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    text = TEXT.replace('"digits"', '"parquet:cifar"')
    text = text.replace('"secateur:digits_vgg"', '"nets.py:make"\nweights = "w.st"')
    (folder / "mine.toml").write_text(text)
    recipe = read_recipe(folder / "mine.toml")
    assert recipe.data.source == f"parquet:{folder / 'cifar'}"
    assert recipe.model.source == f"{folder / 'nets.py'}:make"
    assert recipe.model.weights == str(folder / "w.st")


def test_names_that_are_no_paths_stay(tmp_path: Path):
    (tmp_path / "mine.toml").write_text(TEXT)
    recipe = read_recipe(tmp_path / "mine.toml")
    assert recipe == parse(TEXT)


def test_a_missing_recipe_is_named(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"there is no recipe '.*none\.toml'; give the path"):
        read_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_a_recipe_that_is_no_text_is_named(tmp_path: Path, content: bytes | None):
    path = tmp_path / "odd.toml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"odd\.toml' cannot be read as text"):
        read_recipe(path)


def test_options_that_are_wrong_are_told_without_a_line():
    with pytest.raises(RecipeError, match=re.escape("the options: sparsity in step 1 (cut) must be less than 1")):
        build(data={"source": "digits"}, model={"source": "x"}, steps=({"kind": "cut", "sparsity": 1.5},))


@pytest.mark.parametrize("name", ["digits", "report"])
def test_the_embedded_recipes_are_those_in_recipes(name):
    repository = Path(__file__).resolve().parents[2]
    assert embedded(name).steps == read_recipe(repository / "recipes" / f"{name}.toml").steps


def test_the_report_is_the_reports_experiment():
    first, cut, last = embedded("report").steps
    assert isinstance(first, Train)
    assert isinstance(cut, Cut)
    assert isinstance(last, Train)
    assert (first.stages[0].lr, first.momentum) == (0.003, 0.9)
    assert (cut.sparsity, cut.guide, cut.p) == (0.8, "sparsity", 1)
    assert [(stage.lr, stage.epochs) for stage in last.stages] == [(1e-3, 10), (1e-4, 5), (1e-6, 5)]
    assert embedded("report").data.batch_size == 64
