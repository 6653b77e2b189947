"""Rules of relevance propagation against slow replicas of their formulas, in float64, and what they conserve."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import CaptureError, PlanError
from secateur.score.lrp.composites import (
    AllEpsilon,
    Composite,
    EpsilonAlphaBeta,
    EpsilonGammaBox,
    EpsilonPlus,
    FlatFirst,
)
from secateur.score.lrp.explain import explain as explained
from secateur.score.lrp.rules import AlphaBeta, Box, Epsilon, Flat, Gamma, Product, Rule, WSquare, ZPlus

TINY = 1e-12

explain = functools.partial(explained, stabilizer=TINY)


def positive(value: float) -> float:
    return max(value, 0.0)


def negative(value: float) -> float:
    return min(value, 0.0)


def slow(part: Callable[[float, float], float], bias: Callable[[float], float]) -> Callable[..., float]:
    """R_i = sum_j part(x_i, w_ij) / (sum_i' part(x_i', w_i'j) + bias(b_j)) R_j."""

    def share(x: Tensor, w: Tensor, b: Tensor, r: Tensor, i: int) -> float:
        total = 0.0
        for j in range(len(w)):
            parts = [part(float(x[k]), float(w[j, k])) for k in range(len(x))]
            total += parts[i] / (sum(parts) + bias(float(b[j]))) * float(r[j])
        return total

    return share


def slow_gamma(x: Tensor, w: Tensor, b: Tensor, r: Tensor, i: int) -> float:
    total = 0.0
    for j in range(len(w)):
        products = [float(x[k] * w[j, k]) for k in range(len(x))]
        favoured = positive if sum(products) + float(b[j]) > 0 else negative
        parts = [p + 0.5 * favoured(p) for p in products]
        total += parts[i] / (sum(parts) + float(b[j]) + 0.5 * favoured(float(b[j]))) * float(r[j])
    return total


def slow_two(x: Tensor, w: Tensor, b: Tensor, r: Tensor, i: int) -> float:
    up = slow(lambda x, w: positive(x * w), positive)
    down = slow(lambda x, w: negative(x * w), negative)
    return 3 * up(x, w, b, r, i) - 2 * down(x, w, b, r, i)


REPLICAS = (
    (Epsilon(TINY), slow(lambda x, w: x * w, lambda b: b)),
    (ZPlus(TINY), slow(lambda x, w: positive(x * w), positive)),
    (AlphaBeta(1.0, 0.0, TINY), slow(lambda x, w: positive(x * w), positive)),
    (AlphaBeta(3.0, 2.0, TINY), slow_two),
    (Gamma(0.5, TINY), slow_gamma),
    (Flat(TINY), slow(lambda x, w: 1.0, lambda b: 0.0)),
    (WSquare(TINY), slow(lambda x, w: w * w, lambda b: 0.0)),
    (Box(-3.0, 4.0, TINY), slow(lambda x, w: x * w + 3 * positive(w) - 4 * negative(w), lambda b: 0.0)),
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rule", "replica"), REPLICAS, ids=lambda value: type(value).__name__)
def test_rule_against_a_slow_replica(rule: Rule, replica: Callable[..., float]) -> None:
    x, weight, bias, relevance = drawn(3, 6), drawn(4, 6, seed=1), drawn(4, seed=2), drawn(3, 4, seed=3)
    got = rule(Product(x, weight, bias, F.linear), relevance)
    want = [[replica(x[n], weight, bias, relevance[n], i) for i in range(6)] for n in range(3)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rule", [rule for rule, _ in REPLICAS], ids=lambda value: type(value).__name__)
def test_a_convolution_is_the_matrix_that_it_is(rule: Rule) -> None:
    x, weight, bias = drawn(2, 3, 5, 4), drawn(4, 3, 3, 3, seed=1), drawn(4, seed=2)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, stride=2, padding=0)

    pixels = torch.eye(60, dtype=torch.float64).reshape(60, 3, 5, 4)
    matrix = convolve(pixels, weight, None).flatten(1).T
    taken = convolve(pixels, torch.ones_like(weight), None).flatten(1).T  # which pixels an output reads

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight * taken, bias)

    relevance = drawn(2, 4, 2, 1, seed=3)
    got = rule(Product(x, weight, bias, convolve), relevance)
    dense = Product(x.flatten(1), matrix, bias.repeat_interleave(2), multiply)
    torch.testing.assert_close(got.flatten(1), rule(dense, relevance.flatten(1)), rtol=1e-8, atol=1e-8)


def test_alpha_and_beta_must_conserve() -> None:
    with pytest.raises(PlanError, match=r"alpha must be beta \+ 1"):
        AlphaBeta(2.0, 0.5)


class Plain(nn.Module):
    """Convolutions, both kinds of pooling, a residual addition and dense layers, all without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in ((3, 8), (8, 6), (6, 8)))
        self.wide, self.head = nn.Linear(32, 12, bias=False), nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.head(F.relu(self.wide(F.adaptive_avg_pool2d(x, 2).flatten(1))))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Plain().double()


CONSERVING = (
    AllEpsilon(TINY),
    EpsilonPlus(TINY, TINY),
    EpsilonAlphaBeta(TINY, 2.0, 1.0, TINY),
    EpsilonGammaBox(-4.0, 4.0, TINY, 0.25, TINY),
    FlatFirst(EpsilonPlus(TINY, TINY), TINY),
)


@pytest.mark.parametrize("composite", CONSERVING, ids=lambda value: type(value).__name__)
def test_relevance_is_conserved_in_every_layer_and_through_the_network(composite: Composite) -> None:
    model, x = plain(), drawn(4, 3, 8, 8)
    explanation = explain(model, x, torch.tensor([0, 1, 2, 3]), composite)
    assert [name for name, _, _ in explanation.layers] == ["head", "wide", "b", "a", "stem"]
    for name, read, made in explanation.layers:
        torch.testing.assert_close(read.flatten(1).sum(1), made.flatten(1).sum(1), rtol=1e-8, atol=1e-9, msg=name)
    logits = model(x)[range(4), range(4)].detach()
    torch.testing.assert_close(explanation.inputs[0].sum((1, 2, 3)), logits, rtol=1e-8, atol=1e-9)


def test_epsilon_in_a_network_of_relus_is_gradient_times_input() -> None:
    model, x = plain(), drawn(2, 3, 8, 8).requires_grad_()
    labels = torch.tensor([4, 0])
    (slope,) = torch.autograd.grad(model(x)[range(2), labels].sum(), x)
    got = explain(model, x.detach(), labels, AllEpsilon(TINY)).inputs[0]
    torch.testing.assert_close(got, (x * slope).detach(), rtol=1e-7, atol=1e-9)


def test_a_residual_addition_shares_in_proportion_to_its_summands() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.branch(x))

    torch.manual_seed(0)
    model, x = Sum().double(), drawn(1, 3)
    got = explain(model, x, torch.tensor([1]), AllEpsilon(TINY)).layers[1][2]  # of what the branch makes
    branch = model.branch(x)
    summed = (x + branch) * model.head.weight[1]
    torch.testing.assert_close(got, (branch / (x + branch) * summed).detach(), rtol=1e-8, atol=1e-9)


class Normed(nn.Module):
    """Batch norm behind each kind of linear layer, and once where it cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.b, self.nb = nn.ConvTranspose2d(6, 8, 2, groups=2), nn.BatchNorm2d(8)
        self.c, self.nc = nn.Linear(8, 7), nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))))
        return self.head(F.relu(self.nc(self.c(x.mean((2, 3))))))


