"""Cutting: what comes out, what must not change, and what is refused."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.optim import Adafactor
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn, optim
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel

import networks
from secateur.allocate.plan import Plan, allocate
from secateur.allocate.uniform import Uniform
from secateur.errors import PlanError
from secateur.graph.groups import find_groups
from secateur.graph.records import Groups
from secateur.score.magnitude import Magnitude
from secateur.score.scoring import score
from secateur.surgery.certify import certify
from secateur.surgery.cut import apply
from secateur.surgery.simulate import mask

CUTTABLE = tuple(net for net in networks.NETWORKS if net.sizes)
FOUND: tuple[tuple[networks.Net, Groups], ...] = tuple(
    (net, find_groups(networks.build(net), net.inputs())) for net in CUTTABLE
)
BY_NAME = [net.make.__name__ for net in CUTTABLE]


@st.composite
def plans(draw: st.DrawFn, groups: Groups) -> Plan:
    keep = [
        tuple(sorted(draw(st.sets(st.integers(0, group.size - 1), min_size=1, max_size=group.size))))
        for group in groups.groups
    ]
    return Plan(groups, tuple(keep))


@pytest.mark.parametrize("case", FOUND, ids=BY_NAME)
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_plan_on_every_network_is_certified(case: tuple[networks.Net, Groups], data: st.DataObject) -> None:
    net, groups = case
    model, plan = networks.build(net), data.draw(plans(groups))
    before = copy.deepcopy(model.state_dict())
    smaller = apply(model, plan)
    certificate = certify(model, smaller, plan, net.inputs())
    assert certificate.ok, certificate.sentence
    assert sum(p.numel() for p in smaller.parameters()) == plan.params_left
    assert {n: tuple(t.shape) for n, t in smaller.state_dict().items()} == groups.shapes(plan.keep)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).hash == plan.hash


@pytest.mark.parametrize("case", FOUND, ids=BY_NAME)
def test_the_empty_plan_is_a_bitwise_no_op(case: tuple[networks.Net, Groups]) -> None:
    net, groups = case
    model, inputs = networks.build(net), net.inputs()
    plan = Plan(groups, tuple(tuple(range(group.size)) for group in groups.groups))
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        same = torch.utils._pytree.tree_map(torch.equal, model(*args), apply(model, plan)(*args))
    assert all(torch.utils._pytree.tree_leaves(same))
    assert plan.attributes() == {}


def test_layers_say_their_new_sizes() -> None:
    net, groups = FOUND[BY_NAME.index("Depthwise")]
    smaller = apply(networks.build(net), Plan(groups, ((0, 2, 5),)))
    assert "Conv2d(3, 3, kernel_size=(1, 1)" in str(smaller[0])
    assert "Conv2d(3, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=3)" in str(smaller[1])
    assert "groups=6" in str(smaller[3])


def test_padding_of_a_shortcut_follows_the_cut() -> None:
    net, groups = FOUND[BY_NAME.index("ZeroPadded")]
    # The padded channels 0, 1 | 6, 7 of the wide stage are a group of their own.
    plan = Plan(groups, ((1, 2), (0, 1, 2, 3, 4), (0, 2, 3)))
    smaller = apply(networks.build(net), plan)
    assert smaller.padding == (0, 0, 0, 0, 1, 2)
    assert smaller.head.in_features == 5


def test_everything_else_about_the_model_survives() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4)).double()
    model = model.to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    calls: list[int] = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    model.register_buffer("steps", torch.tensor(7))
    x = torch.randn(2, 3, 4, 4).double()
    groups = find_groups(model, x)
    calls.clear()
    smaller = apply(model, Plan(groups, ((0, 1, 6),))).train()
    smaller(x)
    assert calls == [1]
    assert smaller.training
    assert smaller[0].weight.dtype is torch.float64
    assert smaller[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not smaller[0].weight.requires_grad
    assert smaller[3].weight.requires_grad
    assert int(smaller.steps) == 7
    assert isinstance(smaller[0].weight, nn.Parameter)


def test_parametrizations_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), weight_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    plan = allocate(score(model, find_groups(model, x), Magnitude()), Uniform(0.5))
    smaller = apply(model, plan)
    assert nn.utils.parametrize.is_parametrized(smaller[1], "weight")
    assert certify(model, smaller, plan, x).ok


def test_tied_modules_share_one_cut_tensor() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 2))
    model[2].weight = model[0].weight
    into = nn.Sequential(nn.Linear(3, 5), *model)
    groups = find_groups(into, torch.randn(2, 3))
    assert [group.size for group in groups.groups] == [5]
    smaller = apply(into, Plan(groups, ((0, 4),)))
    assert smaller[1].weight is smaller[3].weight
    assert smaller[1].weight.shape == (2, 2)


def test_a_plan_for_another_model_is_refused() -> None:
    groups = FOUND[0][1]
    plan = Plan(groups, tuple((0,) for _ in groups.groups))
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(PlanError, match=r"made for another model: 0.weight is \(4, 3\) here"):
        apply(other, plan)
    with pytest.raises(PlanError, match=r"made for another model"):
        certify(other, other, plan, torch.randn(1, 3))


def test_a_damaged_cut_is_not_certified() -> None:
    net, groups = FOUND[1]
    model = networks.build(net)
    plan = Plan(groups, tuple(tuple(range(group.size // 2)) for group in groups.groups))
    smaller = apply(model, plan)
    with torch.no_grad():
        smaller.a.weight.copy_(smaller.a.weight.flip(0))
    certificate = certify(model, smaller, plan, net.inputs())
    assert not certificate.ok
    assert "cut model equals masked model" in certificate.sentence


def test_a_damaged_cut_under_a_norm_is_not_certified() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)), torch.randn(2, 4)
    plan = Plan(find_groups(model, x), ((0, 1, 2),))
    smaller = apply(model, plan)
    assert certify(model, smaller, plan, x).ok
    nn.init.zeros_(smaller[2].weight)
    assert not certify(model, smaller, plan, x).ok


def test_a_cut_transformer_layer_runs_where_torch_would_fuse_it() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)).eval()
    x = torch.randn(2, 5, 4)
    groups = find_groups(model, x)
    smaller = apply(model, Plan(groups, tuple(tuple(range(max(1, group.size // 2))) for group in groups.groups)))
    with torch.no_grad():
        fused = smaller(x)
    torch.testing.assert_close(fused, smaller(x).detach())


def test_a_model_that_keeps_activations_can_be_cut() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Linear(4, 8), nn.Linear(8, 3), None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = self.a(x)
            return self.b(self.last)

    model, x = Keeping(), torch.randn(2, 4)
    model(x)
    plan = Plan(find_groups(model, x), ((0, 1, 2),))
    assert certify(model, apply(model, plan), plan, x).ok


def test_a_cut_of_another_plan_is_not_certified() -> None:
    net, groups = FOUND[1]
    model = networks.build(net)
    promised, done = (Plan(groups, tuple(tuple(range(g.size - n)) for g in groups.groups)) for n in (2, 3))
    certificate = certify(model, apply(model, done), promised, net.inputs())
    assert not certificate.ok
    assert "predicted" in certificate.sentence


def test_mask_computes_the_cut_model_and_leaves_no_trace() -> None:
    net, groups = FOUND[BY_NAME.index("Attention")]
    model, x = networks.build(net), net.inputs()
    model.train()
    plan = Plan(groups, ((1, 3),))
    smaller = apply(model, plan).eval()
    with mask(model, plan, x) as masked, torch.no_grad():
        assert not model.training
        torch.testing.assert_close(masked(x), smaller(x))
        assert not torch.allclose(masked(x), model(x))
    assert model.training


def test_seed_of_the_certificate_changes_the_shuffle() -> None:
    net, groups = FOUND[1]
    model = networks.build(net)
    plan = Plan(groups, tuple((0,) for _ in groups.groups))
    errors = {certify(model, apply(model, plan), plan, net.inputs(), seed=s).control_error for s in (0, 1)}
    assert len(errors) == 2


def residual() -> tuple[nn.Module, Tensor, Plan]:
    net, groups = FOUND[BY_NAME.index("Residual")]
    return networks.build(net), net.inputs(), Plan(groups, ((0, 2, 5), (1, 3)))


def stepped(optimizer: optim.Optimizer, model: nn.Module, x: Tensor) -> optim.Optimizer:
    model(x).square().sum().backward()
    optimizer.step()
    return optimizer


def test_a_cut_holds_what_was_given() -> None:
    model, _, plan = residual()
    optimizer, ema = optim.SGD(model.parameters(), 0.1), AveragedModel(model)
    assert isinstance(apply(model, plan), type(model))
    alone, average, both = (
        apply(model, plan, optimizer=optimizer),
        apply(model, plan, ema=ema),
        apply(model, plan, optimizer=optimizer, ema=ema),
    )
    assert alone.ema is None
    assert average.optimizer is None
    assert [type(part) for part in (both.model, both.optimizer, both.ema)] == [type(model), optim.SGD, AveragedModel]
    assert both.optimizer.param_groups[0]["params"] == list(both.model.parameters())
    optimizer.network = model
    assert (known := apply(model, plan, optimizer=optimizer)).optimizer.network is known.model


def test_tied_weights_have_one_state_and_one_average() -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)), torch.randn(2, 3)
    model[2].weight = model[1].weight
    optimizer = stepped(optim.Adam(model.parameters()), model, x)
    cut = apply(model, Plan(find_groups(model, x), ((0, 4),)), optimizer=optimizer, ema=AveragedModel(model))
    assert cut.model[1].weight is cut.model[2].weight
    assert cut.ema.module[1].weight is cut.ema.module[2].weight
    held = optimizer.state[model[1].weight]["exp_avg"]
    assert torch.equal(cut.optimizer.state[cut.model[2].weight]["exp_avg"], held[[0, 4]][:, [0, 4]])
    assert len(cut.optimizer.state) == len(list(model.parameters())) == 7


@pytest.mark.parametrize("make", [copy.deepcopy, AveragedModel, ModelEmaV2, ModelEmaV3, "deeper", "double"])
def test_an_average_is_found_wherever_it_lies(make: object) -> None:
    model, x, plan = residual()
    special = {
        "deeper": lambda m: AveragedModel(nn.Sequential(m)),
        "double": lambda m: ModelEmaV3(m, dtype=torch.float64),
    }
    ema = special[make](model) if isinstance(make, str) else make(model)
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter.mul_(2)
    before = copy.deepcopy(ema.state_dict())
    cut = apply(model, plan, ema=ema)
    assert type(cut.ema) is type(ema)
    small = dict(cut.model.named_parameters())
    for name, parameter in cut.ema.named_parameters():
        own = name.removeprefix("module.").removeprefix("0.")
        assert torch.equal(parameter.float(), 2 * small[own])
    update = getattr(cut.ema, "update", getattr(cut.ema, "update_parameters", None))
    if update is not None and make != "deeper":
        update(cut.model)
    assert cut.ema(x.to(next(ema.parameters()).dtype)).isfinite().all()
    assert all(torch.equal(before[name], tensor) for name, tensor in ema.state_dict().items())


def test_an_average_that_knows_the_model_knows_the_cut_one() -> None:
    class Online(nn.Module):
        def __init__(self, model: nn.Module, registered: bool) -> None:
            super().__init__()
            self.averaged, self.listed = copy.deepcopy(model), [model]
            if registered:
                self.online = model

    model, _, plan = residual()
    for registered in (False, True):
        cut = apply(model, plan, ema=Online(model, registered))
        assert cut.ema.listed[0] is cut.model
        assert cut.ema.averaged.a.weight.shape == cut.model.a.weight.shape
        assert cut.ema.averaged.a.weight is not cut.model.a.weight
        assert not registered or cut.ema.online is cut.model


@pytest.mark.parametrize("other", [nn.Linear(2, 2), {"a": torch.ones(2)}, "the model", "a cut one"])
def test_an_average_of_another_model_is_refused(other: object) -> None:
    model, _, plan = residual()
    ema = {"the model": model, "a cut one": apply(model, plan)}[other] if isinstance(other, str) else other
    with pytest.raises(PlanError, match=r"the ema given \(\w+\) holds no copy of the model"):
        apply(model, plan, ema=ema)


class Shampoo(optim.SGD):
    """Keeps a square matrix for each axis of a weight, as Gupta et al. do; some have the shape of a square weight."""

    def step(self, closure: object = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["of rows"] = torch.eye(len(parameter))
            self.state[parameter]["sides"] = [torch.eye(n) for n in parameter.shape]


class Fisher(optim.SGD):
    def step(self, closure: object = None) -> None:
        self.means = {"activations": [torch.ones(3)]}


class Whole(optim.SGD):
    def step(self, closure: object = None) -> None:
        self.state["all"]["gradient"] = torch.ones(7)


factored = functools.partial(Adafactor, lr=0.1, min_dim_size_to_factor=1)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (optim.Adafactor, r"the optimizer Adafactor keeps 'row_var' of shape \(8, 3, 3, 1\) for stem.weight of shape"),
        (factored, r"the optimizer Adafactor keeps 'exp_avg_sq_row' of shape \(8, 3, 3\) for stem.weight of shape"),
        (Shampoo, r"the optimizer Shampoo keeps 'of rows' of shape \(8, 8\) for stem.weight of shape \(8, 3, 3, 3\)"),
        (Whole, r"keeps 'gradient' of shape \(7,\) for all parameters; what is not kept for each weight"),
        (Fisher, r"the optimizer Fisher keeps a tensor of shape \(3,\) in means, and nothing says"),
    ],
)
def test_a_state_that_is_not_by_weight_is_refused(make: Callable[[Any], optim.Optimizer], sentence: str) -> None:
    model, x, plan = residual()
    optimizer = stepped(make(model.parameters()), model, x)
    with pytest.raises(PlanError, match=sentence):
        apply(model, plan, optimizer=optimizer)


def test_a_square_matrix_is_not_taken_for_a_weight() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)), torch.randn(2, 4)
    groups = find_groups(model, x)
    plan = Plan(groups, (tuple(range(6)), (0, 1), tuple(range(6))))
    optimizer = stepped(Shampoo(model[1:].parameters()), model, x)
    with pytest.raises(PlanError, match=r"keeps 'of rows' of shape \(6, 6\) for 1.weight of shape \(6, 6\)"):
        apply(model, plan, optimizer=optimizer)


def test_a_state_of_weights_that_stay_whole_is_copied_whatever_it_is() -> None:
    model, x, plan = residual()
    optimizer = stepped(optim.Adafactor(model.head.parameters()), model, x)
    whole = Plan(plan.groups, (tuple(range(8)), (1, 3)))
    new = apply(model, whole, optimizer=optimizer)
    held = new.optimizer.state[new.model.head.weight]
    assert torch.equal(held["row_var"], optimizer.state[model.head.weight]["row_var"])
    assert held["row_var"] is not optimizer.state[model.head.weight]["row_var"]


def test_optimizers_that_cannot_be_carried_are_refused() -> None:
    model, x, plan = residual()
    for done in (False, True):
        optimizer = optim.LBFGS(model.parameters())
        if done:
            optimizer.step(lambda: model(x).square().sum())
        with pytest.raises(PlanError, match=r"LBFGS keeps the history of all parameters in one flat vector"):
            apply(model, plan, optimizer=optimizer)
    stray = optim.SGD([{"params": list(model.parameters())}, {"params": [nn.Parameter(torch.ones(3))]}], 0.1)
    with pytest.raises(PlanError, match=r"SGD has, in group 1, a parameter of shape \(3,\) that is not the model's"):
        apply(model, plan, optimizer=stray)
    with pytest.raises(PlanError, match=r"SGD has, in group 0, a parameter of shape \(8, 3, 3, 3\) that is not"):
        apply(model, plan, optimizer=optim.SGD(copy.deepcopy(model).parameters(), 0.1))
    wrapped = optim.SGD(model.parameters(), 0.1)
    wrapped.step = wrapped.step
    with pytest.raises(PlanError, match=r"the method step of the optimizer SGD was replaced on the object"):
        apply(model, plan, optimizer=wrapped)
    with pytest.raises(PlanError, match=r"list is no torch.optim.Optimizer"):
        apply(model, plan, optimizer=list(model.parameters()))
