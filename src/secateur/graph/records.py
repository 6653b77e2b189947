"""The record of the graph room: `Groups`, all that the later rooms know about a model's structure.

Immutable, printable, and the same after a round trip through JSON.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

Keep = Sequence[Sequence[int]]
"""For each group, the indices of the units that stay, ascending."""


@dataclass(frozen=True)
class TensorInfo:
    """A parameter or buffer of the model."""

    name: str
    shape: tuple[int, ...]
    parameter: bool


@dataclass(frozen=True)
class Slot:
    """Where a group touches one tensor: `index[unit]` are the unit's places along axis `dim`.

    `role` says what the tensor does with the unit: "write" makes it (the output channels of a convolution),
    "read" takes it in (the input channels of the next), "scale" passes it on (batch norm, bias).
    """

    tensor: str
    dim: int
    role: str
    index: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Group:
    """Units that can go one by one, each with all that is coupled to it.

    `inexact` says why a cut changes what the units that stay compute (a norm over them); empty if it does not.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    inexact: str = ""


@dataclass(frozen=True)
class Frozen:
    """`units` of the `size` indices along an axis that may not change, and why."""

    tensor: str
    dim: int
    units: int
    size: int
    reason: str


@dataclass(frozen=True)
class Int:
    """An integer attribute of a module that counts units; `units[i]` is -1 for one that always stays."""

    module: str
    attribute: str
    position: int | None
    original: int | tuple[int, ...]
    units: tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """A number that Python gives to a torch function, and which no attribute holds: it is replayed (`graph.replay`).

    `function` and `ordinal` say which call in the module's forward, `place` which of its numbers. It counts `units`;
    or, with `constant`, it is a factor computed from sizes that must stay what it was.
    """

    module: str
    function: str
    ordinal: int
    place: tuple[str, int]
    units: tuple[int, ...]
    constant: float | None = None


