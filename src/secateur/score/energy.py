"""Energy: a unit matters as much as it adds to what its readers compute, measured on images without labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.graph.nested import Nested
from secateur.graph.records import Groups
from secateur.score.streams import Seen, gather, stream


@dataclass(frozen=True)
class Energy:
    """The mean square of what a unit contributes to its readers' outputs, summed over outputs and readers.

    A reader computes y = W x, and a unit u has the columns W_u and the entries x_u: several, for the places in a
    kernel, or for a channel that was flattened. Its score is the sum over its readers of

        E |W_u x_u|^2 = tr(W_u^T W_u E[x_u x_u^T]),

    W as seen through the batch norm behind it (W diag(gamma / sqrt(variance + eps))). For one column it is the mean
    square of the activation times the squared norm of the weights that read it. It is by how much the squared error of
    the outputs grows when this unit alone goes and nothing else changes; ThiNet (Luo et al. 2017, equation 6)
    minimises the same for sets of units.

    Args:
        batches: model inputs, which can be gone through again and again. No labels.
        centred: the variance of the contribution in place of its mean square: what is left when a bias, or the
            batch norm's statistics, are set anew after the cut.

    Raises:
        PlanError: there is no batch.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [-2.0]]))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[3.0, 1.0]]))
    >>> from secateur.graph.groups import find_groups
    >>> groups, batches = find_groups(net, torch.zeros(1, 1)), [torch.tensor([[1.0], [3.0]])]
    >>> Energy(batches)(net, groups)[0].tolist(), Energy(batches, centred=True)(net, groups)[0].tolist()
    ([45.0, 20.0], [9.0, 4.0])
    """

    batches: Iterable[Nested]
    centred: bool = False

    def __call__(self, model: nn.Module, groups: Groups) -> Sequence[Tensor]:
        """One score per unit."""
        return gather(groups, stream(model, groups, self.batches, products="units"), self._energies)

    def _energies(self, seen: Seen) -> Tensor:
        return ((seen.covariance if self.centred else seen.second) * seen.reader).sum((1, 2))
