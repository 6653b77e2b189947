"""Weights solved by least squares after a cut: exact where a cut unit can be stood in for, and never worse."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import networks
import secateur as sc
from secateur.errors import CaptureError, DataError, PlanError
from secateur.recover.reconstruct import Solved, reconstruct
from solving import double, error, first_half, state


@pytest.mark.parametrize("net", networks.NETWORKS, ids=lambda net: net.make.__name__)
def test_no_layer_has_a_larger_error_than_before(net: networks.Net) -> None:
    model, x = double(net)
    plan = first_half(sc.find_groups(model, x))
    smaller, before = sc.apply(model, plan), state(model)
    shapes = [tensor.shape for tensor in smaller.state_dict().values()]
    for layer in reconstruct(model, smaller, plan, [x], positions=None):
        assert layer.after <= layer.before * (1 + 1e-9) + 1e-12
    assert [tensor.shape for tensor in smaller.state_dict().values()] == shapes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def doubled(model: nn.Module, groups: sc.Groups) -> sc.Plan:
    """Make the last unit of each group what the first is, where it is made and passed on; the plan cuts it."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group in groups.groups:
        for slot in group.slots:
            if slot.role != "read":
                moved = tensors[slot.tensor].data.movedim(slot.dim, 0)
                moved[list(slot.index[-1])] = moved[list(slot.index[0])]
    return sc.Plan(groups, tuple(tuple(range(max(1, group.size - 1))) for group in groups.groups))


RESTORED = (
    networks.Chain, networks.Residual, networks.Depthwise, networks.ZeroPadded, networks.Dense, networks.UNet,
    networks.Attention, networks.GroupedQueries, networks.PointNet, networks.TwoInTwoOut,
)  # fmt: skip


@pytest.mark.parametrize("kind", RESTORED, ids=lambda kind: kind.__name__)
def test_a_unit_that_another_doubles_is_folded_into_it(kind: type[nn.Module]) -> None:
    (net,) = [net for net in networks.NETWORKS if net.make is kind]
    model, x = double(net)
    plan = doubled(model, sc.find_groups(model, x))
    smaller = sc.apply(model, plan)
    raw = error(model, smaller, x)
    reconstruct(model, smaller, plan, [x], ridge=0, positions=None)
    assert raw > 1e-3
    assert error(model, smaller, x) < 1e-12


def test_a_dead_unit_costs_nothing_whatever_the_ridge() -> None:
    (net,) = [net for net in networks.NETWORKS if net.make is networks.Chain]
    model, x = double(net)
    model[0].weight.data[2] = 0
    model[1].weight.data[2] = model[1].bias.data[2] = 0
    plan = sc.Plan(sc.find_groups(model, x), keep=((0, 1, 3, 4, 5, 6, 7), tuple(range(6)), tuple(range(7))))
    smaller = sc.apply(model, plan)
    reconstruct(model, smaller, plan, [x], ridge=10.0)
    assert error(model, smaller, x) < 1e-12


def chain() -> tuple[nn.Module, Tensor, sc.Plan]:
    (net,) = [net for net in networks.NETWORKS if net.make is networks.Residual]
    model, x = double(net)
    return model, x, first_half(sc.find_groups(model, x))


