"""Norms over the inputs: they subtract a mean, which is linear, and divide by a deviation, which counts as a constant.

This is the rule of Ali et al. 2022, "XAI for Transformers: Better Explanations through Conservative Propagation",
for layer norm; group norm, instance norm, RMS norm and a batch norm on the batch's own statistics are
treated alike. Then the epsilon rule is applied to what is left, which is linear but for the norm's bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from secateur.graph.capture import Call
from secateur.score.lrp.tape import filled, named_arguments

Named = Mapping[str, Any]
"""The arguments of a call by name, with tensors."""


def layer_norm(named: Named) -> Tensor:
    x: Tensor = named["input"]
    dims = tuple(range(x.ndim - len(named["normalized_shape"]), x.ndim))
    return _scaled(_whitened(x, dims, named["eps"]), named["weight"], named["bias"])


def rms_norm(named: Named) -> Tensor:
    x: Tensor = named["input"]
    eps = named.get("eps")
    dims = tuple(range(x.ndim - len(named["normalized_shape"]), x.ndim))
    small = torch.finfo(x.dtype).eps if eps is None else eps
    deviation = (x.detach().square().mean(dims, keepdim=True) + small).sqrt()
    return _scaled(x / deviation, named["weight"], None)


def group_norm(named: Named) -> Tensor:
    x = named["input"]
    rows = x.reshape(x.shape[0], named["group"], -1)
    return _by_channel(_whitened(rows, (2,), named["eps"]).reshape(x.shape), named)


def batch_norm(named: Named) -> Tensor:
    """By the running statistics, or by those of the batch."""
    x: Tensor = named["input"]
    eps = named.get("eps", named.get("epsilon"))
    if uses_batch(named):
        return _by_channel(_whitened(x, (0, *range(2, x.ndim)), eps), named)
    scale, offset = affine(named)
    return x * _along_channels(scale, x) + _along_channels(offset, x)


def uses_batch(named: Named) -> bool:
    """Whether a batch norm takes its statistics from the batch."""
    return bool(named.get("training", False)) or named.get("running_mean") is None


def affine(named: Named) -> tuple[Tensor, Tensor]:
    """The scale and offset of each channel that a batch norm is in eval mode."""
    eps = named.get("eps", named.get("epsilon"))
    scale = (named["running_var"] + eps).rsqrt()
    if named["weight"] is not None:
        scale = scale * named["weight"].detach()
    offset = -named["running_mean"] * scale
    return scale, offset if named["bias"] is None else offset + named["bias"].detach()


def _whitened(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    deviation = (x.detach().var(dims, unbiased=False, keepdim=True) + eps).sqrt()
    return (x - x.mean(dims, keepdim=True)) / deviation


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _by_channel(x: Tensor, named: Named) -> Tensor:
    weight, bias = (None if named[n] is None else _along_channels(named[n], x) for n in ("weight", "bias"))
    return _scaled(x, weight, bias)


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.ndim - 2))


def _norm(compute: Callable[[Named], Tensor]) -> Callable[[Call], Callable[[Sequence[Tensor]], Sequence[Any]]]:
    """For a call, the function of its operands that stands in for it."""

    def of(call: Call) -> Callable[[Sequence[Tensor]], Sequence[Any]]:
        def function(tensors: Sequence[Tensor]) -> Sequence[Any]:
            arguments = named_arguments(call)
            refs = filled((call.args, dict(call.kwargs)), tensors)
            names = list(arguments)
            return (compute(dict(zip(names, [*refs[0], *refs[1].values()]))),)

        return function

    return of


BATCH_NORMS = frozenset(
    """
    native_batch_norm native_batch_norm_legit native_batch_norm_legit_no_training batch_norm_with_update
    batch_norm_no_update cudnn_batch_norm miopen_batch_norm
    """.split()
)

NORMS: Mapping[str, Callable[[Call], Callable[[Sequence[Tensor]], Sequence[Any]]]] = MappingProxyType(
    dict.fromkeys(BATCH_NORMS, _norm(batch_norm))
    | {
        "native_layer_norm": _norm(layer_norm),
        "native_group_norm": _norm(group_norm),
        "fused_rms_norm": _norm(rms_norm),
    }
)
