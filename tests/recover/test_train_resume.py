"""Runs with each option, broken off after any epoch or within one, end in the same bits; other options are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import TrainingError
from secateur.recover.checkpoint import model_state
from secateur.recover.distillation import Distillation
from secateur.recover.history import EpochRow, History
from secateur.recover.mixing import CutMix, Mixup, OneOf
from secateur.recover.penalties import L2, GroupLasso, Growing
from secateur.recover.place import norms_and_head
from secateur.recover.train import Stage
from training import STEPS, batches, network, tune

Options = dict[str, Any]


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, weight_decay=0.1, amsgrad=True)


class Counting(torch.optim.SGD):
    """Keeps a plain number by parameter and changes an option as it goes on."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            group["momentum"] *= 0.9
            for parameter in group["params"]:
                self.state[parameter]["calls"] = self.state[parameter].get("calls", 0) + 1
                parameter.data.mul_(1 - 0.001 * self.state[parameter]["calls"])


GROUPS = sc.find_groups(network().eval(), batches(1, 1)[0][0])
OPTIONS: tuple[Options, ...] = (
    {"optimizer": adam},
    {"optimizer": lambda parameters: Counting(parameters, momentum=0.9)},
    {"optimizer": lambda parameters: torch.optim.RMSprop(parameters, momentum=0.5), "clip": 0.1},
    {"ema": 0.9},
    {"mix": OneOf((Mixup(0.4), CutMix(1.0)))},
    {"penalty": L2(GROUPS, plan=sc.Plan(GROUPS, ((0, 1),))), "strength": Growing(0.01, 3, 0.1)},
    {"penalty": GroupLasso(GROUPS), "strength": 0.1, "proximal": True},
    {"only": norms_and_head(network())},
    {"bf16": True, "keep": "last"},
    {"rewind": 4, "schedule": "cosine", "warmup": 1, "batches_per_epoch": STEPS},
    {"optimizer": adam, "ema": 0.9, "mix": Mixup(1.0), "penalty": GroupLasso(GROUPS), "strength": 0.01, "clip": 1.0},
)


def run(folder: Path | None, options: Options, *, seed: int = 0, **more: Any) -> tuple[nn.Module, History]:
    model, teacher = network(seed), network(9)
    given = {"stages": [Stage(0.05, 3), Stage(0.01, 1)], "distill": Distillation(teacher, weight=0.3)} | options | more
    return model, tune(model, checkpoint=folder, **given)


def stop(epoch: int) -> Callable[[EpochRow], None]:
    def on_epoch(row: EpochRow) -> None:
        torch.rand(3)
        if row.epoch == epoch:
            raise KeyboardInterrupt

    return on_epoch


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_broken_off_after_every_epoch(tmp_path: Path, number: int) -> None:
    options = OPTIONS[number]
    expected, rows = run(None, options)
    for epoch in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, options, on_epoch=stop(epoch))

    def within(step: int, steps: int, loss: float) -> None:
        if steps == 3 * STEPS + 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, options, on_step=within)
    torch.manual_seed(999)
    model, history = run(tmp_path, options, seed=5)
    assert [replace(row, seconds=0) for row in history.rows] == [replace(row, seconds=0) for row in rows.rows]
    for name, tensor in model_state(expected).items():
        assert torch.equal(model_state(model)[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimizer": adam}, "optimizer SGD, and this run asks for AdamW"),
        ({"clip": 1.0}, r"clip None, and this run asks for 1\.0"),
        ({"ema": 0.9}, r"ema None, and this run asks for 0\.9"),
        ({"mix": Mixup(0.2)}, r"mix None, and this run asks for {'Mixup': {'alpha': 0\.2}}"),
        ({"distill": None}, "made with distillation {'Distillation'.*, and this run asks for None"),
        ({"distill": Distillation(network(8), weight=0.3)}, "with distillation {'Distillation': {'teacher': '"),
        ({"penalty": GroupLasso(GROUPS)}, "penalty None, and this run asks for {'GroupLasso': {'groups': '"),
        ({"warmup": 1, "batches_per_epoch": STEPS}, "batches_per_epoch None, and this run asks for 4"),
        ({"rewind": 2}, "rewind None, and this run asks for 2"),
        ({"bf16": True}, "bf16 False, and this run asks for True"),
        (
            {"only": norms_and_head(network())},
            r"frozen parameters \[\], and this run asks for \['0.weight', '0.bias'\]",
        ),
    ],
)
def test_other_options_are_refused(tmp_path: Path, changes: Options, sentence: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, {}, on_epoch=stop(1))
    with pytest.raises(TrainingError, match=sentence):
        run(tmp_path, changes)


def test_other_options_of_an_optimizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, {"optimizer": adam}, on_epoch=stop(1))
    with pytest.raises(TrainingError, match=r"options \[.*0\.1.*\], and this run asks for \[.*0\.2.*\]"):
        run(tmp_path, {"optimizer": lambda p: torch.optim.AdamW(p, weight_decay=0.2, amsgrad=True)})


def test_an_optimizer_that_no_file_can_hold_is_refused_by_the_checkpoint_alone(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step()
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["parts"] = [torch.zeros(1)]

    options = {"optimizer": lambda parameters: Odd(parameters)}
    with pytest.raises(TrainingError, match="the optimizer Odd keeps 'parts', a list, which a checkpoint cannot hold"):
        run(tmp_path, options)
    assert len(run(None, options)[1].rows) == 4
