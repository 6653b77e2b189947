"""Masks that move in training: which weights go and come by the papers' formulas, and that masked ones are zero."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import PlanError, TrainingError
from secateur.recover.checkpoint import model_state, read_checkpoint
from secateur.recover.history import EpochRow
from secateur.recover.keeping import Keeping
from secateur.recover.moving import ACDC, Fixed, Gradual, Moment, RigL
from secateur.recover.train import Stage
from secateur.surgery.masks import Masks, find_masks
from secateur.surgery.pattern import find_pattern
from training import STEPS, assert_same_weights, batches, network, tune

EPOCHS = 5
ALL = EPOCHS * STEPS


def ways() -> dict[str, Any]:
    return {
        "fixed": find_masks(network(), 0.8),
        "pattern": find_pattern(network(), 2, 4, names=["5.weight"]),
        "gradual": Gradual(0.8, end=0.6, every=2),
        "layers": Gradual(0.9, begin=0.1, end=0.5, every=3, initial=0.2, scope="layer", names=("0.weight", "5.weight")),
        "acdc": ACDC(0.8, cycles=2, warmup=0.1, final=0.3),
        "rigl": RigL(find_masks(network(), 0.8), every=3),
    }


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, weight_decay=0.1)


class Shaking(torch.optim.SGD):
    """Moves weights without a gradient too."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(0.01)


