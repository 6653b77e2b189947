"""What is left after some steps, and what each step would save, exactly: `Meter`, for searches that ask often.

The costs of a model are sums of products of counts (`graph.costs`); a step takes a few off some counts. So what a step
saves depends on the steps already taken, and the derivatives of the products say how much.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array

from secateur.allocate.ladder import Floats, Gone, Ints, Ladder
from secateur.graph.costs import Product, tensor_products
from secateur.graph.records import Groups


class Meter:
    """The measures of a budget as functions of the steps taken.

    Args:
        groups: the model's.
        ladder: the steps.
        measures: "params", "macs", "bytes" or "units", each a row of the answers.
    """

    def __init__(self, groups: Groups, ladder: Ladder, measures: Sequence[str]) -> None:
        products, weights = _terms(groups, measures)
        axes = list(dict.fromkeys([(-1,), *(axis for product in products for axis in product.axes)]))
        place = {axis: i for i, axis in enumerate(axes)}
        width = max((len(product.axes) for product in products), default=0)
        rows = [[*(place[axis] for axis in p.axes), *[0] * (width - len(p.axes))] for p in products]
        self._rows = np.array(rows, np.int64).reshape(len(products), width)
        self._weights = weights
        lengths = [len(axis) for axis in axes]
        self._full = np.array(lengths, np.int64)
        # drops[axis, step]: by how much the count of an axis falls in a step.
        steps = ladder.step_of[np.concatenate([np.array(axis, np.int64) for axis in axes])]
        along = np.repeat(np.arange(len(axes)), lengths)
        entries = (np.ones(int((steps >= 0).sum()), np.int64), (along[steps >= 0], steps[steps >= 0]))
        self._drops = coo_array(entries, shape=(len(axes), len(ladder.values))).tocsc()
        self._drops.sum_duplicates()

    def lengths(self, gone: Gone) -> Ints:
        """How many units stay on each axis of the model's tensors: what the other methods take."""
        return np.asarray(self._full - self._drops @ gone.astype(np.int64))

    def regained(self, lengths: Ints, step: int) -> Ints:
        """The lengths with a step given back."""
        drops, out = self._drops, lengths.copy()
        entries = slice(drops.indptr[step], drops.indptr[step + 1])
        out[drops.indices[entries]] += drops.data[entries]
        return out

    def left(self, lengths: Ints) -> Ints:
        """(measures,) what is left."""
        return np.asarray(self._weights @ lengths[self._rows].prod(1))

    def prices(self, lengths: Ints) -> Floats:
        """(measures, steps) how much each step is worth where these lengths are left: the derivative along it."""
        factors = lengths[self._rows].astype(np.float64)
        slopes = np.zeros((len(self._weights), len(lengths)))
        for i in range(factors.shape[1]):
            others = np.delete(factors, i, 1).prod(1)
            for row, weights in zip(slopes, self._weights):
                row += np.bincount(self._rows[:, i], weights * others, minlength=len(lengths))
        return np.asarray((self._drops.T @ slopes.T).T)


def _terms(groups: Groups, measures: Sequence[str]) -> tuple[list[Product], NDArray[np.int64]]:
    """The products that the measures are sums of, and (measures, products) how often each counts."""
    tensors = tensor_products(groups.groups, groups.tensors) if {"params", "bytes"} & set(measures) else []
    products = list(groups.products) if "macs" in measures else []
    units = [Product("", 1, (tuple(range(first, last)),)) for first, last in itertools.pairwise(groups.offsets)]
    units = units if "units" in measures else []
    of_tensors = {
        "params": [int(info.parameter) for info in groups.tensors],
        "bytes": [info.itemsize for info in groups.tensors],
    }
    rows = []
    for measure in measures:
        times = of_tensors.get(measure, [0] * len(groups.tensors))[: len(tensors)]
        macs, one = int(measure == "macs"), int(measure == "units")
        rows.append([*times, *[macs] * len(products), *[one] * len(units)])
    terms = [*tensors, *products, *units]
    constants = np.array([product.constant for product in terms], np.int64)
    return terms, np.array(rows, np.int64).reshape(len(measures), len(terms)) * constants
