"""The same share of every group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.allocate.problem import Problem
from secateur.errors import PlanError


@dataclass(frozen=True)
class Uniform:
    """Cut the share `sparsity` of the units of each group; `n - floor(n * sparsity)` stay.

    Args:
        sparsity: in [0, 1); left out, the budget says how much goes.

    >>> Uniform(1.5)
    Traceback (most recent call last):
    secateur.errors.PlanError: sparsity must be in [0, 1), and 1.5 is not.
    """

    sparsity: float | None = None

    def __post_init__(self) -> None:
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise PlanError(f"sparsity must be in [0, 1), and {self.sparsity} is not.")

    def __call__(self, problem: Problem) -> Sequence[int]:
        """How many units of each group stay."""
        if self.sparsity is None:
            problem.need_budget("Uniform()", instead=", or a share, as in Uniform(0.5)")
        else:
            problem.need_budget(f"Uniform({self.sparsity})", wanted=False)
        return problem.by_shares([1.0 if self.sparsity is None else self.sparsity] * len(problem.groups.groups))
