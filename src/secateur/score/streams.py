"""Statistics of units, wherever they end in a sum: of what the reader takes in, and of the weights it takes it in with.

What a criterion needs of a run is, at each end, the second moments of the samples that are summed over, and the same
products of the reader's weights: the trace of one times the other is the energy that units give to the reader's output.
Both come in three kinds: of each column alone, of a unit's columns with each other, or of all columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from secateur.graph.nested import Nested
from secateur.graph.records import Groups
from secateur.graph.twin import tensors_of
from secateur.score.ends import End, Norm, Sight, visit
from secateur.score.moments import Moments, Product, pairs, squares, within
from secateur.score.readers import samples_of, weights_of

Pairs = Literal["each", "units", "all"]


@dataclass(frozen=True, eq=False)
class Seen:
    """What was seen at one end. Columns are cells x places in a convolution's kernel; float64 on the CPU.

    `units[i]`, counted as `Groups.offsets` do, has the columns `columns[i]`; where others have more, -1 fills up.
    `products` says which products there are, of columns with columns:

    - "each": (columns,), squares;
    - "units": (units, m, m), of each unit's columns with each other;
    - "all": (columns, columns).

    Args:
        count: how many samples.
        mean: (columns,).
        magnitude, zeros: (columns,) the mean of absolute values and the share of exact zeros; where products are
            "each" only, and empty otherwise.
        covariance: products of deviations from the mean, their mean over the samples.
        reader: products of the reader's weights, their sum over its outputs; through the batch norm behind it, if any.
        weights: (outputs, columns) these weights, if they are the same in every batch; otherwise no rows.
        normed: whether there is such a batch norm.
        joined: the variance, summed over channels, of what the outputs become a part of: the residual stream that they
            are added to, or they themselves. NaN where it was not asked for.
    """

    units: Tensor
    columns: Tensor
    products: Pairs
    count: int
    mean: Tensor
    magnitude: Tensor
    zeros: Tensor
    covariance: Tensor
    reader: Tensor
    weights: Tensor
    normed: bool
    joined: float

    @property
    def product(self) -> Product:
        """The function that took the products."""
        return _product(self.products, self.columns)

    @property
    def second(self) -> Tensor:
        """The mean of the products themselves: not about the mean."""
        return self.covariance + self.product(self.mean[:, None])

    def by_unit(self, values: Tensor) -> Tensor:
        """The sum of a number for each column over each unit's: (columns,) -> (units,)."""
        return torch.cat([values, values.new_zeros(1)])[self.columns].sum(1)

    @property
    def widths(self) -> Tensor:
        """How many columns each unit has."""
        return (self.columns >= 0).sum(1)


def stream(
    model: nn.Module,
    groups: Groups,
    batches: Iterable[Nested],
    *,
    products: Pairs = "each",
    patches: bool = True,
    joined: bool = False,
) -> tuple[Seen, ...]:
    """Run the model over all batches and note, at each end of units, what the reader sees.

    Memory does not grow with the number of images: it is what one batch needs, and the products.

    Args:
        model: left as found; a copy is run, in eval mode.
        groups: those of the model.
        batches: model inputs, as `find_groups` takes them, of any sizes.
        products: which products of columns with columns are wanted.
        patches: a convolution reads patches: every channel has a column for each place in its kernel. Without, it
            reads pixels: a channel is one column, and its reader's outputs are those of each place in the kernel.
        joined: whether `Seen.joined` is wanted.

    Raises:
        PlanError: there is no batch. CaptureError: the model does not run on one.

    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [-2.0]]))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[3.0, 1.0]]))
    >>> from secateur.graph.groups import find_groups
    >>> groups = find_groups(net, torch.zeros(1, 1))
    >>> (seen,) = stream(net, groups, [torch.tensor([[1.0]]), torch.tensor([[3.0]])])
    >>> seen.count, seen.mean.tolist(), seen.second.tolist(), seen.reader.tolist()
    (2, [2.0, -4.0], [5.0, 20.0], [9.0, 1.0])
    """
    tensors = tensors_of(model)
    found: dict[object, _Sums] = {}

    def see(end: End, sight: Sight) -> None:
        if end.key not in found:
            if not (end.units >= 0).any():
                return
            found[end.key] = _Sums(products, patches)
        found[end.key].add(end, sight, tensors)

    def join(end: End, whole: Tensor) -> None:
        if end.key in found:
            channels = 1 if end.op == "convolution" or end.norm is not None else -1
            found[end.key].whole.add(whole.detach().movedim(channels if whole.ndim > 1 else 0, 0).flatten(1))

    visit(model, groups, batches, see, join if joined else None)
    return tuple(sums.seen() for sums in found.values() if sums.count)


