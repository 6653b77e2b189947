"""Ops that compute: elementwise, statistics, products, constants, and those of other runs and devices."""

from __future__ import annotations

from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanes import Family, Lane, Op, conv1, conv2, each, noise

aten = torch.ops.aten


def wide() -> Tensor:
    """Far enough apart that rounding leaves something."""
    return 3 * noise(2, 5, 4)()


UNARY = Family(nn.Linear, wide, {
    **each({
        name: getattr(torch, name) for name in (
            "abs ceil clone cos detach erf exp exp2 expm1 floor neg relu round sgn sigmoid sign "
            "sin tan tanh trunc nan_to_num reciprocal square").split()
    }),
})  # fmt: skip

ACTIVATIONS = Family(nn.Linear, wide, {
    **each({
        name: getattr(F, name) for name in (
            "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu6 rrelu selu silu "
            "softplus softshrink").split()
    }),
})  # fmt: skip

ELEMENTWISE = Family(nn.Linear, wide, {
    **each({
        "add": lambda x: x + x.sin(),
        "addcdiv": lambda x: torch.addcdiv(x, x.sin(), x.exp()),
        "addcmul": lambda x: torch.addcmul(x, x.sin(), x.exp()),
        "alias": aten.alias,
        "atan2": lambda x: torch.atan2(x, x.exp()),
        "bitwise": lambda x: x * (((x > -1) & (x < 1)) | ~(x > 0)),
        "clamp": lambda x: x.clamp(-0.5, 0.5),
        "clamp_max": lambda x: x.clamp_max(0.5),
        "clamp_min": lambda x: x.clamp_min(0.5),
        "copy": lambda x: torch.empty_like(x).copy_(x),
        "div": lambda x: x / x.exp(),
        "eq": lambda x: x * (x == x.floor()) + x * (x != 0.5),
        "fill": lambda x: x * torch.empty_like(x).fill_(0.5),
        "floor_divide": lambda x: x // 0.3,
        "fmod": lambda x: x.fmod(0.3),
        "ge": lambda x: x * (x >= 0.1) - (x <= -0.1) * x,
        "isnan": lambda x: x * ~x.isnan(),
        "lerp": lambda x: torch.lerp(x, x.sin(), 0.3),
        "lift_fresh": lambda x: x * torch.tensor(0.5),
        "log": lambda x: x.exp().log() + x.exp().log10() + x.exp().log2() + x.exp().log1p(),
        "logical": lambda x: x * (x > -1).logical_and(x < 1).logical_or((x > 0).logical_not()),
        "logit": lambda x: x.sigmoid().logit(),
        "masked_fill": lambda x: x.masked_fill(x > 0, 0.5),
        "maximum": lambda x: torch.maximum(x, x.sin()) + torch.minimum(x, x.cos()),
        "mul": lambda x: x * x.sin(),
        "pow": lambda x: x**3,
        "remainder": lambda x: x % 0.3,
        "rsqrt": lambda x: x.exp().rsqrt() + x.exp().sqrt(),
        "rsub": lambda x: torch.rsub(x, 1) - x,
        "threshold": lambda x: F.threshold(x, 0.1, 0.2),
        "to_copy": lambda x: x.half().to(x.dtype),
        "where": lambda x: torch.where(x > 0, x, x.sin()),
        "xlogy": lambda x: torch.xlogy(x, x.exp()),
    }),
})  # fmt: skip

