"""Optimizers, warm-up, rewinding, clipping, averages and what is trained, each against a bare PyTorch loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import TrainingError, UnknownName
from secateur.recover.place import norms_and_head
from secateur.recover.schedule import learning_rate
from secateur.recover.train import Stage
from training import STEPS, assert_same_weights, batches, network, one_epoch, plain_epoch, tune

OPTIMIZERS: tuple[Callable[[Any], torch.optim.Optimizer], ...] = (
    lambda parameters: torch.optim.AdamW(parameters, weight_decay=0.1),
    lambda parameters: torch.optim.Adam(parameters, betas=(0.8, 0.9), amsgrad=True),
    lambda parameters: torch.optim.RMSprop(parameters, momentum=0.5, centered=True),
    lambda parameters: torch.optim.SGD(parameters, lr=9.0, momentum=0.9, weight_decay=0.01, nesterov=True),
)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_any_optimizer_takes_its_own_steps_at_the_stages_rates(make: Any) -> None:
    model, replica = network(), network()
    plain = make(replica.parameters())
    plain.param_groups[0]["lr"] = 0.1
    assert one_epoch(model, optimizer=make) == pytest.approx(plain_epoch(replica, plain), rel=1e-6)
    assert_same_weights(model, replica, 1e-5)


def test_groups_keep_the_ratio_of_their_rates_and_get_them_back() -> None:
    def make(model: nn.Sequential, most: float) -> torch.optim.SGD:
        groups = [{"params": model[0].parameters(), "lr": most / 10}, {"params": model[5].parameters()}]
        return torch.optim.SGD(groups, lr=most, momentum=0.9)

    model, replica = network(), network()
    given = make(model, 2.0)
    assert one_epoch(model, optimizer=given) == pytest.approx(plain_epoch(replica, make(replica, 0.1)), rel=1e-6)
    assert_same_weights(model, replica)
    assert [group["lr"] for group in given.param_groups] == [0.2, 2.0]
    assert torch.equal(model[1].weight, network()[1].weight)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_state_that_was_carried_across_a_cut_goes_on() -> None:
    model = network()
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    plain_epoch(model, adam)
    groups = sc.find_groups(model.eval(), batches(1, 1)[0][0])
    cut = sc.apply(model, sc.Plan(groups, ((0, 2, 3),)), optimizer=adam)
    replica = copy.deepcopy(cut.model)
    plain = copy.deepcopy(cut.optimizer, {id(a): b for a, b in zip(cut.model.parameters(), replica.parameters())})
    assert one_epoch(cut.model, optimizer=cut.optimizer, stages=[Stage(0.01, 1)]) == pytest.approx(
        plain_epoch(replica, plain), rel=1e-6
    )
    assert_same_weights(cut.model, replica, 1e-5)
    assert cut.optimizer.state[cut.model[0].weight]["step"] == 2 * STEPS
    with pytest.raises(TrainingError, match=r"AdamW has a parameter of shape \(4, 1, 3, 3\) that is not the model's"):
        one_epoch(cut.model, optimizer=adam)


@pytest.mark.parametrize("schedule", ["staged", "cosine"])
def test_warm_up_is_a_line_and_then_the_schedule_over_the_rest(schedule: Any) -> None:
    def rates(epochs: int, warmup: int) -> list[float]:
        return [
            learning_rate([Stage(0.5, epochs)], e, s, schedule=schedule, warmup=warmup, batches_per_epoch=4)
            for e in range(epochs)
            for s in range(4)
        ]

    assert rates(5, 2)[:8] == pytest.approx([0.5 * (step + 1) / 8 for step in range(8)])
    assert rates(5, 2)[8:] == rates(3, 0)


def test_warm_up_reaches_the_weights() -> None:
    model, replica = network(), network()
    settings = {"stages": [Stage(0.1, 2)], "schedule": "cosine", "warmup": 1, "batches_per_epoch": STEPS}
    torch.manual_seed(3)
    history = tune(model, **settings)
    assert history.rows[0].lr == 0.1
    loss = plain_epoch(replica, torch.optim.SGD(replica.parameters(), momentum=0.9), rates=[0.025, 0.05, 0.075, 0.1])
    assert history.rows[0].train_loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("schedule", ["staged", "one-cycle", "cosine"])
def test_rewinding_replays_the_last_epochs_of_the_schedule(schedule: Any) -> None:
    given = {"stages": [Stage(0.1, 2), Stage(0.01, 2)], "schedule": schedule, "batches_per_epoch": STEPS}
    whole, last = tune(network(), **given), tune(network(), **given, rewind=3)
    assert [row.lr for row in last.rows] == [row.lr for row in whole.rows[1:]]
    assert [row.epoch for row in last.rows] == [1, 2, 3]


@pytest.mark.parametrize("clip", [0.05, 100.0])
def test_gradients_are_clipped_by_their_common_norm(clip: float) -> None:
    model, replica = network(), network()

    def scale() -> None:
        gradients = [parameter.grad for parameter in replica.parameters()]
        norm = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
        for gradient in gradients:
            gradient.mul_(min(1.0, clip / (norm + 1e-6)))

    plain = plain_epoch(replica, torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9), before=scale)
    assert one_epoch(model, clip=clip) == pytest.approx(plain, rel=1e-6)
    assert_same_weights(model, replica)


@pytest.mark.parametrize("decay", [0.2, 0.999])
def test_the_average_is_what_is_validated_and_kept(decay: float) -> None:
    model, replica = network(), network()
    average = {name: value.clone() for name, value in replica.state_dict().items()}
    steps, seen = 0, []

    def follow() -> None:
        nonlocal steps
        steps += 1
        d = min(decay, steps / (steps + 9))
        for name, value in replica.state_dict().items():
            average[name] = d * average[name] + (1 - d) * value if value.is_floating_point() else value.clone()

    def validation() -> list[tuple[Tensor, Tensor]]:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return batches(7, 2)

    plain = plain_epoch(replica, torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9), after=follow)
    assert one_epoch(model, ema=decay, validation=validation) == pytest.approx(plain, rel=1e-6)
    for name, value in average.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(seen[0][name], model.state_dict()[name])
    assert not torch.equal(model[5].weight, replica[5].weight)


def test_the_average_does_not_change_what_is_trained() -> None:
    plain, averaged = tune(network(), stages=[Stage(0.1, 3)]), tune(network(), stages=[Stage(0.1, 3)], ema=0.5)
    assert [row.train_loss for row in plain.rows] == [row.train_loss for row in averaged.rows]
    assert plain.rows[0].validation_loss != averaged.rows[0].validation_loss


def test_the_last_epoch_is_kept_where_it_is_asked_for() -> None:
    seen: list[dict[str, Tensor]] = []

    def run(keep: Any) -> tuple[nn.Module, int]:
        model = network()
        seen.clear()

        def validation() -> list[tuple[Tensor, Tensor]]:
            seen.append({name: value.clone() for name, value in model.state_dict().items()})
            images = batches(7, 1)[0][0]
            model.eval()
            said = model(images).argmax(1)
            said[: len(seen)] = (said[: len(seen)] + 1) % 3  # one more is wrong after each epoch
            return [(images, said)]

        return model, tune(model, validation=validation, keep=keep).best_epoch

    for keep, epoch in (("best", 1), ("last", 3)):
        model, kept = run(keep)
        assert kept == epoch
        assert all(torch.equal(value, seen[epoch - 1][name]) for name, value in model.state_dict().items())
    with pytest.raises(UnknownName, match="unknown epoch to keep 'first'"):
        run("first")


def test_only_some_are_trained_and_the_rest_is_as_it_was() -> None:
    model, replica = network(), network()
    only = norms_and_head(model)
    chosen = [parameter for name, parameter in replica.named_parameters() if only(name)]
    plain = plain_epoch(replica, torch.optim.SGD(chosen, lr=0.1, momentum=0.9))
    assert one_epoch(model, only=only) == pytest.approx(plain, rel=1e-6)
    assert_same_weights(model, replica)
    assert torch.equal(model[0].weight, network()[0].weight)
    assert not torch.equal(model[1].weight, network()[1].weight)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(TrainingError, match="no parameter of the model needs a gradient"):
        one_epoch(model, only=lambda name: False)


def test_bf16_is_autocast_with_losses_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.recover.place.has_bf16", lambda device: True)
    model, replica = network(), network()

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = replica(images)
        assert outputs.dtype == torch.bfloat16
        return nn.functional.cross_entropy(outputs.float(), labels)

    plain = plain_epoch(replica, torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9), loss)
    assert one_epoch(model, bf16=True) == plain
    assert_same_weights(model, replica)
    assert model[0].weight.dtype == torch.float32
    assert plain != one_epoch(network())


def test_bf16_is_float32_on_a_cpu_without_instructions_for_it_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.recover.place.has_bf16", lambda device: device.type != "cpu")
    one, other = network(), network()
    torch.manual_seed(3)
    (note,) = tune(one, bf16=True).notes
    torch.manual_seed(3)
    assert tune(other).notes == ()
    assert note.startswith("bf16 was asked for, and this CPU has no instructions")
    assert_same_weights(one, other)


def test_compile_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    really = torch.compile

    def without_inductor(model: nn.Module) -> Any:
        compiled.append(model)
        return really(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", without_inductor)
    model, plain = nn.Sequential(*network()[:3], *network()[4:]), nn.Sequential(*network()[:3], *network()[4:])
    assert one_epoch(model, compile=True) == pytest.approx(one_epoch(plain), rel=1e-6)
    assert compiled == [model]
    assert_same_weights(model, plain, 1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimizer": lambda parameters: None}, "optimizer gave a NoneType; give a torch.optim.Optimizer"),
        ({"optimizer": OPTIMIZERS[0], "momentum": 0.5}, "momentum, weight_decay and nesterov are SGD's"),
        ({"clip": 0.0}, r"clip is 0\.0; give a norm above 0"),
        ({"ema": 1.0}, r"ema is 1\.0; give a decay in \(0, 1\)"),
        ({"warmup": 1}, "the warm-up goes step by step; give batches_per_epoch"),
        ({"warmup": 3, "batches_per_epoch": 4}, "warmup is 3, of 3 epochs; give"),
        ({"warmup": 1, "batches_per_epoch": 4, "schedule": "one-cycle"}, "one-cycle schedule has a warm-up of its own"),
        ({"rewind": 4}, "rewind is 4, and the stages have 3 epochs"),
        ({"rewind": 0}, "rewind is 0, and the stages have 3 epochs"),
        ({"proximal": True}, "a proximal step needs a penalty with shrink_"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence):
        tune(network(), **changes)
