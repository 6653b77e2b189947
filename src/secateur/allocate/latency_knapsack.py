"""As much score as a latency can hold, where the latency of any plan is read off a measured table.

Time is no product of counts and no smooth function of them: it has steps where a kernel's block is full, and flats
where nothing is gained. So no prices are taken. With the other groups as they are, every width that a group may have is
looked up; each group takes, in turn, the one that makes

    (scores lost) + multiplier * (milliseconds)

least, until none changes: coordinate descent on the Lagrangian (Everett 1963, Generalized Lagrange Multiplier Method),
whose multiplier is searched. From the best plan that is fast enough, single groups are then widened while the time
holds, and narrowed to make room for others, as long as the sum of scores grows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.allocate.ladder import Floats, Gone, Ints
from secateur.allocate.problem import Problem
from secateur.errors import PlanError
from secateur.measure.table import Curve, LatencyTable

SWEEPS = 8
HALVINGS = 18
BEST = 3
"""So many plans of the search for the multiplier are filled up."""

FINE = 256
COARSE = 8
"""Groups with more widths than this are tried at multiples only."""


@dataclass(frozen=True)
class LatencyKnapsack:
    """Keep the largest sum of scores whose predicted latency is low enough.

    Scores must be comparable between layers and add up, as for `Knapsack`. The plan is fast on the machine, batch and
    runtime that the table was measured on; `table.predict(plan)` says how fast.

    Args:
        table: from `measure_table`, for the groups that are scored.
        ms: the most milliseconds of a forward pass; or
        share: the most as a share of the whole model's, as the table predicts it.
        tries: how many groups are narrowed on trial at the end; 0 for none.

    Raises:
        PlanError: both or neither of `ms` and `share`, or a value out of range; when it is called, also if a budget is
            given as well, if the table is another model's, or if no plan within the limits is fast enough.

    >>> import torch, secateur as sc
    >>> from secateur.measure.measure_table import measure_table
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 2)).eval()
    >>> scores = sc.score(net, sc.find_groups(net, torch.zeros(8, 64)), sc.Magnitude())
    >>> table = measure_table(net, torch.zeros(8, 64), scores.groups, turns=3)
    >>> plan = sc.allocate(scores, LatencyKnapsack(table, share=1.0))
    >>> table.predict(plan) <= table.whole_ms
    True
    """

    table: LatencyTable
    ms: float | None = None
    share: float | None = None
    tries: int = 60

    def __post_init__(self) -> None:
        if (self.ms is None) == (self.share is None):
            raise PlanError("give the latency as ms, in milliseconds, or as share, of the whole model's; one of them.")
        if self.ms is not None and not self.ms > 0:
            raise PlanError(f"ms is a number of milliseconds above 0, and not {self.ms}.")
        if self.share is not None and not 0 < self.share <= 1:
            raise PlanError(f"share is above 0 and up to 1, and not {self.share}.")
        if self.tries < 0:
            raise PlanError(f"tries is a number of groups to narrow on trial, 0 or more, and not {self.tries}.")

    def __call__(self, problem: Problem) -> Sequence[int]:
        """How many units of each group stay."""
        problem.need_budget("LatencyKnapsack()", wanted=False)
        if problem.groups.offsets[-1] != self.table.units:
            raise PlanError(
                f"the table is of a model with {self.table.units} units and this one has {problem.groups.offsets[-1]}; "
                "measure a table with these groups."
            )
        most = self.ms if self.ms is not None else self.table.whole_ms * (self.share or 1)
        search = _Search(problem, self.table, most)
        if not len(problem.ladder.ropes):
            search.refused(search.ms(np.zeros(0, np.int64)))
            return problem.counts(np.zeros(0, np.bool_))
        taken = search.best(search.feasible())
        return problem.counts(search.gone(search.exchanged(taken, self.tries)))


class _Search:
    """Plans as (ropes,) places among the widths that a rope is tried at, 0 for the whole; what they take and lose."""

    def __init__(self, problem: Problem, table: LatencyTable, most: float) -> None:
        self.problem, self.table, self.clock, self.most = problem, table, table.clock, most
        ladder, self.whole = problem.ladder, table.clock.lengths(np.ones(table.units + 1, np.bool_))
        falls = self.clock.falls(ladder.step_of, len(ladder.values))
        self.steps: list[Ints] = []
        self.lost: list[Floats] = []
        self.drops: list[Ints] = []
        self.curves: list[Curve] = []
        for first, rope in zip(ladder.first, ladder.ropes):
            left = np.append(ladder.sizes[rope.groups[0]], ladder.sizes[rope.groups[0]] - rope.gone[:, 0])
            tried = np.arange(len(left))
            if len(left) > FINE:
                tried = tried[(left % COARSE == 0) | (tried == 0) | (tried == tried[-1])]
            own = slice(first, first + len(rope.share))
            drops = np.concatenate([0 * self.whole[None], falls[own].cumsum(0)])[tried]
            self.steps.append(tried)
            self.lost.append(np.append(0.0, ladder.values[own].cumsum())[tried])
            self.drops.append(drops)
            self.curves.append(self.clock.curve(np.asarray(drops.any(0))))

    def gone(self, taken: Ints) -> Gone:
        """The steps as the ladder counts them."""
        out = np.zeros(len(self.problem.ladder.values), np.bool_)
        for first, steps, n in zip(self.problem.ladder.first, self.steps, taken):
            out[first : first + steps[n]] = True
        return out

    def lengths(self, taken: Ints) -> Ints:
        """(axes,) how long each axis is."""
        return np.asarray(self.whole - sum((drops[n] for drops, n in zip(self.drops, taken)), 0 * self.whole))

    def ms(self, taken: Ints) -> float:
        """The predicted latency."""
        return float(self.clock.ms(self.lengths(taken)[None])[0])

    def score_lost(self, taken: Ints) -> float:
        """The sum of the scores that go."""
        return float(sum(lost[n] for lost, n in zip(self.lost, taken)))

    def curve(self, taken: Ints, rope: int) -> Floats:
        """The latency at each width of one rope, the others as they are."""
        others = self.lengths(taken) + self.drops[rope][taken[rope]]
        return self.curves[rope](others - self.drops[rope])

    def settled(self, taken: Ints, multiplier: float) -> Ints:
        """Each rope in turn where the Lagrangian is least, until none changes; infinity for the latency alone."""
        taken = taken.copy()
        for _ in range(SWEEPS):
            before = taken.copy()
            for rope in range(len(taken)):
                ms = self.curve(taken, rope)
                value = ms if np.isinf(multiplier) else self.lost[rope] + multiplier * ms
                taken[rope] = int(np.argmin(value))
            if (taken == before).all():
                break
        return taken

    def feasible(self) -> Iterator[Ints]:
        """Plans that are fast enough, from a search for the multiplier; PlanError if there is none."""
        none = np.zeros(len(self.lost), np.int64)
        if self.ms(none) <= self.most:
            yield none
            return
        ends = np.array([len(lost) - 1 for lost in self.lost])
        starts = [self.settled(start, np.inf) for start in (ends, none)]
        fastest = min(starts, key=self.ms)
        self.refused(self.ms(fastest))
        yield fastest
        total = sum(float(np.abs(lost[-1])) for lost in self.lost)
        low, high = 1e-6 * total / self.ms(none), 1e6 * total / self.ms(none)
        fast, slow = fastest, none
        for _ in range(HALVINGS if total > 0 else 0):
            middle = float(np.sqrt(low * high))
            found = min(
                (self.settled(start, middle) for start in (slow, fast)),
                key=lambda taken: self.score_lost(taken) + middle * self.ms(taken),
            )
            if self.ms(found) <= self.most:
                high, fast = middle, found
                yield found
            else:
                low, slow = middle, found

    def refused(self, fastest: float) -> None:
        """PlanError if even this is too slow."""
        if fastest > self.most:
            whole, share = self.table.whole_ms, fastest / self.table.whole_ms
            raise PlanError(
                f"a latency of {self.most:.4g} ms cannot be met: the fastest plan within the limits that was found "
                f"takes {fastest:.4g} ms by the table, {100 * share:.0f} % of the whole model's {whole:.4g} ms."
            )

    def best(self, plans: Iterator[Ints]) -> Ints:
        """The one that loses least once it is filled up."""
        good = sorted(plans, key=self.score_lost)[:BEST]
        return min(map(self.filled, good), key=self.score_lost)

    def filled(self, taken: Ints, held: int = -1) -> Ints:
        """Ropes widened while the time holds, where most score comes back for each millisecond; `held` stays."""
        taken, room = taken.copy(), self.most
        while True:
            best = (0.0, -1, 0)
            now = self.ms(taken)
            for rope in range(len(taken)):
                if rope == held or not taken[rope]:
                    continue
                ms = self.curve(taken, rope)[: taken[rope]]
                gain = self.lost[rope][taken[rope]] - self.lost[rope][: taken[rope]]
                rate = np.where((ms <= room) & (gain > 0), gain / np.maximum(ms - now, 1e-9 * now), 0)
                if rate.max() > best[0]:
                    best = (float(rate.max()), rope, int(rate.argmax()))
            if best[1] < 0:
                return taken
            taken[best[1]] = best[2]

    def exchanged(self, taken: Ints, tries: int) -> Ints:
        """Ropes narrowed, one at a time, to make room for the others, while that gains."""
        rope, since = 0, 0
        while tries and since < len(taken):
            lost, ms = self.lost[rope], self.curve(taken, rope)
            saved, given = ms[taken[rope]] - ms, lost - lost[taken[rope]]
            good = (np.arange(len(lost)) > taken[rope]) & (saved > 0)
            since += 1
            if good.any():
                moved = taken.copy()
                moved[rope] = int(np.argmin(np.where(good, given / np.maximum(saved, 1e-12), np.inf)))
                moved, tries = self.filled(moved, rope), tries - 1
                if self.score_lost(moved) < self.score_lost(taken) - 1e-12 * abs(self.score_lost(taken)):
                    taken, since = moved, 0
            rope = (rope + 1) % len(taken)
        return taken
