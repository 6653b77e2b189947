"""As much score as the budget can hold: a knapsack in which what a unit weighs depends on what else is in it.

A convolution's weights and MACs are products of two counts, so no unit has a cost of its own. But with the counts of
the moment each has a price, the derivative of the cost along it, and by the method of Lagrange the best plan keeps the
units whose score is above a multiplier times their price (Everett 1963, Generalized Lagrange Multiplier Method). So:

1. rank by score over price, cut until the budget is met, take the prices there (half the way, on a log scale), again;
2. from the best plan, move one group to another count, hold it there, let the others make room or fill up, and keep
   what is better, until nothing is or `tries` are used up.

Every plan that is looked at is feasible by exact counts; which is best is judged by the kept score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.allocate.ladder import Floats, Gone
from secateur.allocate.problem import Problem, Ranking
from secateur.allocate.ranking import per_price, relative_prices
from secateur.errors import PlanError

ROUNDS = 12
NEAR = 16
"""Up to so many steps, every count of a group is tried; beyond, those 1, 2, 4, 8 ... steps away."""


@dataclass(frozen=True)
class Knapsack:
    """Keep the largest sum of scores that the budget allows.

    The sum is over all groups, so scores must be comparable between layers and add up, as those of `Taylor` do; give
    `score` a scale where they are not. Limits keep the sum from emptying layers whose scores are low. The budget is
    used up even where that keeps units with scores below zero.

    Args:
        tries: how many moves are tried after the prices have settled; 0 for none.

    >>> Knapsack(tries=-1)
    Traceback (most recent call last):
    secateur.errors.PlanError: tries is a number of moves, 0 or more, and not -1.
    """

    tries: int = 200

    def __post_init__(self) -> None:
        if self.tries < 0:
            raise PlanError(f"tries is a number of moves, 0 or more, and not {self.tries}.")

    def __call__(self, problem: Problem) -> Sequence[int]:
        """How many units of each group stay; PlanError without a budget, or if it cannot be met."""
        problem.need_budget("Knapsack()")
        if not len(problem.ladder.values):
            return problem.counts(np.zeros(0, np.bool_))
        gone = min(_settled(problem), key=lambda gone: _lost(problem, gone))
        return problem.counts(_improved(problem, gone, self.tries))


def _lost(problem: Problem, gone: Gone) -> float:
    return float(problem.ladder.values[gone].sum())


def _settled(problem: Problem) -> Iterator[Gone]:
    """Plans by prices that come from the plan before; for several measures, from several mixes of their prices."""
    count, values = len(problem.targets), problem.ladder.values
    mixes = [np.full(count, 1 / count), *(np.eye(count) if count > 1 else [])]
    for mix in mixes:
        prices = _prices(problem, np.zeros(len(values), np.bool_), mix)
        for _ in range(ROUNDS):
            gone = problem.fit(problem.ranked(per_price(values, prices)))
            if gone is None:
                break
            yield gone
            prices = np.sqrt(prices * _prices(problem, gone, mix))
    # Units that save nothing at first sight may have to go all the same.
    evenly = problem.fit(problem.ranked(np.zeros(len(values))))
    if evenly is not None:
        yield evenly


def _improved(problem: Problem, gone: Gone, tries: int) -> Gone:
    """The best plan that moves of single groups lead to."""
    ladder, mix = problem.ladder, np.full(len(problem.targets), 1 / len(problem.targets))

    def ranked(gone: Gone) -> Ranking:
        return problem.ranked(per_price(ladder.values, _prices(problem, gone, mix)))

    ranking, best, since, r = ranked(gone), _lost(problem, gone), 0, 0
    while since < len(ladder.ropes):
        first, end = ladder.first[r], ladder.first[r + 1]
        since += 1
        for taken in _others(int(gone[first:end].sum()), int(end - first)):
            if not tries:
                return gone
            tries -= 1
            moved = problem.fit(ranking, held=(r, taken))
            if moved is not None and _lost(problem, moved) < best - 1e-12 * abs(best):
                gone, best, since = moved, _lost(problem, moved), 0
                ranking = ranked(gone)
        r = (r + 1) % len(ladder.ropes)
    return gone


def _others(taken: int, steps: int) -> Iterator[int]:
    """The counts of steps to try instead."""
    far = range(1, steps + 1) if steps <= NEAR else [1 << i for i in range(steps.bit_length())]
    for distance in far:
        yield from (t for t in (taken - distance, taken + distance) if 0 <= t <= steps)


def _prices(problem: Problem, gone: Gone, mix: Floats) -> Floats:
    return np.asarray(mix @ relative_prices(problem, problem.meter.lengths(gone)))
