"""The table of zeros, and how names choose weight tensors."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from secateur.errors import ModelError, UnknownName
from secateur.measure.sparsity import SparsityRow, SparsityTable, find_weights, prunable_weights, sparsity


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 2), nn.Flatten(), nn.Linear(8, 5)
    )


def test_counts_zeros_of_either_sign() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[0] = 0.0
        model[4].weight[1, :3] = -0.0
    table = sparsity(model)
    assert table.rows == (
        SparsityRow("0.weight", 27, 108),
        SparsityRow("2.weight", 0, 32),
        SparsityRow("4.weight", 3, 40),
    )
    assert [row.l0 for row in table.rows] == [81, 32, 37]
    assert [row.sparsity for row in table.rows] == [0.25, 0.0, 3 / 40]
    assert (table.zeros, table.elements, table.l0, table.sparsity) == (30, 180, 150, 30 / 180)


def test_an_empty_table_and_an_empty_row() -> None:
    assert SparsityTable(()).sparsity == 0.0
    assert SparsityRow("none", 0, 0).sparsity == 0.0


def test_prunable_are_convolutions_and_linear_layers_in_order() -> None:
    layers = [nn.Conv1d(1, 2, 3), nn.Conv3d(1, 2, 3), nn.LayerNorm(4), nn.Embedding(3, 2), nn.Linear(4, 2)]
    layers += [nn.ConvTranspose1d(1, 2, 3), nn.ConvTranspose3d(1, 2, 3), nn.PReLU(2)]
    assert list(prunable_weights(nn.Sequential(*layers))) == [f"{i}.weight" for i in (0, 1, 4, 5, 6)]


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ({}, ["in_proj_weight", "out_proj.weight"]),
        ({"kdim": 2, "vdim": 3}, ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]),
    ],
)
def test_the_projections_of_attention_are_prunable(sizes: dict[str, int], names: list[str]) -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2, add_bias_kv=True, **sizes))
    assert list(prunable_weights(model)) == [f"0.{name}" for name in names]


def test_the_model_itself_may_be_the_layer() -> None:
    assert list(prunable_weights(nn.Linear(3, 2))) == ["weight"]
    assert list(prunable_weights(nn.MultiheadAttention(4, 2))) == ["in_proj_weight", "out_proj.weight"]


def test_tied_weights_appear_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(prunable_weights(model)) == ["0.weight"]


def test_weights_share_memory_with_the_model() -> None:
    model = nn.Linear(3, 2)
    prunable_weights(model)["weight"].zero_()
    assert sparsity(model).sparsity == 1.0


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (None, ["0.weight", "2.weight", "4.weight"]),
        ("*", ["0.weight", "2.weight", "4.weight"]),
        (["4.weight", "0.weight", "0.*"], ["0.weight", "4.weight"]),
        (["[02].weight"], ["0.weight", "2.weight"]),
        (["?.weight", "1.weight"], ["0.weight", "1.weight", "2.weight", "4.weight"]),
        (["4.bias"], ["4.bias"]),
        ([], []),
    ],
)
def test_names(names: list[str] | str | None, chosen: list[str]) -> None:
    assert list(find_weights(network(), names)) == chosen
    assert [row.name for row in sparsity(network(), names).rows] == chosen


def test_unknown_names_list_the_nearest_first() -> None:
    with pytest.raises(UnknownName, match=r"'0\.wieght'; did you mean '0\.weight'\? Choices: 0\.weight"):
        sparsity(network(), ["0.wieght"])
    with pytest.raises(UnknownName, match=r"unknown weight 'features\.\*'\. Choices"):
        find_weights(network(), "features.*")


def test_a_lazy_layer() -> None:
    with pytest.raises(ModelError, match=r"layer '1' has no weights yet \(it is lazy\); run the model once"):
        sparsity(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4)))


def test_a_row_by_name() -> None:
    table = sparsity(network())
    assert table["2.weight"].elements == 32
    with pytest.raises(UnknownName, match=r"unknown weight '3\.weight'"):
        table["3.weight"]


def test_json_round_trip() -> None:
    table = sparsity(network())
    assert SparsityTable.from_json(json.loads(json.dumps(table.to_json()))) == table
