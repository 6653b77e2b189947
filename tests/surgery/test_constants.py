"""Constant units: into a bias or a batch norm's mean where that is exact, and left with a reason where it is not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from secateur.graph.rebuild import rebuild
from secateur.graph.twin import tensors_of
from secateur.surgery.simplification import Simplification
from secateur.surgery.simplify import simplify


def make_constant(layer: nn.Module, unit: int, value: float) -> None:
    """The layer's output number `unit` is `value` on every input."""
    with torch.no_grad():
        layer.weight[unit] = 0
        layer.bias[unit] = value


def simplified(model: nn.Module, x: Tensor) -> tuple[nn.Module, Simplification]:
    """Simplified, with the outputs compared and the original seen to be untouched."""
    model.eval()
    before = copy.deepcopy(model.state_dict())
    smaller, record = simplify(model, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(model(x), smaller(x))
    return smaller, record


ACTIVATIONS = (
    (nn.ReLU(), 0.0, "dead units"),
    (nn.ReLU(), -2.0, "dead units"),
    (nn.ReLU(), 2.0, "constant units"),
    (nn.GELU(), 0.0, "dead units"),
    (nn.GELU(), 1.0, "constant units"),
    (nn.SiLU(), 0.0, "dead units"),
    (nn.Hardswish(), -3.0, "dead units"),
    (nn.Tanh(), 0.0, "dead units"),
    (nn.Sigmoid(), 0.0, "constant units"),
    (nn.Softplus(), 0.0, "constant units"),
    (nn.ELU(), -1.0, "constant units"),
    (nn.Dropout(0.5), 1.0, "constant units"),
)


@pytest.mark.parametrize(("activation", "value", "kind"), ACTIVATIONS)
def test_a_unit_is_what_the_activation_makes_of_its_bias(activation: nn.Module, value: float, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 3)).double()
    make_constant(model[0], 2, value)
    bias, column = model[2].bias.detach().clone(), model[2].weight[:, 2].detach().clone()
    held = activation.eval()(torch.tensor(value, dtype=torch.float64))
    smaller, record = simplified(model, torch.randn(5, 4).double())
    assert [(item.kind, item.count) for item in record.found] == [(kind, 1)]
    torch.testing.assert_close(smaller[2].bias.detach(), bias + held * column)
    assert record.identities == record.biases == ()


def test_one_layer_takes_up_several_constants() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 2))
    for unit, value in ((0, 1.0), (3, -1.0), (5, 0.0)):
        make_constant(model[0], unit, value)
    make_constant(model[2], 1, 0.5)
    smaller, record = simplified(model, torch.randn(3, 4))
    assert record.count("constant units") == 4
    assert [layer.out_features for layer in smaller if isinstance(layer, nn.Linear)] == [3, 4, 2]


def test_what_comes_of_constants_alone_is_a_constant() -> None:
    """All inputs of a unit are constants: it is one, though none of its weights is zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        make_constant(model[0], 0, 1.0)
        make_constant(model[0], 1, 2.0)
        model[2].weight[3, 2:] = 0
        model[2].bias[3] = 5.0
    smaller, record = simplified(model, torch.randn(3, 4))
    assert record.count("constant units") == 3
    assert smaller[2].weight.shape == (4, 4)


def conv_net(padding: int, kernel: int = 3, mode: str = "zeros", bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    reader = nn.Conv2d(6, 4, kernel, padding=padding, padding_mode=mode, bias=bias)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), reader, nn.Flatten(), nn.LazyLinear(2))


@pytest.mark.parametrize(
    ("padding", "kernel", "mode"), [(0, 3, "zeros"), (0, 1, "zeros"), (1, 3, "reflect"), (1, 3, "circular")]
)
def test_a_convolution_without_zero_padding_takes_up_a_constant(padding: int, kernel: int, mode: str) -> None:
    model, x = conv_net(padding, kernel, mode), torch.randn(2, 3, 9, 9)
    model(x)
    with torch.no_grad():
        model[1].weight[1] = 0
        model[1].bias[1] = 0.7
    smaller, record = simplified(model, x)
    assert record.count("constant units") == 1
    assert smaller[3].in_channels == smaller[0].out_channels == smaller[1].num_features == 5


def test_zero_padding_keeps_a_constant_and_says_so() -> None:
    model, x = conv_net(1), torch.randn(2, 3, 9, 9)
    model(x)
    with torch.no_grad():
        model[1].weight[1:3] = 0
        model[1].bias[1], model[1].bias[2] = 0.7, -0.7  # of the second, ReLU makes zero
    smaller, record = simplified(model, x)
    assert record.count("dead units") == 1
    assert record.count("constant units") == 0
    assert [(item.where, item.count) for item in record.left] == [("0", 1)]
    assert "zero padding" in record.left[0].why
    assert smaller[3].in_channels == 5


def test_a_batch_norm_after_a_layer_without_bias_takes_up_a_constant() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
    )  # fmt: skip
    x = torch.randn(4, 3, 8, 8)
    model(x)
    with torch.no_grad():
        model[1].weight[1] = 0
        model[1].bias[1] = 0.7
    mean = model[4].running_mean.clone()
    smaller, record = simplified(model, x)
    assert record.count("constant units") == 1
    assert record.identities == record.biases == ()
    assert smaller[3].bias is None
    torch.testing.assert_close(smaller[4].running_mean, mean - 0.7 * model[3].weight[:, 1, 0, 0].detach())
    again = rebuild(model, tensors_of(smaller), record.attributes, record.replays).eval()
    assert torch.equal(again(x), smaller(x))
    # The statistics of a batch move by the constant too, so training sees no difference either.
    torch.testing.assert_close(model.train()(x), smaller.train()(x), atol=1e-5, rtol=1e-5)


def test_a_layer_without_bias_or_norm_keeps_a_constant_and_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3, bias=False))
    make_constant(model[0], 2, 1.0)
    _, record = simplified(model, torch.randn(3, 4))
    assert record.found == ()
    assert "without a bias or a batch norm" in record.left[0].why


class Shared(nn.Module):
    """A unit that two layers read; they may have one bias between them."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        if tied:
            self.c.bias = self.b.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).sigmoid()
        return self.b(x) * self.c(x.flip(0))


