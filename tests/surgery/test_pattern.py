"""N:M masks against a loop over groups of weights, and what they refuse."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from secateur.errors import PlanError
from secateur.surgery.masks import Masks
from secateur.surgery.pattern import find_pattern


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, (3, 1)), nn.Flatten(), nn.Linear(8, 5))


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (1, 2), (3, 8)])
def test_of_every_group_the_largest_stay(keep: int, of: int) -> None:
    model = network()
    masks = find_pattern(model, keep, of)
    assert masks.names == ("2.weight", "4.weight")
    for name in masks.names:
        weight, stays = model.get_parameter(name).detach(), masks.keep(name)
        for places in itertools.product(*(range(size) for dim, size in enumerate(weight.shape) if dim != 1)):
            at = (places[0], slice(None), *places[1:])
            for row, held in zip(weight[at].split(of), stays[at].split(of), strict=True):
                largest = sorted(range(of), key=lambda i: -abs(row[i].item()))[:keep]
                assert held.nonzero().flatten().tolist() == sorted(largest)


def test_equal_magnitudes_and_channels_last_are_told_apart_by_place() -> None:
    model = network()
    nn.init.ones_(model[2].weight)
    assert find_pattern(model).keep("2.weight")[0, :, 0, 0].tolist() == [True, True, False, False] * 2
    expected = find_pattern(network())
    assert find_pattern(network().to(memory_format=torch.channels_last)) == expected


def test_a_transposed_convolution_has_its_inputs_first() -> None:
    layer = nn.ConvTranspose2d(8, 3, 2)
    stays = find_pattern(layer).keep("weight")
    assert (stays.unflatten(0, (2, 4)).sum(1) == 2).all()
    first = layer.weight[:4, 1, 0, 1].abs().argsort(descending=True)[:2]
    assert stays[:4, 1, 0, 1].nonzero().flatten().tolist() == sorted(first.tolist())


def test_they_are_masks_as_others_are(tmp_path: Any) -> None:
    model = network()
    masks = find_pattern(model)
    masks.apply_(model)
    assert masks.holds(model)
    assert [row.sparsity for row in masks.table().rows] == [0.5, 0.5]
    masks.save(tmp_path / "masks.safetensors")
    assert Masks.load(tmp_path / "masks.safetensors") == masks
    assert find_pattern(model) == masks


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"keep": 4}, "4 of every 4 weights is no pattern"),
        ({"keep": 0}, "0 of every 4 weights is no pattern"),
        ({"names": "0.weight"}, r"groups of 4 do not divide the inputs of '0\.weight', \(8, 3, 3, 3\)"),
        ({"names": "4.bias"}, r"groups of 4 do not divide the inputs of '4\.bias', \(5,\)"),
        ({"of": 16}, "no layer has inputs that groups of 16 divide"),
    ],
)
def test_what_is_no_pattern(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        find_pattern(network(), **given)


def test_weights_that_are_not_finite() -> None:
    model = network()
    nn.init.constant_(model[4].weight, float("nan"))
    with pytest.raises(PlanError, match=r"'4\.weight' has weights that are not finite"):
        find_pattern(model)
