"""How far apart two runs are where each unit ends: a cut's error, group by group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from secateur.graph.analysis import Analysis
from secateur.graph.compare import Stays
from secateur.score.ends import AtEnds, Sight

GroupErrors = tuple[tuple[str, float], ...]
"""(group, error), for each group that ends in a sum."""


class Ends(AtEnds):
    """Notes how large each unit is, by its root of the sum of squares, wherever units end in a sum."""

    def __init__(self, analysis: Analysis) -> None:
        super().__init__(analysis, self._note)
        self._dims = [end.block.dims for end, _ in analysis.contractions]
        self.sizes: dict[int, torch.Tensor] = {}

    def _note(self, index: int, sight: Sight) -> None:
        tensor = sight.operand
        others = [d for d in range(tensor.ndim) if d not in self._dims[index]]
        squares = (tensor.abs() if tensor.is_complex() else tensor).double().square()
        self.sizes[index] = (squares.sum(others) if others else squares).sqrt().flatten().cpu()


def group_errors(analysis: Analysis, stays: Stays, masked: Ends, cut: Ends) -> GroupErrors:
    """For each group the largest difference of a unit that stays, as a share of the largest unit there.

    Args:
        masked: of the uncut model with the plan's units zeroed.
        cut: of the cut model.
    """
    errors: dict[int, float] = {}
    for index in sorted(masked.sizes.keys() & cut.sizes.keys()):
        units = analysis.contractions[index][1].units.ravel()
        kept = units[stays[units]]
        want, got = masked.sizes[index][torch.from_numpy(stays[units])].numpy(), cut.sizes[index].numpy()
        off = np.abs(want - got) / (want.max(initial=0) or 1) if want.shape == got.shape else np.full(len(kept), np.inf)
        for group, error in zip(_groups_of(analysis.groups.offsets, kept), off):
            if group >= 0:
                errors[group] = max(errors.get(group, 0.0), float(error))
    return tuple((analysis.groups.groups[group].name, errors[group]) for group in sorted(errors))


def _groups_of(offsets: Sequence[int], units: Any) -> list[int]:
    """The group of each unit; -1 for what is in none."""
    found: list[int] = (np.searchsorted(offsets, units, side="right") - 1).tolist()
    return found
