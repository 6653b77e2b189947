"""Least squares from streamed moments: weights that give given targets from given inputs, near those that there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUMBERS = 1 << 22
"""In the matrices that are solved at once, if each row has one of its own."""


@dataclass(frozen=True, eq=False)
class Affine:
    """y = W x + b, once for each group of a grouped layer: (groups, outputs, inputs), (groups, outputs); float64."""

    weight: Tensor
    offset: Tensor


class Together:
    """Moments of inputs x and targets t, seen together: (groups, rows, inputs) and (groups, rows, targets).

    Products are taken in the rows' own precision, about the mean of their piece, and added up in float64 (Chan, Golub
    and LeVeque 1983, equation 1.5; see `score.moments`), so that any batches of the same rows give the same.

    >>> seen = Together()
    >>> for x, t in (([[1.0], [2.0]], [[2.0], [4.0]]), ([[6.0]], [[12.0]])):
    ...     seen.add(torch.tensor([x]), torch.tensor([t]))
    >>> seen.count, seen.inputs.flatten().tolist(), seen.crossed.flatten().tolist(), seen.squares.flatten().tolist()
    (3, [14.0], [28.0], [56.0])
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.target = self.inputs = self.crossed = self.squares = torch.zeros(0, dtype=torch.float64)

    def add(self, x: Tensor, t: Tensor, *, inputs_too: bool = True) -> None:
        """Take in rows; without `inputs_too`, the products of inputs with inputs are left at 0."""
        count = x.shape[1]
        mean, target = x.mean(1, dtype=torch.float64), t.mean(1, dtype=torch.float64)
        x, t = x - mean.to(x.dtype).unsqueeze(1), t - target.to(t.dtype).unsqueeze(1)
        crossed = (t.mT @ x).double().cpu()
        inputs = (x.mT @ x).double().cpu() if inputs_too else crossed.new_zeros(len(x), 1, 1)
        squares, mean, target = t.square().sum(1, dtype=torch.float64).cpu(), mean.cpu(), target.cpu()
        self._join(count, mean, target, inputs, crossed, squares)

    def __or__(self, other: Together) -> Together:
        """The moments of both sets of rows."""
        out = Together()
        for seen in (self, other):
            if seen.count:
                out._join(seen.count, seen.mean, seen.target, seen.inputs, seen.crossed, seen.squares)
        return out

    def _join(self, count: int, mean: Tensor, target: Tensor, *products: Tensor) -> None:
        if not self.count:
            self.count, self.mean, self.target = count, mean, target
            self.inputs, self.crossed, self.squares = (tensor.clone() for tensor in products)
            return
        total, (inputs, crossed, squares) = self.count + count, products
        share, moved, turned = self.count * count / total, mean - self.mean, target - self.target
        if inputs.shape[1] == moved.shape[1]:
            inputs = inputs + share * moved.unsqueeze(2) * moved.unsqueeze(1)
        self.inputs += inputs
        self.crossed += crossed + share * turned.unsqueeze(2) * moved.unsqueeze(1)
        self.squares += squares + share * turned.square()
        self.mean, self.target = self.mean + moved * (count / total), self.target + turned * (count / total)
        self.count = total

    def solve(self, start: Affine, ridge: float, free: bool, stays: Tensor | None = None) -> Affine:
        """The map that is best on the rows, drawn towards `start`.

        It minimises E |t - W x - b|^2 + ridge * mean(diag C) * |W - W_start|^2, C being the second moments of x: about
        the mean where b is `free`, and as they are where b must stay. So, with D = E[(t - b) x^T] alike,

            W = W_start + (D - W_start C) (C + ridge * mean(diag C) I)^-1

        and no ridge makes the error larger than that of `start`. Without a ridge it is the solution of least change.

        Args:
            start: what to begin from; zero where weights do not stay.
            ridge: see above.
            free: whether b may change.
            stays: which weights do, (groups, outputs, inputs); None for all. The others are held at zero: each output's
                row is solved by itself, with the rows and columns of D and C that belong to its own weights.
        """
        offset = start.offset - self.target
        inputs, crossed = self.moments(free), self.crossed / self.count
        if not free:
            crossed = crossed - offset.unsqueeze(2) * self.mean.unsqueeze(1)
        left = crossed - start.weight @ inputs
        raised = ridge * inputs.diagonal(dim1=1, dim2=2).mean(1)
        change = _divided(left, inputs, raised) if stays is None else _by_rows(left, inputs, raised, stays)
        weight = start.weight + change
        return Affine(weight, self.target - _times(weight, self.mean) if free else start.offset)

    def moments(self, free: bool) -> Tensor:
        """The second moments of the inputs, (groups, inputs, inputs): about the mean, where an offset is `free`."""
        inputs = self.inputs / self.count
        return inputs if free else inputs + self.mean.unsqueeze(2) * self.mean.unsqueeze(1)

    def error(self, of: Affine) -> float:
        """The mean square of t - W x - b, summed over targets."""
        weight, bias = of.weight, self.target - _times(of.weight, self.mean) - of.offset
        spread = ((weight @ self.inputs - 2 * self.crossed) * weight).sum(2) + self.squares
        return max(0.0, float((spread / self.count + bias.square()).sum()))

    def outcome(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of each W x: (groups, outputs)."""
        spread = ((weight @ self.inputs) * weight).sum(2).clamp(min=0)
        return _times(weight, self.mean), spread / max(self.count - 1, 1)

    @property
    def spread(self) -> float:
        """The variance of the targets, summed."""
        return float(self.squares.sum()) / self.count


def best_ridge(
    halves: tuple[Together, Together],
    start: Affine,
    ridges: Sequence[float],
    free: bool,
    stays: Tensor | None = None,
) -> float:
    """The ridge with which what is solved on one half of the images has the least error on the other, both ways.

    Hastie, Tibshirani and Friedman 2009, "The Elements of Statistical Learning", section 7.10, with two folds. Of equal
    ones, the largest; it takes no rows, only their moments.
    """
    if len(ridges) == 1 or not all(half.count for half in halves):
        return max(ridges)
    one, other = halves

    def error(ridge: float) -> float:
        found = [half.solve(start, ridge, free, stays) for half in halves]
        return other.error(found[0]) * other.count + one.error(found[1]) * one.count

    return min(sorted(ridges, reverse=True), key=error)


def _times(weight: Tensor, mean: Tensor) -> Tensor:
    return (weight @ mean.unsqueeze(2)).squeeze(2)


def _divided(left: Tensor, inputs: Tensor, ridge: Tensor) -> Tensor:
    """left (inputs + ridge I)^-1, with a ridge for each matrix."""
    if (ridge > 0).any():
        raised = inputs + torch.diag_embed(ridge.clamp(min=1e-300).unsqueeze(1).expand(inputs.shape[:2]))
        factor, failed = torch.linalg.cholesky_ex(raised)
        if not failed.any():
            solved: Tensor = torch.cholesky_solve(left.mT, factor).mT
            return solved
        inputs = raised
    inverse: Tensor = torch.linalg.pinv(inputs, hermitian=True, rtol=1e-12)
    return left @ inverse


def _by_rows(left: Tensor, inputs: Tensor, ridge: Tensor, stays: Tensor) -> Tensor:
    """The same for each row with the columns that stay alone, zero elsewhere: (groups, outputs, inputs)."""
    groups, rows, _ = stays.shape
    most = int(stays.sum(2).max())
    out = torch.zeros_like(left).flatten(0, 1)
    # Those that stay first; a row that has fewer is filled up with columns that are then apart from all others.
    order = stays.flatten(0, 1).int().argsort(dim=1, descending=True, stable=True)[:, :most]
    own = stays.flatten(0, 1).gather(1, order)
    group = torch.arange(groups).repeat_interleave(rows)
    for at in torch.arange(groups * rows).split(max(1, NUMBERS // max(1, most * most))):
        columns, real, of = order[at], own[at], group[at]
        block = inputs[of[:, None, None], columns[:, :, None], columns[:, None, :]]
        block = block.masked_fill(~(real[:, :, None] & real[:, None, :]), 0)
        block.diagonal(dim1=1, dim2=2).masked_fill_(~real, 1.0)
        wanted = left.flatten(0, 1)[at].gather(1, columns).masked_fill(~real, 0)
        out[at] = out[at].scatter(1, columns, _divided(wanted.unsqueeze(1), block, ridge[of]).squeeze(1) * real)
    return out.view_as(left)
