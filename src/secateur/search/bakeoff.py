"""One choice against another: accuracies of many runs under one budget, ranked, with what chance may have done.

An entrant is a way to choose what goes. Each is run with several seeds, the same for all, so that two entrants can be
compared seed by seed: a paired t-test says how likely a difference so large is if there is none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from scipy import stats

Stage = Literal["cut", "reset", "recovered"]
STAGES: tuple[Stage, ...] = ("cut", "reset", "recovered")
"""As cut; with batch norm's statistics taken anew; after the recipe's training."""


@dataclass(frozen=True)
class Entrant:
    """A way to choose: the criterion that scores, the scale that makes layers comparable, the guide that shares out.

    >>> str(Entrant("taylor", "none", "ranking")), str(Entrant("magnitude", "lamp", "ranking"))
    ('taylor, ranking', 'magnitude x lamp, ranking')
    """

    criterion: str
    scale: str
    guide: str

    def __str__(self) -> str:
        scaled = self.criterion if self.scale == "none" else f"{self.criterion} x {self.scale}"
        return f"{scaled}, {self.guide}"


@dataclass(frozen=True)
class Cell:
    """One entrant with one seed, measured.

    Attributes:
        entrant, seed: which.
        macs, params: of the cut model.
        validation, test: accuracy after each stage that was run; the first ranks, the second is only reported.
        seconds: wall-clock time of all of it.
    """

    entrant: Entrant
    seed: int
    macs: int
    params: int
    validation: Mapping[Stage, float]
    test: Mapping[Stage, float]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "validation": dict(self.validation), "test": dict(self.test)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Cell:
        """What `to_json` wrote."""
        return cls(**{**value, "entrant": Entrant(**value["entrant"])})


@dataclass(frozen=True)
class Standing:
    """Where an entrant stands after a stage.

    Attributes:
        entrant: who.
        seeds: how many runs.
        mean, spread: of the validation accuracies, and their sample standard deviation; NaN for one run.
        test: the mean of the test accuracies.
        behind: how far the mean is below the first's.
        chance: the p-value of a paired t-test against the first, two-sided; NaN for the first, and for fewer than two
            seeds in common.
        control: the same against "random" with the same guide; NaN where that did not run.
    """

    entrant: Entrant
    seeds: int
    mean: float
    spread: float
    test: float
    behind: float
    chance: float
    control: float


def rank(cells: Sequence[Cell], stage: Stage) -> tuple[Standing, ...]:
    """The entrants by mean validation accuracy after a stage, the best first.

    >>> cells = [Cell(Entrant(name, "none", "ranking"), seed, 1, 1, {"cut": a + seed / 100}, {"cut": a}, 1.0)
    ...          for name, a in (("random", 0.5), ("taylor", 0.75)) for seed in range(2)]
    >>> [(standing.entrant.criterion, standing.mean, standing.behind) for standing in rank(cells, "cut")]
    [('taylor', 0.755, 0.0), ('random', 0.505, 0.25)]
    """
    by_entrant: dict[Entrant, dict[int, Cell]] = {}
    for cell in cells:
        if stage in cell.validation:
            by_entrant.setdefault(cell.entrant, {})[cell.seed] = cell
    values = {who: {seed: c.validation[stage] for seed, c in found.items()} for who, found in by_entrant.items()}
    order = sorted(values, key=lambda who: -statistics.mean(list(values[who].values())))
    return tuple(
        Standing(
            who,
            len(values[who]),
            statistics.mean(list(values[who].values())),
            _spread(list(values[who].values())),
            statistics.mean([cell.test[stage] for cell in by_entrant[who].values()]),
            statistics.mean(list(values[order[0]].values())) - statistics.mean(list(values[who].values())),
            paired(values[who], values[order[0]]) if who != order[0] else math.nan,
            paired(values[who], values.get(Entrant("random", "none", who.guide), {})),
        )
        for who in order
    )


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """The p-value of a paired t-test over the seeds that both have.

    NaN for fewer than two, and where all differences are one, so that the seeds say nothing about chance.

    >>> round(paired({0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.4, 1: 0.55, 2: 0.6}), 4)
    0.0377
    """
    seeds = sorted(one.keys() & other.keys())
    a, b = [one[seed] for seed in seeds], [other[seed] for seed in seeds]
    if len(seeds) < 2 or statistics.stdev(x - y for x, y in zip(a, b)) < 1e-9:
        return math.nan
    return float(stats.ttest_rel(a, b).pvalue)


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan
