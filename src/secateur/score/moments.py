"""Sums over any number of samples, from pieces: mean and scatter, combined exactly and never held together.

Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", equation 1.5: of two sets of n and m
samples, whose means lie d apart, the scatters (sums of squares or products about the mean) add up to

    S = S_n + S_m + n m / (n + m) d d^T
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""(columns, n) -> sums over n of products of columns with columns: which ones is the function's choice."""


def squares(columns: Tensor) -> Tensor:
    """Of each column with itself: (columns,).

    >>> squares(torch.tensor([[1.0, 3.0], [2.0, 0.0]]))
    tensor([10.,  4.])
    """
    return columns.square().sum(1)


def pairs(columns: Tensor) -> Tensor:
    """Of each column with each: (columns, columns).

    >>> pairs(torch.tensor([[1.0, 3.0], [2.0, 0.0]]))
    tensor([[10.,  2.],
            [ 2.,  4.]])
    """
    return columns @ columns.T


def within(sets: Tensor) -> Product:
    """Of the columns in each row of `sets` (sets, m) with each other: (sets, m, m); -1 is a column of zeros.

    >>> within(torch.tensor([[0, 1], [2, -1]]))(torch.tensor([[1.0], [2.0], [5.0]])).tolist()
    [[[1.0, 2.0], [2.0, 4.0]], [[25.0, 0.0], [0.0, 0.0]]]
    """
    ordered = bool((sets.flatten() == torch.arange(sets.numel())).all())

    def product(columns: Tensor) -> Tensor:
        if ordered and sets.numel() == len(columns):
            taken = columns.reshape(*sets.shape, -1)
        else:
            places = sets.to(columns.device)
            taken = columns[places].masked_fill(places.unsqueeze(-1) < 0, 0)
        return taken @ taken.mT

    return product


class Moments:
    """How many samples there were, their mean, and the products of their deviations from it.

    Products are taken in the samples' own precision, about the mean of their piece, and added up in float64.

    Args:
        product: which products are summed.

    >>> moments = Moments(squares)
    >>> for piece in torch.tensor([[1.0, 2.0, 6.0]]).split(2, 1):
    ...     moments.add(piece)
    >>> moments.count, moments.mean, moments.scatter
    (3, tensor([3.], dtype=torch.float64), tensor([14.], dtype=torch.float64))
    """

    def __init__(self, product: Product) -> None:
        self._product = product
        self.count = 0
        self.mean = self.scatter = torch.zeros(0, dtype=torch.float64)

    def add(self, columns: Tensor) -> None:
        """Take in (columns, n)."""
        count = columns.shape[1]
        if not count:
            return
        mean = columns.mean(1, dtype=torch.float64)
        scatter = self._product(columns - mean.to(columns.dtype)[:, None]).double()
        if not self.count:
            self.count, self.mean, self.scatter = count, mean, scatter
            return
        total = self.count + count
        apart = mean - self.mean
        self.scatter += scatter + self._product(apart[:, None]) * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """The mean of the products of deviations."""
        return self.scatter / max(self.count, 1)
