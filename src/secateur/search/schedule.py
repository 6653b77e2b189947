"""In how many cuts a model shrinks, and how far with each.

A schedule turns the share that is left in the end into the shares that are left after each cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from secateur.errors import PlanError

Schedule = Callable[[float], Sequence[float]]
"""From the share of the whole that is left in the end, in (0, 1], to those left after each cut, with it as the last."""


def one_shot(left: float) -> tuple[float, ...]:
    """All at once.

    >>> one_shot(0.25)
    (0.25,)
    """
    return (left,)


def linear(cuts: int) -> Schedule:
    """Each cut takes as much.

    >>> [round(share, 3) for share in linear(3)(0.25)]
    [0.75, 0.5, 0.25]
    """
    _check(cuts)
    return lambda left: [1 - (1 - left) * i / cuts for i in range(1, cuts)] + [left]


def geometric(cuts: int) -> Schedule:
    """Each cut takes the same share of what the one before left.

    >>> [round(share, 3) for share in geometric(2)(0.25)]
    [0.5, 0.25]
    """
    _check(cuts)
    return lambda left: [left ** (i / cuts) for i in range(1, cuts)] + [left]


def cubic(cuts: int) -> Schedule:
    """Much at first, while there is much to spare, and less and less (Zhu and Gupta 2017, arXiv 1710.01878, eq. 1).

    >>> [round(share, 3) for share in cubic(3)(0.25)]
    [0.472, 0.278, 0.25]
    """
    _check(cuts)
    return lambda left: [left + (1 - left) * (1 - i / cuts) ** 3 for i in range(1, cuts)] + [left]


def _check(cuts: int) -> None:
    if isinstance(cuts, bool) or not isinstance(cuts, int) or cuts < 1:
        raise PlanError(f"a schedule has a whole number of cuts, 1 or more, and not {cuts!r}.")
