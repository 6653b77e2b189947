"""Scores + a strategy + budget and limits -> `Plan`: which units stay. Immutable, hashed, a JSON value."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from secateur.allocate.budget import Budget
from secateur.allocate.limits import Limits
from secateur.allocate.problem import Problem
from secateur.allocate.ranking import GlobalRanking
from secateur.errors import PlanError
from secateur.graph.records import Groups
from secateur.score.scoring import Scores

Strategy = Callable[[Problem], Sequence[int]]
"""For each group, how many of its units stay; `Problem` has what there is to know, and answers ready made."""


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

    @property
    def bytes_left(self) -> int:
        """Bytes of the cut model's tensors, as they are saved."""
        return self.groups.costs.bytes(self.groups.stays(self.keep))

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
    scores: Scores, strategy: Strategy | Budget, *, budget: Budget | None = None, limits: Limits | None = None
) -> Plan:
    """Choose how many units of each group stay, and keep those with the highest scores (of equal ones, the first).

    Args:
        scores: from `score`.
        strategy: `GlobalRanking`, `Knapsack`, `Uniform`, `SparsityGuided`, `SensitivityGuided`, or any function of a
            `Problem` that gives the number of units that stay for each group; limits round it up. A budget in its
            place is met by `GlobalRanking`.
        budget: what may be left, at most. Afterwards no single unit more, or as many as the limits let stay or go at
            once, would fit into it.
        limits: what no plan may do.

    Raises:
        PlanError: no plan within the limits meets the budget (says how near one can come, and what stands in the way),
            or the strategy's does not. UnknownName: a limit for a group that does not exist.

    >>> import torch, secateur as sc
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 2))
    >>> scores = sc.score(net, sc.find_groups(net, torch.zeros(1, 4)), sc.Magnitude())
    >>> sc.allocate(scores, sc.Budget(macs=0.5)).macs_left, scores.groups.macs
    (300, 600)
    >>> len(sc.allocate(scores, sc.Uniform(0.3), limits=sc.Limits(multiple=8)).keep[0])
    72
    """
    if isinstance(strategy, Budget):
        if budget is not None:
            raise PlanError("there are two budgets; put them into one, as in Budget(macs=0.5, params=0.6).")
        budget, strategy = strategy, GlobalRanking()
    problem = Problem(scores, limits or Limits(), budget)
    problem.check()
    asked, wanted = list(strategy(problem)), len(scores.groups.groups)
    if len(asked) != wanted:
        raise PlanError(f"the strategy gave {len(asked)} counts of units, and the model has {wanted} groups.")
    plan = Plan(scores.groups, best_units(scores, problem.counts(problem.ladder.allowed(asked))))
    for target, left in zip(problem.targets, problem.exactly_left(plan.keep)):
        if left > target.most:
            raise PlanError(f"the strategy's plan leaves {target.said(left)}, and the budget is {target}.")
    return plan


def best_units(scores: Scores, counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """So many units of each group, those with the highest scores; of equal ones, the first."""
    chosen = (values.argsort(descending=True, stable=True)[:n] for values, n in zip(scores.values, counts))
    return tuple(tuple(sorted(units.tolist())) for units in chosen)
