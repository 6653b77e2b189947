"""Where Python keeps the counts of units: in a module's attribute, which can be bound, or only in a call."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from secateur.graph.axes import PythonInt
from secateur.graph.capture import Trace
from secateur.graph.replay import REPLAYABLE
from secateur.graph.slots import Int, Size
from secateur.graph.units import Ids, Solution
from secateur.graph.watch import Attribute

Modules = Mapping[str, nn.Module]
"""All of a model's, by their paths."""


def find_ints(
    ints: Sequence[PythonInt],
    solution: Solution,
    units: Ids,
    model: nn.Module,
    unbound: Collection[Attribute],
) -> tuple[Int, ...]:
    """The module attribute that holds each integer, where there is exactly one."""
    found: dict[tuple[str, str, int | None], Int] = {}
    modules, known = dict(model.named_modules()), dict[bytes, tuple[int, ...]]()
    for item in ints:
        numbers = _by_row(units[solution.root[item.ids]])
        if not (numbers >= 0).any():
            continue
        places = [(item.module, item)]
        if "in_channels" in item.names and item.module:  # a module may check its input before it calls the convolution
            places.append((item.module.rpartition(".")[0], replace(item, names=("num_channels",))))
        for module, wanted in places:
            attribute = _attribute(modules, module, wanted)
            if attribute is not None and attribute not in unbound:
                key = (*attribute, wanted.position)
                if key not in found:
                    counted = known.setdefault(numbers.tobytes(), tuple(numbers.tolist()))
                    found[key] = Int(*key, item.value, counted)
    return tuple(found.values())


def _by_row(numbers: Ids) -> Ids:
    """One unit for each index of an axis: that of its row, or -1 (always there) where the row has several."""
    rows = numbers.reshape(len(numbers), int(np.prod(numbers.shape[1:])))
    return np.where((rows == rows[:, :1]).all(axis=1), rows[:, 0], -1)


def find_sizes(
    trace: Trace, ints: Sequence[PythonInt], solution: Solution, units: Ids
) -> dict[int, tuple[Size, ...]]:
    """For each torch function that Python called, the numbers that it can be given anew.

    Calls of one site get the numbers of the first: where they disagree, the probe will see it.
    """
    found: dict[tuple[str, str, int, tuple[str, int]], Size] = {}
    out: dict[int, list[Size]] = {}
    for item in ints:
        if item.place is None or item.python is None or trace.python[item.python].function not in REPLAYABLE:
            continue
        key = (*trace.python[item.python].site, item.place)
        if key not in found:
            found[key] = Size(*key, tuple(_by_row(units[solution.root[item.ids]]).tolist()))
        out.setdefault(item.python, []).append(found[key])
    for index, call in enumerate(trace.python):
        factors = [Size(*call.site, place, (), value) for place, value in call.factors]
        if factors:
            out.setdefault(index, []).extend(factors)
    return {index: tuple(sizes) for index, sizes in out.items()}


def guesses(ints: Sequence[PythonInt], model: nn.Module) -> frozenset[Attribute]:
    """The attributes that were found by their value alone, and never by their name."""
    modules = dict(model.named_modules())
    found = {_searched(modules, item.module, item) for item in ints if item.search}
    named = {(item.module, name) for item in ints for name in item.names}
    return frozenset(attribute for attribute in found if attribute is not None and attribute not in named)


def _attribute(modules: Modules, path: str, item: PythonInt) -> Attribute | None:
    """The attribute with this value: by name, or the only one that has it."""
    held = vars(modules[path])
    named = next((name for name in item.names if name in held and _same(held[name], item)), None)
    return (path, named) if named else _searched(modules, path, item)


def _searched(modules: Modules, path: str, item: PythonInt) -> Attribute | None:
    """The only attribute with this value, where none has it by name: the module's own, or else one of a part of it."""
    if not item.search:
        return None
    module = modules[path]
    held = [(path, name) for name in _held(module, item)]
    if not held:
        prefix = f"{path}." if path else ""
        held = [(prefix + name, held) for name, part in module.named_children() for held in _held(part, item)]
    return held[0] if len(held) == 1 and held[0][1] not in item.names else None


def _held(module: nn.Module, item: PythonInt) -> list[str]:
    """The attributes with this value."""
    return [name for name, value in vars(module).items() if not name.startswith("_") and _same(value, item)]


def _same(held: object, item: PythonInt) -> bool:
    if isinstance(item.value, tuple):
        return isinstance(held, tuple | list) and tuple(held) == item.value
    return isinstance(held, int) and not isinstance(held, bool) and held == item.value
