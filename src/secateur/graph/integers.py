"""Where Python keeps the counts of units: in a module's attribute, which can be bound, or only in a call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from secateur.graph.axes import PythonInt
from secateur.graph.capture import Trace
from secateur.graph.replay import REPLAYABLE
from secateur.graph.slots import Int, Size
from secateur.graph.units import Ids, Solution
from secateur.graph.watch import Attribute


def find_ints(
    ints: Sequence[PythonInt],
    solution: Solution,
    units: Ids,
    model: nn.Module,
    unbound: Collection[Attribute],
) -> tuple[Int, ...]:
    """The module attribute that holds each integer, where there is exactly one."""
    found: dict[tuple[str, str, int | None], Int] = {}
    for item in ints:
        numbers = _by_row(units[solution.root[item.ids]])
        if not (numbers >= 0).any():
            continue
        places = [(item.module, item)]
        if "in_channels" in item.names and item.module:  # a module may check its input before it calls the convolution
            places.append((item.module.rpartition(".")[0], replace(item, names=("num_channels",))))
        for module, wanted in places:
            attribute = _attribute(model.get_submodule(module), wanted)
            if attribute is not None and (module, attribute[0]) not in unbound:
                key = (module, attribute[0], attribute[1])
                found.setdefault(key, Int(*key, item.value, tuple(numbers.tolist())))
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
    found = {(item.module, _searched(model.get_submodule(item.module), item)) for item in ints}
    named = {(item.module, name) for item in ints for name in item.names}
    return frozenset((module, name) for module, name in found if name is not None and (module, name) not in named)


def _attribute(module: nn.Module, item: PythonInt) -> tuple[str, int | None] | None:
    """(name, position) of the attribute with this value: by name, or the only one that has it."""
    held = _held(module, item)
    named = next((name for name in item.names if name in held), None)
    found = named or _searched(module, item)
    return None if found is None else (found, item.position)


def _searched(module: nn.Module, item: PythonInt) -> str | None:
    """The only attribute with this value, where none has it by name."""
    held = _held(module, item) if item.search else []
    return held[0] if len(held) == 1 and held[0] not in item.names else None


def _held(module: nn.Module, item: PythonInt) -> list[str]:
    """The attributes with this value."""

    def same(held: object) -> bool:
        if isinstance(item.value, tuple):
            return isinstance(held, tuple | list) and tuple(held) == item.value
        return isinstance(held, int) and not isinstance(held, bool) and held == item.value

    return [name for name, value in vars(module).items() if not name.startswith("_") and same(value)]
