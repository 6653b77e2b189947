"""What a strategy is given, and the search that strategies share: `Problem`."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from secateur.allocate.budget import Budget, Target, left_of
from secateur.allocate.ladder import Floats, Gone, Ints, Ladder, build
from secateur.allocate.limits import Limits
from secateur.allocate.meter import Meter
from secateur.errors import PlanError
from secateur.graph.records import Groups
from secateur.score.scoring import Scores


@dataclass(frozen=True)
class Ranking:
    """Steps in the order in which they go, from `Problem.ranked`: `order` are their numbers, `levels` those of all."""

    levels: Floats
    order: Ints


@dataclass(frozen=True)
class Problem:
    """Scores, limits, and what may be left: a strategy answers with how many units of each group stay.

    Three answers are ready made: `by_shares`, `by_levels`, and `counts` of any steps of the `ladder`.

    >>> import torch, secateur as sc
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 6), torch.nn.Linear(6, 2))
    >>> scores = sc.score(net, sc.find_groups(net, torch.zeros(1, 4)), sc.Magnitude())
    >>> deeper_gives_more = lambda problem: problem.by_shares([0.25, 0.5])
    >>> [len(units) for units in sc.allocate(scores, deeper_gives_more).keep]
    [6, 3]
    >>> [len(units) for units in sc.allocate(scores, deeper_gives_more, budget=sc.Budget(macs=0.8)).keep]
    [7, 5]
    """

    scores: Scores
    limits: Limits
    budget: Budget | None = None

    @property
    def groups(self) -> Groups:
        """The model's groups."""
        return self.scores.groups

    @cached_property
    def ladder(self) -> Ladder:
        """The steps that the limits allow."""
        return build(self.scores, self.limits)

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """The budget in counts; empty without one."""
        return () if self.budget is None else self.budget.targets(self.groups)

    @cached_property
    def most(self) -> Ints:
        """(measures,) the budget as an array."""
        return np.array([target.most for target in self.targets], np.int64)

    @cached_property
    def meter(self) -> Meter:
        """What is left of the budget's measures, for any steps."""
        return Meter(self.groups, self.ladder, [target.measure for target in self.targets])

    def need_budget(self, strategy: str, wanted: bool = True, instead: str = "") -> None:
        """PlanError unless there is a budget, or, for a strategy that says itself how much goes, none."""
        if wanted and self.budget is None:
            raise PlanError(f"{strategy} needs a budget, such as budget=sc.Budget(macs=0.5){instead}.")
        if not wanted and self.budget is not None:
            raise PlanError(f"{strategy} says how much goes, and so does the budget; leave one of them out.")

    def by_shares(self, shares: Sequence[float]) -> tuple[int, ...]:
        """Units that stay when each group loses its share, rounded down.

        With a budget, all shares are multiplied by one number, which is searched; a share of 0 stays 0.

        Raises:
            PlanError: a share outside [0, 1], or the budget cannot be met.
        """
        named = list(zip(self.groups.groups, shares, strict=True))
        for group, share in named:
            if not 0 <= share <= 1:
                raise PlanError(f"the share to cut of group {group.name!r} is {share}; it must be in [0, 1].")
        if self.budget is None:
            return tuple(group.size - int(group.size * share) for group, share in named)
        with np.errstate(divide="ignore", invalid="ignore"):
            curves = [np.arange(group.size + 1) / group.size / share for group, share in named]
        return self.by_levels(self.ladder.levels(curves))

    def by_levels(self, levels: Floats) -> tuple[int, ...]:
        """Units that stay when the steps of the lowest levels go first, until the budget is met.

        See `ranked` for the order, and `fit` for what is given back; PlanError if the budget cannot be met.
        """
        gone = self.fit(self.ranked(levels))
        if gone is None:
            spared = np.unique(self.ladder.rope_of[np.isinf(levels)])
            names = ", ".join(self.groups.groups[self.ladder.ropes[r].groups[0]].name for r in spared[:3])
            raise PlanError(f"{self._out_of_reach(~np.isinf(levels))} The strategy takes no more from {names}.")
        return self.counts(gone)

    def counts(self, gone: Gone) -> tuple[int, ...]:
        """Units that stay of each group when these steps are taken."""
        return self.ladder.counts(gone)

    def exactly_left(self, keep: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """What a plan leaves of each of the budget's measures, counted over the whole model."""
        return left_of(self.groups, tuple(target.measure for target in self.targets), self.groups.stays(keep))

    def ranked(self, levels: Floats) -> Ranking:
        """The steps in the order in which they go: of the lowest level first; of equal ones, where least has gone.

        A step that comes after one of a higher level in its rope has that one's.

        Args:
            levels: (steps,) infinity for a step that is not to be taken.
        """
        levels, ties = _rising(levels, self.ladder.first), self.ladder.evenly
        order = ties[np.argsort(levels[ties], kind="stable")]
        return Ranking(levels, order[levels[order] < np.inf])

    def fit(self, ranking: Ranking, held: tuple[int, int] | None = None) -> Gone | None:
        """Take steps in the order of a ranking until the budget is met, then give back what fits, the last ones first.

        Afterwards no single step can be given back without passing the budget.

        Args:
            ranking: from `ranked`.
            held: a rope, and how many of its steps are taken whatever their levels; given back if nothing else fits.

        Returns None if the steps that may be taken do not meet the budget.
        """
        ladder, order, rope = self.ladder, ranking.order, -1
        surely = np.zeros(len(ranking.levels), np.bool_)
        if held is not None:
            rope, taken = held
            surely[ladder.first[rope] : ladder.first[rope] + taken] = True
            order = order[ladder.rope_of[order] != rope]
        rank = np.full(len(surely), len(surely))
        rank[order] = np.arange(len(order))
        count = _least(lambda n: self._fits(self.meter.lengths(surely | (rank < n))), len(order))
        return None if count is None else self._filled(surely | (rank < count), ranking.levels, rope)

    def check(self) -> None:
        """PlanError if no plan within the limits meets the budget; says what stands in the way."""
        if self.budget is None or self._reachable:
            return
        said, plain = self._out_of_reach(np.ones(len(self.ladder.values), np.bool_)), Limits()
        without = {name: replace(self.limits, **{name: getattr(plain, name)}) for name in self.limits.given}
        alone = [name for name, limits in without.items() if replace(self, limits=limits)._reachable]
        if alone:
            values = [f"{name}={getattr(self.limits, name)!r}" for name in alone]
            raise PlanError(f"{said} What stands in the way is {' or '.join(values)}: without it there is a plan.")
        if replace(self, limits=plain)._reachable:
            raise PlanError(f"{said} The limits stand in the way together: {', '.join(self.limits.given)}.")
        raise PlanError(
            f"{said} It is out of reach even with one unit left of each group: too much of the model cannot be cut; "
            "print the groups to see what, and why."
        )

    @property
    def _reachable(self) -> bool:
        return self._fits(self.meter.lengths(np.ones(len(self.ladder.values), np.bool_)))

    def _fits(self, lengths: Ints) -> bool:
        return bool((self.meter.left(lengths) <= self.most).all())

    def _out_of_reach(self, gone: Gone) -> str:
        """The target that is missed most, and the nearest that there is."""
        left = self.meter.left(self.meter.lengths(gone))
        target, nearest = max(zip(self.targets, left.tolist()), key=lambda pair: pair[1] / max(pair[0].most, 1))
        return f"the budget of {target} cannot be met: at least {target.said(nearest)} stay."

    def _filled(self, gone: Gone, levels: Floats, held: int) -> Gone:
        """The last step of each rope given back, the highest level first, those held last, while the budget holds."""
        ladder, gone, lengths = self.ladder, gone.copy(), self.meter.lengths(gone)
        last = ladder.first[:-1] + ladder.taken(gone) - 1

        def turn(step: int) -> tuple[bool, float, float, int]:
            return bool(ladder.rope_of[step] == held), -levels[step], -ladder.share[step], step

        heap = [turn(step) for step, first in zip(last.tolist(), ladder.first) if step >= first]
        heapq.heapify(heap)
        while heap:
            step = heapq.heappop(heap)[-1]
            regained = self.meter.regained(lengths, step)
            # What does not fit now will not fit when more has been given back.
            if self._fits(regained):
                gone[step], lengths = False, regained
                if step > ladder.first[ladder.rope_of[step]]:
                    heapq.heappush(heap, turn(step - 1))
        return gone


def _rising(levels: Floats, first: Ints) -> Floats:
    out = levels.copy()
    for start, end in itertools.pairwise(first):
        np.maximum.accumulate(out[start:end], out=out[start:end])
    return out


def _least(holds: Callable[[int], bool], most: int) -> int | None:
    """The least number up to `most` for which a condition holds that, once it does, goes on to."""
    low, high = 0, most + 1
    while low < high:
        middle = (low + high) // 2
        if middle > most or holds(middle):
            high = middle
        else:
            low = middle + 1
    return low if low <= most else None
