"""What is streamed at the ends of units: closed forms in float64, any sizes of batches, any network, no trace left."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import networks
from secateur.errors import PlanError
from secateur.graph.groups import find_groups
from secateur.graph.nested import map_tensors, tensors_in
from secateur.score.moments import Moments, pairs, squares, within
from secateur.score.streams import Seen, stream


def drawn(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(rows: Tensor) -> Tensor:
    return torch.cov(rows.T, correction=0)


class Normed(nn.Sequential):
    """A convolution that reads with a stride, padding and dilation, with batch norm behind it."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, (3, 2), stride=2, padding=(2, 1), dilation=(2, 1)),
            nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1),
        )  # fmt: skip


def normed() -> nn.Module:
    return networks.build(networks.Net(Normed, networks.image(), (4, 5))).double()


def test_moments_of_pieces_are_those_of_the_whole() -> None:
    rows = drawn(101, 6) * 1e-3 + 1e4
    columns = torch.tensor([[4, 0], [2, -1]])
    for product in (squares, pairs, within(columns)):
        moments = Moments(product)
        for piece in rows.split([1, 40, 0, 60]):
            moments.add(piece.T)
        apart = (rows - rows.mean(0)).T
        assert moments.count == 101
        torch.testing.assert_close(moments.mean, rows.mean(0))
        torch.testing.assert_close(moments.scatter, product(apart), rtol=1e-6, atol=0)


def test_patches_and_weights_are_what_the_convolution_multiplies() -> None:
    model, images = normed(), drawn(7, 3, 9, 8)
    groups = find_groups(model, images[:2])
    first, second = stream(model, groups, list(images.split(3)), products="all")
    x = model[1](model[0](images))
    patches = F.unfold(x, (3, 2), dilation=(2, 1), padding=(2, 1), stride=2).transpose(1, 2).flatten(0, 1).detach()
    assert first.count == len(patches)
    torch.testing.assert_close(first.mean, patches.mean(0))
    alone = stream(model, groups, [images])[0]
    torch.testing.assert_close(alone.magnitude, patches.abs().mean(0))
    torch.testing.assert_close(alone.zeros, (patches == 0).double().mean(0))
    torch.testing.assert_close(first.covariance, covariance(patches))
    torch.testing.assert_close(first.second, patches.T @ patches / len(patches))
    scale = model[3].weight / (model[3].running_var + model[3].eps).sqrt()
    weights = (model[2].weight.flatten(1) * scale[:, None]).detach()
    torch.testing.assert_close(first.reader, weights.T @ weights)
    assert first.columns[2].tolist() == list(range(12, 18))
    assert first.units.tolist() == [0, 1, 2, 3]
    weight = model[5].weight.detach().flatten(1)
    torch.testing.assert_close(second.reader, weight.T @ weight)
    energy = torch.trace(first.covariance @ first.reader)  # of all units together it is the variance of the outputs
    outputs = model[3](model[2](x)).movedim(1, -1).flatten(0, -2)
    assert energy.item() == pytest.approx(outputs.var(0, correction=0).sum().item(), rel=1e-9)


def test_what_outputs_join_is_the_stream_that_they_are_added_to() -> None:
    model, x = networks.build(networks.NETWORKS[1]).double(), drawn(6, 3, 8, 8)
    ends = stream(model, find_groups(model, x), [x[:4], x[4:]], joined=True)
    stem = model.stem(x)
    inner = model.a(stem)
    added = stem + model.norm(model.b(torch.relu(inner)))
    logits = model.head(torch.relu(added).mean((2, 3)))
    wanted = {6: inner.movedim(1, -1).flatten(0, -2), 8: added.movedim(1, -1).flatten(0, -2), 5: logits}
    assert {len(end.weights) for end in ends} == set(wanted)
    for end in ends:
        whole = wanted[len(end.weights)].detach().var(0, correction=0).sum().item()
        assert end.joined == pytest.approx(whole, rel=1e-9)
        assert end.normed == (len(end.weights) == 8)


def test_kinds_of_products_are_parts_of_all() -> None:
    model, batches = normed(), [drawn(4, 3, 9, 8)]
    groups = find_groups(model, batches[0])
    kinds = [stream(model, groups, batches, products=kind)[0] for kind in ("each", "units", "all")]
    each, units, every = ((seen.second, seen.covariance, seen.reader) for seen in kinds)
    for one, own, full in zip(each, units, every):
        torch.testing.assert_close(one, full.diagonal())
        torch.testing.assert_close(own[2], full[12:18, 12:18])


def test_pixels_are_the_patches_of_a_kernel_of_one() -> None:
    model, images = normed(), drawn(5, 3, 9, 8)
    seen = stream(model, find_groups(model, images), [images], products="all", patches=False)[0]
    pixels = model[1](model[0](images)).movedim(1, -1).flatten(0, -2).detach()
    torch.testing.assert_close(seen.covariance, covariance(pixels))
    scale = model[3].weight / (model[3].running_var + model[3].eps).sqrt()
    weights = (model[2].weight * scale[:, None, None, None]).movedim(1, 0).flatten(1).detach()
    torch.testing.assert_close(seen.reader, weights @ weights.T)


def test_cells_of_a_flattened_map_belong_to_their_channel() -> None:
    model, images = networks.build(networks.NETWORKS[0]).double(), drawn(6, 3, 8, 8)
    seen = stream(model, find_groups(model, images), [images], products="units")[1]
    rows = nn.Sequential(*list(model)[:8])(images).detach()
    assert seen.columns[1].tolist() == [4, 5, 6, 7]
    torch.testing.assert_close(seen.covariance[1], covariance(rows[:, 4:8]))