@pytest.mark.parametrize("tied", [False, True])
def test_all_who_read_a_constant_must_take_it_up(tied: bool) -> None:
    torch.manual_seed(0)
    model = Shared(tied)
    make_constant(model.a, 2, 1.0)
    smaller, record = simplified(model, torch.randn(3, 4))
    assert record.count("constant units") == (0 if tied else 1)
    assert smaller.b.in_features == smaller.c.in_features == (6 if tied else 5)
    if tied:
        assert "not one layer's own" in record.left[0].why


def test_a_layer_called_twice_keeps_the_constants_that_it_reads() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x).sigmoid()) * self.c(self.b(x).sigmoid())

    torch.manual_seed(0)
    model = Twice()
    make_constant(model.a, 2, 1.0)
    _, record = simplified(model, torch.randn(3, 4))
    assert record.found == ()
    make_constant(model.b, 2, 2.0)
    _, record = simplified(model, torch.randn(3, 4))
    assert record.found == ()
    assert "not one layer's own" in record.left[0].why


class Positional(nn.Module):
    """A unit that is zero but for what its position adds: known, and not the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.place, self.b = nn.Linear(4, 6), nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) + self.place).relu())


def test_a_constant_that_differs_by_position_stays() -> None:
    torch.manual_seed(0)
    model = Positional()
    make_constant(model.a, 2, 0.5)
    _, record = simplified(model, torch.randn(3, 5, 4))
    assert record.found == ()
    assert "not the same at all positions" in record.left[0].why


def test_a_flattened_map_may_hold_a_constant_for_each_pixel() -> None:
    """Flattened, each position has columns of its own in the linear layer: a border of other values is no matter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AvgPool2d(3, 1, padding=1), nn.Flatten(), nn.Linear(150, 2))
    make_constant(model[0], 2, 0.5)
    smaller, record = simplified(model, torch.randn(3, 3, 7, 7))
    assert record.count("constant units") == 1
    assert smaller[3].in_features == 125


def test_a_transposed_convolution_keeps_a_constant() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 2, 3, stride=2))
    make_constant(model[0], 2, 0.5)
    make_constant(model[0], 3, 0.0)
    smaller, record = simplified(model, torch.randn(3, 3, 7, 7))
    assert record.count("dead units") == 1
    assert "transposed" in record.left[0].why
    assert smaller[1].in_channels == 5


def test_constants_go_through_a_depthwise_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU6(), nn.Conv2d(6, 4, 1)
    )
    make_constant(model[2], 2, 0.5)  # whatever comes into it, the filter makes 0.5
    smaller, record = simplified(model, torch.randn(2, 3, 7, 7))
    assert record.count("constant units") == 1
    assert smaller[2].groups == smaller[0].out_channels == 5


def test_a_gate_of_zero_makes_dead_units_and_one_of_a_half_does_not() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gate, self.b = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * self.gate(x).relu() * self.gate(x).sigmoid())

    torch.manual_seed(0)
    model = Gated()
    make_constant(model.gate, 2, -1.0)
    _, record = simplified(model, torch.randn(3, 4))
    assert record.count("dead units") == 1
    make_constant(model.gate, 2, 1.0)
    _, record = simplified(model, torch.randn(3, 4))
    assert record.found == ()
    assert record.left == ()
