"""Network slimming: a unit matters as much as batch norm lets through (Liu et al. 2017, Learning Efficient
Convolutional Networks through Network Slimming, section 3: the scaling factor |gamma|)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.errors import PlanError
from secateur.graph.records import Groups
from secateur.graph.slots import Slot
from secateur.graph.twin import tensors_of
from secateur.score.combining import Combine, mean
from secateur.score.scoring import Criterion
from secateur.score.weights import by_unit


@dataclass(frozen=True)
class BatchNormScale:
    """The mean of |gamma| over a unit's channels in a batch norm; made for nets trained with an L1 penalty on gamma.

    Args:
        combine: makes one number of what a unit has in several batch norms, as after sums and concatenations.
        otherwise: the criterion of groups that no batch norm scales; its scores are on another scale (see `scaling`).

    Raises:
        PlanError: when called, for a group without batch norm, if there is no `otherwise`.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    >>> _ = net[1].weight.data.copy_(torch.tensor([0.5, -2.0, 0.0, 1.0]))
    >>> from secateur.graph.groups import find_groups
    >>> BatchNormScale()(net, find_groups(net, torch.zeros(1, 3, 8, 8)))[0].tolist()
    [0.5, 2.0, 0.0, 1.0]
    """

    combine: Combine = mean
    otherwise: Criterion | None = None

    def __call__(self, model: nn.Module, groups: Groups) -> Sequence[Tensor]:
        """One score per unit."""
        found = [[slot for slot in group.slots if _of_batch_norm(model, slot)] for group in groups.groups]
        bare = next((group.name for group, slots in zip(groups.groups, found) if not slots), None)
        if bare is not None and self.otherwise is None:
            raise PlanError(
                f"no batch norm scales the units of group {bare!r}, so there is no gamma to score them by; "
                "give otherwise=, a criterion for such groups, as Magnitude()."
            )
        others = () if bare is None or self.otherwise is None else self.otherwise(model, groups)
        tensors = tensors_of(model)
        out = []
        for number, slots in enumerate(found):
            rows = [by_unit(tensors[s.tensor].detach().to("cpu", torch.float64).abs(), s).mean(1) for s in slots]
            out.append(self.combine(torch.stack(rows)) if rows else others[number])
        return out


def _of_batch_norm(model: nn.Module, slot: Slot) -> bool:
    path, _, name = slot.tensor.rpartition(".")
    return name == "weight" and isinstance(model.get_submodule(path), _BatchNorm)
