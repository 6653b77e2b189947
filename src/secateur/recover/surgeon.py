"""Optimal brain surgery on single weights: in which order they go, and what each costs when the others make up for it.

Everything here is a quadratic: around the weights W that are best for the inputs seen, leaving V instead costs
tr((V - W) H (V - W)^T), with H the second moments of the inputs, raised by a damping.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BATCH = 1 << 19
"""Numbers in the inverses that are worked on at once: what a processor's cache holds."""
BLOCK = 128


def prices(weights: Tensor, hessian: Tensor, parts: Tensor | None = None, most: int = 0) -> Tensor:
    """What each weight costs when its turn comes, row by row, the cheapest first.

    ExactOBS (Frantar and Alistarh 2022, Optimal Brain Compression, algorithm 1): of a row w, the weight p with the
    least w_p^2 / [H^-1]_pp goes, and the others become the best that they can be without it,

        w <- w - w_p / [H^-1]_pp H^-1_:p,     H^-1 <- H^-1 - H^-1_:p H^-1_p: / [H^-1]_pp,

    so each price is by how much the cost of the row rises. As a price counts that, or a trifle more than the one paid
    before in its row, whatever goes below some limit is the beginning of the row's order; with one limit for all rows,
    that is what algorithm 2 there chooses.

    Args:
        weights: (rows, columns), the best for `hessian`; float64.
        hessian: (columns, columns), positive definite.
        parts: (columns,) numbers of sets; of each set, at most `most` go, and the others are priced at infinity.

    >>> prices(torch.tensor([[1.0, 2.0, 2.0]]).double(), torch.tensor([[1.0, 0, 0], [0, 1, 0.9], [0, 0.9, 1]]).double())
    tensor([[ 1.0000,  0.7600, 14.4400]], dtype=torch.float64)
    """
    inverse = torch.linalg.inv(hessian)
    inverse = (inverse + inverse.T) / 2
    size = max(1, BATCH // hessian.numel())
    return torch.cat([_prices(rows.clone(), inverse, parts, most) for rows in weights.split(size)])


def _prices(w: Tensor, inverse: Tensor, parts: Tensor | None, most: int) -> Tensor:
    """The same for few rows, each with an inverse of its own, out of which columns are taken as they go."""
    rows, columns = w.shape
    each = torch.arange(rows)
    inverses = inverse.expand(rows, columns, columns).clone()
    places = torch.arange(columns).expand(rows, columns).clone()
    gone = torch.zeros(rows, columns, dtype=torch.bool)
    paid, out = w.new_zeros(rows), torch.full_like(w, torch.inf)
    left = None if parts is None else torch.full((rows, int(parts.max()) + 1), most)
    count = columns if left is None else int(left.shape[1]) * most
    for step in range(count):
        pivots = inverses.diagonal(dim1=1, dim2=2)
        costs = (w.square() / pivots.clamp(min=1e-300)).masked_fill_(gone, torch.inf)
        if left is not None and parts is not None:
            costs = costs.masked_fill(left.gather(1, parts[places]) == 0, torch.inf)
        at = costs.argmin(1)
        paid = torch.maximum(paid * (1 + 1e-9), costs[each, at])  # so that no two are alike and the order is kept
        out[each, places[each, at]] = paid
        gone[each, at] = True
        if left is not None and parts is not None:
            left[each, parts[places[each, at]]] -= 1
        column, pivot = inverses[each, :, at], pivots[each, at].clamp(min=1e-300)
        w = w.addcmul(column, (w[each, at] / pivot).unsqueeze(1), value=-1).masked_fill_(gone, 0)
        inverses.baddbmm_(column.unsqueeze(2), (column / pivot.unsqueeze(1)).unsqueeze(1), alpha=-1)
        stay = columns - step - 1
        if stay and 4 * stay <= 3 * w.shape[1]:  # a quarter has gone
            kept = (~gone).nonzero()[:, 1].view(rows, stay)
            w, places, gone = w.gather(1, kept), places.gather(1, kept), gone.gather(1, kept)
            inverses = inverses[each[:, None, None], kept[:, :, None], kept[:, None, :]]
    return out


def in_blocks(weights: Tensor, hessian: Tensor, share: float, parts: Tensor | None = None, most: int = 0) -> Tensor:
    """Which weights stay, chosen in blocks of columns: much faster than `prices` where there are many columns.

    SparseGPT (Frantar and Alistarh 2023, algorithm 1): with U the Cholesky factor of H^-1, upper, columns are gone
    through in order; of each block of 128, the share with the least w_j^2 / U_jj^2 goes, in all rows together, and
    what goes is made up for by the columns behind it. The weights that stay are solved anew afterwards.

    Args:
        weights, hessian: as in `prices`.
        share: that goes of each block.
        parts: (columns,) as in `prices`: `most` of each set go, in each row, whatever the share.

    >>> in_blocks(torch.tensor([[1.0, 3.0, 2.0, 4.0]]).double(), torch.eye(4).double(), 0.5)
    tensor([[False,  True, False,  True]])
    """
    order = torch.arange(weights.shape[1]) if parts is None else parts.argsort(stable=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    w, stays = weights[:, order].clone(), torch.ones_like(weights, dtype=torch.bool)
    for block in _blocks(None if parts is None else parts[order], len(order)):
        costs = (w[:, block] / upper.diagonal()[block]).square()
        if parts is None:
            first = costs.flatten().argsort(stable=True)[: round(share * costs.numel())]
        else:
            first = costs.argsort(dim=1, stable=True)[:, :most] + torch.arange(len(w)).unsqueeze(1) * costs.shape[1]
        own = torch.ones(costs.numel(), dtype=torch.bool)
        own[first.flatten()] = False
        stays[:, block] = own.view(costs.shape)
        for column in range(block.start, block.stop):
            error = w[:, column] / upper[column, column] * ~stays[:, column]
            w[:, column:] -= error.unsqueeze(1) * upper[column, column:]
    out = torch.empty_like(stays)
    out[:, order] = stays
    return out


def _blocks(parts: Tensor | None, columns: int) -> Iterator[slice]:
    """Sets of columns that follow one another: of one number each, or of so many."""
    sizes = [BLOCK] * (columns // BLOCK) + [columns % BLOCK] if parts is None else parts.bincount().tolist()
    start = 0
    for size in sizes:
        if size:
            yield slice(start, start + size)
            start += size
