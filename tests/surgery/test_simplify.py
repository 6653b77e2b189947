"""Simplifying: what costs nothing goes, what costs something stays, and the outputs are the same."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import networks
from secateur.allocate.plan import Plan
from secateur.errors import CaptureError, ProofError
from secateur.graph.attention import headwise
from secateur.graph.groups import find_groups
from secateur.graph.rebuild import rebuild
from secateur.graph.slots import Group
from secateur.graph.twin import run, tensors_of
from secateur.recipe.folder import load, save
from secateur.surgery import simplify as verb
from secateur.surgery.certify import certify
from secateur.surgery.cut import apply
from secateur.surgery.simplification import Simplification
from secateur.surgery.simplify import simplify
from secateur.zoo.models import build_model

OWN = ("TiedTwice", "Recurrent")
"""Here units are made and read by one op or tensor, which simplification does not look into."""

NETS = networks.NETWORKS
BY_NAME = [net.make.__name__ for net in NETS]
CUTTABLE = tuple(net for net in NETS if net.sizes and net.make.__name__ not in OWN)


def set_units(model: nn.Module, group: Group, role: str, unit: int, like: int | None = None) -> None:
    """Give a unit zeros, or what unit `like` has, in the slots where it is read, or in all others ("made")."""
    tensors = tensors_of(model)
    with torch.no_grad():
        for slot in group.slots:
            if (slot.role == "read") == (role == "read"):
                rows = tensors[slot.tensor].movedim(slot.dim, 0)
                new = 0.0 if like is None else rows[list(slot.index[like])].clone()
                rows[list(slot.index[unit])] = new


def outputs(model: nn.Module, inputs: object) -> list[Tensor]:
    return list(torch.utils._pytree.tree_leaves(run(model, inputs)))


def check_same(model: nn.Module, smaller: nn.Module, inputs: object) -> None:
    for a, b in zip(outputs(copy.deepcopy(model).eval(), inputs), outputs(smaller.eval(), inputs), strict=True):
        torch.testing.assert_close(a, b)


def check_rebuilt(model: nn.Module, smaller: nn.Module, record: Simplification, inputs: object) -> None:
    """What the record says, and the tensors, are enough to build the smaller model from the source's."""
    again = rebuild(model, tensors_of(smaller), record.attributes, record.replays).eval()
    assert record.identities == record.biases == ()
    assert all(torch.equal(a, b) for a, b in zip(outputs(smaller.eval(), inputs), outputs(again, inputs), strict=True))


@pytest.mark.parametrize("net", NETS, ids=BY_NAME)
def test_a_random_net_stays_bit_for_bit(net: networks.Net) -> None:
    model = networks.build(net).train()
    smaller, record = simplify(model, net.inputs())
    assert record.found == ()
    assert record.plans == ()
    assert record.params == record.params_left
    assert smaller.training
    before, after = tensors_of(model), tensors_of(smaller)
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name])
        assert tensor.dtype == after[name].dtype
        assert tensor.data_ptr() != after[name].data_ptr()
        assert isinstance(tensor, nn.Parameter) == isinstance(after[name], nn.Parameter)


KINDS = ("alike", "read", "made")


def kinds(net: networks.Net) -> tuple[str, ...]:
    """A direction of length zero has no direction: a weight norm makes no numbers of it."""
    return KINDS if net.make is not networks.weight_normed else KINDS[:2]


