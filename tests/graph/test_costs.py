"""Costs are counted: MACs, parameters and bytes of any plan are those of the model that is really cut."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

import networks
from secateur.allocate.plan import Plan
from secateur.graph.analysis import analyse
from secateur.graph.capture import capture
from secateur.graph.costs import Product, Tally, find_products
from secateur.graph.groups import find_groups
from secateur.graph.records import Groups
from secateur.measure.macs import count_macs
from secateur.surgery.cut import apply

PLANS = 6
Keep = tuple[tuple[int, ...], ...]


class Calls(nn.Module):
    """A function of modules and inputs as a module."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def heads(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def projected(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return heads(m.q(x), 4), heads(m.k(x), 4), heads(m.v(x), 6)


def fused(m: Any, x: Tensor) -> Tensor:
    mixed: Tensor = F.scaled_dot_product_attention(*projected(m, x), scale=0.5)
    return m.out(mixed.transpose(1, 2).flatten(2))


def linear_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = projected(m, x)
    return m.out((q @ (k.transpose(-2, -1) @ v)).transpose(1, 2).flatten(2))


def attention(function: Callable[..., Any]) -> nn.Module:
    return Calls(function, q=nn.Linear(6, 12), k=nn.Linear(6, 12), v=nn.Linear(6, 18), out=nn.Linear(18, 5))


def made_kernel(m: Any, x: Tensor) -> Tensor:
    """A convolution whose kernel is computed."""
    return m.c(F.conv2d(m.a(x), m.b(x.mean((0, 2, 3))).view(-1, 8, 3, 3)))


def shared(m: Any, x: Tensor) -> Tensor:
    return m.out(m.loop(torch.tanh(m.loop(m.a(x)))))


VECTOR, TOKENS, IMAGE = torch.randn(6), torch.randn(2, 5, 6), torch.randn(2, 3, 8, 8)
NINE = nn.Parameter(torch.randn(9))
WEIGHT_NORM = torch.nn.utils.parametrizations.weight_norm
OTHERS = {
    "fused attention": lambda: (attention(fused), TOKENS),
    "linear attention": lambda: (attention(linear_attention), TOKENS),
    "nn.MultiheadAttention": lambda: (nn.TransformerEncoderLayer(6, 2, 11, batch_first=True), TOKENS),
    "mv": lambda: (Calls(lambda m, x: torch.mv(m.a(x), m.w), a=nn.Linear(6, 9), w=NINE), TOKENS[0]),
    "addmv": lambda: (
        Calls(lambda m, x: m.b(torch.addmv(m.w, m.a.weight, x)), a=nn.Linear(6, 9), b=nn.Linear(9, 3), w=NINE),
        VECTOR,
    ),
    "dot": lambda: (Calls(lambda m, x: torch.dot(m.a(x), m.b(x)), a=nn.Linear(6, 9), b=nn.Linear(6, 9)), VECTOR),
    "baddbmm": lambda: (
        Calls(
            lambda m, x: m.c(torch.baddbmm(m.a(x)[:, :1], m.b(x), m.d.weight.t().expand(2, -1, -1))),
            a=nn.Linear(6, 9),
            b=nn.Linear(6, 7),
            c=nn.Linear(9, 2),
            d=nn.Linear(7, 9),
        ),
        TOKENS,
    ),
    "transposed in groups": lambda: (
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 9, 3, stride=2, groups=3), nn.Conv2d(9, 2, 1)),
        IMAGE,
    ),
    "in three dimensions": lambda: (nn.Sequential(nn.Conv3d(3, 5, 2), nn.Conv3d(5, 2, 1)), torch.randn(1, 3, 4, 4, 4)),
    "weight norm": lambda: (nn.Sequential(WEIGHT_NORM(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 2, 1)), IMAGE),
    "a kernel that is made": lambda: (
        Calls(made_kernel, a=nn.Conv2d(3, 8, 3), b=nn.Linear(3, 5 * 8 * 9), c=nn.Conv2d(5, 2, 1)),
        IMAGE,
    ),
    "a module called twice": lambda: (
        Calls(shared, a=nn.Linear(6, 4), loop=nn.Linear(4, 4), out=nn.Linear(4, 2)),
        TOKENS,
    ),
}


def keeps(groups: Groups) -> list[Keep]:
    """The whole model, one unit of each group, and random plans between."""
    draw = random.Random(0)
    plans = [tuple(tuple(range(g.size)) for g in groups.groups), tuple((g.size - 1,) for g in groups.groups)]
    for _ in range(PLANS):
        sizes = [draw.randint(1, g.size) for g in groups.groups]
        plans.append(tuple(tuple(sorted(draw.sample(range(g.size), n))) for g, n in zip(groups.groups, sizes)))
    return plans


