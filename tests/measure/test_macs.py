"""MACs against closed forms, what is said to be left out, and that the model is left alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import CaptureError
from secateur.measure.macs import Macs, batch_size, count_macs

N = 2
IMAGE = torch.zeros(N, 8, 10, 12)
SEQUENCE = torch.zeros(N, 5, 8)


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return self.function(*args, **kwargs)


@pytest.mark.parametrize(
    ("layer", "inputs", "macs"),
    [
        (nn.Conv2d(8, 6, 3), IMAGE, N * 6 * 8 * 9 * (8 * 10)),
        (nn.Conv2d(8, 6, 3, stride=2, padding=1), IMAGE, N * 6 * 8 * 9 * (5 * 6)),
        (nn.Conv2d(8, 6, 3, dilation=2, bias=False), IMAGE, N * 6 * 8 * 9 * (6 * 8)),
        (nn.Conv2d(8, 12, (1, 3), groups=4), IMAGE, N * 12 * (8 // 4) * 3 * (10 * 10)),
        (nn.Conv2d(8, 8, 3, groups=8), IMAGE, N * 8 * 9 * (8 * 10)),
        (nn.Conv1d(8, 4, 5), torch.zeros(N, 8, 9), N * 4 * 8 * 5 * 5),
        (nn.Conv3d(2, 3, 2), torch.zeros(N, 2, 4, 5, 6), N * 3 * 2 * 8 * (3 * 4 * 5)),
        (nn.ConvTranspose2d(8, 6, 3, stride=2), IMAGE, N * 8 * 6 * 9 * (10 * 12)),
        (nn.ConvTranspose2d(8, 6, 3, groups=2), IMAGE, N * 8 * (6 // 2) * 9 * (10 * 12)),
        (nn.Linear(8, 3), torch.zeros(N, 8), N * 8 * 3),
        (nn.Linear(8, 3, bias=False), SEQUENCE, N * 5 * 8 * 3),
        (nn.MultiheadAttention(8, 2, batch_first=True), (SEQUENCE,) * 3, N * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8)),
        (nn.LSTM(8, 3, batch_first=True), SEQUENCE, N * 5 * 4 * 3 * (8 + 3)),
        (nn.GRU(8, 3, batch_first=True), SEQUENCE, N * 5 * 3 * 3 * (8 + 3)),
        (Calls(torch.mv), (torch.zeros(7, 3), torch.zeros(3)), 7 * 3),
        (Calls(torch.addmv), (torch.zeros(7), torch.zeros(7, 3), torch.zeros(3)), 7 * 3),
        (Calls(torch.dot), (torch.zeros(3), torch.zeros(3)), 3),
        (Calls(torch.bmm), (torch.zeros(N, 3, 4), torch.zeros(N, 4, 5)), N * 3 * 4 * 5),
    ],
)
def test_closed_forms(layer: nn.Module, inputs: Any, macs: int) -> None:
    assert count_macs(layer, inputs).total == macs


def test_fused_attention() -> None:
    query, key, value = torch.zeros(N, 3, 5, 8), torch.zeros(N, 3, 7, 8), torch.zeros(N, 3, 7, 8)
    found = count_macs(Calls(F.scaled_dot_product_attention), (query, key, value))
    assert found.total == N * 3 * (5 * 7 * 8 + 5 * 7 * 8)


class Nested(nn.Module):
    """A block that runs twice, and a product of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.stem(x))) @ self.stem.weight


def test_each_module_gets_its_own_and_they_add_up() -> None:
    found = count_macs(Nested(), torch.zeros(N, 8))
    assert found.by_module == (("stem", N * 64), ("block.0", 2 * N * 64), ("", N * 64))
    assert found.total == sum(macs for _, macs in found.by_module) == 4 * N * 64


def test_ops_without_a_formula_are_named() -> None:
    layers = [nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True)]
    found = count_macs(nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), IMAGE)
    assert dict(found.uncounted) == {
        "aten.native_batch_norm": 1,
        "aten.relu": 2,
        "aten.relu_": 1,
        "aten.mean": 1,
    }
    assert found.uncounted[0] == ("aten.relu", 2)


def test_moving_values_about_is_no_arithmetic() -> None:
    def move(x: Tensor) -> Tensor:
        y = torch.cat([x.flip(1), F.pad(x, (1, 1))[..., 1:-1]], 1).permute(0, 2, 3, 1).contiguous()
        return y.view(-1, y.shape[-1])[torch.arange(3)].clone().masked_fill_(y[0, 0, 0] == 0, 1.0)

    assert count_macs(Calls(move), IMAGE) == Macs(0, (), (), N)


def test_the_count_is_for_the_batch_given() -> None:
    one, four = (count_macs(nn.Linear(8, 3), torch.zeros(n, 8)) for n in (1, 4))
    assert (one.batch, four.batch) == (1, 4)
    assert four.total == 4 * one.total
    assert four.per_image == one.per_image == 24


def test_keyword_inputs() -> None:
    assert count_macs(Calls(torch.mm), {"input": torch.zeros(3, 4), "mat2": torch.zeros(4, 5)}).total == 60


def test_control_flow_on_values_is_run_for_real() -> None:
    layer = nn.Linear(8, 3)

    def often(x: Tensor) -> Tensor:
        return sum((layer(x) for _ in range(int(x.sum()))), torch.zeros(()))

    assert count_macs(Calls(often), torch.ones(1, 8)).total == 8 * 24


class Caching(nn.Module):
    """Keeps what it has computed, and notes each call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.cache["x"] = self.norm(x)
        return self.cache["x"]


def test_the_model_is_left_as_found() -> None:
    model = Caching()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    count_macs(model, torch.ones(N, 8))
    assert model.training
    assert model.norm.training
    assert model.cache == {}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(CaptureError, match="did not run on the example inputs"):
        count_macs(nn.Linear(8, 3), torch.zeros(2, 9))


def test_batch_size() -> None:
    assert batch_size((torch.zeros(3, 2), torch.zeros(5))) == 3
    with pytest.raises(CaptureError, match=r"first example input has shape \(0, 3\); give a batch of at least one"):
        batch_size(torch.zeros(0, 3))
    with pytest.raises(CaptureError, match=r"the example inputs are \[1, 2\] and hold no tensor"):
        batch_size([1, 2])


def test_json_round_trip() -> None:
    found = count_macs(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), IMAGE)
    assert Macs.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_deformed_convolution_counts_like_a_plain_one() -> None:
    from torchvision.ops import DeformConv2d

    class Deformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = DeformConv2d(4, 5, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x, torch.zeros(len(x), 18, *x.shape[2:]))

    x = torch.zeros(2, 4, 6, 6)
    assert count_macs(Deformed(), x).total == 2 * (5 * 4 * 3 * 3) * (6 * 6)
