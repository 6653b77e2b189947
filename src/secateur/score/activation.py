"""Statistics of a unit's activation on images without labels, wherever it ends in a sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.graph.nested import Nested
from secateur.graph.records import Groups
from secateur.score.streams import Seen, gather, stream

Statistic = Callable[[Seen], Tensor]
"""Of an end, a number for each column."""


def magnitude(seen: Seen) -> Tensor:
    """The mean of |a| (Molchanov et al. 2017, section 2.2, with absolute values)."""
    return seen.magnitude


def mean_square(seen: Seen) -> Tensor:
    """The mean of a^2."""
    return seen.second


def variance(seen: Seen) -> Tensor:
    """The variance of a (Molchanov et al. 2017, section 2.2, its square root)."""
    return seen.covariance


def nonzero(seen: Seen) -> Tensor:
    """The share of activations that are not exactly zero: 1 - APoZ, the average percentage of zeros of Hu et al. 2016,
    Network Trimming, equation 1."""
    return 1 - seen.zeros


@dataclass(frozen=True)
class Activation:
    """A statistic of what a unit's readers take in, the mean over its cells and over its readers.

    Args:
        batches: model inputs, which can be gone through again and again. No labels.
        statistic: `magnitude`, `mean_square`, `variance`, `nonzero` (APoZ), or a function of yours of what was seen
            at an end (`score.streams.Seen`, pixels for convolutions) that gives a number for each column.

    Raises:
        PlanError: there is no batch.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [-2.0]]))
    >>> from secateur.graph.groups import find_groups
    >>> groups, batches = find_groups(net, torch.zeros(1, 1)), [torch.tensor([[1.0], [3.0], [-1.0], [0.0]])]
    >>> Activation(batches)(net, groups)[0].tolist(), Activation(batches, nonzero)(net, groups)[0].tolist()
    ([1.0, 0.5], [0.5, 0.25])
    """

    batches: Iterable[Nested]
    statistic: Statistic = magnitude

    def __call__(self, model: nn.Module, groups: Groups) -> Sequence[Tensor]:
        """One score per unit."""
        ends = stream(model, groups, self.batches, patches=False)
        sums = gather(groups, ends, lambda seen: seen.by_unit(self.statistic(seen)) / seen.widths)
        readers = gather(groups, ends, lambda seen: seen.widths.sign())
        return [total / count.clamp(min=1) for total, count in zip(sums, readers)]