@pytest.mark.parametrize("turn", range(2))
@pytest.mark.parametrize("net", CUTTABLE, ids=[net.make.__name__ for net in CUTTABLE])
def test_idle_units_in_each_group_go(net: networks.Net, turn: int) -> None:
    """In each group unit 1 equals unit 0, 2 is read by nobody and 3 is zero, as far as the group has such; in turn."""
    model, inputs = networks.build(net), net.inputs()
    groups = find_groups(model, inputs)
    wanted = Counter[str]()
    for group in (group for group in groups.groups if not group.inexact):
        for unit, kind in enumerate((*kinds(net)[turn:], *kinds(net)[:turn])[: group.size - 1], 1):
            set_units(model, group, "read" if kind == "read" else "made", unit, 0 if kind == "alike" else None)
            wanted["duplicate units" if kind == "alike" else "dead units"] += 1
    before = copy.deepcopy(model.state_dict())
    smaller, record = simplify(model, inputs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {kind: record.count(kind) for kind in wanted} == wanted
    assert sum(item.count for item in record.found) == wanted.total()
    keep = [[u for u in range(g.size) if g.inexact or not 0 < u <= len(kinds(net))] for g in groups.groups]
    assert record.params_left == groups.params_left(keep) == sum(p.numel() for p in smaller.parameters())
    assert record.error < 1e-12
    check_same(model, smaller, inputs)
    check_rebuilt(model, smaller, record, inputs)


def test_the_plans_are_certified_like_any_other() -> None:
    net = networks.NETWORKS[0]
    model, inputs = networks.build(net), net.inputs()
    for group in find_groups(model, inputs).groups:
        set_units(model, group, "read", 2)
    smaller, record = simplify(model, inputs)
    (plan,) = record.plans
    assert certify(model, smaller, plan, inputs).ok
    cut = apply(model, plan).state_dict()
    assert all(torch.equal(cut[name], tensor) for name, tensor in smaller.state_dict().items())


def test_the_record_survives_json_and_says_what_was_done() -> None:
    net = networks.NETWORKS[BY_NAME.index("Attention")]
    model, inputs = networks.build(net), net.inputs()
    (group,) = find_groups(model, inputs).groups
    set_units(model, group, "made", 3)
    set_units(model, group, "made", 2, 0)
    _, record = simplify(model, inputs)
    assert Simplification.from_json(json.loads(json.dumps(record.to_json()))) == record
    text = str(record)
    assert "1 dead units in qkv" in text
    assert "1 duplicate units in qkv" in text
    assert f"{record.params_left:,} of {record.params:,} parameters are left" in text
    assert isinstance(record.plans[0], Plan)


def test_heads_of_nn_attention_go() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 4, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.head(x + self.attention(y, y, y, need_weights=False)[0])

    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        model.attention.in_proj_weight[16:18] = 0  # the values of head 0
        model.attention.in_proj_bias[16:18] = 0
        model.attention.out_proj.weight[:, 2:4] = 0  # nobody reads head 1
    smaller, record = simplify(model, x)
    assert record.count("dead units") == 2
    assert smaller.attention.num_heads == 2
    assert smaller.attention.out_proj.weight.shape == (8, 4)
    assert headwise(model.attention)
    check_same(model, smaller, x)
    check_rebuilt(model, smaller, record, x)


def test_what_goes_takes_along_what_only_it_read() -> None:
    """A chain of five layers whose last reader is zero at one unit: round by round, from the back to the front."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)), nn.Linear(4, 2))
    with torch.no_grad():
        for layer in model[1:4]:
            layer.weight[0, 1:] = 0  # unit 0 comes of unit 0 alone,
            layer.weight[1:, 0] = 0  # and it alone comes of it
        model[4].weight[:, 0] = 0
    smaller, record = simplify(model, torch.randn(3, 4))
    assert [layer.out_features for layer in smaller] == [3, 3, 3, 3, 2]
    assert len(record.plans) == 4
    check_same(model, smaller, torch.randn(3, 4))


def test_more_rounds_than_allowed_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "ROUNDS", 1)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.zeros_(model[2].weight[:, 1])
    _, record = simplify(model, torch.randn(3, 4))
    assert record.count("dead units") == 1
    assert "stopped after 1 rounds" in record.left[0].why


def test_a_group_keeps_one_unit() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    nn.init.zeros_(model[2].weight)
    smaller, record = simplify(model, torch.randn(3, 4))
    assert smaller[0].out_features == 1
    assert record.count("dead units") == 5
    check_same(model, smaller, torch.randn(3, 4))


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(1, 6), nn.RMSNorm(6), nn.Softmax(-1)])
@pytest.mark.parametrize("role", ["read", "made", "alike"])
def test_units_under_a_norm_stay(norm: nn.Module, role: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), norm, nn.Linear(6, 3)), torch.randn(5, 4)
    (group,) = find_groups(model, x).groups
    assert group.inexact
    set_units(model, group, "read" if role == "read" else "made", 1, 0 if role == "alike" else None)
    smaller, record = simplify(model, x)
    assert record.found == ()
    assert smaller[0].out_features == 6
    if role == "read" and not isinstance(norm, nn.RMSNorm):  # which is a mean of their squares: they are read by it
        assert [(item.count, item.why) for item in record.left] == [(1, group.inexact)]


def test_a_residual_stream_with_one_writer_left_stays() -> None:
    net = networks.NETWORKS[BY_NAME.index("Residual")]
    model = networks.build(net)
    with torch.no_grad():
        for tensor in (model.norm.weight, model.norm.bias):
            tensor[1] = 0  # the block adds nothing to channel 1, the stem still does
    smaller, record = simplify(model, net.inputs())
    assert record.found == ()
    with torch.no_grad():
        for tensor in (model.stem.weight, model.stem.bias):
            tensor[1] = 0
    smaller, record = simplify(model, net.inputs())
    assert record.count("dead units") == 1
    assert smaller.stem.out_channels == smaller.b.out_channels == 7


def test_units_that_were_only_seen_to_be_zero_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    nn.init.constant_(model[0].bias, -100.0)
    _, record = simplify(model, torch.rand(3, 4))
    assert record.found == ()
    assert record.left == ()


def test_whole_groups_of_a_grouped_convolution() -> None:
    """A group of four filters goes only when all of it is idle."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 3, 1))
    x = torch.randn(2, 3, 5, 5)
    nn.init.zeros_(model[3].weight[:, :3])
    assert simplify(model, x)[1].found == ()
    nn.init.zeros_(model[3].weight[:, 3])
    smaller, record = simplify(model, x)
    assert record.count("dead units") == 1
    assert (smaller[1].groups, smaller[1].in_channels, smaller[1].out_channels) == (1, 4, 4)


def test_a_simplified_model_is_saved_like_a_cut_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("secateur:resnet20", classes=10).model
    with torch.no_grad():
        for block in (model.layer1[0], model.layer2[1]):
            block.bn1.weight[:3], block.bn1.bias[:3] = 0, -0.1
    x = torch.randn(2, 3, 32, 32)
    smaller, record = simplify(model, x)
    assert record.count("dead units") == 6
    save(smaller, tmp_path, plan=record, source="secateur:resnet20")
    assert torch.equal(load(tmp_path)(x), smaller.eval()(x))


class Branching(nn.Module):
    """Which layer reads a unit is decided in Python, by what was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) if bool(x.sum() > 1e9) else self.c(x)


def test_where_values_steer_python_nothing_goes() -> None:
    model = Branching()
    nn.init.zeros_(model.c.weight[:, 1])
    smaller, record = simplify(model, torch.randn(2, 4))
    assert record.found == ()
    assert "Python reads values" in record.left[0].why
    assert smaller.a.out_features == 6


class Counting(nn.Module):
    """A buffer that changes with every run, and a tensor that a module keeps beside its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(6))
        self.kept = torch.ones(6, 6).tril()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.seen += y.detach().amax(0)
        return self.b(y * self.seen)


