"""The smallest model whose accuracy, measured after recovery, is above a floor: a bracket that trials close.

The whole model is known to be above. A share that was tried and lies above the floor takes its place; one that lies
below is the other end. In between, the next share is where a straight line through the two accuracies meets the floor,
on a log scale of shares and away from the ends; accuracy is noisy, so nothing is assumed but what was measured.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from secateur.codec.files import append_line
from secateur.errors import PlanError, RunError

INNER = 0.2
"""A trial is at least this share of the bracket away from its ends."""


@dataclass(frozen=True)
class Floor:
    """An accuracy that the smaller model must have: what `compress` takes in a budget's place.

    Args:
        accuracy: from 0 up, what `evaluate` must give at least; below 0, how far it may fall from the uncut model's.
        evaluate: the accuracy of a model, higher is better, on held-out data that choose; test data are for the end.
        measure: what is made small: "macs", "params" or "bytes".
        tries: how many sizes are tried at most.
        width: it ends when the largest share below and the smallest above are this near: 0.03 is 3 %.
        folder: where each trial is written down, and the best model, so that a call after a kill goes on.

    Raises:
        PlanError: tries below 1, or a width that is not above 0.
    """

    accuracy: float
    evaluate: Callable[[nn.Module], float]
    measure: Literal["macs", "params", "bytes"] = "macs"
    tries: int = 8
    width: float = 0.03
    folder: str | Path | None = None

    def __post_init__(self) -> None:
        if self.tries < 1 or not self.width > 0:
            raise PlanError(f"a floor needs tries of 1 or more and a width above 0, not {self.tries} and {self.width}.")


@dataclass(frozen=True)
class Trial:
    """A size that was tried: what share may be left, and the accuracy then; None if no plan is so small."""

    share: float
    accuracy: float | None
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Search:
    """What was tried, in order.

    Attributes:
        floor: what had to be reached.
        whole: the accuracy of the model as it was given.
        trials: each measured.
    """

    floor: float
    whole: float
    trials: tuple[Trial, ...] = ()

    @property
    def best(self) -> Trial | None:
        """The smallest above the floor; None if there is none."""
        above = [trial for trial in self.trials if _is_above(trial, self.floor)]
        return min(above, key=lambda trial: trial.share, default=None)

    @property
    def sentence(self) -> str:
        """What came out.

        >>> print(Search(0.9, 0.92, (Trial(0.5, 0.91, 1.0), Trial(0.25, 0.88, 1.0))).sentence)
        50.0 % left has 91.00 %, above the floor of 90.00 %; 25.0 % left has 88.00 % (2 sizes tried).
        """
        below = [trial for trial in self.trials if trial.accuracy is not None and trial.accuracy < self.floor]
        ended = f" ({len(self.trials)} sizes tried)."
        best = self.best
        if best is None:
            nearest = max(below, key=lambda trial: trial.accuracy or 0.0, default=None)
            said = "no size could be cut" if nearest is None else f"the best is {_said(nearest)}"
            return f"None is above the floor of {100 * self.floor:.2f} %: {said}{ended}"
        under = max((trial for trial in below if trial.share < best.share), key=lambda t: t.share, default=None)
        then = "" if under is None else f"; {_said(under)}"
        return f"{_said(best)}, above the floor of {100 * self.floor:.2f} %{then}{ended}"


def find_floor(
    attempt: Callable[[float], float],
    whole: float,
    floor: float,
    *,
    tries: int = 8,
    width: float = 0.03,
    journal: Path | None = None,
    on_trial: Callable[[Search], None] | None = None,
) -> Search:
    """Try shares until the smallest above the floor is known to within `width`.

    Args:
        attempt: makes the model of which this share is left, and measures its accuracy; PlanError if no plan is so
            small.
        whole: the accuracy of the uncut model, a share of 1.
        floor: from 0 up an accuracy, below 0 how far it may fall from `whole`.
        tries, width: see `Floor`.
        journal: a file with a line of JSON for each trial; those in it are not tried again.
        on_trial: called after each.

    Raises:
        PlanError: the uncut model is below the floor. RunError: the journal is of another search.

    >>> search = find_floor(lambda share: 0.9 + 0.05 * math.log10(share), 0.9, -0.02)
    >>> round(search.floor, 3), round(search.best.share, 2), round(10 ** (-0.02 / 0.05), 2)
    (0.88, 0.4, 0.4)
    """
    search = Search(whole + floor if floor < 0 else floor, whole)
    if whole < search.floor:
        raise PlanError(f"the model as it is has {100 * whole:.2f} %, below the floor of {100 * search.floor:.2f} %.")
    if journal is not None:
        search = _read(journal, search)
    while len(search.trials) < tries and (share := next_share(search, width)) is not None:
        start = time.perf_counter()
        try:
            trial = Trial(share, float(attempt(share)), 0.0)
        except PlanError as error:
            trial = Trial(share, None, 0.0, str(error))
        trial = replace(trial, seconds=time.perf_counter() - start)
        search = replace(search, trials=(*search.trials, trial))
        if journal is not None:
            append_line(journal, json.dumps(asdict(trial)))
        if on_trial is not None:
            on_trial(search)
    return search


def next_share(search: Search, width: float) -> float | None:
    """Which share to try next, to three digits; None if the bracket is closed.

    >>> next_share(Search(0.9, 0.92), 0.03), next_share(Search(0.9, 0.92, (Trial(0.5, 0.92, 1.0),)), 0.03)
    (0.5, 0.25)
    """
    top = search.best or Trial(1.0, search.whole, 0.0)
    under = [trial for trial in search.trials if trial.share < top.share]
    if not under:
        return top.share / 2
    low = max(under, key=lambda trial: trial.share)
    if top.share / low.share - 1 <= width:
        return None
    across = 0.5  # 0 is the lower end
    if low.accuracy is not None and top.accuracy is not None and top.accuracy > low.accuracy:
        across = (search.floor - low.accuracy) / (top.accuracy - low.accuracy)
    across = min(max(across, INNER), 1 - INNER)
    return float(f"{low.share * math.exp(across * math.log(top.share / low.share)):.3g}")


def _is_above(trial: Trial, floor: float) -> bool:
    return trial.accuracy is not None and math.isfinite(trial.accuracy) and trial.accuracy >= floor


def _said(trial: Trial) -> str:
    return f"{100 * trial.share:.1f} % left has {100 * (trial.accuracy or 0.0):.2f} %"


def _read(journal: Path, search: Search) -> Search:
    """The trials of a search that was broken off; a line that was cut off does not count."""
    head = {"floor": search.floor, "whole": search.whole}
    if not journal.exists():
        append_line(journal, json.dumps(head))
        return search
    rows: list[dict[str, Any]] = []
    for line in journal.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    if rows[:1] != [head]:
        raise RunError(
            f"{str(journal)!r} is of another search: it began with {rows[:1]}, and this one with {head}. Remove it, or "
            "give another folder."
        )
    return replace(search, trials=tuple(Trial(**row) for row in rows[1:]))
