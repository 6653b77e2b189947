"""What a training step says of warm-up, penalties and the original reaches the training, and resuming ends the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from secateur.errors import PlanError, RecipeError
from secateur.measure.latency import torch_threads
from secateur.recipe.folder import load
from secateur.recipe.parts import DataPart, DistillPart, ModelPart, PenaltyPart, StagePart
from secateur.recipe.reading import parse
from secateur.recipe.run import Status, resume, run
from secateur.recipe.schema import Cut, Recipe, Sparsify, Train
from secateur.recipe.steps import prepare, take
from secateur.recover.history import History

NETWORK = """
from torch import nn

def make(classes):
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 12), nn.ReLU(), nn.Linear(12, classes),
    )
"""
DATA = DataPart(source="digits", validation=0.9, batch_size=64)
TRAIN = Train(stages=(StagePart(lr=0.1, epochs=2),))
CUT = Cut(sparsity=0.5, guide="uniform")
PENALTY = PenaltyPart(kind="l2", strength=0.05, every=1, most=0.3)
PENALTIES: tuple[tuple[str, Any], ...] = (
    ("kind", "l1"),
    ("kind", "group-lasso"),
    ("kind", "slimming"),
    ("strength", 0.2),
    ("every", 2),
    ("most", 0.06),
    ("units", "next-cut"),
    ("proximal", True),
)
DISTILL = DistillPart(attention=("0",))
DISTILLATIONS: tuple[tuple[str, Any], ...] = (
    ("temperature", 1.0),
    ("weight", 0.3),
    ("attention", ("2",)),
    ("attention_weight", 10.0),
    ("unlabelled", "digits"),
)


@pytest.fixture
def network(tmp_path: Path) -> ModelPart:
    (tmp_path / "nets.py").write_text(NETWORK)
    return ModelPart(source=f"{tmp_path / 'nets.py'}:make")


def trained(
    network: ModelPart, *steps: Train | Sparsify | Cut, until: int | None = None
) -> tuple[dict[str, Tensor], History]:
    """The weights after all steps, or the first ones, and the history of the last one that trains."""
    recipe = Recipe(data=DATA, model=network, steps=steps)
    histories = []
    torch.manual_seed(0)
    with torch_threads(1):
        setting, state = prepare(recipe)
        for number in range(1, (until or len(steps)) + 1):
            state, outcome = take(number, state, setting)
            histories += [outcome.history] if outcome.history is not None else []
    return state.model.state_dict(), histories[-1]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def changed(part: BaseModel, field: str, value: object) -> Any:
    assert getattr(part, field) != value
    return type(part).model_validate({**dict(part), field: value})


def test_every_field_of_these_parts_is_here() -> None:
    assert {field for field, _ in PENALTIES} == set(PenaltyPart.model_fields)
    assert {"teacher", *(field for field, _ in DISTILLATIONS)} == set(DistillPart.model_fields)


@pytest.mark.parametrize(("field", "value"), PENALTIES)
def test_knobs_of_penalties(network: ModelPart, field: str, value: object) -> None:
    def after(part: PenaltyPart) -> dict[str, Tensor]:
        return trained(network, changed(TRAIN, "penalty", part), CUT, until=1)[0]

    part = changed(PENALTY, field, value)
    assert same(after(part), after(part))
    assert not same(after(PENALTY), after(part))


def test_what_the_next_cut_would_take_is_what_becomes_small(network: ModelPart) -> None:
    part = PenaltyPart(kind="group-lasso", strength=20.0, units="next-cut", proximal=True)
    recipe = Recipe(data=DATA, model=network, steps=(changed(TRAIN, "penalty", part), CUT))
    torch.manual_seed(0)
    setting, state = prepare(recipe)
    state, _ = take(1, state, setting)
    rows = state.model[0].weight.flatten(1)
    assert int((~rows.any(1)).sum()) == 6
    cut, _ = take(2, state, setting)
    assert cut.model[0].weight.flatten(1).any(1).all()
    alone = Recipe(data=DATA, model=network, steps=(changed(TRAIN, "penalty", part),))
    setting, state = prepare(alone)
    with pytest.raises(RecipeError, match="step 1 penalises what the next cut would take, and no step after it cuts"):
        take(1, state, setting)


@pytest.mark.parametrize(("field", "value"), DISTILLATIONS)
def test_knobs_of_distillation(network: ModelPart, field: str, value: object) -> None:
    def after(part: DistillPart) -> dict[str, Tensor]:
        return trained(network, TRAIN, CUT, changed(TRAIN, "distill", part))[0]

    part = changed(DISTILL, field, value)
    assert same(after(part), after(part))
    assert not same(after(DISTILL), after(part))


def test_the_original_is_the_model_as_it_was_first_measured(network: ModelPart) -> None:
    steps = (TRAIN, Sparsify(sparsity=0.3), TRAIN, CUT, changed(TRAIN, "distill", DistillPart()))
    setting, state = prepare(Recipe(data=DATA, model=network, steps=steps))
    assert state.original is None
    state, _ = take(1, state, setting)
    first = {name: value.clone() for name, value in state.model.state_dict().items()}
    for number in (2, 3, 4, 5):
        state, _ = take(number, state, setting)
        assert state.original is not None
        assert same(first, state.original.state_dict())
    setting, state = prepare(Recipe(data=DATA, model=network, steps=(CUT, steps[-1])))
    assert state.original is not None
    assert same(state.model.state_dict(), state.original.state_dict())
    setting, state = prepare(Recipe(data=DATA, model=network, steps=steps[-1:]))
    with pytest.raises(RecipeError, match="distils from the original, and there is none yet"):
        take(1, state, setting)


def test_a_table_of_logits_teaches_as_the_original_does(network: ModelPart, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (TRAIN, CUT, changed(TRAIN, "distill", DistillPart()))
    _, table = trained(network, *steps)
    monkeypatch.setattr("secateur.recipe.steps.fixed_logits", lambda *given: None)
    _, teacher = trained(network, *steps)
    for one, other in zip(table.rows, teacher.rows, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-5)
    augmented = changed(steps[-1], "augment", ("flip",))
    monkeypatch.undo()
    assert trained(network, TRAIN, CUT, augmented)[1].rows[0].train_loss != table.rows[0].train_loss


def test_the_epoch_that_is_kept(network: ModelPart) -> None:
    step = Train(stages=(StagePart(lr=0.1, epochs=3), StagePart(lr=3.0, epochs=1)))
    kept = {each.keep: trained(network, each) for each in (step, changed(step, "keep", "last"))}
    assert kept["best"][1].best_epoch < 4
    assert kept["last"][1].best_epoch == 4
    assert not same(kept["best"][0], kept["last"][0])


def test_warm_up_and_rewinding(network: ModelPart) -> None:
    step = Train(stages=(StagePart(lr=0.1, epochs=1), StagePart(lr=0.01, epochs=2)))
    rates = [row.lr for row in trained(network, step)[1].rows]
    assert rates == [0.1, 0.01, 0.01]
    warmed = trained(network, changed(step, "warmup", 2))[1].rows
    assert [warmed[0].lr, warmed[1].lr] == pytest.approx([0.05, 0.01])
    rewound = changed(step, "rewind", 2)
    assert [row.lr for row in trained(network, rewound)[1].rows] == [0.01, 0.01]
    assert rewound.epochs == 2


def test_a_run_that_distils_and_penalises_goes_on_to_the_same_end(network: ModelPart, tmp_path: Path) -> None:
    steps = (
        changed(TRAIN, "penalty", changed(PENALTY, "units", "next-cut")),
        CUT,
        changed(changed(changed(TRAIN, "distill", DISTILL), "ema", 0.9), "mixup", 0.2),
    )
    recipe = Recipe(data=DATA, model=network, steps=steps, threads=1)
    whole = run(recipe, tmp_path / "whole")
    for done in (1, 2, 3):

        def stop(status: Status, done: int = done) -> None:
            if status.done == done and status.share > 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            (
                run(recipe, tmp_path / "broken", progress=stop)
                if done == 1
                else resume(tmp_path / "broken", progress=stop)
            )
    broken = resume(tmp_path / "broken")
    assert same(load(tmp_path / "whole").state_dict(), load(tmp_path / "broken").state_dict())
    assert math.isclose(
        whole.ledger.rows[-1].measurement.accuracy.top1, broken.ledger.rows[-1].measurement.accuracy.top1
    )


def test_a_recipe_with_all_of_it_goes_to_toml_and_back() -> None:
    step = Train(
        stages=(StagePart(lr=0.1, epochs=4),), optimizer="adamw", warmup=1, rewind=2, mixup=0.2, cutmix=1.0, clip=1.0,
        ema=0.99, only="norms-and-head", distill=DISTILL, penalty=PENALTY, bf16=True, compile=True,
    )  # fmt: skip
    recipe = Recipe(data=DATA, model=ModelPart(source="secateur:digits_vgg"), steps=(step,))
    assert parse(recipe.to_toml()) == recipe


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"warmup": 2}, "warmup is 2, of 2 epochs; it must be fewer"),
        ({"warmup": 1, "schedule": "one-cycle"}, "'one-cycle' has a warm-up of its own"),
        ({"rewind": 3}, "rewind is 3, and the stages have 2 epochs"),
        ({"nesterov": True, "optimizer": "adamw"}, "nesterov is for the optimizer 'sgd', and this is 'adamw'"),
        ({"penalty": {"kind": "l1", "strength": 0.1, "every": 2}}, "needs both every and most"),
        ({"ema": 1.0}, "ema\n  Input should be less than 1"),
    ],
)
def test_what_does_not_fit_together(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Train.model_validate({**dict(TRAIN), **changes})


def test_a_misspelt_key_of_a_part_is_told_with_its_line() -> None:
    step = '[[steps]]\nkind = "train"\nstages = [{lr = 1.0, epochs = 1}]\n'
    text = f'[data]\nsource = "digits"\n[model]\nsource = "x"\n{step}'
    with pytest.raises(RecipeError, match=r"line 8: unknown key 'temprature' in .*; did you mean 'temperature'"):
        parse(text + "distill = {temprature = 2.0}\n")
    with pytest.raises(RecipeError, match=r"line 8: unknown key 'strengths' in .*; did you mean 'strength'"):
        parse(text + 'penalty = {kind = "l1", strengths = 2.0}\n')


def test_a_penalty_on_what_is_not_there_is_found_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(
        "from torch import nn\ndef make(classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, classes))\n"
    )
    network = ModelPart(source=f"{tmp_path / 'plain.py'}:make")
    steps = (TRAIN, changed(TRAIN, "penalty", PenaltyPart(kind="slimming", strength=0.1)))
    with pytest.raises(PlanError, match="no unit goes through a batch norm"):
        prepare(Recipe(data=DATA, model=network, steps=steps))