def shaking(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Shaking(parameters, momentum=0.9)


class Watched:
    """A way of moving, with every mask that it has put in force."""

    def __init__(self, moving: Any) -> None:
        self.moving, self.seen = moving, []

    def start(self, model: nn.Module) -> Masks:
        return self.moving.start(model)

    def move(self, at: Moment) -> Any:
        moved = self.moving.move(at)
        self.seen.append({name: keep.clone() for name, keep in (at.keeps if moved is None else moved).items()})
        return moved

    def settled(self, step: int, steps: int) -> bool:
        return self.moving.settled(step, steps)


def watched(moving: Any) -> Watched:
    return Watched(Fixed(moving) if isinstance(moving, Masks) else moving)


def train(moving: Any, model: nn.Module | None = None, **more: Any) -> tuple[nn.Module, Any]:
    model = network() if model is None else model
    given = {"stages": [Stage(0.05, EPOCHS)], "batches_per_epoch": STEPS, "masks": moving} | more
    return model, tune(model, **given)


@pytest.mark.parametrize("options", [{}, {"optimizer": adam, "ema": 0.9}, {"optimizer": shaking, "clip": 0.5}])
@pytest.mark.parametrize("name", ways())
def test_masked_weights_are_exactly_zero_after_every_step(name: str, options: dict[str, Any]) -> None:
    moving, model = watched(ways()[name]), network()
    checks = []

    def look(step: int, steps: int, loss: float) -> None:
        for tensor, keep in moving.seen[-1].items():
            weight = model.get_parameter(tensor)
            checks.append(not weight[~keep].any() and bool(weight[keep].any()))

    train(moving, model, on_step=look, **options)
    assert len(moving.seen) == ALL
    assert all(checks)
    for tensor, keep in moving.seen[-1].items():
        assert not model.get_parameter(tensor)[~keep].any()
        assert not torch.signbit(model.get_parameter(tensor)[~keep]).any()
    gone = sum(int((~keep).sum()) for keep in moving.seen[-1].values())
    size = sum(keep.numel() for keep in moving.seen[-1].values())
    want = {"pattern": 0.5, "layers": 0.9}.get(name, 0.8)
    assert gone == pytest.approx(want * size, abs=1)


@pytest.mark.parametrize("name", ["fixed", "pattern"])
def test_the_averaged_weights_are_masked_at_each_validation(name: str) -> None:
    masks, model, seen = ways()[name], network(), []

    def validation() -> Any:
        seen.append(masks.holds(model))
        return batches(7, 2)

    train(masks, model, ema=0.5, validation=validation)
    assert seen == [True] * EPOCHS


def test_fixed_masks_are_a_bare_loop_whose_gradients_are_masked() -> None:
    masks, model, other = find_masks(network(), 0.7), network(), network()
    torch.manual_seed(3)
    train(masks, model, stages=[Stage(0.1, 1)], weight_decay=0.01, clip=0.3)
    torch.manual_seed(3)
    masks.apply_(other)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    other.train()
    for images, labels in batches(100):
        optimizer.zero_grad()
        functional.cross_entropy(other(images), labels).backward()
        for name in masks.names:
            other.get_parameter(name).grad.mul_(masks.keep(name))
        nn.utils.clip_grad_norm_(other.parameters(), 0.3)
        optimizer.step()
    assert masks.holds(other)
    assert_same_weights(model, other)


def test_gradual_is_the_cubic_curve_and_what_went_stays_gone() -> None:
    moving = watched(Gradual(0.9, begin=0.2, end=0.7, every=2, initial=0.1))
    train(moving)
    size = sum(keep.numel() for keep in moving.seen[0].values())
    first, last = 4, 14
    sparsity = 0.1
    for step, keeps in enumerate(moving.seen):
        if first <= step <= last and (step - first) % 2 == 0:
            sparsity = 0.9 + (0.1 - 0.9) * (1 - (step - first) / (last - first)) ** 3
        assert sum(int((~keep).sum()) for keep in keeps.values()) == round(sparsity * size)
    for before, after in zip(moving.seen, moving.seen[1:]):
        assert not any((after[name] & ~before[name]).any() for name in before)


def test_gradual_takes_the_smallest_weights_of_the_moment() -> None:
    model = network()
    keeps = {name: torch.ones_like(model.get_parameter(name), dtype=torch.bool) for name in ("0.weight", "5.weight")}
    moved = Gradual(0.5, end=0.5, every=1).move(Moment(model, 5, 10, keeps))
    assert moved is not None
    kept = torch.cat([model.get_parameter(name)[moved[name]].abs() for name in keeps])
    gone = torch.cat([model.get_parameter(name)[~moved[name]].abs() for name in keeps])
    assert gone.max() < kept.min()
    assert abs(len(gone) - len(kept)) <= 1


def test_compressed_and_dense_phases_take_turns() -> None:
    moving = watched(ACDC(0.8, cycles=2, warmup=0.1, final=0.3))
    train(moving)
    dense = [all(bool(keep.all()) for keep in keeps.values()) for keeps in moving.seen]
    assert dense == [True] * 2 + [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3 + [False] * 6
    changes = [
        step for step in range(1, ALL)
        if any(not torch.equal(moving.seen[step][name], moving.seen[step - 1][name]) for name in moving.seen[0])
    ]  # fmt: skip
    assert changes == [2, 5, 8, 11, 14]
    assert any(not torch.equal(moving.seen[2][name], moving.seen[14][name]) for name in moving.seen[0])


def slow_exchange(weight: Tensor, slope: Tensor, keep: Tensor, share: float) -> list[int]:
    """RigL's algorithm 1, weight by weight."""
    weights, slopes = weight.double().flatten().tolist(), slope.double().flatten().tolist()
    active = [place for place, stays in enumerate(keep.flatten().tolist()) if stays]
    count = int(share * len(active))
    dropped = sorted(active, key=lambda place: abs(weights[place]))[:count]
    active = [place for place in active if place not in dropped]
    others = [place for place in range(len(weights)) if place not in active]
    return sorted(active + sorted(others, key=lambda place: -abs(slopes[place]))[:count])


def test_rigl_exchanges_weights_as_algorithm_1_does() -> None:
    model, masks = network(), find_masks(network(), 0.7, scope="layer")
    masks.apply_(model)
    images, labels = batches(5)[0]
    functional.cross_entropy(model(images), labels).backward()
    rigl = RigL(masks, every=10, alpha=0.4, end=0.8)
    keeps = {name: masks.keep(name) for name in masks.names}
    moved = rigl.move(Moment(model, 30, 100, keeps))
    share = 0.4 / 2 * (1 + math.cos(30 * math.pi / 80))
    assert moved is not None
    for name, keep in keeps.items():
        weight = model.get_parameter(name)
        assert weight.grad is not None
        want = slow_exchange(weight.detach(), weight.grad, keep, share)
        assert moved[name].flatten().nonzero().flatten().tolist() == want
        assert int(moved[name].sum()) == int(keep.sum())
        assert not torch.equal(moved[name], keep)
    assert [step for step in range(100) if rigl.move(Moment(model, step, 100, keeps))] == [10, 20, 30, 40, 50, 60, 70]
    assert [rigl.settled(step, 100) for step in (0, 70, 71, 80, 99)] == [False, False, True, True, True]


@pytest.mark.parametrize("make", [adam, lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)])
def test_what_comes_back_has_no_momentum(make: Any) -> None:
    model = nn.Linear(6, 4, bias=False)
    optimizer = make(list(model.parameters()))
    random = torch.Generator().manual_seed(0)
    keeping = Keeping(ACDC(0.5, cycles=1, warmup=0.2, final=0.4), model, optimizer, 10)
    keeping.begin()
    for step in range(10):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=random)).square().sum().backward()
        keeping.before(step)
        gone = ~keeping.keeps["weight"]
        if step:
            for value in optimizer.state[model.weight].values():
                if value.ndim:
                    assert not value[gone].any()
        if step == 4:  # dense again
            assert not gone.any()
            assert int((model.weight == 0).sum()) == 12
        optimizer.step()
        keeping.after()
    assert int((model.weight == 0).sum()) == 12


