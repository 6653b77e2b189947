"""Optimal brain surgery on units: what it costs a reader to lose one, when its other weights are solved anew.

Hassibi and Stork 1993, "Second order derivatives for network pruning: Optimal Brain Surgeon", with the squared error of
each layer's own outputs as the loss (Dong et al. 2017, "Learning to Prune Deep Neural Networks via Layer-wise Optimal
Brain Surgeon"), whose Hessian is the second moment of the layer's input; and a unit's columns in place of one weight,
as in SlimGPT (Ling et al. 2024) after SparseGPT (Frantar and Alistarh 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.graph.nested import Nested
from secateur.graph.records import Groups
from secateur.score.streams import Seen, gather, stream


@dataclass(frozen=True)
class BrainSurgeon:
    """By how much the squared error of a unit's readers grows when it goes and their other weights make the best of it.

    Of a reader y = W x with H = E[x x^T], unit u with the columns W_u adds

        tr(W_u [H^-1]_uu^-1 W_u^T),

    the least E |y - y'|^2 over all readers' weights with W'_u = 0 (SlimGPT, equation 4). Convolutions are read by
    patches, so that a unit's columns are its places in the kernel, and W is as seen through the batch norm behind it.
    Units that the others can stand in for score low, however large they are; the score is meant for cuts whose readers
    are then solved anew.

    Args:
        batches: model inputs, which can be gone through again and again. No labels.
        damping: added to H's diagonal, as a share of its mean (0.01 in SparseGPT); it must be above 0.
        in_order: take units out of each group one by one, the cheapest first, and solve for the rest in between. The
            score is then the price at that time, or the highest paid so far in the group; so ranking by score is the
            order. Without, each unit is scored as if it went alone.
        centred: H about the mean: the reader may set a bias anew.

    For each end, two float64 matrices of all its columns squared are held: 42 MB each where 256 channels are read by
    kernels of 3 x 3.

    Raises:
        PlanError: there is no batch, or the damping is not above 0.

    >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.1]]))  # the first two are equal
    >>> _ = net[1].weight.data.fill_(1.0)
    >>> from secateur.graph.groups import find_groups
    >>> groups, batches = find_groups(net, torch.zeros(1, 2)), [torch.eye(2)]
    >>> [round(value, 4) for value in BrainSurgeon(batches, damping=1e-6)(net, groups)[0].tolist()]
    [0.0, 0.0, 0.005]
    """

    batches: Iterable[Nested]
    damping: float = 0.01
    in_order: bool = False
    centred: bool = False

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise PlanError(f"the damping is {self.damping}; give a share above 0, usually 0.01.")

    def __call__(self, model: nn.Module, groups: Groups) -> Sequence[Tensor]:
        """One score per unit."""
        ends = stream(model, groups, self.batches, products="all")
        if not self.in_order:
            return gather(groups, ends, lambda seen: prices(seen, self.centred, self.damping))
        states = [(seen, inverse(_moments(seen, self.centred), self.damping)) for seen in ends]
        out = []
        for first, group in zip(groups.offsets, groups.groups):
            readers = [_Reader.of(seen, inv, first, group.size) for seen, inv in states]
            out.append(_in_order([reader for reader in readers if len(reader.units)], group.size))
        return out


def prices(seen: Seen, centred: bool, damping: float) -> Tensor:
    """For each unit at an end, tr([H^-1]_uu^-1 W_u^T W_u): (units,)."""
    inverted = blocks(inverse(_moments(seen, centred), damping), seen.columns, fill=1.0)
    return _traces(inverted, blocks(seen.reader, seen.columns))


def inverse(moments: Tensor, damping: float) -> Tensor:
    """The inverse of a matrix of moments, its diagonal raised by a share of its mean."""
    mean = moments.diagonal().mean()
    raised = moments.clone()
    raised.diagonal().add_(damping * mean if mean > 0 else 1.0)
    inverted: Tensor = torch.linalg.inv(raised)
    return inverted


def blocks(matrix: Tensor, columns: Tensor, fill: float = 0.0) -> Tensor:
    """The blocks on the diagonal that belong to each row of `columns`: (sets, m, m).

    Where a row is filled up with -1, the block has `fill` on its diagonal and 0 elsewhere.
    """
    found = matrix[columns.unsqueeze(2), columns.unsqueeze(1)]
    missing = columns < 0
    found = found.masked_fill(missing.unsqueeze(1) | missing.unsqueeze(2), 0)
    return found + torch.diag_embed(missing * fill).to(found.dtype)


def _traces(inverted: Tensor, weights: Tensor) -> Tensor:
    """tr(A^-1 B) of symmetric A and B, (units, m, m) each: (units,)."""
    left: Tensor = torch.linalg.inv(inverted)
    return (left * weights).sum((1, 2))


def _moments(seen: Seen, centred: bool) -> Tensor:
    return seen.covariance if centred else seen.second


@dataclass
class _Reader:
    """An end while units go: H^-1, and W^T W of the weights as they are solved by then."""

    units: Tensor
    columns: Tensor
    inverse: Tensor
    weights: Tensor

    @classmethod
    def of(cls, seen: Seen, inverted: Tensor, first: int, size: int) -> _Reader:
        own = (seen.units >= first) & (seen.units < first + size)
        return cls(seen.units[own] - first, seen.columns[own], inverted.clone(), seen.reader.clone())

    def prices(self) -> Tensor:
        """(units,); of no meaning for those that have gone."""
        inverted = blocks(self.inverse, self.columns, fill=1.0)
        gone = inverted.diagonal(dim1=1, dim2=2).amax(1) <= 0
        inverted[gone] = torch.eye(inverted.shape[1], dtype=inverted.dtype)
        return _traces(inverted, blocks(self.weights, self.columns))

    def take_out(self, unit: int) -> None:
        for row in self.columns[self.units == unit]:
            at = row[row >= 0]
            share = torch.linalg.solve(self.inverse[at][:, at], self.inverse[at])
            self.inverse -= self.inverse[:, at] @ share
            moved = self.weights[:, at] @ share
            self.weights += share.T @ (self.weights[at][:, at] @ share) - moved - moved.T
            for matrix in (self.inverse, self.weights):  # what is left there is rounding
                matrix[at] = matrix[:, at] = 0


def _in_order(readers: Sequence[_Reader], size: int) -> Tensor:
    """The prices at which units go, the cheapest first, none below one paid before."""
    scores, left, paid = torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.bool), 0.0
    for _ in range(size):
        prices = torch.zeros(size, dtype=torch.float64)
        for reader in readers:
            prices.index_add_(0, reader.units, reader.prices())
        unit = int(prices.masked_fill(~left, float("inf")).argmin())
        paid = max(paid, float(prices[unit]))
        scores[unit], left[unit] = paid, False
        for reader in readers:
            reader.take_out(unit)
    return scores
