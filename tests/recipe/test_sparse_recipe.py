"""Recipes that set single weights to zero: solved without labels, of a fixed pattern, or while the model is trained."""

from __future__ import annotations

import re

import pytest
import torch

from secateur.errors import RecipeError
from secateur.measure.latency import torch_threads
from secateur.measure.sparsity import sparsity
from secateur.recipe.folder import load
from secateur.recipe.launch import resume, run
from secateur.recipe.reading import build, parse
from secateur.recipe.run import Status
from secateur.recipe.steps import prepare, take
from secateur.surgery.masks import find_masks, find_zeros

NETWORK = """
from torch import nn

def make(classes):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, classes),
    )
"""
TRAIN = {"kind": "train", "stages": [{"lr": 0.05, "epochs": 2}], "keep": "last"}
WAYS = {
    "gradual": {"way": "gradual", "sparsity": 0.8, "end": 0.5, "every": 2},
    "acdc": {"way": "acdc", "sparsity": 0.8, "cycles": 2, "final": 0.4},
    "rigl": {"way": "rigl", "every": 5, "alpha": 0.3},
}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Trains within seconds; no pictures."""
    monkeypatch.setattr("secateur.recipe.run.save_plots", lambda record, folder: ())
    monkeypatch.setattr("secateur.recipe.run.write_page", lambda record, path: None)
    (tmp_path / "nets.py").write_text(NETWORK)
    return {
        "data": {"source": "digits", "batch_size": 16, "validation": 0.8},
        "model": {"source": f"{tmp_path / 'nets.py'}:make"},
        "threads": 1,
    }


def states(parts, *steps):
    """The state before each step, and after the last."""
    torch.manual_seed(0)
    with torch_threads(1):
        setting, state = prepare(build(**parts, steps=steps))
        out = [state]
        for number in range(1, len(steps) + 1):
            state, _ = take(number, state, setting)
            out.append(state)
    return out


@pytest.mark.parametrize("way", WAYS)
def test_masks_that_moved_stay_for_the_steps_that_follow(parts, way):
    before = ({"kind": "sparsify", "sparsity": 0.8},) if way == "rigl" else ()
    *_, begun, moved, after = states(parts, TRAIN, *before, {**TRAIN, "masks": WAYS[way]}, TRAIN)
    assert moved.masks.table().sparsity == pytest.approx(0.8, abs=0.002)
    assert after.masks == moved.masks
    assert find_zeros(after.model) == moved.masks
    if way == "rigl":
        assert moved.masks != begun.masks
        layers = [(row.name, row.zeros) for row in begun.masks.table().rows]
        assert [(row.name, row.zeros) for row in moved.masks.table().rows] == layers


def test_gradual_goes_on_from_the_masks_in_force(parts):
    moving = {"way": "gradual", "sparsity": 0.8, "every": 1000}
    steps = ({"kind": "sparsify", "sparsity": 0.6}, {**TRAIN, "masks": moving})
    *_, begun, moved = states(parts, TRAIN, *steps)
    gone = [~begun.masks.keep(name) for name in begun.masks.names]
    assert all(not (moved.masks.keep(name) & off).any() for name, off in zip(begun.masks.names, gone))
    assert moved.masks.table().sparsity == pytest.approx(0.8, abs=0.002)


def test_a_run_killed_while_masks_move_ends_in_the_same_weights(parts, tmp_path):
    recipe = build(**parts, steps=(TRAIN, {**TRAIN, "masks": WAYS["gradual"]}))
    run(recipe, tmp_path / "whole")

    def stop(status: Status) -> None:
        if "step 2 of 2: validation" in status.text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "broken", progress=stop)
    resume(tmp_path / "broken")
    whole, broken = load(tmp_path / "whole").state_dict(), load(tmp_path / "broken").state_dict()
    assert all(broken[name].equal(tensor) for name, tensor in whole.items())
    assert sparsity(load(tmp_path / "broken")).sparsity == pytest.approx(0.8, abs=0.002)


def test_weights_that_stay_are_solved(parts):
    plain = {"kind": "sparsify", "sparsity": 0.8}
    *_, dense = states(parts, TRAIN)
    *_, magnitude = states(parts, TRAIN, plain)
    *_, solved = states(parts, TRAIN, {**plain, "recover": "least-squares"})
    assert solved.masks.table().zeros == magnitude.masks.table().zeros
    setting, _ = prepare(build(**parts, steps=(TRAIN,)))
    images = torch.cat([x for x, _ in setting.data.batches("validation", 64)])
    with torch.no_grad():
        whole, by_size, made_up = (state.model.eval()(images) for state in (dense, magnitude, solved))
    assert (made_up - whole).norm() < 0.5 * (by_size - whole).norm()


def test_a_pattern_stays(parts):
    *_, begun, after = states(parts, TRAIN, {"kind": "sparsify", "pattern": [2, 4], "layers": ["7.weight"]}, TRAIN)
    kept = after.model[7].weight.detach() != 0
    assert (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert begun.masks == after.masks
    *_, solved = states(parts, TRAIN, {"kind": "sparsify", "pattern": [2, 4], "recover": "least-squares"})
    assert solved.masks.table()["7.weight"].sparsity == 0.5


def test_rigl_without_masks_is_refused_before_anything_is_trained(parts):
    with pytest.raises(RecipeError, match="sparsify in a step before"):
        prepare(build(**parts, steps=({**TRAIN, "masks": WAYS["rigl"]},)))
    sparsify, cut = {"kind": "sparsify", "sparsity": 0.8}, {"kind": "cut", "sparsity": 0.5}
    with pytest.raises(RecipeError, match="sparsify in a step before"):
        prepare(build(**parts, steps=(sparsify, cut, {**TRAIN, "masks": WAYS["rigl"]})))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('masks = {way = "rigl", cycles = 2}', "the way 'rigl' takes no cycles, but every, alpha, end"),
        ('masks = {way = "acdc"}', "the way 'acdc' needs a sparsity"),
        ('masks = {way = "acdc", sparsity = 0.9, warmup = 0.6, final = 0.5}', "leave nothing between them"),
        ('masks = {way = "gradual", sparsity = 0.9, evry = 5}', "unknown key 'evry' in step 1 (train); did you mean"),
        ('masks = {way = "graduall", sparsity = 0.9}', "'graduall'"),
    ],
)
def test_mistakes_are_told_with_their_line(line, said):
    head = '[data]\nsource = "digits"\n[model]\nsource = "secateur:digits_vgg"\n[[steps]]\nkind = "train"\n'
    with pytest.raises(RecipeError, match=f"line 8: .*{re.escape(said)}"):
        parse(f"{head}stages = [{{lr = 0.1, epochs = 1}}]\n{line}\n")


@pytest.mark.parametrize(("keys", "said"), [({}, "one of them"), ({"sparsity": 0.5, "pattern": [2, 4]}, "one of them")])
def test_a_sparsity_or_a_pattern(parts, keys, said):
    with pytest.raises(RecipeError, match=said):
        build(**parts, steps=({"kind": "sparsify", **keys},))
    with pytest.raises(RecipeError, match="give fewer"):
        build(**parts, steps=({"kind": "sparsify", "pattern": [4, 4]},))


def test_zeros_are_found_as_they_were_made(parts):
    model = prepare(build(**parts, steps=(TRAIN,)))[1].model
    masks = find_masks(model, 0.7)
    masks.apply_(model)
    assert find_zeros(model) == masks
    assert find_zeros(model, names="7.weight").names == ("7.weight",)