STATISTICS = Family(nn.Linear, noise(2, 5, 4), {
    **each({
        "softmax": lambda x: x.softmax(-1),
        "log_softmax": lambda x: x.log_softmax(-1),
        "safe_softmax": lambda x: aten._safe_softmax(x, -1),
    }, inexact=True),
    **each({
        "softmax of places": lambda x: x.softmax(1),
        "log_softmax of places": lambda x: x.log_softmax(1),
        "safe_softmax of places": lambda x: aten._safe_softmax(x, 1),
        "cumsum of places": lambda x: x.cumsum(1),
        "cumprod of places": lambda x: x.cumprod(1),
        "logcumsumexp of places": lambda x: x.logcumsumexp(1),
        "sum of places": lambda x: x.sum(1),
        "mean of places": lambda x: x.mean(1),
        "amax of places": lambda x: x.amax((0, 1)) + x.amin((0, 1)),
        "var of places": lambda x: x.var(1) + x.std(1) + torch.var_mean(x, 1)[0],
        "norm of places": lambda x: x.norm(dim=1, keepdim=True),
        "logsumexp of places": lambda x: x.logsumexp((0, 1)),
        "max of places": lambda x: x.max(1).values - x.min(1).values,
        "argmax of places": lambda x: x.gather(1, x.argmax(1, keepdim=True)) + x.gather(1, x.argmin(1, keepdim=True)),
        "prod of places": lambda x: x.prod(1),
        "any of places": lambda x: x * (x > 0).any(1, keepdim=True) + x * (x > 0).all(1, keepdim=True),
        "median of places": lambda x: x.median(1).values,
    }),
    **each({
        "sum": lambda x: x.sum(-1, keepdim=True),
    }, read=1),
    **each({
        "mean": lambda x: x.mean(-1, keepdim=True),
        "amax": lambda x: x.amax(-1, keepdim=True),
        "amin": lambda x: x.amin(-1, keepdim=True),
        "var": lambda x: x.var(-1, keepdim=True),
        "std": lambda x: x.std(-1, keepdim=True),
        "var_mean": lambda x: torch.var_mean(x, -1, keepdim=True)[1],
        "norm": lambda x: x.norm(dim=-1, keepdim=True),
        "logsumexp": lambda x: x.logsumexp(-1, keepdim=True),
        "max": lambda x: x.max(-1, keepdim=True).values,
        "min": lambda x: x.min(-1, keepdim=True).values,
        "prod": lambda x: x.prod(-1, keepdim=True),
        "all": lambda x: (x > -9).all(-1, keepdim=True).to(x.dtype),
        "any": lambda x: (x > 0).any(-1, keepdim=True).to(x.dtype),
        "median": lambda x: x.median(-1, keepdim=True).values,
        "max of all": lambda x: x.max().view(1, 1),
    }, read=1, inexact=True),
    **each({
        "average of neighbours": lambda x: F.avg_pool1d(x, 3, 1, 1),
        "largest of neighbours": lambda x: F.max_pool1d(x, 3, 1, 1),
        "average in a plane": lambda x: F.avg_pool2d(x.unsqueeze(1), 3, 1, 1).squeeze(1),
        "average in space": lambda x: F.avg_pool3d(x[:, None, None], (1, 3, 3), 1, (0, 1, 1))[:, 0, 0],
        "cumsum": lambda x: x.cumsum(-1),
        "cumprod": lambda x: x.cumprod(-1),
        "logcumsumexp": lambda x: x.logcumsumexp(-1),
    }, sizes=()),
    **each({
        "argmax": lambda x: x.argmax(-1, keepdim=True).to(x.dtype),
        "argmin": lambda x: x.argmin(-1, keepdim=True).to(x.dtype),
        "place of max": lambda x: sum(x.max(-1, keepdim=True)),
    }, read=1, sizes=()),
    "rms_norm": Lane(lambda: nn.RMSNorm(8), inexact=True),
    "layer_norm": Lane(lambda: nn.LayerNorm(8), inexact=True),
})  # fmt: skip

CONSTANTS = Family(nn.Linear, noise(2, 6, 4), {
    **each({
        "zeros": lambda x: x + torch.zeros(x.shape, dtype=x.dtype) + torch.ones(x.shape, dtype=x.dtype),
        "full": lambda x: x * torch.full((x.shape[-1],), 0.5, dtype=x.dtype),
        "empty": lambda x: torch.empty(x.shape, dtype=x.dtype).copy_(x),
        "new": lambda x: x * x.new_ones(x.shape) + x.new_zeros(x.shape[-1:]) + x.new_full(x.shape[-1:], 0.5),
        "new_empty": lambda x: x.new_empty(x.shape).copy_(x),
        "like": lambda x: x * torch.ones_like(x) + torch.zeros_like(x) + torch.full_like(x, 0.5),
        "empty_like": lambda x: torch.empty_like(x).copy_(x),
    }),
    "cat with zeros": Lane(lambda: lambda x: torch.cat([x, x.new_zeros(2, 6, 4)], -1), 12, (8, 4)),
})  # fmt: skip

