"""The last layer of a classifier: find it, and give it another number of classes."""

from __future__ import annotations

from torch import nn

from secateur.errors import ModelError


def adapt_head(model: nn.Module, width: int, classes: int) -> str:
    """Replaces, in `model`, the head with `width` outputs by a fresh one with `classes`; says so in words.

    The head is the last linear layer or 1 x 1 convolution with `width` outputs. The new one has its type, inputs,
    bias, device and dtype, and the type's usual initialisation.

    Raises:
        ModelError: no layer has `width` outputs.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1000))
    >>> adapt_head(model, width=1000, classes=10)
    'head 2: 1000 -> 10 outputs, freshly initialised'
    >>> model[2]
    Linear(in_features=8, out_features=10, bias=True)
    """
    found = [name for name, module in model.named_modules() if name and _outputs(module) == width]
    if not found:
        raise ModelError(
            f"no linear layer or 1 x 1 convolution of {type(model).__name__} has {width} outputs, so its head cannot "
            f"be adapted to {classes} classes; give a factory (file.py:make) that builds it with {classes}."
        )
    name = found[-1]
    model.set_submodule(name, _like(model.get_submodule(name), classes))
    return f"head {name}: {width} -> {classes} outputs, freshly initialised"


def _outputs(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
        return module.out_channels
    return None


def _like(old: nn.Module, outputs: int) -> nn.Module:
    assert isinstance(old, nn.Linear | nn.Conv2d)
    bias, device, dtype = old.bias is not None, old.weight.device, old.weight.dtype
    new: nn.Linear | nn.Conv2d
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, outputs, bias, device=device, dtype=dtype)
    else:
        stride = (old.stride[0], old.stride[1])
        new = nn.Conv2d(old.in_channels, outputs, 1, stride, bias=bias, device=device, dtype=dtype)
    return new.train(old.training)