def check(model: nn.Module, inputs: Any, groups: Groups, keep: Keep) -> None:
    """The costs that are predicted are those of the cut model."""
    plan = Plan(groups, keep)
    cut = apply(model, plan)
    assert plan.macs_left == groups.macs_left(keep) == count_macs(cut, inputs).total
    assert plan.params_left == sum(p.numel() for p in cut.parameters())
    saved = {id(t): t for t in cut.state_dict(keep_vars=True).values()}
    assert groups.costs.bytes(groups.stays(keep)) == sum(t.numel() * t.element_size() for t in saved.values())


@pytest.mark.parametrize("net", networks.NETWORKS, ids=lambda net: net.make.__name__)
def test_every_plan_costs_what_the_cut_model_costs(net: networks.Net) -> None:
    model, inputs = networks.build(net), net.inputs()
    groups = find_groups(model, inputs)
    assert groups.macs == count_macs(model, inputs).total
    for keep in keeps(groups):
        check(model, inputs, groups, keep)


@pytest.mark.parametrize("name", OTHERS)
def test_every_product_is_counted(name: str) -> None:
    model, inputs = OTHERS[name]()
    groups = find_groups(model.eval(), inputs)
    assert groups.groups, str(groups)
    assert groups.macs == count_macs(model, inputs).total
    assert groups.prunable_macs > 0
    for keep in keeps(groups):
        check(model, inputs, groups, keep)


@pytest.mark.parametrize("name", ["fused attention", "linear attention"])
def test_places_within_heads_are_counted_too(name: str) -> None:
    model, inputs = OTHERS[name]()
    groups = find_groups(model, inputs, split="inner")
    assert [group.size for group in groups.groups] == [4, 6]
    for keep in keeps(groups):
        check(model, inputs, groups, keep)


def test_einsum_multiplies_instead_where_an_axis_is_one_long() -> None:
    """The one known difference: such a product is a `mul`, which is no MAC in `measure.macs`, and is counted here."""
    net = Calls(lambda m, x: m.b(torch.einsum("bti,oi->bto", m.a(x), m.w)), a=nn.Linear(6, 9), b=nn.Linear(7, 2))
    net.w = nn.Parameter(torch.randn(7, 9))
    groups = find_groups(net.eval(), TOKENS)
    assert [group.size for group in groups.groups] == [7, 9]
    for outer, inner, missing in ((7, 9, 0), (2, 2, 0), (1, 2, 0), (3, 1, 2 * 5 * 3 * 1)):
        keep = (tuple(range(outer)), tuple(range(inner)))
        cut = apply(net, Plan(groups, keep))
        assert groups.macs_left(keep) - count_macs(cut, TOKENS).total == missing


def test_lstm_with_fewer_units() -> None:
    class Net(nn.Module):
        def __init__(self, width: int, hidden: int) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, width), nn.LSTM(width, hidden), nn.Linear(hidden, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x))[0])

    model = Net(8, 7).eval()
    trace = capture(model, TOKENS)
    assert any("mkldnn_rnn_layer" in str(call.op) for call in trace.calls)
    groups = analyse(trace, model).groups
    assert [group.size for group in groups.groups] == [8, 7]
    for width, hidden in ((8, 7), (5, 7), (8, 4), (1, 2)):
        keep = (tuple(range(width)), tuple(range(hidden)))
        assert groups.macs_left(keep) == count_macs(Net(width, hidden), TOKENS).total


def test_deformable_convolution() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.shift = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 18, 3, padding=1, stride=2)
            self.b, self.c = DeformConv2d(8, 6, 3, padding=1, stride=2), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x), self.shift(x)))

    groups = find_groups(Net().eval(), IMAGE)
    assert [group.size for group in groups.groups] == [8, 6]
    tally = Tally([product for product in groups.products if product.module == "b"])
    for wide, narrow in ((8, 6), (3, 6), (5, 2)):
        stays = groups.stays((range(wide), range(narrow)))
        assert tally(stays).tolist() == [2 * (4 * 4) * 9 * wide * narrow]


def test_products_of_experts() -> None:
    model = Calls(
        lambda m, x: torch._grouped_mm(x, m.w, offs=torch.tensor([2, 5], dtype=torch.int32)),
        w=nn.Parameter(torch.randn(2, 16, 8, dtype=torch.bfloat16)),
    )
    trace = capture(model, torch.randn(5, 16, dtype=torch.bfloat16))
    assert find_products(trace, {}) == (Product("", 5 * 16 * 8, ()),)


def test_a_block_of_several_axes_is_counted_by_its_cells() -> None:
    """Heads x width is one axis of cells where both vary: here the second of two heads has lost what the first has."""
    trace = capture(Calls(lambda m, x: torch.bmm(x, x.transpose(1, 2))), torch.zeros(2, 5, 3))
    call = next(call for call in trace.calls if "bmm" in str(call.op))

    class Block:
        def __init__(self, dims: tuple[int, ...], units: list[Any]) -> None:
            self.dims, self.units = dims, np.array(units, np.int64)

    varied: Any = {call.args[0].id: [Block((0, 2), [[0, 1, -1], [2, 3, -1]])]}
    assert find_products(trace, varied) == (Product("", 5 * 5, ((0, 1, -1, 2, 3, -1),)),)
    by_head: Any = {call.args[0].id: [Block((0, 2), [[0, 0, 0], [1, 1, 1]])]}
    assert find_products(trace, by_head) == (Product("", 3 * 5 * 5, ((0, 1),)),)


