"""A copy of a model with other tensors and other integers: how every cut is carried out.

`copy.deepcopy` asks its memo before it copies anything; given the new tensors there, it puts them wherever the old
ones stood (tied weights stay tied, hooks and parametrizations come along) and never copies the old ones' memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from secateur.graph.attention import see_heads
from secateur.graph.replay import Change, install
from secateur.graph.twin import as_kind, duplicate, tensors_of

Attributes = Mapping[str, Mapping[str, int | tuple[int, ...]]]
"""Module path -> attribute -> value."""

Kept = Mapping[str, Mapping[int, list[int]]]
"""Parameter or buffer name -> axis -> the indices that stay."""

Shapes = Mapping[str, tuple[int, ...]]
"""Parameter or buffer name -> shape."""

LAYOUTS = MappingProxyType({4: torch.channels_last, 5: torch.channels_last_3d})
"""Number of axes -> the memory format that has the channels last."""


def rebuild(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    attributes: Attributes = MappingProxyType({}),
    replays: Mapping[str, Change] = MappingProxyType({}),
) -> nn.Module:
    """A deep copy of `model` in which the named tensors and integers have been replaced.

    Args:
        model: left untouched.
        tensors: parameter or buffer name -> what stands in its place.
        attributes: module path -> attribute -> value.
        replays: module path -> sizes to give its calls.
    """
    named = {name: old for name, old in tensors_of(model).items() if name in tensors}
    twin = duplicate(model, {id(old): as_kind(tensors[name], old) for name, old in named.items()})
    see_heads(twin, (name for name, old in named.items() if tensors[name].shape != old.shape))
    set_attributes(twin, attributes)
    install(twin, replays)
    return twin


def share(model: nn.Module, tensors: Mapping[str, Tensor] = MappingProxyType({})) -> nn.Module:
    """A copy to run or to change: its parameters are the model's own memory, but for `tensors`; its buffers are copies.

    Args:
        tensors: parameter or buffer name -> what stands in its place.
    """
    return rebuild(model, {**dict(model.named_parameters()), **tensors})


def narrow(model: nn.Module, kept: Kept) -> dict[str, Tensor]:
    """The tensors that a cut changes, each with only the indices that stay."""
    named = tensors_of(model)
    made: dict[tuple[int, torch.device], Tensor] = {}

    def places(indices: list[int], device: torch.device) -> Tensor:
        """The same list, often of many tensors, is put on a device once."""
        key = (id(indices), device)
        if key not in made:
            made[key] = torch.tensor(indices, device=device)
        return made[key]

    with torch.no_grad():
        return {name: _take(named[name].detach(), dims, places) for name, dims in kept.items()}


def set_attributes(model: nn.Module, attributes: Attributes) -> None:
    """Give modules their new integers; a list stays a list."""
    for path, values in attributes.items():
        module = model.get_submodule(path)
        for name, value in values.items():
            held = getattr(module, name)
            setattr(module, name, list(value) if isinstance(held, list) and isinstance(value, tuple) else value)


def attributes_to_json(attributes: Attributes) -> dict[str, dict[str, int | list[int]]]:
    """Plain values."""
    return {
        module: {name: list(value) if isinstance(value, tuple) else value for name, value in held.items()}
        for module, held in attributes.items()
    }


def attributes_from_json(value: Mapping[str, Mapping[str, int | list[int]]]) -> Attributes:
    """What `attributes_to_json` gave.

    >>> attributes = {"conv": {"out_channels": 9}, "pool": {"output_size": (1, 1)}}
    >>> attributes_from_json(attributes_to_json(attributes)) == attributes
    True
    """
    return {
        module: {name: tuple(item) if isinstance(item, list) else item for name, item in held.items()}
        for module, held in value.items()
    }


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter and buffer, tied ones once."""
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}


def layout_of(tensor: Tensor) -> torch.memory_format | None:
    """The format with the channels last in which a tensor lies, if it does."""
    layout = LAYOUTS.get(tensor.ndim)
    if layout is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=layout):
        return None
    return layout


def _take(
    tensor: Tensor, dims: Mapping[int, list[int]], places: Callable[[list[int], torch.device], Tensor]
) -> Tensor:
    layout = layout_of(tensor)
    for dim, indices in dims.items():
        tensor = select(tensor, dim, places(indices, tensor.device))
    return tensor if layout is None else tensor.contiguous(memory_format=layout)


@functools.singledispatch
def select(tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    """What of a tensor a cut keeps; a kind of tensor that needs no memory for it says how."""
    return tensor.index_select(dim, indices)
