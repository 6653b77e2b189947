"""The smallest model above an accuracy floor: brackets, journals, and what comes back after a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from secateur.allocate.limits import Limits
from secateur.errors import PlanError, RunError
from secateur.graph.groups import find_groups
from secateur.measure.accuracy import accuracy
from secateur.recover.train import Stage, fine_tune
from secateur.search.compress import compress
from secateur.search.floor import Floor, Search, Trial, find_floor, next_share
from secateur.surgery.cut import Cut


def curve(share: float) -> float:
    """Falls slowly, then fast."""
    return 0.93 - 0.002 / share


@pytest.mark.parametrize("fall", [-0.001, -0.005, -0.02, -0.1])
def test_the_bracket_closes_on_the_crossing(fall):
    search = find_floor(curve, curve(1.0), fall, tries=20, width=0.02)
    crossing = 0.002 / (0.93 - search.floor)
    assert search.best is not None
    assert crossing <= search.best.share <= 1.03 * crossing
    assert len(search.trials) <= 12
    assert all(t.accuracy == curve(t.share) for t in search.trials)


def test_a_noisy_curve_still_gives_what_was_measured():
    draw = torch.Generator().manual_seed(0)

    def noisy(share: float) -> float:
        return curve(share) + 0.003 * float(torch.randn(1, generator=draw))

    for _ in range(20):
        search = find_floor(noisy, curve(1.0), -0.01)
        best = search.best
        assert len(search.trials) <= 8
        assert best is None or (best in search.trials and best.accuracy is not None and best.accuracy >= search.floor)


def test_what_cannot_be_cut_so_far_is_below():
    def attempt(share: float) -> float:
        if share < 0.3:
            raise PlanError("out of reach")
        return 0.9

    search = find_floor(attempt, 0.9, 0.85, tries=12)
    assert search.best is not None
    assert 0.3 <= search.best.share < 0.31
    assert any(trial.accuracy is None and trial.note == "out of reach" for trial in search.trials)


def test_none_above_says_what_the_best_was():
    search = find_floor(lambda share: 0.5 * share, 0.9, -0.01, tries=4)
    assert search.best is None
    assert search.sentence.startswith("None is above the floor of 89.00 %: the best is ")
    assert next_share(Search(0.9, 0.92, (Trial(0.97, 0.8, 0.0),)), 0.05) is None
    with pytest.raises(PlanError, match=r"the model as it is has 80.00 %, below the floor of 90.00 %"):
        find_floor(curve, 0.8, 0.9)


def test_a_journal_goes_on_and_knows_its_own(tmp_path):
    journal, asked = tmp_path / "trials.jsonl", []

    def breaking(share: float) -> float:
        asked.append(share)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return curve(share)

    with pytest.raises(KeyboardInterrupt):
        find_floor(breaking, curve(1.0), -0.01, journal=journal)
    with journal.open("a") as file:
        file.write('{"share": 0.1, "accu')
    after = find_floor(breaking, curve(1.0), -0.01, journal=journal)
    unbroken = find_floor(curve, curve(1.0), -0.01)
    assert [t.share for t in after.trials] == [t.share for t in unbroken.trials]
    assert len(asked) == len(unbroken.trials) + 1
    assert find_floor(math.sqrt, curve(1.0), -0.01, journal=journal).trials == after.trials
    with pytest.raises(RunError, match="is of another search"):
        find_floor(curve, curve(1.0), -0.02, journal=journal)


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    held = load_digits()
    return torch.tensor(held.images[:, None] / 16, dtype=torch.float32), torch.tensor(held.target)


def test_compress_to_a_floor_on_digits_with_a_kill_on_the_way(tmp_path: Path):
    images, labels = digits()
    parts = [(images[i::3], labels[i::3]) for i in range(3)]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 16, 10)
    )

    def train(net: nn.Module, epochs: int) -> None:
        def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
            order = torch.randperm(len(parts[0][1]), generator=torch.Generator().manual_seed(epoch))
            return [(parts[0][0][i], parts[0][1][i]) for i in order.split(64)]

        fine_tune(net, batches, lambda: [parts[1]], [Stage(0.05, epochs)])

    train(model, 12)
    measured: list[float] = []
    kill = [4]

    def evaluate(net: nn.Module) -> float:
        if len(measured) == kill[0]:
            raise KeyboardInterrupt
        measured.append(accuracy(net, [parts[1]]).top1)
        return measured[-1]

    def recover(cut: Cut[nn.Module, None, None]) -> None:
        train(cut.model, 2)

    floor = Floor(-0.02, evaluate, measure="macs", tries=5, folder=tmp_path / "floor")
    with pytest.raises(KeyboardInterrupt):
        compress(model, images[:2], floor, recover=recover, limits=Limits(least=2))
    kill[0] = 10**9
    made = compress(model, images[:2], floor, recover=recover, limits=Limits(least=2))
    assert made.search is not None
    assert made.search.best is not None
    assert len(made.search.trials) == 5
    assert len(measured) == 1 + 3 + 1 + 2  # the whole, three trials, the whole again, two more
    best = made.search.best.accuracy
    assert best is not None
    assert accuracy(made.model, [parts[1]]).top1 == best >= measured[0] - 0.02
    assert made.plans[-1].macs_left <= made.search.best.share * find_groups(model, images[:2]).macs
    # Once more, from the folder alone: nothing is tried, and the model is the same.
    again = compress(model, images[:2], floor, recover=recover, limits=Limits(least=2))
    assert torch.equal(again.model(images), made.model(images))
    assert [p.hash for p in again.plans] == [p.hash for p in made.plans]
    assert len(list((tmp_path / "floor").glob("*.safetensors"))) == 1
    assert json.loads((tmp_path / "floor" / "trials.jsonl").read_text().splitlines()[0])["whole"] == measured[0]


def test_no_model_above_the_floor_is_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).eval()
    inputs = torch.zeros(1, 4)
    whole = sum(p.numel() for p in model.parameters())

    def evaluate(net: nn.Module) -> float:
        return 0.9 if sum(p.numel() for p in net.parameters()) == whole else 0.2

    with pytest.raises(PlanError, match=r"None is above the floor of 85.00 %: the best is .* has 20.00 %"):
        compress(model, inputs, Floor(0.85, evaluate, tries=3))
    Path("taken").write_text("")
    with pytest.raises(RunError, match="taken"):
        compress(model, inputs, Floor(0.85, evaluate, folder="taken"))
    with pytest.raises(PlanError, match="tries of 1 or more"):
        Floor(0.9, evaluate, tries=0)
