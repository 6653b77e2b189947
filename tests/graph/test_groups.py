"""Groups found on every tiny network, and that nothing is left behind on the model."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import networks
from secateur.errors import CaptureError
from secateur.graph.capture import capture
from secateur.graph.groups import find_groups
from secateur.graph.records import Groups


@pytest.mark.parametrize("net", networks.NETWORKS, ids=lambda net: net.make.__name__)
def test_groups_of_each_network(net: networks.Net) -> None:
    groups = find_groups(networks.build(net), net.inputs())
    assert tuple(group.size for group in groups.groups) == net.sizes, str(groups)


@pytest.mark.parametrize("net", networks.NETWORKS, ids=lambda net: net.make.__name__)
def test_json_round_trip(net: networks.Net) -> None:
    groups = find_groups(networks.build(net), net.inputs())
    assert Groups.from_json(json.loads(json.dumps(groups.to_json()))) == groups


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_found(training: bool) -> None:
    model = networks.build(networks.NETWORKS[0]).train(training)
    before = copy.deepcopy(model.state_dict())
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    find_groups(model, networks.image()())
    assert model.training is training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_same_groups_for_any_batch_size() -> None:
    model = networks.build(networks.NETWORKS[12])
    few, many = (find_groups(model, torch.randn(*shape)) for shape in ((1, 5, 6), (3, 7, 6)))
    assert replace(few, products=()) == replace(many, products=())
    assert few.macs < many.macs


def test_every_parameter_axis_is_in_a_group_or_frozen_with_a_reason() -> None:
    for net in networks.NETWORKS:
        model = networks.build(net)
        groups = find_groups(model, net.inputs())
        grouped = {(s.tensor, s.dim) for g in groups.groups for s in g.slots}
        frozen = {(f.tensor, f.dim) for f in groups.frozen}
        for name, parameter in model.named_parameters():
            for dim, size in enumerate(parameter.shape):
                kernel = parameter.ndim == 4 and dim > 1
                assert kernel or size == 1 or (name, dim) in grouped | frozen, (net.make.__name__, name, dim)
        assert all(f.reason for f in groups.frozen)


def test_slots_of_a_flattened_map_hold_every_position() -> None:
    groups = find_groups(networks.build(networks.NETWORKS[0]), networks.image()())
    slot = next(s for s in groups.groups[1].slots if s.role == "read")
    assert slot.tensor == "8.weight"
    assert slot.dim == 1
    assert slot.index == tuple(tuple(range(4 * unit, 4 * unit + 4)) for unit in range(6))


def test_roles_say_who_makes_reads_and_scales() -> None:
    groups = find_groups(networks.build(networks.NETWORKS[1]), networks.image()())
    stream = groups.groups[0]
    roles = {role: {s.tensor for s in stream.slots if s.role == role} for role in ("write", "read", "scale")}
    assert roles["write"] == {"stem.weight", "b.weight"}
    assert roles["read"] == {"a.weight", "head.weight"}
    assert {"stem.bias", "norm.weight", "norm.running_var"} <= roles["scale"]


def test_unknown_op_freezes_only_what_it_touches_and_says_so() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.relu(self.b(torch.cummax(self.a(x), -1).values)))

    groups = find_groups(Odd(), torch.randn(2, 4))
    assert [group.size for group in groups.groups] == [8]
    reason = next(f.reason for f in groups.frozen if f.tensor == "a.weight" and f.dim == 0)
    assert "cummax" in reason


def test_integer_that_nothing_can_replay_is_found_and_named() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).as_strided((2, 6), (6, 1)).view(2, 6))

    groups = find_groups(Counted(), torch.randn(2, 4))
    reason = next(f.reason for f in groups.frozen if f.tensor == "a.weight" and f.dim == 0)
    assert "as_strided" in reason


def test_norm_over_units_is_marked_inexact() -> None:
    net = next(n for n in networks.NETWORKS if n.make is networks.Norms)
    groups = find_groups(networks.build(net), net.inputs())
    assert [bool(group.inexact) for group in groups.groups] == [False, True]


def test_control_flow_on_values_falls_back_to_real_tensors() -> None:
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x) if float(x.sum()) > 0 else -self.a(x))

    trace = capture(Choosy(), torch.ones(2, 4))
    assert not trace.fake
    assert any(str(call.op) == "aten.addmm.default" for call in trace.calls)


def test_model_that_does_not_run_is_named() -> None:
    with pytest.raises(CaptureError, match=r"module '0' stopped .* Check the inputs' shapes"):
        find_groups(nn.Sequential(nn.Linear(4, 2)), torch.randn(2, 5))


def test_outputs_inside_an_object_may_not_change() -> None:
    class Holder:
        def __init__(self, features: torch.Tensor) -> None:
            self.features, self.me = features, self

    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Holder]:
            x = self.a(x)
            return self.b(x), Holder(x)

    groups = find_groups(Holding(), torch.randn(2, 4))
    assert not groups.groups
    assert next(f.reason for f in groups.frozen if f.tensor == "a.weight") == "reaches the model's output"


def test_modules_of_a_group_are_those_whose_tensors_it_cuts() -> None:
    groups = find_groups(networks.build(networks.NETWORKS[0]), networks.image()())
    assert [group.modules for group in groups.groups] == [("0", "1", "4"), ("4", "8"), ("8", "11")]
    raw = next(n for n in networks.NETWORKS if n.make is networks.RawParameter)
    assert find_groups(networks.build(raw), raw.inputs()).groups[0].modules == ("", "into", "out")


def test_a_detector_that_ranks_is_followed_up_to_the_ranking() -> None:
    class Ranks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.kept = nn.Linear(4, 6), nn.Linear(6, 3), [torch.zeros(1)]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.a(x)
            self.kept[0] = hidden  # an activation kept in a list, as a pyramid of features is
            scores = self.b(hidden.view(-1, 6))
            return scores[scores[:, 0] > scores[:, 0].mean()]

    groups = find_groups(Ranks(), torch.randn(5, 4))
    assert [group.size for group in groups.groups] == [6]
    assert [size.function for size in groups.sizes] == ["view"]
