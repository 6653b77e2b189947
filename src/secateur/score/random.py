"""Random scores: the control that every criterion has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.graph.records import Groups


@dataclass(frozen=True)
class Random:
    """Uniform scores, the same for the same seed.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> from secateur.graph.groups import find_groups
    >>> groups = find_groups(net, torch.zeros(1, 2))
    >>> bool((Random(0)(net, groups)[0] == Random(0)(net, groups)[0]).all())
    True
    """

    seed: int = 0

    def __call__(self, model: nn.Module, groups: Groups) -> Sequence[Tensor]:
        """One score per unit."""
        random = torch.Generator().manual_seed(self.seed)
        return [torch.rand(group.size, generator=random, dtype=torch.float64) for group in groups.groups]
