"""Reconstruction: a unit matters as much as the others cannot explain it, where it is read; no labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.graph.nested import Nested
from secateur.graph.records import Groups
from secateur.score.brain_surgeon import prices
from secateur.score.streams import gather, stream


@dataclass(frozen=True)
class Reconstruction:
    """What is lost in the readers' outputs when the other units' values are mixed to stand in for this one's.

    With C the covariance of all channels that a reader takes in, the best mix of the others, and a constant, leaves of
    unit u's values the residual covariance [C^-1]_uu^-1: for one channel 1 / [C^-1]_uu, its variance times 1 - R^2 of
    the regression on the others. The score is its trace with the weights that read it, tr([C^-1]_uu^-1 W_u^T W_u).

    In a convolution it is pixels that are mixed, one factor for each pair of channels, which a cut can fold into the
    readers' weights; `BrainSurgeon` mixes patches and finds the best weights there are.

    Args:
        batches: model inputs, which can be gone through again and again. No labels.
        damping: added to C's diagonal, as a share of its mean; it must be above 0.

    Raises:
        PlanError: there is no batch, or the damping is not above 0.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))  # second: twice the first
    >>> _ = net[1].weight.data.fill_(1.0)
    >>> from secateur.graph.groups import find_groups
    >>> groups = find_groups(net, torch.zeros(1, 2))
    >>> images = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> [round(value, 4) for value in Reconstruction([images], damping=1e-8)(net, groups)[0].tolist()]
    [0.0, 0.0, 1.0]
    """

    batches: Iterable[Nested]
    damping: float = 1e-4

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise PlanError(f"the damping is {self.damping}; give a share above 0, such as 1e-4.")

    def __call__(self, model: nn.Module, groups: Groups) -> Sequence[Tensor]:
        """One score per unit."""
        ends = stream(model, groups, self.batches, products="all", patches=False)
        return gather(groups, ends, lambda seen: prices(seen, centred=True, damping=self.damping))
