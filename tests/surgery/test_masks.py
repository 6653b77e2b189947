"""Masks drop what torch's own pruning drops, to the exact count; they zero, hold, and survive training and disk."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from secateur.allocate import threshold
from secateur.codec.state import save_state
from secateur.errors import PlanError, RunError, UnknownName
from secateur.measure.sparsity import sparsity
from secateur.surgery.masks import Masks, find_masks


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold, "CHUNK", 16)


def network(seed: int = 0, coarse: float = 0.0) -> nn.Sequential:
    """Three layers; `coarse` rounds the weights to its multiples, so that many tie."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(7, 9), nn.Linear(9, 3))
    if coarse:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((parameter / coarse).round() * coarse)
    return model


def by_torch(model: nn.Sequential, amount: float, scope: str) -> dict[str, Tensor]:
    """The masks of torch.nn.utils.prune, by the name of the weight."""
    layers = [(name, module) for name, module in model.named_children() if isinstance(module, nn.Conv2d | nn.Linear)]
    if scope == "global":
        pairs = [(module, "weight") for _, module in layers]
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=amount)
    else:
        for _, module in layers:
            prune.l1_unstructured(module, "weight", amount=amount)
    return {f"{name}.weight": module.get_buffer("weight_mask").bool() for name, module in layers}


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    amount=st.floats(0, 1, exclude_max=True),
    scope=st.sampled_from(["global", "layer"]),
    coarse=st.sampled_from([0.0, 0.1, 10.0]),
)
def test_keeps_what_torch_keeps(seed: int, amount: float, scope: str, coarse: float) -> None:
    model = network(seed, coarse)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = find_masks(model, amount, scope=scope)
    theirs = by_torch(model, amount, scope)
    assert list(masks.names) == list(theirs)
    for groups in [list(theirs)] if scope == "global" else [[name] for name in theirs]:
        ours_kept = torch.cat([weights[name][masks.keep(name)].abs() for name in groups])
        theirs_kept = torch.cat([weights[name][theirs[name]].abs() for name in groups])
        assert torch.equal(ours_kept.sort().values, theirs_kept.sort().values)
    if not coarse:
        assert all(torch.equal(masks.keep(name), theirs[name]) for name in theirs)


def test_when_everything_ties_the_first_go_to_the_exact_count() -> None:
    model = network()
    for parameter in model.parameters():
        nn.init.constant_(parameter, -0.25)
    masks = find_masks(model, 0.5)
    dropped = torch.cat([~masks.keep(name).reshape(-1) for name in masks.names])
    assert dropped.tolist() == [True] * 112 + [False] * 113  # round(112.5) of 225


def test_weights_are_zeroed_in_place_and_nothing_else() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = find_masks(model, 0.7)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not masks.holds(model)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    masks.apply_(model)
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]
    for name, value in model.state_dict().items():
        expected = before[name] * masks.keep(name) if name in masks.names else before[name]
        assert torch.equal(value, expected)
    assert masks.holds(model)
    assert masks.table() == sparsity(model)
    assert masks.table().zeros == round(0.7 * 225)


def test_zeroed_weights_have_no_sign_and_no_nan() -> None:
    model = nn.Linear(4, 1, bias=False)
    masks = find_masks(model, 0.75)
    model.weight.data = torch.tensor([[-1.0, torch.inf, torch.nan, -2.0]])
    masks.apply_(model)
    gone = model.weight.detach()[~masks.keep("weight")]
    assert gone.tolist() == [0.0, 0.0, 0.0]
    assert not gone.signbit().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    masks = find_masks(model, 0.6)
    masks.apply_(model)
    assert masks.table().zeros == round(0.6 * 225)
    assert masks.holds(model)


def test_mixed_dtypes_drop_the_exact_count() -> None:
    model = network()
    model[3].to(torch.bfloat16)
    model[4].to(torch.float16)
    assert find_masks(model, 0.6).table().zeros == round(0.6 * 225)


def test_the_layout_in_memory_does_not_matter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 12, 3), nn.Conv2d(12, 4, 2))
    plain = find_masks(model, 0.6)
    assert find_masks(model.to(memory_format=torch.channels_last), 0.6) == plain
    assert not model[0].weight.is_contiguous()
    plain.apply_(model)
    assert plain.holds(model)
    assert sparsity(model) == plain.table()


def test_sparsity_scope_and_names_change_the_masks() -> None:
    model = network()
    assert [find_masks(model, share).table().zeros for share in (0, 0.2, 0.9)] == [0, 45, 202]
    each = [row.zeros for row in find_masks(model, 0.5, scope="layer").table().rows]
    assert each == [round(135 / 2), round(63 / 2), round(27 / 2)]
    assert each != [row.zeros for row in find_masks(model, 0.5).table().rows]
    assert find_masks(model, 0.5, names="[34].*").names == ("3.weight", "4.weight")
    assert find_masks(model, 0.5, names=["4.weight", "1.weight"]).names == ("1.weight", "4.weight")