def normed() -> Normed:
    torch.manual_seed(0)
    model = Normed().double().eval()
    for norm in (model.na, model.nb, model.nc):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return model


@pytest.mark.parametrize("composite", CONSERVING, ids=lambda value: type(value).__name__)
def test_batch_norm_is_folded_exactly(composite: Composite) -> None:
    model, x = normed(), drawn(2, 3, 6, 6)
    by_hand = copy.deepcopy(model)
    by_hand.a = nn.utils.fuse_conv_bn_eval(model.a, model.na)
    scale = (model.nb.weight / (model.nb.running_var + model.nb.eps).sqrt()).detach()
    with torch.no_grad():
        for unit in range(8):
            group = slice(0, 3) if unit < 4 else slice(3, 6)
            by_hand.b.weight[group, unit % 4] *= scale[unit]
        by_hand.b.bias.sub_(model.nb.running_mean).mul_(scale).add_(model.nb.bias)
    by_hand.c = nn.utils.fuse_linear_bn_eval(model.c, model.nc)
    by_hand.na = by_hand.nb = by_hand.nc = nn.Identity()
    torch.testing.assert_close(by_hand(x), model(x))
    got, want = (explain(net, x, torch.tensor([0, 2]), composite) for net in (model, by_hand))
    torch.testing.assert_close(got.inputs, want.inputs, rtol=1e-7, atol=1e-9)
    for (_, *ours), (_, *theirs) in zip(got.layers, want.layers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_layer_norm_divides_by_a_constant() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3, bias=False)).double()
    x = drawn(2, 5)
    explanation = explain(model, x, torch.tensor([0, 2]), AllEpsilon(TINY))
    logits, made = model(x)[range(2), [0, 2]].detach(), explanation.layers[0][1]
    centred = x - x.mean(1, keepdim=True)
    for image in range(2):
        for i in range(5):
            parts = [((i == j) - 1 / 5) * x[image, i] / centred[image, j] * made[image, j] for j in range(5)]
            assert explanation.inputs[0][image, i].item() == pytest.approx(float(sum(parts)), rel=1e-6)
    torch.testing.assert_close(explanation.inputs[0].sum(1), logits, rtol=1e-7, atol=1e-9)


