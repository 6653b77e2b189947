"""Scores + a strategy -> `Plan`: which units stay. Immutable, hashed, a JSON value."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from secateur.errors import PlanError, UnknownName
from secateur.graph.records import Group, Groups
from secateur.score.scoring import Scores

Strategy = Callable[[Groups], Sequence[float]]
"""For each group, the share of its units to cut, in [0, 1]; `allocate` always leaves `least` of them."""


@dataclass(frozen=True)
class Plan:
    """`keep[g]` are the units of group g that stay, ascending; at least one of each.

    Raises:
        PlanError: an empty group, a unit that does not exist, or the wrong number of groups.
    """

    groups: Groups
    keep: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.keep) != len(self.groups.groups):
            raise PlanError(f"the plan has {len(self.keep)} groups and the model {len(self.groups.groups)}.")
        for group, units in zip(self.groups.groups, self.keep):
            if not units:
                raise PlanError(f"the plan would empty group {group.name!r}; at least one of its units must stay.")
            if list(units) != sorted(set(units)) or units[0] < 0 or units[-1] >= group.size:
                raise PlanError(
                    f"the units kept of group {group.name!r} must be ascending numbers from 0 to {group.size - 1}."
                )

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the plan's JSON: equal plans for equal models on equal inputs have equal hashes."""
        text = json.dumps(self._value(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def params_left(self) -> int:
        """Parameters of the cut model, counted."""
        return self.groups.params_left(self.keep)

    @property
    def macs_left(self) -> int:
        """MACs of the cut model for the batch of the example inputs (see `Groups.macs_left`)."""
        return self.groups.macs_left(self.keep)

    def attributes(self) -> dict[str, dict[str, int | tuple[int, ...]]]:
        """Module path -> attribute -> value after the cut, for the integers that change."""
        return self.groups.attributes(self.keep)

    def replays(self) -> dict[str, dict[tuple[str, int], dict[tuple[str, int], int | float]]]:
        """Module path -> the numbers that its calls are given after the cut (see `graph.replay`)."""
        return self.groups.replays(self.keep)

    def channels(self) -> tuple[tuple[str, int, int], ...]:
        """(layer, units it makes before, after) for each tensor that makes units, in the model's order."""
        kept = self.groups.kept(self.keep)
        made = {(s.tensor, s.dim) for g in self.groups.groups for s in g.slots if s.role == "write"}
        rows = []
        for info in self.groups.tensors:
            for dim, size in enumerate(info.shape):
                if (info.name, dim) in made:
                    left = len(kept.get(info.name, {}).get(dim, range(size)))
                    rows.append((info.name.removesuffix(".weight"), size, left))
        return tuple(rows)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the hash that `from_json` checks."""
        return {**self._value(), "hash": self.hash}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote; PlanError if it was changed since."""
        plan = cls(Groups.from_json(value["groups"]), tuple(tuple(units) for units in value["keep"]))
        if plan.hash != value.get("hash"):
            raise PlanError("the plan's hash does not fit its content: it was changed after it was made.")
        return plan

    def _value(self) -> dict[str, Any]:
        return {"version": 1, "groups": self.groups.to_json(), "keep": [list(units) for units in self.keep]}


def allocate(
    scores: Scores, strategy: Strategy, *, least: int = 1, multiple: int = 1, keep: Sequence[str] = ()
) -> Plan:
    """In each group, cut the share that `strategy` says, lowest scores first (of equal ones, the later first).

    Args:
        scores: from `score`.
        strategy: `Uniform`, `SparsityGuided`, or any function of the groups that gives a share for each.
        least: units that stay at least, in every group.
        multiple: round the units that stay up to a multiple of this, for hardware that likes it.
        keep: groups not to cut: patterns that a group's name, or a tensor it is made by, matches.

    Raises:
        PlanError: a share outside [0, 1]. UnknownName: a pattern that matches nothing.
    """
    groups = scores.groups.groups
    shares = list(strategy(scores.groups))
    kept = _kept_whole(groups, keep)
    chosen = []
    for group, values, share in zip(groups, scores.values, shares, strict=True):
        if not 0 <= share <= 1:
            raise PlanError(f"the share to cut of group {group.name!r} is {share}; it must be in [0, 1].")
        stay = group.size if group.name in kept else group.size - int(group.size * share)
        stay = min(group.size, max(-(-stay // multiple) * multiple, least, 1))
        ranked = values.argsort(descending=True, stable=True)[:stay]
        chosen.append(tuple(sorted(ranked.tolist())))
    return Plan(scores.groups, tuple(chosen))


def _kept_whole(groups: Sequence[Group], patterns: Sequence[str]) -> set[str]:
    names = {group.name: {group.name, *(s.tensor for s in group.slots if s.role == "write")} for group in groups}
    kept = set()
    for pattern in patterns:
        found = {name for name, all_names in names.items() if any(_matches(n, pattern) for n in all_names)}
        if not found:
            raise UnknownName("layer to keep", pattern, names)
        kept |= found
    return kept


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern)