@pytest.mark.parametrize("positions", [None, 7])
@pytest.mark.parametrize(("sizes", "held"), [((1,) * 40, 8), ((13, 20, 7), 2), ((40,), 0), ((20, 20), 0)])
def test_how_inputs_are_batched_and_which_runs_are_held_does_not_matter(
    sizes: tuple[int, ...], held: int, positions: int | None
) -> None:
    model, x, plan = chain()
    one, other = sc.apply(model, plan), sc.apply(model, plan)
    want = reconstruct(model, one, plan, [x], positions=positions)
    got = reconstruct(model, other, plan, x.split(sizes), positions=positions, held=held)
    assert [(layer.layer, layer.rows) for layer in got] == [(layer.layer, layer.rows) for layer in want]
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_a_layer_is_what_a_plain_least_squares_gives() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(50, 3, dtype=torch.float64)
    plan = sc.Plan(sc.find_groups(model, x), keep=((0, 2, 3),))
    smaller = sc.apply(model, plan)
    start = smaller[2].weight.detach().clone()
    rows, wanted, ridge = smaller[:2](x).detach(), model(x).detach(), 0.3
    (solved,) = reconstruct(model, smaller, plan, [x], ridge=ridge)
    centred = rows - rows.mean(0)
    # A plain least squares with further rows, one for each weight, which draw it to its start.
    weight = (ridge * (centred.square().mean(0).mean()) * len(x)) ** 0.5
    left = torch.cat([centred, weight * torch.eye(3, dtype=torch.float64)])
    right = torch.cat([wanted - wanted.mean(0), weight * start.T])
    found = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(smaller[2].weight.detach(), found)
    torch.testing.assert_close(smaller[2].bias.detach(), wanted.mean(0) - found @ rows.mean(0))
    off = (smaller(x).detach() - wanted).square().mean(0).sum()
    assert solved.after == pytest.approx(float(off / wanted.var(0, correction=0).sum()))


def test_the_sums_on_a_residual_stream_are_matched() -> None:
    model, x, plan = chain()
    smaller = sc.apply(model, plan)
    solved = {
        layer.layer: layer
        for layer in reconstruct(model, smaller, plan, [x], ridge=0, positions=None, rectify=0)
    }
    sums = []
    for net in (model, smaller):
        stem = net.stem(x)
        sums.append((stem + net.norm(net.b(torch.relu(net.a(stem))))).detach())
    kept = list(plan.keep[[group.name for group in plan.groups.groups].index("stem")])
    off = (sums[1] - sums[0][:, kept]).square().mean((0, 2, 3)).sum()
    other = (sums[0][:, kept] - smaller.stem(x).detach()).var((0, 2, 3), correction=0).sum()
    assert float(off / other) == pytest.approx(solved["b"].after)


def test_a_batch_norm_has_the_statistics_of_what_it_takes_in() -> None:
    model, x, plan = chain()
    smaller = sc.apply(model, plan)
    reconstruct(model, smaller, plan, [x], positions=None)
    before = copy.deepcopy(smaller)
    assert sc.reset_statistics(smaller, [x]) == ("norm",)
    for a, b in zip(before.state_dict().values(), smaller.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_norm_without_scale_and_a_layer_without_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        networks.conv(3, 8, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU(), networks.conv(8, 6, bias=False),
        nn.BatchNorm2d(6, affine=False), nn.ReLU(), networks.conv(6, 4, bias=False),
    ).double()  # fmt: skip
    x = torch.randn(30, 3, 6, 6, dtype=torch.float64)
    model.train()(x)
    plan = first_half(sc.find_groups(model.eval(), x))
    smaller = sc.apply(model, plan)
    solved = reconstruct(model, smaller, plan, [x], ridge=1e-6, positions=None, rectify=0)
    with torch.no_grad():
        inner, wanted = smaller[:5](x), model[:5](x)[:, list(plan.keep[1])]
        last, outcome = smaller(x), model(x)
    assert [layer.layer for layer in solved] == ["3", "6"]
    assert float((inner - wanted).square().mean()) == pytest.approx(
        solved[0].after * float(wanted.var((0, 2, 3), correction=0).mean())
    )
    assert float((last - outcome).square().sum(1).mean()) == pytest.approx(
        solved[1].after * float(outcome.var((0, 2, 3), correction=0).sum())
    )


def test_attention_projections_are_solved() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True, dropout=0.0, norm_first=True)
    model = nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(8, 3)).double().eval()
    x = torch.randn(60, 6, 5, dtype=torch.float64)
    plan = first_half(sc.find_groups(model, x))
    smaller = sc.apply(model, plan)
    raw = error(model, smaller, x)
    solved = reconstruct(model, smaller, plan, [x], ridge=1e-6, positions=None)
    assert {"1.self_attn.out_proj", "1.linear1", "1.linear2", "2"} <= {layer.layer for layer in solved}
    assert error(model, smaller, x) < 0.7 * raw


