"""The same share of every group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.errors import PlanError
from secateur.graph.records import Groups


@dataclass(frozen=True)
class Uniform:
    """Cut `sparsity` of the units of each group; `n - floor(n * sparsity)` stay.

    >>> Uniform(1.5)
    Traceback (most recent call last):
    secateur.errors.PlanError: sparsity must be in [0, 1), and 1.5 is not.
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise PlanError(f"sparsity must be in [0, 1), and {self.sparsity} is not.")

    def __call__(self, groups: Groups) -> Sequence[float]:
        """One share per group."""
        return [self.sparsity] * len(groups.groups)