def train(model: nn.Module, enforce: bool, masks: Masks) -> None:
    step = masks.enforcer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(6, 7)).square().sum().backward()
        optimizer.step()
        if enforce:
            step()


@pytest.mark.parametrize("enforce", [True, False])
def test_masks_survive_training_only_if_enforced(enforce: bool) -> None:
    model = network()[3:]
    masks = find_masks(model, 0.5)
    masks.apply_(model)
    before = model[0].weight.detach().clone()
    train(model, enforce, masks)
    assert masks.holds(model) is enforce
    assert not torch.equal(before, model[0].weight)


def test_the_enforcer_follows_weights_that_are_replaced() -> None:
    model = nn.Linear(6, 5)
    masks = find_masks(model, 0.5)
    enforce = masks.enforcer(model)
    model.weight.data = torch.ones(5, 6)
    enforce()
    assert torch.equal(model.weight.detach(), masks.keep("weight").float())


def test_a_bit_for_each_weight() -> None:
    model = network()
    masks = find_masks(model, 0.5)
    assert [len(mask.bits) for mask in masks.masks] == [-(-n // 8) for n in (135, 63, 27)]
    assert [mask.elements for mask in masks.masks] == [135, 63, 27]
    assert sum(mask.kept for mask in masks.masks) == masks.table().l0 == 225 - 112


def test_save_and_load() -> None:
    masks = find_masks(network(), 0.5)
    masks.save("masks.safetensors")
    assert Masks.load("masks.safetensors") == masks
    model = nn.Sequential(*(nn.Linear(4, 3) for _ in range(12)))  # "10.weight" sorts before "2.weight"
    masks = find_masks(model, 0.5)
    masks.save("masks.safetensors")
    assert Masks.load("masks.safetensors").names == masks.names


def test_a_file_without_masks() -> None:
    save_state("weights.safetensors", network().state_dict())
    with pytest.raises(PlanError, match=r"weights\.safetensors holds no masks; give a file that Masks\.save wrote"):
        Masks.load("weights.safetensors")
    with pytest.raises(RunError, match=r"none\.safetensors is not there"):
        Masks.load("none.safetensors")


def test_a_file_that_lacks_bits() -> None:
    bits = torch.zeros(3, dtype=torch.uint8)
    for tensors in ({}, {"fc.weight": bits}):
        save_state("masks.safetensors", tensors, {"secateur.masks": '{"fc.weight": [5, 5]}'})
        with pytest.raises(PlanError, match=r"lacks the bits of mask 'fc\.weight', shape \[5, 5\]; save it again"):
            Masks.load("masks.safetensors")


@pytest.mark.parametrize("share", [1, 1.5, -0.1, float("nan")])
def test_a_sparsity_out_of_range(share: float) -> None:
    with pytest.raises(PlanError, match=rf"sparsity {share} is out of range: .* \[0, 1\)"):
        find_masks(network(), share)


def test_other_bad_arguments() -> None:
    with pytest.raises(UnknownName, match="unknown scope 'layers'; did you mean 'layer'"):
        find_masks(network(), 0.5, scope="layers")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match=r"unknown weight '3\.wait'"):
        find_masks(network(), 0.5, names=["3.wait"])
    with pytest.raises(PlanError, match="no convolution or linear layer to prune; name its weight tensors"):
        find_masks(nn.BatchNorm2d(3), 0.5)
    with pytest.raises(UnknownName, match=r"unknown mask '1\.weight'"):
        find_masks(network(), 0.5).keep("1.weight")


def test_a_nan_is_named() -> None:
    model = network()
    with torch.no_grad():
        model[3].weight[2, 2] = torch.nan
    with pytest.raises(PlanError, match=r"'3\.weight' holds NaN"):
        find_masks(model, 0.5)


@pytest.mark.parametrize("verb", ["apply_", "holds", "enforcer"])
def test_masks_of_another_model_change_nothing(verb: str) -> None:
    masks = find_masks(network(), 0.5)
    other = network()[:1]
    before = other[0].weight.detach().clone()
    with pytest.raises(PlanError, match=r"belong to another model: this one has no tensor '3\.weight'"):
        getattr(masks, verb)(other)
    wider = nn.Sequential(nn.Conv2d(3, 6, 3))
    with pytest.raises(PlanError, match=r"mask of '0\.weight' has shape \(5, 3, 3, 3\), the tensor \(6, 3, 3, 3\)"):
        getattr(masks, verb)(wider)
    assert torch.equal(before, other[0].weight)


def test_masks_cannot_be_changed() -> None:
    masks = find_masks(network(), 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        masks.masks = ()  # type: ignore[misc]
    masks.keep("0.weight").fill_(True)
    assert masks.table().zeros == 112
