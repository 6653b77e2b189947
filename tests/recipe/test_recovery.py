"""A cutting step that gets accuracy back at once."""

import pytest
import torch

from secateur.measure.accuracy import accuracy
from secateur.measure.latency import torch_threads
from secateur.recipe import recovery
from secateur.recipe.parts import BudgetPart, DataPart, ModelPart, StagePart
from secateur.recipe.schema import Cut, Recipe, Train
from secateur.recipe.steps import prepare, take

NETWORK = """
from torch import nn

def make(classes):
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, classes),
    )
"""


@pytest.fixture
def trained(tmp_path):
    """A recipe's setting and the state after training, by how the cut that follows recovers."""
    (tmp_path / "nets.py").write_text(NETWORK)

    def made(recover):
        cut = Cut(guide="ranking", budget=BudgetPart(macs=0.35), recover=recover, recover_images=256)
        steps = (Train(stages=(StagePart(lr=0.1, epochs=4),)), cut)
        model = ModelPart(source=f"{tmp_path / 'nets.py'}:make")
        torch.manual_seed(0)
        setting, state = prepare(Recipe(data=DataPart(source="digits", batch_size=64), model=model, steps=steps))
        return setting, take(1, state, setting)[0]

    return made


def test_a_cut_that_recovers_loses_less_and_says_how(trained):
    found, notes = {}, {}
    with torch_threads(1):
        for recover in ("nothing", "statistics", "least-squares"):
            setting, state = trained(recover)
            smaller, outcome = take(2, state, setting)
            found[recover] = accuracy(smaller.model, setting.data.batches("test", 256)).top1
            notes[recover] = outcome.notes[1:]
    assert found["nothing"] + 0.1 < found["statistics"] < found["least-squares"]
    assert notes["nothing"] == ()
    assert "statistics of 2 batch norms" in notes["statistics"][0]
    assert "weights of 2 layers" in notes["least-squares"][0]


def test_without_batch_norm_there_are_no_statistics_and_it_says_so(tmp_path):
    (tmp_path / "nets.py").write_text(NETWORK.replace("nn.BatchNorm2d(24), ", ""))
    cut = Cut(guide="ranking", budget=BudgetPart(macs=0.5), recover="statistics")
    model = ModelPart(source=f"{tmp_path / 'nets.py'}:make")
    setting, state = prepare(Recipe(data=DataPart(source="digits"), model=model, steps=(cut,)))
    _, outcome = take(1, state, setting)
    assert "There is no batch norm" in outcome.notes[-1]


@pytest.mark.parametrize(("augment", "times"), [((), 1), (("crop", "flip"), 2)])
def test_what_was_trained_on_mirrored_images_is_solved_on_them_too(tmp_path, monkeypatch, augment, times):
    seen = []
    monkeypatch.setattr(recovery, "reconstruct", lambda model, smaller, plan, inputs, **_: seen.extend(inputs) or ())
    (tmp_path / "nets.py").write_text(NETWORK)
    cut = Cut(guide="ranking", budget=BudgetPart(macs=0.5), recover="least-squares", recover_images=40)
    data = DataPart(source="digits", batch_size=64, augment=augment)
    setting, state = prepare(Recipe(data=data, model=ModelPart(source=f"{tmp_path / 'nets.py'}:make"), steps=(cut,)))
    _, outcome = take(1, state, setting)
    assert ("mirror images" in outcome.notes[-1]) == (times == 2)
    assert [len(images) for images in seen] == [40] * times
    if times == 2:
        assert torch.equal(seen[1], seen[0].flip(3))
        assert not torch.equal(seen[1], seen[0])
