"""Every field of a recipe does something: with another value the steps leave another model, or see other data."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import save_file
from torch import Tensor

import pictures
from secateur.errors import RecipeError
from secateur.measure.latency import torch_threads
from secateur.recipe import parts, schema
from secateur.recipe.parts import (
    BudgetPart,
    DataPart,
    DistillPart,
    FloorPart,
    LimitsPart,
    ModelPart,
    MovingPart,
    PenaltyPart,
    StagePart,
)
from secateur.recipe.schema import Cut, Recipe, Sparsify, Train
from secateur.recipe.steps import Drawn, Setting, State, prepare, take
from secateur.zoo.data import Data

NETWORK = """
from torch import nn

class Seen(nn.Module):
    def forward(self, x):
        self.strides = x.stride()
        return x

def make(classes, width=24):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), Seen(), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 12), nn.ReLU(), nn.Linear(12, classes),
    )

def other(classes):
    return make(classes, 20)
"""
STAGE = StagePart(lr=0.1, epochs=1)
TRAIN = Train(stages=(STAGE,))
# So much held out leaves some hundred images to train on, which is enough to see a difference.
DATA = DataPart(source="digits", validation=0.9, batch_size=64)

TRAINING: tuple[tuple[str, Any], ...] = (
    ("stages", (StagePart(lr=0.05, epochs=1),)),
    ("stages", (StagePart(lr=0.1, epochs=2),)),
    ("momentum", 0.5),
    ("weight_decay", 0.01),
    ("nesterov", True),
    ("schedule", "cosine"),
    ("schedule", "one-cycle"),
    ("label_smoothing", 0.1),
    ("batch_size", 48),
    ("augment", ("crop",)),
    ("augment", ("flip",)),
    ("optimizer", "adamw"),
    ("mixup", 0.5),
    ("cutmix", 1.0),
    ("clip", 0.1),
    ("ema", 0.5),
    ("only", "norms-and-head"),
    ("penalty", PenaltyPart(kind="l2", strength=0.1)),
    ("bf16", True),
    ("masks", MovingPart(way="gradual", sparsity=0.5, end=0.5, every=2)),
)
SPARSIFYING: tuple[tuple[str, Any], ...] = (
    ("sparsity", 0.6),
    ("scope", "layer"),
    ("layers", ("0.weight",)),
    ("recover", "least-squares"),
)
CUTTING: tuple[tuple[str, Any], ...] = (
    ("sparsity", 0.6),
    ("guide", "uniform"),
    ("criterion", "random"),
    ("p", 4.0),
    ("recover", "statistics"),
    ("recover", "least-squares"),
    ("budget", BudgetPart(macs=0.4)),
    ("limits", LimitsPart(keep=("0",))),
    ("limits", LimitsPart(least=20)),
    ("limits", LimitsPart(multiple=5)),
    ("limits", LimitsPart(cap=0.2)),
    ("limits", LimitsPart(tied=("*",))),
)
BUDGETS: tuple[tuple[str, Any], ...] = (
    ("budget", BudgetPart(macs=0.3)),
    ("budget", BudgetPart(params=0.5)),
    ("budget", BudgetPart(bytes=5000)),
    ("budget", BudgetPart(units=12)),
    ("guide", "uniform"),
    ("guide", "ranking-per-cost"),
    ("guide", "knapsack"),
    ("criterion", "magnitude"),
)
SCALES = ("mean", "max", "gaussian", "lamp")
READING: tuple[tuple[str, Any], ...] = (
    ("validation", 0.8),
    ("batch_size", 48),
    ("augment", ("crop",)),
    ("image_size", 12),
)
ELSEWHERE = frozenset(
    {
        *((DataPart, field) for field in ("source", "normalise", "label", "folder", "download")),
        *((ModelPart, field) for field in ("source", "weights", "pretrained")),
        *((StagePart, field) for field in ("lr", "epochs")),
        *((Recipe, field) for field in ("seed", "device", "data", "model", "steps", "floor")),
        *((FloorPart, field) for field in ("accuracy", "measure", "tries", "width")),
        *((Train, field) for field in ("channels_last", "compile", "distill", "warmup", "rewind", "keep", "parallel")),
        *((part, field) for part in (PenaltyPart, DistillPart, MovingPart) for field in part.model_fields),
        *((Cut, field) for field in ("images", "recover_images", "recover_together", "scale", "runtime", "table")),
        *((Sparsify, field) for field in ("pattern", "recover_images")),
        (BudgetPart, "latency"),
    }
)
"""What the tests further down change; a run's title and threads are in test_run.py, floors in test_floor_recipe.py,
latencies in test_latency_recipe.py, masks in test_sparse_recipe.py."""


@pytest.fixture
def network(tmp_path: Path) -> ModelPart:
    (tmp_path / "nets.py").write_text(NETWORK)
    return ModelPart(source=f"{tmp_path / 'nets.py'}:make")


def after(recipe: Recipe) -> tuple[Setting, State]:
    """What all steps of a recipe leave."""
    torch.manual_seed(recipe.seed)
    with torch_threads(1):
        setting, state = prepare(recipe)
        for number in range(1, len(recipe.steps) + 1):
            state, _ = take(number, state, setting)
    return setting, state


def left(network: ModelPart, *steps: Train | Sparsify | Cut, data: DataPart = DATA, seed: int = 0) -> dict[str, Tensor]:
    return after(Recipe(data=data, model=network, steps=steps, seed=seed))[1].model.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def changed(part: BaseModel, field: str, value: object) -> Any:
    assert getattr(part, field) != value
    return type(part).model_validate({**dict(part), field: value})


def test_every_field_is_here():
    found = {**vars(parts), **vars(schema)}.values()
    kinds = {kind for kind in found if isinstance(kind, type) and issubclass(kind, parts.Part)}
    every = {(part, field) for part in kinds for field in part.model_fields}
    tables = ((Train, TRAINING), (Sparsify, SPARSIFYING), (Cut, CUTTING), (DataPart, READING))
    told = {(part, field) for part, knobs in tables for field, _ in knobs}
    inner = [value for _, value in CUTTING + BUDGETS if isinstance(value, BaseModel)]
    told |= {(type(value), field) for value in inner for field in value.model_fields_set}
    known = {(Recipe, "title"), (Recipe, "threads"), *((part, "kind") for part in (Train, Sparsify, Cut))}
    assert every == told | ELSEWHERE | known
    assert not told & ELSEWHERE


def test_nothing_changed_is_the_same_model(network):
    steps = (TRAIN, Sparsify(sparsity=0.5), Cut(sparsity=0.4))
    assert same(left(network, *steps), left(network, *steps))


@pytest.mark.parametrize(("field", "value"), TRAINING)
def test_knobs_of_training(network, field, value, monkeypatch):
    monkeypatch.setattr("secateur.recover.place.has_bf16", lambda device: True)
    assert not same(left(network, TRAIN), left(network, changed(TRAIN, field, value)))


@pytest.mark.parametrize(("field", "value"), SPARSIFYING)
def test_knobs_of_sparsifying(network, field, value):
    step = Sparsify(sparsity=0.5)
    assert not same(left(network, step), left(network, changed(step, field, value)))


@pytest.mark.parametrize(("field", "value"), CUTTING)
def test_knobs_of_cutting(network, field, value):
    step = Cut(sparsity=0.4)
    assert not same(left(network, step), left(network, changed(step, field, value)))


def test_every_criterion_has_its_own_choice(network):
    torch.manual_seed(0)
    trained = left(network, TRAIN)
    save_file(trained, "trained.safetensors")
    given = changed(network, "weights", "trained.safetensors")
    cut = Cut(sparsity=0.5, guide="uniform")
    criteria = get_args(Cut.model_fields["criterion"].annotation)
    chosen = [left(given, cut.model_copy(update={"criterion": criterion})) for criterion in criteria]
    assert len(criteria) == 12
    assert not any(same(one, other) for one, other in itertools.combinations(chosen, 2))


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_criteria_that_look_at_images_see_as_many_as_are_asked_for(network, criterion):
    def seen(images: int, seed: int = 0) -> list[Tensor]:
        recipe = Recipe(data=DATA, model=network, steps=(TRAIN,), seed=seed)
        return [image for batch, _ in Drawn(prepare(recipe)[0], images) for image in batch]

    counts = [len(seen(images)) for images in (1, 64, 100, 10_000)]
    assert counts[:3] == [1, 64, 100]
    assert counts[3] == len(prepare(Recipe(data=DATA, model=network, steps=(TRAIN,)))[0].data.train)
    assert torch.equal(torch.stack(seen(20)), torch.stack(seen(20)))
    assert not torch.equal(torch.stack(seen(20)), torch.stack(seen(20, seed=1)))
    few, many = (left(network, TRAIN, Cut(sparsity=0.4, criterion=criterion, images=images)) for images in (1, 100))
    assert not same(few, many)


def test_recovery_sees_as_many_images_as_are_asked_for(network):
    step = Cut(sparsity=0.4, recover="least-squares")
    few, many = (left(network, TRAIN, changed(step, "recover_images", images)) for images in (16, 100))
    assert not same(few, many)


def test_recovery_solves_layers_two_and_two_if_it_is_asked_to(network):
    step = Cut(sparsity=0.4, recover="least-squares", recover_images=64)
    one, two = (left(network, TRAIN, each) for each in (step, changed(step, "recover_together", 1)))
    assert not same(one, two)
    with pytest.raises(ValueError, match="recover_together goes with recover = 'least-squares'"):
        Cut(sparsity=0.4, recover_together=1)


@pytest.mark.parametrize("scale", SCALES)
def test_scales_change_what_is_ranked_over_all_layers(network, scale):
    step = Cut(guide="ranking", budget=BudgetPart(params=0.4))
    plain, scaled = (left(network, each) for each in (step, changed(step, "scale", scale)))
    assert not same(plain, scaled)
    alone = Cut(sparsity=0.4)
    assert same(left(network, alone), left(network, changed(alone, "scale", scale)))


def test_what_stays_when_it_is_said(network):
    def channels(**limits: Any) -> int:
        cut = Cut(sparsity=0.9, guide="uniform", limits=LimitsPart(**limits))
        return len(left(network, cut)["0.weight"])

    assert [channels(), channels(keep=("0",)), channels(least=7), channels(multiple={"0": 5})] == [3, 24, 7, 5]


@pytest.mark.parametrize(("field", "value"), BUDGETS)
def test_knobs_of_budgets(network, field, value):
    step = Cut(guide="ranking", criterion="random", budget=BudgetPart(params=0.4))
    assert not same(left(network, step), left(network, changed(step, field, value)))


@pytest.mark.parametrize(("field", "value"), READING)
def test_knobs_of_reading(network, field, value):
    assert not same(left(network, TRAIN), left(network, TRAIN, data=changed(DATA, field, value)))


def test_the_seed_draws_the_weights_the_split_the_order_and_the_channels(network):
    assert not same(left(network, TRAIN), left(network, TRAIN, seed=1))
    weights = Path("weights.safetensors")
    save_file(left(network, Sparsify(sparsity=0.0)), weights)
    given = changed(network, "weights", str(weights))
    cut = Cut(sparsity=0.5, criterion="random", guide="uniform")
    assert same(left(given, cut), left(given, cut))
    assert not same(left(given, cut), left(given, cut, seed=1))
    assert not same(left(given, TRAIN), left(given, TRAIN, seed=1))


def test_the_model_and_its_weights_are_those_of_the_recipe(network):
    nothing = Sparsify(sparsity=0.0)
    first = left(network, nothing)
    assert len(left(changed(network, "source", network.source.replace(":make", ":other")), nothing)["0.weight"]) == 20
    weights = {name: value + 1 for name, value in first.items()}
    save_file(weights, "weights.safetensors")
    assert same(left(changed(network, "weights", "weights.safetensors"), nothing), weights)


def test_channels_last_is_how_the_model_trains(network):
    for channels_last in (False, True):
        step = TRAIN.model_copy(update={"channels_last": channels_last})
        _, state = after(Recipe(data=DATA, model=network, steps=(step,)))
        assert (state.model[1].strides[1] == 1) is channels_last


def test_the_device_is_that_of_the_recipe(network):
    recipe = Recipe(data=DATA, model=network, steps=(TRAIN,))
    assert prepare(recipe)[0].device.type == "cpu"
    setting, state = prepare(recipe.model_copy(update={"device": "meta"}))
    assert {setting.device.type, *(tensor.device.type for tensor in state.model.parameters())} == {"meta"}


def test_auto_is_the_gpu_where_there_is_one(network, monkeypatch):
    recipe = Recipe(data=DATA, model=network, steps=(TRAIN,), device="auto")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert prepare(recipe)[0].device.type == "cpu"


def test_a_device_that_is_not_there_is_a_sentence(network):
    recipe = Recipe(data=DATA, model=network, steps=(TRAIN,)).model_copy(update={"device": "ipu"})
    with pytest.raises(RecipeError, match=r"has no device 'ipu' that torch can use; set device to 'cpu'\."):
        prepare(recipe)


def test_where_the_images_come_from_and_how_they_are_normalised(tmp_path, network):
    colour = ModelPart(source="secateur:resnet20")
    source = f"parquet:{pictures.folder_of(tmp_path / 'parquet')}"

    def read(**fields: str) -> Data:
        return prepare(Recipe(data=DataPart(source=source, **fields), model=colour, steps=(TRAIN,)))[0].data

    assert len(read().classes) == 2
    assert not torch.equal(read().example(), read(normalise="imagenet").example())
    assert len(prepare(Recipe(data=DATA, model=network, steps=(TRAIN,)))[0].data.classes) == 10


@pytest.mark.parametrize(
    ("verb", "part", "field", "value"),
    [
        ("unlabelled.load_data", DATA, "label", "fine_label"),
        ("unlabelled.load_data", DATA, "folder", "elsewhere"),
        ("unlabelled.load_data", DATA, "download", True),
        ("steps.build_model", ModelPart(source="torchvision:resnet18"), "pretrained", True),
    ],
)
def test_what_would_need_the_network_is_handed_on(monkeypatch, verb, part, field, value):
    class Seen(Exception):
        pass

    def note(*arguments: object, **options: object) -> None:
        raise Seen(repr(options[field]))

    monkeypatch.setattr(f"secateur.recipe.{verb}", note)
    for given in (part, changed(part, field, value)):
        parts = {"data": DATA, "model": ModelPart(source="x"), ("data" if part is DATA else "model"): given}
        with pytest.raises(Seen, match=f"^{getattr(given, field)!r}$"):
            prepare(Recipe(**parts, steps=(TRAIN,)))