@pytest.mark.parametrize(("name", "ridge"), [("resnet18", 0.1), ("mobilenet_v2", (0.1, 1.0))])
def test_outputs_of_torchvision_models_come_nearer(name: str, ridge: Any) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10)
    x = torch.randn(48, 3, 32, 32)
    with torch.no_grad():
        model.train()(x)
    groups = sc.find_groups(model.eval(), x[:2])
    plan = sc.Plan(groups, tuple(tuple(range(max(1, group.size // 4))) for group in groups.groups))
    smaller, reset = sc.apply(model, plan), sc.apply(model, plan)
    sc.reset_statistics(reset, [x])
    for layer in reconstruct(model, smaller, plan, x.split(16), ridge=ridge):
        assert layer.after <= layer.before * (1 + 1e-5) + 1e-9
    new = torch.randn(32, 3, 32, 32)
    assert error(model, smaller, new) < 0.8 * error(model, reset, new)


def test_outputs_of_a_vision_transformer_come_nearer() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=10).eval()
    x = torch.randn(96, 3, 32, 32)
    plan = first_half(sc.find_groups(model, x[:2]))
    smaller = sc.apply(model, plan)
    new = torch.randn(32, 3, 32, 32)
    raw = error(model, smaller, new)
    solved = reconstruct(model, smaller, plan, x.split(32))
    assert any("attn.proj" in layer.layer for layer in solved)
    assert error(model, smaller, new) < 0.8 * raw


def test_what_is_wrong_is_said_and_nothing_is_changed() -> None:
    model, x, plan = chain()
    smaller = sc.apply(model, plan)
    before = state(smaller)
    threads = threading.active_count()
    with pytest.raises(DataError, match="no batches"):
        reconstruct(model, smaller, plan, [])
    with pytest.raises(PlanError, match="was not cut by this plan"):
        reconstruct(model, copy.deepcopy(model), plan, [x])
    with pytest.raises(DataError, match="not finite"):
        reconstruct(model, smaller, plan, [x, x * float("nan")])
    with pytest.raises(RuntimeError, match="channels"):
        reconstruct(model, smaller, plan, [x, x[:, :1]])
    assert all(torch.equal(tensor, before[name]) for name, tensor in smaller.state_dict().items())
    assert threading.active_count() == threads


def test_a_model_whose_path_depends_on_values_is_refused() -> None:
    model, x = networks.Winding().double(), torch.ones(4, 3, dtype=torch.float64)
    plan = first_half(sc.find_groups(model, x))
    smaller = sc.apply(model, plan)
    before = state(smaller)
    with pytest.raises(CaptureError, match="run tanh where the first ran relu"):
        reconstruct(model, smaller, plan, [x, -x])
    assert all(torch.equal(tensor, before[name]) for name, tensor in smaller.state_dict().items())


@pytest.mark.parametrize("held", [0, 1, 3])
def test_only_so_many_runs_are_held_at_once(held: int) -> None:
    model, x, plan = chain()
    seen, before = [], threading.active_count()
    model.stem.register_forward_pre_hook(lambda *_: seen.append(threading.active_count() - before))
    smaller = sc.apply(model, plan)
    reconstruct(model, smaller, plan, x.split(4), held=held, positions=None)
    assert max(seen) == 2 * (held + 1)
    assert threading.active_count() == before


def test_what_is_returned_says_which_layers() -> None:
    model, x, plan = chain()
    solved = reconstruct(model, sc.apply(model, plan), plan, [x], positions=None)
    assert [(layer.layer, layer.rows) for layer in solved] == [("a", 40 * 64), ("b", 40 * 64), ("head", 40)]
    assert all(isinstance(layer, Solved) for layer in solved)
