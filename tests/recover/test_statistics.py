"""Batch norm's statistics estimated anew: exact over any batches, in one pass and layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import networks
from secateur.errors import DataError
from secateur.recover.statistics import reset_statistics


class Two(nn.Module):
    """Batch norm before and behind a convolution, dropout between, and one norm that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.second = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.twice = nn.Dropout(0.5), nn.BatchNorm1d(4)
        self.bare = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.conv(self.drop(self.first(x)))))
        x = self.bare(x).mean((2, 3))
        once: Tensor = self.twice(x)
        again: Tensor = self.twice(once.square())
        return again


def made() -> Two:
    torch.manual_seed(0)
    model = Two().double()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model.train()


def images(*counts: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    shifts = torch.linspace(-2, 3, len(counts)).tolist()  # unequal batches, so that means of means are wrong
    drawn = [torch.randn(n, 3, 6, 5, generator=random, dtype=torch.float64) for n in counts]
    return [images * (1 + s * s) + s for images, s in zip(drawn, shifts)]


def check_moments(layer: nn.Module, x: Tensor) -> None:
    rows = x.detach().movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(layer.running_mean, rows.mean(0))
    torch.testing.assert_close(layer.running_var, rows.var(0))


@pytest.mark.parametrize("sequential", [False, True])
def test_the_first_layer_has_the_moments_of_all_values(sequential: bool) -> None:
    model, batches = made(), images(5, 1, 8)
    assert reset_statistics(model, batches, sequential=sequential) == ("first", "second", "twice")
    check_moments(model.first, torch.cat(batches))


def test_layer_by_layer_each_has_the_moments_of_what_it_sees_in_use() -> None:
    model, batches = made(), images(5, 1, 8)
    reset_statistics(model, batches, sequential=True)
    model.eval()
    check_moments(model.second, torch.relu(model.conv(model.first(torch.cat(batches)))))


def test_in_one_pass_each_gives_on_what_its_batch_makes() -> None:
    model, batches = made(), images(5, 1, 8)
    reset_statistics(model, batches)
    training = copy.deepcopy(model).train()
    check_moments(model.second, torch.cat([torch.relu(training.conv(training.first(x))) for x in batches]))


def test_of_one_batch_both_ways_agree_with_torch_up_to_the_bias_of_variances() -> None:
    (x,) = images(9)
    models = [made() for _ in range(3)]
    reset_statistics(models[0], [x])
    reset_statistics(models[1], [x], sequential=True)
    by_torch = models[2].eval()
    for layer in (by_torch.first, by_torch.second):
        layer.momentum = 1.0
        layer.train()
        by_torch(x)  # in training mode a layer normalises by the biased variance and keeps the unbiased one
    for name in ("first", "second"):
        want, both = by_torch.get_submodule(name), [model.get_submodule(name) for model in models[:2]]
        for layer in both:
            torch.testing.assert_close(layer.running_mean, want.running_mean, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(both[0].running_var, both[1].running_var, rtol=2e-2, atol=0)
    check_moments(models[0].first, x)
    torch.testing.assert_close(models[0].first.running_var, by_torch.first.running_var)


def test_calls_of_one_layer_count_together() -> None:
    model, batches = made(), images(5, 9)
    reset_statistics(model, batches)
    training, seen = copy.deepcopy(model).train(), []
    training.drop.eval()
    training.twice.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for x in batches:
        training(x)
    check_moments(model.twice, torch.cat(seen))


def test_sizes_of_batches_do_not_matter_to_the_first_layer() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4)).double()
    rows = torch.randn(31, 4, dtype=torch.float64) * 1e-3 + 1e3
    found: list[Tensor] = []
    for parts in ([31], [1] * 31, [30, 1], [2, 29]):
        reset_statistics(model, list(rows.split(parts)))
        found.append(model[0].running_var.clone())
    assert all(torch.allclose(value, rows.var(0), rtol=1e-7, atol=0) for value in found)


@pytest.mark.parametrize("sequential", [False, True])
def test_nothing_else_changes(sequential: bool) -> None:
    model = made()
    model.conv.eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    reset_statistics(model, images(4, 6), sequential=sequential)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{n}.running_{what}" for n in ("first", "second", "twice") for what in ("mean", "var")}
    assert modes == [m.training for m in model.modules()]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "there are no batches to estimate statistics from"), (images(1), "batch norm '2' sees 1 value per channel")],
)
@pytest.mark.parametrize("sequential", [False, True])
def test_too_few_inputs_are_refused_and_nothing_is_changed(
    batches: Sequence[Tensor], message: str, sequential: bool
) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)).double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=message):
        reset_statistics(model, batches, sequential=sequential)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("net", [n for n in networks.NETWORKS if n.make in (networks.Chain, networks.Residual)])
def test_channels_are_centred_afterwards(net: networks.Net) -> None:
    model = networks.build(net).double()
    x = net.inputs().double()
    names = reset_statistics(model, [x, x[:1]], sequential=True)
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: seen[name].append(out))
    model(torch.cat([x, x[:1]]))
    for name, (out,) in seen.items():
        bias = model.get_submodule(name).bias
        torch.testing.assert_close(out.mean((0, 2, 3)), bias.expand(out.shape[1]), rtol=0, atol=1e-9)


def test_a_model_without_batch_norm_has_nothing_to_set() -> None:
    assert reset_statistics(nn.Linear(2, 2), [torch.ones(1, 2)]) == ()