NORMS = (
    nn.GroupNorm(2, 4, affine=False),
    nn.InstanceNorm1d(4),
    nn.LayerNorm(6, bias=False),
    nn.RMSNorm(6, eps=1e-6),
    nn.BatchNorm1d(4, affine=False, track_running_stats=False),
)


@pytest.mark.parametrize("norm", NORMS, ids=lambda value: type(value).__name__)
def test_norms_conserve_relevance(norm: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(24, 3, bias=False)).double()
    x = drawn(2, 4, 6)
    got = explain(model, x, torch.tensor([0, 2]), AllEpsilon(TINY)).inputs[0]
    assert got.sum().item() == pytest.approx(model(x)[range(2), [0, 2]].sum().item(), rel=1e-6)


class Mixed(nn.Module):
    """Single-head attention without biases, by its matrix products or fused."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.head = (nn.Linear(4, n, bias=False) for n in (4, 4, 4, 3))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        else:
            mixed = (q @ k.mT / 2).softmax(-1) @ v
        return self.head(mixed.mean(1))


def test_attention_weights_without_a_share_are_constants() -> None:
    x, labels = drawn(2, 5, 4), torch.tensor([0, 2])
    model = Mixed(fused=False).double()
    got = explain(model, x, labels, AllEpsilon(TINY), gates=0.0)
    weights = (model.q(x) @ model.k(x).mT / 2).softmax(-1).detach()
    detached = x.clone().requires_grad_()
    logits = model.head((weights @ model.v(detached)).mean(1))[range(2), labels]
    (slope,) = torch.autograd.grad(logits.sum(), detached)
    torch.testing.assert_close(got.inputs[0], (x * slope), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(got.inputs[0].sum((1, 2)), logits.detach(), rtol=1e-7, atol=1e-9)
    assert {name for name, _, _ in got.layers} == {"head", "v"}


@pytest.mark.parametrize("gates", [0.0, 0.5])
def test_fused_attention_is_what_it_is_made_of(gates: float) -> None:
    x, labels = drawn(2, 5, 4), torch.tensor([0, 2])
    apart, fused = (explain(Mixed(kind).double(), x, labels, AllEpsilon(), gates=gates) for kind in (False, True))
    torch.testing.assert_close(fused.inputs, apart.inputs, rtol=1e-4, atol=1e-6)
    assert {name for name, _, _ in fused.layers} == {"head", "v"} | ({"q", "k"} if gates else set())


def test_gates_take_their_share() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.g, self.head = (nn.Linear(3, n, bias=False) for n in (3, 3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x) * self.g(x).sigmoid())

    torch.manual_seed(0)
    model, x = Gated().double(), drawn(2, 3)
    for gates in (0.0, 0.25, 1.0):
        made = {n: out for n, _, out in explain(model, x, torch.tensor([0, 1]), AllEpsilon(), gates=gates).layers}
        whole = explain(model, x, torch.tensor([0, 1]), AllEpsilon()).layers[0][1]
        for name, share in (("a", 1 - gates), ("g", gates)):
            torch.testing.assert_close(made.get(name, torch.zeros_like(whole)), share * whole, rtol=1e-7, atol=1e-12)


class Written(nn.Module):
    """The same network, its values put together by `cat` or written in place, also by way of a view."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.how = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(8, 3), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "cat":
            y = torch.cat([self.conv(x), x], 1)
            y = torch.cat([y[:, :1], y[:, 1:3].relu(), y[:, 3:]], 1) * 2
        elif self.how == "slices":
            y = x.new_zeros(x.shape[0], 8, *x.shape[2:])
            y[:, :4] = self.conv(x)
            y[:, 4:] = x
            y[:, 1:3].relu_()
            y *= 2
        else:
            y = torch.cat([self.conv(x), x], 1)
            flat = y.flatten(2)
            y[:, 1:3].relu_()
            flat.mul_(2)
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("how", ["slices", "views"])
def test_what_is_written_in_place_is_followed(how: str) -> None:
    x, labels = drawn(2, 4, 5, 5), torch.tensor([0, 2])
    got, want = (explain(Written(h).double(), x, labels, EpsilonPlus()) for h in (how, "cat"))
    torch.testing.assert_close(got.inputs, want.inputs)
    torch.testing.assert_close(got.layers[1][1:], want.layers[1][1:])


def test_writing_into_what_is_expanded_is_refused() -> None:
    class Expanded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            wide = x[:, :1].expand(-1, 3)
            x[:, :1].mul_(2)
            return wide * 1.0

    with pytest.raises(CaptureError, match="writes in place into a tensor that it has expanded"):
        explain(Expanded(), torch.ones(2, 4), torch.tensor([0, 1]))


def test_an_op_without_a_derivative_is_named() -> None:
    class Gamma(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return torch.igamma(self[0](x).abs(), x)

    with pytest.raises(CaptureError, match=r"relevance cannot pass aten.igamma.default in the model itself"):
        explain(Gamma(nn.Linear(3, 3)), torch.rand(2, 3), torch.tensor([0, 1]))
