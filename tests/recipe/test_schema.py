"""Recipes as values: they go to TOML and back, cannot be changed, and take overrides only where they are valid."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from secateur.recipe.parts import BudgetPart, DataPart, LimitsPart, ModelPart, StagePart
from secateur.recipe.reading import parse
from secateur.recipe.schema import Cut, Recipe, Sparsify, Train

SHARES = st.floats(0, 1, exclude_max=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
STAGES = st.builds(StagePart, lr=st.floats(1e-9, 10), epochs=st.integers(1, 99))
TRAINS = st.builds(
    Train,
    stages=st.lists(STAGES, min_size=1, max_size=3).map(tuple),
    momentum=SHARES,
    nesterov=st.booleans(),
    schedule=st.sampled_from(["staged", "cosine", "one-cycle"]),
    batch_size=st.none() | st.integers(1, 512),
    augment=st.none() | st.just(("crop", "flip")),
)
SPARSIFIES = st.builds(Sparsify, sparsity=SHARES, layers=st.lists(TEXTS, max_size=2).map(tuple))
COUNTS = st.integers(1, 99)
NAMES = st.lists(TEXTS, max_size=3).map(tuple)
LIMITS = st.builds(
    LimitsPart,
    least=COUNTS | st.dictionaries(TEXTS, COUNTS, max_size=2),
    multiple=COUNTS,
    cap=SHARES | st.dictionaries(TEXTS, SHARES, max_size=2),
    keep=NAMES,
    tied=st.lists(TEXTS | NAMES, max_size=2).map(tuple),
)
BUDGETS = st.builds(BudgetPart, params=st.none() | COUNTS, macs=st.floats(0.01, 1) | st.integers(1, 10**15))
PS = st.sampled_from([1.0, 2.0, math.inf])
CUTS = st.builds(Cut, sparsity=SHARES, p=PS, limits=LIMITS) | st.builds(
    Cut, budget=BUDGETS, guide=st.sampled_from(["uniform", "ranking", "knapsack"])
)
RECIPES = st.builds(
    Recipe,
    title=TEXTS,
    seed=st.integers(0, 2**31),
    threads=st.none() | st.integers(1, 64),
    data=st.builds(DataPart, source=TEXTS, image_size=st.none() | st.integers(1, 512)),
    model=st.builds(ModelPart, source=TEXTS, weights=st.none() | TEXTS),
    steps=st.lists(TRAINS | SPARSIFIES | CUTS, min_size=1, max_size=4).map(tuple),
)


def recipe(*steps: Train | Sparsify | Cut) -> Recipe:
    return Recipe(data=DataPart(source="digits"), model=ModelPart(source="secateur:digits_vgg"), steps=steps)


@settings(max_examples=80, deadline=None)
@given(RECIPES)
def test_toml_and_back_is_the_same_recipe(made):
    assert parse(made.to_toml()) == made


def test_every_default_is_written_out():
    text = recipe(Cut(sparsity=0.5), Sparsify(sparsity=0.5)).to_toml()
    for key in ("seed", "device", "validation", "normalise", "batch_size", "guide", "criterion", "limits", "scope"):
        assert f"\n{key} = " in text


def test_an_override_of_the_sparsity_reaches_every_pruning_step():
    train = Train(stages=(StagePart(lr=0.1, epochs=2),))
    changed = recipe(Sparsify(sparsity=0.1), train, Cut(sparsity=0.2, p=2)).with_sparsity(0.7)
    assert changed == recipe(Sparsify(sparsity=0.7), train, Cut(sparsity=0.7, p=2))
    budgeted = Cut(guide="ranking", budget=BudgetPart(macs=0.5))
    assert recipe(budgeted, Cut(sparsity=0.2)).with_sparsity(0.7) == recipe(budgeted, Cut(sparsity=0.7))


def test_an_override_of_the_budget_reaches_every_step_that_cuts():
    half = BudgetPart(macs=0.5)
    steps = (Sparsify(sparsity=0.1), Cut(sparsity=0.2), Cut(sparsity=0.2, guide="uniform"))
    wanted = (steps[0], Cut(sparsity=0.2, budget=half), Cut(budget=half, guide="uniform"))
    assert recipe(*steps).with_budget({"macs": 0.5}) == recipe(*wanted)


def test_an_override_of_the_epochs_reaches_the_last_training_step_alone():
    stages = (StagePart(lr=0.1, epochs=2), StagePart(lr=0.01, epochs=3))
    train = Train(stages=stages, momentum=0.5)
    changed = recipe(train, Cut(sparsity=0.5), train).with_epochs(7)
    assert changed.steps[0] == train
    assert changed.steps[2] == Train(stages=(StagePart(lr=0.1, epochs=7),), momentum=0.5)


def test_an_override_is_checked():
    with pytest.raises(ValidationError, match="less than 1"):
        recipe(Cut(sparsity=0.5)).with_sparsity(1.0)


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        recipe(Cut(sparsity=0.5)).seed = 3
