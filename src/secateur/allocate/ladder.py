"""The steps by which groups can shrink: `Ladder`. Limits are carried out here, once, for every strategy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from secateur.allocate.limits import Limits
from secateur.score.scoring import Scores

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Gone = NDArray[np.bool_]
"""`[step]` -> whether it has been taken; of a rope, the first steps are."""


@dataclass(frozen=True)
class Rope:
    """Groups that shrink together, and by which steps.

    Args:
        groups: their numbers; mostly one.
        gone: (steps, groups) units of each group that are gone after each step.
        share: (steps,) the share of the units that is.
    """

    groups: tuple[int, ...]
    gone: Ints
    share: Floats


@dataclass(frozen=True)
class Ladder:
    """Every step that the limits allow, rope by rope, in the order in which units go: lowest scores first.

    Args:
        ropes: those with steps.
        step_of: (units + 1,) the step in which each unit goes, when all units are counted through; -1 for never.
        values: (steps,) the sum of the scores of the units that go in each step.
        sizes: (groups,) units of each group.
    """

    ropes: tuple[Rope, ...]
    step_of: Ints
    values: Floats
    sizes: Ints

    @cached_property
    def first(self) -> Ints:
        """(ropes + 1,) the number of each rope's first step, and of all steps at the end."""
        return np.cumsum([0, *(len(rope.share) for rope in self.ropes)])

    @cached_property
    def rope_of(self) -> Ints:
        """(steps,) which rope a step is of."""
        return np.repeat(np.arange(len(self.ropes)), np.diff(self.first))

    @cached_property
    def share(self) -> Floats:
        """(steps,) the share of a rope's units that is gone after the step."""
        return np.concatenate([np.empty(0), *(rope.share for rope in self.ropes)])

    @cached_property
    def units(self) -> Ints:
        """(steps,) units that go in each step."""
        return np.bincount(self.step_of[self.step_of >= 0], minlength=len(self.values))

    @cached_property
    def evenly(self) -> Ints:
        """(steps,) the steps in the order in which all ropes lose the same share."""
        return np.lexsort((self.rope_of, self.share))

    def taken(self, gone: Gone) -> Ints:
        """(ropes,) how many steps each rope has taken."""
        return np.bincount(self.rope_of[gone], minlength=len(self.ropes))

    def counts(self, gone: Gone) -> tuple[int, ...]:
        """Units that stay of each group."""
        left = self.sizes.copy()
        for rope, taken in zip(self.ropes, self.taken(gone)):
            if taken:
                left[list(rope.groups)] -= rope.gone[taken - 1]
        return tuple(left.tolist())

    def allowed(self, counts: Sequence[int]) -> Gone:
        """The steps that leave the fewest units, but no fewer than `counts` of any group."""
        gone = np.zeros(len(self.values), np.bool_)
        most = self.sizes - np.asarray(counts, np.int64)
        for first, rope in zip(self.first, self.ropes):
            taken = int((rope.gone <= most[list(rope.groups)]).all(1).sum())
            gone[first : first + taken] = True
        return gone

    def levels(self, curves: Sequence[Floats]) -> Floats:
        """(steps,) the level of each step, where `curves[g][k]` is that of group g with k units gone.

        Of groups that are tied, the highest.
        """
        out = [np.empty(0)]
        for rope in self.ropes:
            out.append(np.max([curves[g][rope.gone[:, i]] for i, g in enumerate(rope.groups)], axis=0))
        return np.concatenate(out)


def build(scores: Scores, limits: Limits) -> Ladder:
    """The ladder of a model's groups; UnknownName for a limit that names no group."""
    groups, offsets = scores.groups.groups, scores.groups.offsets
    kept, bounds = limits.kept(groups), list(limits.bounds(groups))
    step_of = np.full(offsets[-1] + 1, -1, np.int64)
    ropes, first = [], 0
    for members in limits.ropes(groups):
        sizes = np.array([groups[g].size for g in members], np.int64)
        pieces = math.gcd(*sizes.tolist())
        left = np.arange(pieces - 1, 0, -1)
        for g, size in zip(members, sizes):
            least, multiple = bounds[g]
            stay = size // pieces * left
            left = left[(stay >= least) & (stay % multiple == 0)]
        if kept.intersection(members) or not len(left):
            continue
        gone = np.outer(pieces - left, sizes // pieces)
        for g, ends in zip(members, gone.T):
            ascending = scores.values[g].argsort(descending=True, stable=True).flip(0).numpy()
            going = offsets[g] + ascending[: ends[-1]]
            step_of[going] = first + np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
        ropes.append(Rope(members, gone, 1 - left / pieces))
        first += len(left)
    values = np.concatenate([*(v.numpy() for v in scores.values), [0.0]])
    sums = np.bincount(step_of[step_of >= 0], values[step_of >= 0], minlength=first)
    return Ladder(tuple(ropes), step_of, sums.astype(np.float64), np.array([group.size for group in groups], np.int64))