def test_calls_of_one_module_with_equal_axes_are_one_product() -> None:
    model, inputs = OTHERS["a module called twice"]()
    products = find_groups(model, inputs).products
    axis, positions = (0, 1, 2, 3), 2 * 5
    assert products == (
        Product("a", positions * 6, (axis,)),
        Product("loop", 2 * positions, (axis, axis)),
        Product("out", positions * 2, (axis,)),
    )


@pytest.mark.parametrize("net", networks.NETWORKS, ids=lambda net: net.make.__name__)
def test_every_unit_of_a_group_costs_what_is_said(net: networks.Net) -> None:
    groups = find_groups(networks.build(net), net.inputs())
    for number, (group, cost) in enumerate(zip(groups.groups, groups.unit_costs, strict=True)):
        for unit in range(group.size):
            keep = [[u for u in range(g.size) if (n, u) != (number, unit)] for n, g in enumerate(groups.groups)]
            assert cost.params == groups.params - groups.params_left(keep)
            assert cost.macs == groups.macs - groups.macs_left(keep)
        assert cost == groups.costs.of_unit(groups.offsets[number])


def test_bytes_are_those_of_the_file() -> None:
    """Half precision, a buffer that is saved, and one that is not."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8).half(), nn.Linear(8, 2)
            self.register_buffer("kept", torch.ones(8, dtype=torch.float64))
            self.register_buffer("made", torch.ones(8), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).float() * self.kept.float() * self.made)

    model = Net().eval()
    groups = find_groups(model, torch.zeros(1, 4, dtype=torch.half))
    assert [t.itemsize for t in groups.tensors] == [2, 2, 4, 4, 8, 0]
    (cost,) = groups.unit_costs
    assert (cost.params, cost.macs) == (4 + 1 + 2, 4 + 2)
    assert cost.bytes == (4 + 1) * 2 + 2 * 4 + 8
    check(model, torch.zeros(1, 4, dtype=torch.half), groups, ((0, 5),))


def test_dense_macs_of_attention_are_of_all_heads_that_stay() -> None:
    model, inputs = OTHERS["fused attention"]()
    groups = find_groups(model, inputs)
    (group,) = groups.groups
    assert group.size == 3
    projections, scores = (2 * 5) * (6 * (4 + 4 + 6) + 6 * 5), 2 * (5 * 5) * (4 + 6)
    assert groups.macs == 3 * (projections + scores)
    assert groups.macs_left([[1]]) == groups.unit_costs[0].macs == projections + scores


def test_shares_leave_out_what_cannot_shrink() -> None:
    groups = find_groups(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(2, 1)), torch.zeros(1, 4))
    assert groups.prunable_macs == groups.macs == 32 + 16 + 2
    assert groups.prunable_params == groups.params - 1
    groups = find_groups(nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)), torch.zeros(1, 4))
    assert (groups.macs, groups.prunable_macs, groups.prunable_params) == (12, 0, 0)


def test_a_group_of_one_unit_cannot_shrink() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PixelShuffle(2), nn.Conv2d(1, 2, 1))
    groups = find_groups(net, IMAGE)
    assert all(group.size == 1 for group in groups.groups)
    assert (groups.prunable_params, groups.prunable_macs) == (0, 0)


def test_units_that_stay_are_counted_through_all_groups() -> None:
    net = networks.NETWORKS[0]
    groups = find_groups(networks.build(net), net.inputs())
    stays = groups.stays(([0, 7], range(6), [3]))
    assert stays.dtype == np.bool_
    assert np.flatnonzero(stays).tolist() == [0, 7, *range(8, 14), 17, 21]
    with pytest.raises(ValueError, match="shorter"):
        groups.stays(([0],))


def test_a_model_without_groups_or_products_costs_nothing() -> None:
    groups = find_groups(nn.ReLU(), torch.zeros(2, 3))
    assert (groups.params, groups.macs, groups.macs_left([]), groups.params_left([])) == (0, 0, 0, 0)
    assert groups.unit_costs == ()


def test_products_keep_their_axes_as_runs() -> None:
    net = next(n for n in networks.NETWORKS if n.make is networks.Attention)
    groups = find_groups(networks.build(net), net.inputs())
    written = groups.to_json()
    assert Groups.from_json(json.loads(json.dumps(written))).products == groups.products
    assert max(len(runs) for product in written["products"] for runs in product["axes"]) <= 2 * 3 * 4
    assert any(len(axis) > 16 for product in groups.products for axis in product.axes)
