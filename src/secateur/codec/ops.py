"""The ops of a program and their arguments, as JSON values and back.

A program names ATen and torchvision ops (`aten.conv2d.default`) and the few Python functions that compute sizes
(`operator.floordiv`). Nothing else is looked up, so a file can call nothing else: no import, no pickle, no code.
"""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from secateur.errors import ModelError, RunError

LIBRARIES = frozenset(("aten", "torchvision"))
FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        f"{home.__name__.removeprefix('_')}.{name}": getattr(home, name)
        for home, names in (
            (operator, "getitem add sub mul truediv floordiv mod neg pow eq ne lt le gt ge and_ or_ not_".split()),
            (math, "ceil floor trunc sqrt".split()),
            (torch, "sym_float sym_int sym_max sym_min sym_not sym_ite sym_sum".split()),
        )
        for name in names
    }
)
"""Functions of numbers, and `getitem` for an op with several results."""

KINDS = (torch.dtype, torch.layout, torch.memory_format)


def op_name(op: Any) -> str:
    """The name that `find_op` finds `op` by.

    Raises:
        ModelError: it is neither an op of torch or torchvision nor a function of numbers.

    >>> op_name(torch.ops.aten.conv2d.default), op_name(operator.floordiv)
    ('aten.conv2d.default', 'operator.floordiv')
    """
    name = next((known for known, function in FUNCTIONS.items() if function is op), str(op))
    if name in FUNCTIONS or _is_plain(op):
        return name
    raise ModelError(
        f"a program holds the ops of torch and torchvision alone, and this model uses {op}; "
        "save the model with its source instead (save)."
    )


def find_op(name: str) -> Callable[..., Any]:
    """The op or function called `name`.

    Raises:
        RunError: there is none here, or it is none that a program may use.

    >>> find_op("aten.relu.default")(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    >>> find_op("os.system")
    Traceback (most recent call last):
    secateur.errors.RunError: the program uses 'os.system', which is no op of torch or torchvision that it may use.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    library, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    op = None
    if library in LIBRARIES:
        if library == "torchvision":
            importlib.import_module(library)  # its ops are known once it is imported
        op = getattr(getattr(getattr(torch.ops, library), packet, None), overload, None)
    if op is None or not _is_plain(op):
        raise RunError(f"the program uses {name!r}, which is no op of torch or torchvision that it may use.")
    found: Callable[..., Any] = op
    return found


def _is_plain(op: Any) -> bool:
    """Whether it is an op of the two libraries that touches tensors and numbers alone; a few read or write files."""
    return (
        isinstance(op, torch._ops.OpOverload)
        and op.namespace in LIBRARIES
        and not any(argument.name == "filename" for argument in op._schema.arguments)
    )


def to_plain(value: Any, number: Callable[[Any], Any]) -> Any:
    """An argument of an op as a JSON value.

    Args:
        value: a number, text, None, dtype, layout, memory format, device, a list of such, or what `number` knows.
        number: gives the plain value of anything else.

    >>> to_plain([1, float("inf"), torch.float32, torch.device("cpu")], repr)
    [1, {'float': 'inf'}, {'torch': 'float32'}, {'device': 'cpu'}]
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, KINDS):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, list | tuple):
        return [to_plain(item, number) for item in value]
    return number(value)


def from_plain(value: Any, values: Sequence[Any]) -> Any:
    """What `to_plain` was given; `{"ref": i}` is `values[i]`.

    >>> from_plain([1, {"float": "inf"}, {"torch": "float32"}, {"ref": 0}], ["x"])
    [1, inf, torch.float32, 'x']
    """
    if isinstance(value, list):
        return [from_plain(item, values) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "ref":
        if held < 0:
            raise IndexError(f"there is no value {held}")
        return values[held]
    if kind == "float":
        return float(held)
    if kind == "complex":
        return complex(*held)
    if kind == "device":
        return torch.device(held)
    found = getattr(torch, held)
    if kind != "torch" or not isinstance(found, KINDS):
        raise ValueError(f"{value!r} is no argument")
    return found
