"""`print(groups)`: what can be cut and what a unit costs; what cannot be cut, why, and what would free it."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from typing import Protocol

from secateur.graph.advice import Advice, advice, taken_apart
from secateur.graph.costs import UnitCost
from secateur.graph.slots import Frozen, Group, TensorInfo

WIDTH = 100
NAMED = 3
"""Axes named for each reason."""


class Told(Protocol):
    """What of `Groups` is told."""

    @property
    def groups(self) -> tuple[Group, ...]: ...
    @property
    def frozen(self) -> tuple[Frozen, ...]: ...
    @property
    def tensors(self) -> tuple[TensorInfo, ...]: ...
    @property
    def params(self) -> int: ...
    @property
    def prunable_params(self) -> int: ...
    @property
    def macs(self) -> int: ...
    @property
    def prunable_macs(self) -> int: ...
    @property
    def unit_costs(self) -> tuple[UnitCost, ...]: ...


def overview(groups: Told) -> str:
    """What `groups` has to tell, the most important first, in lines of at most `WIDTH` characters.

    Groups that are alike but for the numbers in their names are one line, with `*` for what differs.

    >>> from torch import nn, zeros
    >>> from secateur.graph.groups import find_groups
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> print(overview(find_groups(net, zeros(1, 4))))
    1 group, 8 units; with them can shrink
      56 of 58 parameters (96.6 %)
      48 of 48 MACs on the example inputs (100.0 %)
    <BLANKLINE>
           one unit costs
    units  params  MACs  bytes  group + other modules that it is cut from
        8       7     6     28  0 + 2
    <BLANKLINE>
    cannot change:
      meets an axis that cannot be cut, such as the model's input or positions (addmm in 0)
        0.weight axis 1
        nothing frees it: the caller decides the input's width; behind an op named here, free that one.
      reaches the model's output
        2.weight axis 0, 2.bias axis 0
        nothing frees it: the caller reads it.
    """
    sizes = [group.size for group in groups.groups if group.size > 1]
    head = [
        f"{_many(len(sizes), 'group')}, {_many(sum(sizes), 'unit')}{'; with them can shrink' if sizes else ''}",
        f"  {_share(groups.prunable_params, groups.params, 'parameters')}",
        f"  {_share(groups.prunable_macs, groups.macs, 'MACs on the example inputs')}",
    ]
    return "\n".join(head + _groups(groups) + _inexact(groups) + _frozen(groups))


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _share(part: int, whole: int, what: str) -> str:
    return f"{part:,} of {whole:,} {what} ({100 * part / whole if whole else 0:.1f} %)"


def _groups(groups: Told) -> list[str]:
    """A row for each kind of group, the most expensive first."""
    kinds: dict[tuple[object, ...], list[Group]] = {}
    costs: dict[str, UnitCost] = {}
    for group, cost in zip(groups.groups, groups.unit_costs):
        if group.size == 1:
            continue
        names = re.sub(r"\d+", "0", " ".join((group.name, *group.modules)))
        key = (group.size, cost, bool(group.inexact), names)
        kinds.setdefault(key, []).append(group)
        costs[group.name] = cost

    def weight(kind: Sequence[Group]) -> float:
        units, cost = len(kind) * kind[0].size, costs[kind[0].name]
        return units * (cost.params / max(groups.params, 1) + cost.macs / max(groups.macs, 1))

    rows = sorted(kinds.values(), key=weight, reverse=True)
    cells = [("units", "params", "MACs", "bytes")]
    for kind in rows:
        times = f"{len(kind)} x " if len(kind) > 1 else ""
        cost = costs[kind[0].name]
        cells.append((f"{times}{kind[0].size:,}", f"{cost.params:,}", f"{cost.macs:,}", f"{cost.bytes:,}"))
    widths = [max(map(len, column)) for column in zip(*cells)]
    numbers = ["  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in cells]
    lines = ["", " " * widths[0] + "  one unit costs", numbers[0] + "  group + other modules that it is cut from"]
    lines += [f"{row}  {_modules(kind, WIDTH - len(row) - 2)}" for kind, row in zip(rows, numbers[1:])]
    return lines if rows else []


def _modules(kind: Sequence[Group], width: int) -> str:
    """The name of these groups, and as many of the other modules that they touch as fit."""
    name = _pattern([group.name for group in kind])
    modules = [_pattern(names) or "the model itself" for names in zip(*(group.modules for group in kind))]
    modules = [module for module in modules if module != name]
    name += " *" if kind[0].inexact else ""
    texts = [name]
    for shown in range(len(modules), 0, -1):
        texts.append(f"{name} + {_few(modules, shown)}")
    texts += [f"{name} + {len(modules)} more"] if modules else []
    return next((text for text in texts[1:] if len(text) <= width), texts[-1])


def _pattern(names: Sequence[str]) -> str:
    """Names that differ in numbers only as one.

    >>> _pattern(["layer1.0.conv1", "layer1.1.conv1"])
    'layer1.*.conv1'
    """
    parts = zip(*(re.split(r"(\d+)", name) for name in names))
    return "".join(part[0] if len(set(part)) == 1 else "*" for part in parts)


def _inexact(groups: Told) -> list[str]:
    reasons = [taken_apart(group.inexact) for group in groups.groups if group.inexact]
    whys = dict.fromkeys(f"{r.text} ({r.op})" if r.op else r.text for r in reasons)
    return [line for why in whys for line in _wrapped(f"* {why}, so after a cut what stays computes something else", 0)]


def _frozen(groups: Told) -> list[str]:
    """The axes that cannot be cut, by reason: first what can be freed, and of that the largest tensors."""
    sizes = {info.name: math.prod(info.shape) for info in groups.tensors}
    kinds: dict[tuple[str, Advice], list[Frozen]] = {}
    for item in groups.frozen:
        kinds.setdefault((taken_apart(item.reason).text, advice(item.reason)), []).append(item)

    def order(kind: tuple[tuple[str, Advice], Sequence[Frozen]]) -> tuple[bool, float]:
        (_, found), items = kind
        return not found.possible, -sum(sizes[item.tensor] * item.units / item.size for item in items)

    lines = [line for (_, found), items in sorted(kinds.items(), key=order) for line in _kind(found, items)]
    single = [group.name for group in groups.groups if group.size == 1]
    if single:
        lines += _entry("groups of one unit", _few(single, NAMED), Advice("one unit of each group stays.", False))
    return ["", "cannot change:", *lines] if lines else []


def _kind(found: Advice, items: Sequence[Frozen]) -> list[str]:
    """A reason, the axes that are frozen for it, and what would free them."""
    reasons = [taken_apart(item.reason) for item in items]
    places = list(dict.fromkeys(f"{reason.op} in {reason.module}" for reason in reasons if reason.op))
    where = f" ({_few(places, 1)})" if places else ""
    axes = [f"{f.tensor} axis {f.dim}" + (f" ({f.units} of {f.size})" if f.units < f.size else "") for f in items]
    error = next((f" The error: {reason.error}" for reason in reasons if reason.error), "")
    return _entry(reasons[0].text + where, _few(axes, NAMED), Advice(found.text + error, found.possible))


def _entry(reason: str, what: str, found: Advice) -> list[str]:
    answer = "to free it: " if found.possible else "nothing frees it: "
    return _wrapped(reason, 2) + _wrapped(what, 4) + _wrapped(answer + found.text, 4)


def _few(names: Sequence[str], shown: int) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _wrapped(text: str, by: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * by, subsequent_indent=" " * (by + 2), break_on_hyphens=False)
