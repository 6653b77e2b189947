"""Inputs and outputs of models: tensors in any nesting, and which of them are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Nested = Any
"""Any nesting of tuple, list, dict and dataclass with tensors at its leaves."""


@dataclass(frozen=True)
class Example:
    """Example inputs, and which part of what the model returns is read; wherever example inputs are taken, so is this.

    What nobody reads need not stay as it is: of a model that returns its hidden states beside the logits, the hidden
    width can only be cut where the logits alone are read.

    >>> from secateur.graph.groups import find_groups
    >>> class Net(nn.Sequential):
    ...     def forward(self, x):
    ...         return {"hidden": (hidden := self[0](x)), "logits": self[1](hidden)}
    >>> net, x = Net(nn.Linear(4, 8), nn.Linear(8, 2)), torch.zeros(1, 4)
    >>> [len(find_groups(net, given).groups) for given in (x, Example(x, lambda out: out["logits"]))]
    [0, 1]
    """

    inputs: Nested
    outputs: Callable[[Any], Any]


def as_arguments(example_inputs: Nested) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as the caller gave them -> (args, kwargs): a dict is keywords, a tuple or list positions."""
    if isinstance(example_inputs, Example):
        return as_arguments(example_inputs.inputs)
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def map_tensors(function: Callable[[Tensor], Any], nested: Nested) -> Nested:
    """The same nesting with `function` applied to each tensor."""
    if isinstance(nested, Tensor):
        return function(nested)
    if nested is None or isinstance(nested, int | float | str):
        return nested
    if type(nested) in (list, tuple):
        return type(nested)([map_tensors(function, item) for item in nested])
    if isinstance(nested, Mapping):
        return {key: map_tensors(function, item) for key, item in nested.items()}
    if dataclasses.is_dataclass(nested) and not isinstance(nested, type):
        entries = {e.name: getattr(nested, e.name) for e in dataclasses.fields(nested) if e.init}
        return dataclasses.replace(nested, **map_tensors(function, entries))
    if isinstance(nested, tuple | list) and not isinstance(nested, torch.Size):
        items = [map_tensors(function, item) for item in nested]
        named = isinstance(nested, tuple) and type(nested) is not tuple and issubclass(type(nested), tuple)
        return type(nested)(*items) if named else type(nested)(items)
    return nested


def tensors_in(nested: Nested, inside: tuple[Any, ...] = ()) -> Iterator[Tensor]:
    """The tensors at the leaves, in order; objects, such as dataclasses, are looked into, but none that is `inside`."""
    if isinstance(nested, Tensor):
        yield nested
        return
    if nested is None or isinstance(nested, int | float | str):
        return
    if isinstance(nested, Mapping):
        items = list(nested.values())
    elif isinstance(nested, tuple | list | set | frozenset):
        items = list(nested)
    elif isinstance(nested, nn.Module | type | ModuleType | FunctionType):
        items = []
    else:
        items = list(getattr(nested, "__dict__", {}).values())
    if not any(nested is outer for outer in inside):
        for item in items:
            yield from tensors_in(item, (*inside, nested))