@dataclass(frozen=True)
class Groups:
    """Every channel group of a model, what may not be cut and why, and the integers that follow a cut.

    >>> from torch import nn, zeros
    >>> from secateur.graph.groups import find_groups
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> print(find_groups(net, zeros(1, 4)))
    1 group, 8 units; 56 of 58 parameters (96.6 %) can shrink
      0  8 units  made by 0.weight; read by 2.weight; scaled by 0.bias
    cannot change:
      0.weight axis 1: meets an axis that cannot be cut, such as the model's input or positions \
(aten.addmm.default in 0)
      2.weight axis 0, 2.bias axis 0: reaches the model's output
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    ints: tuple[Int, ...]
    sizes: tuple[Size, ...]
    tensors: tuple[TensorInfo, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The number of the first unit of each group, when all units are counted through; and of all, at the end."""
        sizes = [group.size for group in self.groups]
        return tuple(sum(sizes[:i]) for i in range(len(sizes) + 1))

    @property
    def params(self) -> int:
        """Parameters of the whole model."""
        return sum(math.prod(t.shape) for t in self.tensors if t.parameter)

    @property
    def prunable_params(self) -> int:
        """Parameters in tensors that shrink when some group is cut."""
        touched = {slot.tensor for group in self.groups for slot in group.slots}
        return sum(math.prod(t.shape) for t in self.tensors if t.parameter and t.name in touched)

    def kept(self, keep: Keep) -> dict[str, dict[int, list[int]]]:
        """For each tensor and axis that a plan touches, the indices that stay, ascending."""
        gone: dict[str, dict[int, set[int]]] = {}
        for group, stay in zip(self.groups, keep):
            stays = set(stay)
            for slot in group.slots:
                lost = {i for unit, spots in enumerate(slot.index) if unit not in stays for i in spots}
                if lost:
                    gone.setdefault(slot.tensor, {}).setdefault(slot.dim, set()).update(lost)
        shapes = {t.name: t.shape for t in self.tensors}
        return {
            tensor: {dim: [i for i in range(shapes[tensor][dim]) if i not in lost] for dim, lost in dims.items()}
            for tensor, dims in gone.items()
        }

    def shapes(self, keep: Keep) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor after the cut."""
        kept = self.kept(keep)
        return {
            t.name: tuple(len(kept.get(t.name, {}).get(d, range(n))) for d, n in enumerate(t.shape))
            for t in self.tensors
        }

    def params_left(self, keep: Keep) -> int:
        """Parameters after the cut, counted from the shapes."""
        shapes = self.shapes(keep)
        return sum(math.prod(shapes[t.name]) for t in self.tensors if t.parameter)

    def attributes(self, keep: Keep) -> dict[str, dict[str, int | tuple[int, ...]]]:
        """Module path -> attribute -> its value after the cut, for those that change."""
        stays = self._stays(keep)
        out: dict[str, dict[str, int | tuple[int, ...]]] = {}
        for item in self.ints:
            left = sum(unit in stays for unit in item.units)
            if left == len(item.units):
                continue
            held = out.setdefault(item.module, {})
            if isinstance(item.original, tuple) and item.position is not None:
                whole = list(held.get(item.attribute, item.original))  # type: ignore[arg-type]
                whole[item.position] = left
                held[item.attribute] = tuple(whole)
            else:
                held[item.attribute] = left
        return out

    def replays(self, keep: Keep) -> dict[str, dict[tuple[str, int], dict[tuple[str, int], int | float]]]:
        """Module path -> (function, ordinal) -> which number -> its value after the cut, as `graph.replay` takes it."""
        stays = self._stays(keep)
        out: dict[str, dict[tuple[str, int], dict[tuple[str, int], int | float]]] = {}
        for item in self.sizes:
            left = sum(unit in stays for unit in item.units) if item.constant is None else item.constant
            out.setdefault(item.module, {}).setdefault((item.function, item.ordinal), {})[item.place] = left
        return out

    def _stays(self, keep: Keep) -> set[int]:
        return {self.offsets[g] + unit for g, units in enumerate(keep) for unit in units} | {-1}

    def to_json(self) -> dict[str, Any]:
        """Plain values; index lists are kept as runs `[first, step, count]`."""
        value = asdict(self)
        for group in value["groups"]:
            for slot in group["slots"]:
                width = len(slot["index"][0])
                slot["index"] = {"width": width, "runs": _to_runs([i for spots in slot["index"] for i in spots])}
        for item in (*value["ints"], *value["sizes"]):
            item["units"] = _to_runs(item["units"])
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Groups:
        """The record that `to_json` wrote."""
        groups = tuple(
            Group(g["name"], g["size"], tuple(_slot_from(s) for s in g["slots"]), g["inexact"])
            for g in value["groups"]
        )
        ints = tuple(
            Int(i["module"], i["attribute"], i["position"], _frozen_value(i["original"]), _from_runs(i["units"]))
            for i in value["ints"]
        )
        sizes = tuple(
            Size(s["module"], s["function"], s["ordinal"], tuple(s["place"]), _from_runs(s["units"]), s["constant"])
            for s in value["sizes"]
        )
        tensors = tuple(TensorInfo(t["name"], tuple(t["shape"]), t["parameter"]) for t in value["tensors"])
        return cls(groups, tuple(Frozen(**f) for f in value["frozen"]), ints, sizes, tensors)

    def __str__(self) -> str:
        count, total = len(self.groups), self.params
        share = 100 * self.prunable_params / total if total else 0.0
        lines = [
            f"{count} group{'s' * (count != 1)}, {self.offsets[-1]} units; "
            f"{self.prunable_params:,} of {total:,} parameters ({share:.1f} %) can shrink"
        ]
        width = max((len(g.name) for g in self.groups), default=0)
        for group in self.groups:
            parts = [_who("made", group, "write"), _who("read", group, "read"), _who("scaled", group, "scale")]
            note = f"; inexact: {group.inexact}" if group.inexact else ""
            lines.append(f"  {group.name:<{width}}  {group.size} units  {'; '.join(p for p in parts if p)}{note}")
        if self.frozen:
            lines.append("cannot change:")
        for reason in Counter(f.reason for f in self.frozen):
            axes = [f"{f.tensor} axis {f.dim}" for f in self.frozen if f.reason == reason]
            more = f" and {len(axes) - 4} more" if len(axes) > 4 else ""
            lines.append(f"  {', '.join(axes[:4])}{more}: {reason}")
        return "\n".join(lines)


def _who(verb: str, group: Group, role: str) -> str:
    names = [slot.tensor for slot in group.slots if slot.role == role]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{verb} by {', '.join(names[:3])}{more}" if names else ""


def _slot_from(value: Mapping[str, Any]) -> Slot:
    width = value["index"]["width"]
    flat = _from_runs(value["index"]["runs"])
    index = tuple(flat[i : i + width] for i in range(0, len(flat), width))
    return Slot(value["tensor"], value["dim"], value["role"], index)


def _frozen_value(value: int | list[int]) -> int | tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else value


def _to_runs(values: Sequence[int]) -> list[list[int]]:
    """Arithmetic runs [first, step, count].

    >>> _to_runs([0, 1, 2, 3, 7, 7, 7])
    [[0, 1, 4], [7, 0, 3]]
    """
    runs: list[list[int]] = []
    for value in values:
        if runs and (runs[-1][2] == 1 or value - runs[-1][0] == runs[-1][1] * runs[-1][2]):
            if runs[-1][2] == 1:
                runs[-1][1] = value - runs[-1][0]
            runs[-1][2] += 1
        else:
            runs.append([value, 0, 1])
    return runs


def _from_runs(runs: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(first + step * i for first, step, count in runs for i in range(count))