DRAWS = Family(nn.Linear, noise(2, 6, 4), {
    **each({
        "rand": lambda x: x * torch.rand(x.shape, dtype=x.dtype),
        "randn": lambda x: x * torch.randn(x.shape, dtype=x.dtype),
        "rand_like": lambda x: x * torch.rand_like(x),
        "randn_like": lambda x: x + x.sigmoid() * torch.randn_like(x),
        "bernoulli": lambda x: x * torch.bernoulli(x.sigmoid()),
        "uniform": lambda x: x * torch.empty_like(x).uniform_(1, 2),
        "normal": lambda x: x * torch.empty_like(x).normal_(),
        "exponential": lambda x: (x - torch.empty_like(x).exponential_().log()).softmax(1),
        "dropout": lambda x: F.dropout(x, 0.5, training=True),
        "native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    }),
})  # fmt: skip


class Twice(nn.Module):
    """A layer of two operands, given the same twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


PRODUCTS = Family(nn.Linear, noise(2, 6, 4), {
    **each({
        "mm": lambda x: x[0] @ (x[0].t() @ x[1]),
        "bmm": lambda x: x @ (x.transpose(1, 2) @ x),
        "scores": lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
        "baddbmm": lambda x: torch.baddbmm(x, x @ x.transpose(1, 2), x),
        "addmm": lambda x: torch.addmm(x[0], x[0] @ x[1].t(), x[1]),
        "mv": lambda x: torch.mv(x[0].t(), x[0].sum(1)),
        "addmv": lambda x: torch.addmv(x[0, 0], x[0].t(), x[0].sum(1)),
        "einsum of three": lambda x: torch.einsum("nic,njc,njd->nid", x, x, x),
        "einsum outer": lambda x: torch.einsum("nic,njc->nijc", x, x),
    }),
    **each({
        "dot": lambda x: torch.dot(x[0, 0], x[1, 1]).view(1, 1),
        "vdot": lambda x: torch.vdot(x[0, 0], x[1, 1]).view(1, 1),
        "inner": lambda x: (x @ x[0, 0]).unsqueeze(-1),
        "einsum inner": lambda x: torch.einsum("nic,nic->ni", x, x).unsqueeze(-1),
        "addmv of units": lambda x: torch.addmv(x.new_ones(6), x[0], x[1, 0]).unsqueeze(-1),
        "mv of units": lambda x: torch.mv(x[0], x[1, 0]).unsqueeze(-1),
    }, read=1),
    "baddbmm of units": Lane(lambda: lambda x: torch.baddbmm(x.new_ones(6), x, x.transpose(1, 2)), 6),
    "einsum of heads": Lane(
        lambda: lambda x: torch.einsum("nihc,njhc->nijh", *[x.unflatten(-1, (4, 2))] * 2), 4, (4,)),
    "bilinear": Lane(lambda: Twice(nn.Bilinear(8, 8, 6)), 6, ()),  # no rule
})  # fmt: skip


class Norm(nn.BatchNorm2d):
    """Batch norm by one of the ops that exported programs and other devices call."""

    def __init__(self, name: str) -> None:
        super().__init__(8)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        given = [x, self.weight, self.bias, self.running_mean, self.running_var]
        middle = [] if self.name in ("_native_batch_norm_legit_no_training", *UPDATING) else [False]
        return getattr(aten, self.name)(*given, *middle, 0.1, 1e-5)[0]


UPDATING = ("_batch_norm_with_update", "_batch_norm_no_update")


def inference(op: Op) -> Op:
    """There, ops that torch else takes apart arrive whole."""

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        return op(x)

    return run


WHOLE = Family(conv1, noise(2, 4, 6), {
    **each({name: inference(op) for name, op in {
        "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x, 2),
        "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x, 2),
        "argsort": lambda x: x.gather(2, x.argsort(2)),
        "avg_pool1d": lambda x: F.avg_pool1d(x, 2),
        "contiguous": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        "max_pool1d": lambda x: F.max_pool1d(x, 2, return_indices=True)[0],
        "relu6": F.relu6,
        "reshape": lambda x: x.reshape(2, x.shape[1], 2, 3)[..., 0],
        "rrelu": F.rrelu,
        "selu": F.selu,
        "square": lambda x: x.square(),
        "true_divide": lambda x: torch.true_divide(x, x.exp()),
    }.items()}),
    "chunk": Lane(lambda: inference(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)), sizes=(4, 4)),
    "argsort of units": Lane(lambda: inference(lambda x: x.argsort(1) * x.exp()), sizes=()),
    "unsafe_chunk": Lane(lambda: inference(lambda x: sum(torch.unsafe_chunk(x, 2, 1))), 4, (4,)),
    "channel_shuffle": Lane(lambda: inference(lambda x: torch.native_channel_shuffle(x, 2)), sizes=(4,)),
})  # fmt: skip

EXPORTED = Family(conv2, noise(2, 4, 8, 8), {
    name: Lane(lambda name=name: Norm(name)) for name in (
        "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", *UPDATING)
})  # fmt: skip

ELSEWHERE = Family(conv2, noise(2, 4, 8, 8), {
    **{name: Lane(lambda name=name: Norm(name)) for name in ("cudnn_batch_norm", "miopen_batch_norm")},
})  # fmt: skip

VALUES = MappingProxyType({
    "unary": UNARY, "activations": ACTIVATIONS, "elementwise": ELEMENTWISE, "statistics": STATISTICS,
    "constants": CONSTANTS, "draws": DRAWS, "products": PRODUCTS, "whole": WHOLE, "exported": EXPORTED,
})  # fmt: skip