def test_what_does_not_belong_to_a_group_explains_too() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cat([self.a(x), x], 1))

    torch.manual_seed(0)
    model, x = Beside().double(), drawn(9, 2)
    (seen,) = stream(model, find_groups(model, x), [x], products="all")
    assert seen.units.tolist() == [0, 1, 2]
    assert seen.covariance.shape == (5, 5)
    torch.testing.assert_close(seen.covariance, covariance(torch.cat([model.a(x), x], 1).detach()))


@pytest.mark.parametrize("net", networks.NETWORKS, ids=lambda net: getattr(net.make, "__name__", "net"))
def test_on_every_network_all_units_are_seen_whatever_the_batches(net: networks.Net) -> None:
    model = networks.build(net)
    inputs = map_tensors(lambda t: torch.cat([t, -0.5 * t, t.flip(0)]), net.inputs())
    groups = find_groups(model, net.inputs())
    whole = stream(model, groups, [inputs], products="units")
    rest = [map_tensors(lambda t, part=part: t[part], inputs) for part in (slice(0, 4), slice(4, None))]
    parts = stream(model, groups, rest, products="units")
    seen = torch.cat([torch.zeros(0, dtype=torch.int64), *(end.units for end in whole)])
    assert set(seen.tolist()) == set(range(groups.offsets[-1]))
    assert len(whole) == len(parts)
    for one, other in zip(whole, parts):
        assert one.count == other.count
        torch.testing.assert_close(one.covariance, other.covariance, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(one.reader, other.reader, rtol=1e-4, atol=1e-7)


def test_a_path_that_depends_on_values_is_followed() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            if bool(x.detach().sum() > 0):
                x = self.b(torch.tanh(x)) * 2
            return self.c(x)

    torch.manual_seed(0)
    model = Branching().double()
    groups = find_groups(model, torch.ones(1, 2, dtype=torch.float64))
    model.a.bias.data.zero_()
    x = drawn(20, 2)
    high, low = x[model.a(x).sum(1) > 0], x[model.a(x).sum(1) <= 0]
    seen = {end.count: end for end in stream(model, groups, [low, high, low[:1]])}
    read = torch.cat([model.a(low), model.b(torch.tanh(model.a(high))) * 2, model.a(low[:1])]).detach()
    assert set(seen) == {len(high), len(low) + len(high) + 1}
    torch.testing.assert_close(seen[len(read)].covariance, read.var(0, correction=0))


def test_a_layer_called_twice_is_one_end() -> None:
    net = next(net for net in networks.NETWORKS if net.make is networks.TiedTwice)
    model = networks.build(net).double()
    x = net.inputs().double()
    ends = stream(model, find_groups(model, x), [x])
    first = model.into(x)
    read = torch.cat([first, torch.tanh(model.loop(first))]).flatten(0, 1).detach()
    loop = next(end for end in ends if end.count == len(read))
    torch.testing.assert_close(loop.mean, read.mean(0))
    torch.testing.assert_close(loop.reader, model.loop.weight.detach().square().sum(0))


def test_heads_are_units_of_all_their_cells() -> None:
    net = next(net for net in networks.NETWORKS if net.make is networks.Attention)
    model = networks.build(net)
    (seen,) = stream(model, find_groups(model, net.inputs()), [net.inputs()], products="units")
    assert seen.columns.tolist() == [[4 * head + i for i in range(4)] for head in range(4)]
    torch.testing.assert_close(seen.reader[1], (lambda w: w.T @ w)(model.out.weight.detach().double()[:, 4:8]))


def test_the_hidden_units_of_an_lstm_are_read_between_steps_and_behind() -> None:
    net = next(net for net in networks.NETWORKS if net.make is networks.Recurrent)
    model = networks.build(net)
    ends = stream(model, find_groups(model, net.inputs()), [net.inputs()])
    hidden = [end for end in ends if 6 in end.units.tolist()]
    weights = [model.lstm.weight_hh_l0, model.out.weight]
    assert sorted(round(float(end.reader.sum()), 3) for end in hidden) == sorted(
        round(float(weight.detach().square().sum()), 3) for weight in weights
    )


def test_what_reads_a_group_of_channels_goes_with_it() -> None:
    net = next(net for net in networks.NETWORKS if net.make is networks.Depthwise)
    model = networks.build(net)
    readers = [float(end.reader.sum()) for end in stream(model, find_groups(model, net.inputs()), [net.inputs()])]
    assert readers.count(0.0) == 2
    assert max(readers) > 0


def test_the_model_is_left_as_found() -> None:
    model = normed().train()
    model[1].eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    images = drawn(4, 3, 9, 8).requires_grad_(True)
    stream(model, find_groups(model, images.detach()), [images])
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert images.grad is None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_of_a_batch_is_held() -> None:
    model, held = normed(), []

    def batches():  # type: ignore[no-untyped-def]
        for seed in range(4):
            gc.collect()
            assert sum(ref() is not None for ref in held) <= 1
            batch = drawn(2, 3, 9, 8, seed=seed)
            held.append(weakref.ref(batch))
            yield batch

    groups = find_groups(model, drawn(2, 3, 9, 8))
    seen = stream(model, groups, batches(), products="all")
    kept = sum(t.numel() for end in seen for t in tensors_in([getattr(end, f) for f in Seen.__dataclass_fields__]))
    assert len(held) == 4
    assert kept == sum(2 * n * n + 2 * n + 2 + u + outputs * n for n, u, outputs in ((24, 4, 5), (5, 5, 2)))


def test_no_batch_is_refused() -> None:
    model = normed()
    with pytest.raises(PlanError, match=r"there are no batches to score the units by"):
        stream(model, find_groups(model, drawn(2, 3, 9, 8)), [])
