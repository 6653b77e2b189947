"""What no plan may do, whatever the strategy: `Limits`."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

from secateur.errors import PlanError, UnknownName
from secateur.graph.slots import Group

Value = TypeVar("Value", int, float)


@dataclass(frozen=True)
class Limits:
    """Which numbers of units may stay; a group never loses all of them.

    Groups are named by patterns, with `*` and `?`, that match the name of the group or of a layer that makes its units.
    `least`, `multiple` and `cap` are for all groups, or by pattern; of several patterns that match, the last holds.

    Args:
        least: units that stay at least; of a group that has fewer, all.
        multiple: the units that stay are a multiple of this, or all: what hardware likes.
        cap: at most this share of a group's units goes.
        keep: groups that are not cut.
        tied: sets of groups, each a pattern or several, that keep the same share of their units, exactly: of one size,
            the same count. Sizes that have no common divisor can only stay whole.

    Raises:
        PlanError: a value that is out of range.

    >>> Limits(least=8, multiple={"*": 8, "head*": 1}, cap=0.75, keep=["stem"], tied=["layer1.*.conv1"]).cap
    0.75
    >>> Limits(cap=2)
    Traceback (most recent call last):
    secateur.errors.PlanError: cap is the share of a group that may go, from 0 to 1, and not 2.
    """

    least: int | Mapping[str, int] = 1
    multiple: int | Mapping[str, int] = 1
    cap: float | Mapping[str, float] = 1.0
    keep: Sequence[str] = ()
    tied: Sequence[str | Sequence[str]] = ()

    def __post_init__(self) -> None:
        for name in ("least", "multiple"):
            for value in _values(getattr(self, name)):
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise PlanError(f"{name} is a number of units, 1 or more, and not {value!r}.")
        for share in _values(self.cap):
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise PlanError(f"cap is the share of a group that may go, from 0 to 1, and not {share!r}.")
        if not _texts(self.keep):
            raise PlanError(f"keep is a list of patterns, and not {self.keep!r}.")
        if isinstance(self.tied, str) or not all(isinstance(item, str) or _texts(item) for item in self.tied):
            raise PlanError(f"tied is a list whose elements are patterns or lists of them, and not {self.tied!r}.")

    @property
    def given(self) -> tuple[str, ...]:
        """The names of the limits that are not as they are by default."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != f.default)

    def kept(self, groups: Sequence[Group]) -> frozenset[int]:
        """The groups that are not cut; UnknownName for a pattern that matches none."""
        return frozenset(g for pattern in self.keep for g in _matching(pattern, groups, "to keep"))

    def ropes(self, groups: Sequence[Group]) -> tuple[tuple[int, ...], ...]:
        """The groups in sets that are tied, most of a single one; sets that overlap are one."""
        ropes = {g: frozenset({g}) for g in range(len(groups))}
        for family in self.tied:
            patterns = (family,) if isinstance(family, str) else family
            found = [g for pattern in patterns for g in _matching(pattern, groups, "to tie")]
            rope = frozenset[int]().union(*(ropes[g] for g in found))
            ropes.update(dict.fromkeys(rope, rope))
        return tuple(tuple(sorted(rope)) for g, rope in ropes.items() if g == min(rope))

    def bounds(self, groups: Sequence[Group]) -> Iterator[tuple[int, int]]:
        """For each group, how many units stay at least, and of what their number is a multiple."""
        least = _by_group(self.least, 1, groups, "in least")
        multiple = _by_group(self.multiple, 1, groups, "in multiple")
        cap = _by_group(self.cap, 1.0, groups, "in cap")
        for group, low, step, share in zip(groups, least, multiple, cap):
            # A hair more, so that 0.29 of 100 is 29.
            yield min(group.size, max(low, group.size - int(group.size * share + 1e-9), 1)), step


def _texts(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(item, str) for item in value)


def _values(value: Value | Mapping[str, Value]) -> list[Value]:
    return list(value.values()) if isinstance(value, Mapping) else [value]


def _by_group(value: Value | Mapping[str, Value], default: Value, groups: Sequence[Group], what: str) -> list[Value]:
    if not isinstance(value, Mapping):
        return [value] * len(groups)
    out = [default] * len(groups)
    for pattern, item in value.items():
        for g in _matching(pattern, groups, what):
            out[g] = item
    return out


def _matching(pattern: str, groups: Sequence[Group], what: str) -> list[int]:
    found = [g for g, group in enumerate(groups) if any(fnmatch.fnmatchcase(n, pattern) for n in _names(group))]
    if not found:
        raise UnknownName(f"layer {what}", pattern, [group.name for group in groups])
    return found


def _names(group: Group) -> set[str]:
    made = {slot.tensor for slot in group.slots if slot.role == "write"}
    return {group.name, *made, *(name.removesuffix(".weight") for name in made)}