OPTIONS: tuple[dict[str, Any], ...] = ({"optimizer": adam, "ema": 0.9}, {"clip": 0.5, "bf16": True})


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ways())
def test_broken_off_after_every_epoch_the_run_ends_in_the_same_bits(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    expected, rows = train(ways()[name], **options)

    def stop(row: EpochRow) -> None:
        torch.rand(3)
        raise KeyboardInterrupt

    for seed in (0, *[5] * (EPOCHS - 1)):
        with pytest.raises(KeyboardInterrupt):
            train(ways()[name], network(seed), checkpoint=tmp_path, on_epoch=stop, **options)
    torch.manual_seed(9)
    model, history = train(ways()[name], network(5), checkpoint=tmp_path, **options)
    assert [row.validation_loss for row in history.rows] == [row.validation_loss for row in rows.rows]
    for tensor, value in model_state(expected).items():
        assert torch.equal(model_state(model)[tensor], value), tensor
    left = read_checkpoint(tmp_path)
    assert left is not None
    assert left.masks


def test_other_masks_are_refused(tmp_path: Path) -> None:
    train(find_masks(network(), 0.8), checkpoint=tmp_path)
    with pytest.raises(TrainingError, match=r"was made with masks \{'Masks'"):
        train(find_masks(network(), 0.7), checkpoint=tmp_path)


def test_the_best_epoch_has_the_last_masks() -> None:
    for name, moving in ways().items():
        model, history = train(moving)
        last = max(epoch for epoch in range(1, EPOCHS + 1) if epoch == 1 or name in ("fixed", "pattern") or
                   not moving.settled((epoch - 1) * STEPS, ALL))  # fmt: skip
        assert history.best_epoch >= (1 if name in ("fixed", "pattern") else last)
        zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1)
        size = sum(p.numel() for p in model.parameters() if p.ndim > 1)
        assert name == "pattern" or zeros / size == pytest.approx(0.9 if name == "layers" else 0.8, abs=0.01)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(TrainingError, match="give batches_per_epoch"):
        train(Gradual(0.8), batches_per_epoch=None)
    with pytest.raises(TrainingError, match="18 phases do not fit into 20 steps"):
        train(ACDC(0.8, cycles=8))
    with pytest.raises(PlanError, match="another model"):
        train(find_masks(nn.Linear(2, 2), 0.5))
    with pytest.raises(TrainingError, match=r"cannot go from sparsity 0\.9 up to 0\.5"):
        Gradual(0.5, initial=0.9)
    with pytest.raises(TrainingError, match=r"from 0\.5 to 0\.2 of a run"):
        Gradual(0.5, begin=0.5, end=0.2)
    with pytest.raises(TrainingError, match="leave nothing between"):
        ACDC(0.5, warmup=0.5, final=0.5)
    with pytest.raises(TrainingError, match="no share of weights"):
        RigL(Masks(()), alpha=1.5)
    with pytest.raises(TrainingError, match="every 0 steps"):
        RigL(Masks(()), every=0)
    with pytest.raises(TrainingError, match=r"up to 1\.5 of a run"):
        RigL(Masks(()), end=1.5)


def test_an_error_before_the_first_epoch_leaves_the_model_as_it_came() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model_state(model).items()}

    def interrupt(step: int, steps: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(find_masks(model, 0.8), model, on_step=interrupt)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model_state(model).items())
