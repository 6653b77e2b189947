"""Batch norm folded into the layer before it, for export: in eval mode it is a scale and an offset for each channel.

(w * x + b - mean) * s + beta, with s = gamma / sqrt(variance + eps), is the layer with weight s w and bias
(b - mean) s + beta. What follows what is read off the trace, by values: the names of modules do not matter. Where the
norm stood there is an `nn.Identity`; in train mode the model is another one then, without batch statistics.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.graph.capture import Call, Ref, op_name
from secateur.surgery.wiring import BATCH_NORMS, Wiring, trains

NORMS = frozenset((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm))
LAYERS = frozenset(
    (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )
)


@dataclass(frozen=True)
class FoldedNorm:
    """Batch norm `norm` goes into `layer`, which gets a bias if it has none (`adds_bias`)."""

    norm: str
    layer: str
    adds_bias: bool


def find_norms(wiring: Wiring, model: nn.Module) -> tuple[tuple[FoldedNorm, ...], tuple[tuple[str, str], ...]]:
    """The batch norms that can be folded, and (module, why not) for the others."""
    out: list[FoldedNorm] = []
    left: list[tuple[str, str]] = []
    made = {ref.id: call for call in wiring.trace.calls for ref in call.outputs[:1] if ref is not None}
    for call in wiring.trace.calls:
        if op_name(call) in BATCH_NORMS:
            found = _foldable(wiring, model, call, made.get(call.args[0].id))
            if isinstance(found, str):
                left.append((call.module, found))
            else:
                out.append(found)
    return tuple(out), tuple(left)


def fold_norms(model: nn.Module, found: tuple[FoldedNorm, ...]) -> None:
    """Fold in place: `model` and its tensors are ours."""
    norms = [model.get_submodule(pair.norm) for pair in found]
    drop_norms(model, (pair.norm for pair in found), (f"{pair.layer}.bias" for pair in found if pair.adds_bias))
    for pair, norm in zip(found, norms):
        layer = model.get_submodule(pair.layer)
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        assert isinstance(layer.weight, Tensor)
        assert isinstance(layer.bias, Tensor)
        scale, offset = _affine(norm)
        with torch.no_grad():
            weight = layer.weight * _spread(scale, layer)
            bias = layer.bias * scale + offset
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)


def drop_norms(model: nn.Module, norms: Iterable[str], biases: Iterable[str]) -> None:
    """What folding does to the modules, in place: `nn.Identity` in place of norms, and new biases, of zeros.

    Args:
        norms: paths of modules; each goes wherever it stands.
        biases: names of parameters of linear layers and convolutions that have none.

    Raises:
        AttributeError: the model has no such module, or none that can have a bias.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    >>> drop_norms(net, ["1"], ["0.bias"])
    >>> net[1], net[0].bias.shape
    (Identity(), torch.Size([4]))
    """
    for name in norms:
        norm = model.get_submodule(name)
        for path in [path for path, module in model.named_modules(remove_duplicate=False) if module is norm]:
            model.set_submodule(path, nn.Identity())
    for name in biases:
        layer = model.get_submodule(name.rpartition(".")[0])
        width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        assert isinstance(width, int)
        assert isinstance(layer.weight, Tensor)
        layer.bias = nn.Parameter(layer.weight.new_zeros(width), requires_grad=layer.weight.requires_grad)


def _affine(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """The scale and the offset that a batch norm is in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach()
    offset = -norm.running_mean * scale
    return scale, offset + norm.bias.detach() if norm.affine else offset


def _spread(scale: Tensor, layer: nn.Module) -> Tensor:
    """One factor for each output channel, as the layer's weight has them."""
    assert isinstance(layer.weight, Tensor)
    rank = layer.weight.ndim
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return scale.reshape(-1, *([1] * (rank - 1)))
    inputs = layer.in_channels // layer.groups
    rows = scale.reshape(layer.groups, -1).repeat_interleave(inputs, 0)
    return rows.reshape(*rows.shape, *([1] * (rank - 2)))


def _foldable(wiring: Wiring, model: nn.Module, norm: Call, layer: Call | None) -> FoldedNorm | str:
    """The pair, or why the norm stays."""
    own = model.get_submodule(norm.module)
    if type(own) not in NORMS or own._forward_hooks or own._forward_pre_hooks:
        return "does more than a batch norm"
    if trains(norm):
        return "takes its statistics from the batch"
    given = [ref for ref in norm.args[1:5] if isinstance(ref, Ref)]
    if not all(wiring.read_once(ref) for ref in given):
        return "is called more than once"
    if layer is None or op_name(layer) not in ("convolution", "addmm", "mm"):
        return "does not directly follow a linear layer or convolution"
    if wiring.only_reader(norm.args[0]) is not norm:
        return "is not the only one to read the layer before it"
    maker = model.get_submodule(layer.module)
    if type(maker) not in LAYERS or not _holds(wiring, model, layer, maker):
        return "follows a layer whose weight is computed or used elsewhere"
    return FoldedNorm(norm.module, layer.module, maker.bias is None)


def _holds(wiring: Wiring, model: nn.Module, layer: Call, maker: nn.Module) -> bool:
    """Whether the weight and bias of a call are the module's own parameters, read here only."""
    if layer.kwargs:
        return False
    if op_name(layer) == "convolution":
        weight, bias = layer.args[1], layer.args[2]
    else:
        weight, bias = layer.args[-1], layer.args[0] if op_name(layer) == "addmm" else None
    named = dict(model.named_parameters())
    for ref, held in ((weight, maker.weight), (bias, maker.bias)):
        if ref is None and held is None:
            continue
        if not isinstance(ref, Ref) or named.get(wiring.name(ref)) is not held or not wiring.read_once(ref):
            return False
    return True