def test_a_buffer_that_runs_change_is_not_a_constant() -> None:
    model = Counting()
    with torch.no_grad():
        model.a.weight[1] = model.a.bias[1] = 0
    smaller, record = simplify(model, torch.randn(2, 4))
    assert record.count("dead units") in (0, 1)
    assert record.count("constant units") == 0
    assert float(model.seen.abs().max()) == 0
    assert float(smaller.seen.abs().max()) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_stay(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 0.7
    smaller, record = simplify(model, torch.randn(2, 4, dtype=dtype))
    assert {p.dtype for p in smaller.parameters()} == {dtype}
    assert record.count("constant units") == 1
    assert (record.rounding <= 1e-15) == (dtype is torch.float64)


def test_a_model_that_does_not_run_is_refused() -> None:
    with pytest.raises(CaptureError, match="did not run on the example inputs"):
        simplify(nn.Linear(4, 2), torch.randn(2, 3))


def test_outputs_that_are_no_numbers_are_refused() -> None:
    model = nn.Linear(4, 2)
    nn.init.constant_(model.bias, float("nan"))
    with pytest.raises(ProofError, match="are not numbers"):
        simplify(model, torch.randn(2, 4))


def test_a_wrong_merge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a duplicate to go without its weights being added, the outputs would tell."""
    monkeypatch.setattr(verb, "merge", lambda *_: None)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
    with pytest.raises(ProofError, match=r"off by .* of the largest output"):
        simplify(model, torch.randn(20, 4))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_mixture_of_idle_units_is_exact(data: st.DataObject) -> None:
    net = data.draw(st.sampled_from(CUTTABLE))
    model, inputs = networks.build(net), net.inputs()
    groups = [group for group in find_groups(model, inputs).groups if not group.inexact]
    edited = 0
    for group in groups:
        for unit in data.draw(st.sets(st.integers(1, group.size - 1), max_size=3)) if group.size > 1 else ():
            role = data.draw(st.sampled_from(kinds(net)))
            set_units(model, group, "read" if role == "read" else "made", unit, 0 if role == "alike" else None)
            edited += 1
    _, record = simplify(model, inputs)
    assert record.error < 1e-11
    assert sum(item.count for item in record.found) >= edited
    assert record.count("dead units") + record.count("duplicate units") >= edited