def gather(groups: Groups, ends: Sequence[Seen], values: Callable[[Seen], Tensor]) -> list[Tensor]:
    """For each group the sum, over the ends, of a number for each unit that ends there; 0 for one that ends nowhere.

    Args:
        values: of an end, (units,).
    """
    sums = torch.zeros(groups.offsets[-1], dtype=torch.float64)
    for seen in ends:
        sums.index_add_(0, seen.units, values(seen).double())
    return [sums[first : first + group.size] for first, group in zip(groups.offsets, groups.groups)]


class _Sums:
    """The sums at one end while batches come in."""

    def __init__(self, products: Pairs, patches: bool) -> None:
        self._products, self._patches = products, patches
        self._units, self._columns = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.int64)
        self._moments: Moments | None = None
        self._sizes = self._zeros = torch.zeros(1, dtype=torch.float64)
        self._reader, self._calls = torch.zeros((), dtype=torch.float64), 0
        self._weights, self._normed = torch.zeros(0), False
        self.whole = Moments(squares)

    @property
    def count(self) -> int:
        """How many rows have come in."""
        return 0 if self._moments is None else self._moments.count

    def add(self, end: End, sight: Sight, tensors: dict[str, Tensor]) -> None:
        for samples in samples_of(end, sight, self._patches):
            if not samples.shape[2]:
                continue
            if self._moments is None:
                self._units, self._columns = _columns(end.units.ravel(), samples.shape[1])
                self._moments = Moments(_product(self._products, self._columns))
            flat = samples.flatten(0, 1)
            self._moments.add(flat)
            if self._products == "each":
                self._sizes = self._sizes + flat.abs().sum(1, dtype=torch.float64).cpu()
                self._zeros = self._zeros + (flat == 0).sum(1).double().cpu()
        if self._moments is None:
            return
        weights = _scaled(weights_of(end, sight, self._patches), end.norm, tensors).double().flatten(1)
        self._reader = self._reader + _product(self._products, self._columns)(weights.T).cpu()
        same = not self._calls or (weights.shape == self._weights.shape and torch.equal(weights, self._weights))
        self._weights = weights if same else weights[:0]
        self._normed = end.norm is not None
        self._calls += 1

    def seen(self) -> Seen:
        moments = self._moments
        assert moments is not None
        return Seen(
            self._units,
            self._columns,
            self._products,
            moments.count,
            moments.mean.cpu(),
            self._sizes / moments.count,
            self._zeros / moments.count,
            moments.covariance.cpu(),
            self._reader / self._calls,
            self._weights.cpu(),
            self._normed,
            float(self.whole.covariance.sum()) if self.whole.count else math.nan,
        )


def _columns(cells: np.ndarray[tuple[int, ...], np.dtype[np.int64]], places: int) -> tuple[Tensor, Tensor]:
    """The units among the cells, and the columns of each: (units,), (units, most), filled up with -1."""
    units = [int(unit) for unit in np.unique(cells) if unit >= 0]
    rows = [(np.flatnonzero(cells == unit)[:, None] * places + np.arange(places)).ravel() for unit in units]
    out = np.full((len(rows), max(len(row) for row in rows)), -1, np.int64)
    for line, row in zip(out, rows):
        line[: len(row)] = row
    return torch.tensor(units), torch.from_numpy(out)


def _product(products: Pairs, columns: Tensor) -> Product:
    return {"each": squares, "all": pairs}[products] if products != "units" else within(columns)


def _scaled(weights: Tensor, norm: Norm | None, tensors: dict[str, Tensor]) -> Tensor:
    """The reader's weights as seen through the batch norm behind it."""
    if norm is None or norm.variance not in tensors:
        return weights
    scale = (tensors[norm.variance].double() + norm.eps).rsqrt()
    if norm.weight in tensors:
        scale = scale * tensors[norm.weight].detach().double()
    several, rest = divmod(len(weights), len(scale))
    if rest or not several:
        return weights
    return weights * scale.repeat_interleave(several).reshape(-1, 1, 1)
