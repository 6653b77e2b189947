"""The report's own idea: a layer's share of channels to cut is its sparsity under global magnitude pruning.

Global pruning compares weights over all layers, so it finds where the network has weights to spare; cutting that share
of each layer's channels turns the finding into a smaller dense network: `out - floor(out * sparsity)` stay.
With a budget, the shares keep their proportions: all are multiplied by the one number at which it is met.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.allocate.problem import Problem
from secateur.errors import PlanError
from secateur.graph.records import Groups
from secateur.graph.slots import Group
from secateur.measure.sparsity import SparsityTable


@dataclass(frozen=True)
class SparsityGuided:
    """Shares from the sparsity of each weight tensor.

    Layers that must keep the same channels (the ends of a residual stream) share one ratio: the zeros of all tensors
    that make the group's units, over their elements.

    Args:
        table: zeros and elements of each weight tensor, such as `find_masks(model, 0.8).table()`.
    """

    table: SparsityTable

    def __call__(self, problem: Problem) -> Sequence[int]:
        """How many units of each group stay; PlanError if the table does not know a group's tensors."""
        return problem.by_shares(self.shares(problem.groups))

    def shares(self, groups: Groups) -> Sequence[float]:
        """The share of each group that goes, where there is no budget."""
        return [self._share(group) for group in groups.groups]

    def _share(self, group: Group) -> float:
        rows = {row.name: row for row in self.table.rows}
        made = {slot.tensor for slot in group.slots if slot.role == "write"}
        known = [rows[name] for name in made if name in rows]
        if not known:
            makers = ", ".join(sorted(made)) or group.name
            raise PlanError(
                f"the sparsity table has no row for {makers}, which group {group.name!r} is made by; it has "
                f"{', '.join(list(rows)[:6])}. Make the table for all layers, or keep this group."
            )
        # Fractions in floats, as the report computed them: zeros / elements, then floor(out * sparsity).
        return sum(row.zeros for row in known) / sum(row.elements for row in known)
