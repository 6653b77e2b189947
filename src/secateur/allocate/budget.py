"""How much of a model may be left: `Budget`."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from secateur.errors import PlanError
from secateur.graph.costs import Stays
from secateur.graph.records import Groups

WORDS = MappingProxyType({"params": "parameters", "macs": "MACs", "bytes": "bytes", "units": "units"})
"""What is measured, in words."""


@dataclass(frozen=True)
class Target:
    """At most `most` of the `whole` model's parameters, MACs, bytes or units may be left."""

    measure: str
    whole: int
    most: int

    def __str__(self) -> str:
        return f"{self.said(self.most)} of {self.whole:,} {WORDS[self.measure]}"

    def said(self, left: int) -> str:
        """A number with its share of the whole.

        >>> Target("macs", 2000, 1000).said(1500)
        '1,500 (75.0 %)'
        """
        return f"{left:,} ({100 * left / max(self.whole, 1):.1f} %)"


@dataclass(frozen=True)
class Budget:
    """What may be left of a model, at most; of several, all hold.

    A float is a share of the whole model, an int a count. What a plan leaves is counted, never estimated: parameters
    in all tensors, MACs of the example inputs that the groups were found with, bytes of the tensors as they are saved.

    Args:
        params: parameters.
        macs: multiply-accumulates (see `sc.count_macs`).
        bytes: of all parameters and buffers; the file's header comes on top.
        units: of all groups together, as for cutting a few channels at a time.

    Raises:
        PlanError: nothing is asked for, a share outside (0, 1], a count below 1.

    >>> Budget(macs=0.5, params=1_000_000)
    Budget(params=1000000, macs=0.5, bytes=None, units=None)
    >>> Budget(macs=2.5)
    Traceback (most recent call last):
    secateur.errors.PlanError: the budget for macs is 2.5; give a share above 0 and up to 1.0, or a count as an int.
    """

    params: float | None = None
    macs: float | None = None
    bytes: float | None = None
    units: float | None = None

    def __post_init__(self) -> None:
        if not self.asked:
            raise PlanError(f"the budget is empty; say what may be left of {', '.join(WORDS)}.")
        for name, value in self.asked.items():
            good = isinstance(value, int | float) and not isinstance(value, bool)
            if not good or not (value >= 1 if isinstance(value, int) else 0 < value <= 1):
                raise PlanError(
                    f"the budget for {name} is {value!r}; give a share above 0 and up to 1.0, or a count as an int."
                )

    @property
    def asked(self) -> dict[str, float]:
        """Measure -> share or count, of those that are asked for."""
        return {name: getattr(self, name) for name in WORDS if getattr(self, name) is not None}

    def targets(self, groups: Groups) -> tuple[Target, ...]:
        """The budget in counts, for this model."""
        whole = left_of(groups, tuple(self.asked), groups.costs.whole)
        return tuple(
            Target(name, total, value if isinstance(value, int) else int(total * value))
            for (name, value), total in zip(self.asked.items(), whole)
        )


def left_of(groups: Groups, measures: tuple[str, ...], stays: Stays) -> tuple[int, ...]:
    """What is left when these units stay, counted over the whole model, of each measure."""
    costs = groups.costs
    count = {"params": costs.params, "macs": costs.macs, "bytes": costs.bytes, "units": _units}
    return tuple(count[measure](stays) for measure in measures)


def _units(stays: Stays) -> int:
    """The last entry is no unit."""
    return int(stays[:-1].sum())
