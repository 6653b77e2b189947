"""Numbers for units, and union-find over all that is said about them: what is one, what may not go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Ids = NDArray[np.int64]

Split = Literal["outer", "inner"]
"""Of an axis that a reshape splits, such as into heads x width, which factor can be cut: heads, or the width of all."""


@dataclass(frozen=True)
class UnitBlock:
    """Units along some axes of a value, numbered as `Groups.unit_names` does; -1 is one that always stays."""

    dims: tuple[int, ...]
    units: Ids


class Units:
    """The numbers handed out, and all that the ops said about them; solved at the end, and again if more is said."""

    def __init__(self) -> None:
        self.count = 0
        self._root: Ids = np.empty(0, np.int64)
        self._classes = 0
        self._edges: list[tuple[Ids, Ids]] = []
        self._frozen: list[tuple[Ids, str]] = []
        self._inexact: list[tuple[Ids, str]] = []

    def fresh(self, size: int) -> Ids:
        """`size` new units."""
        ids = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return ids

    def unite(self, a: Ids, b: Ids) -> None:
        """a[i] and b[i] are one unit, for every i (shapes broadcast)."""
        if a is not b:
            a, b = np.broadcast_arrays(a, b)
            self._edges.append((a.ravel(), b.ravel()))

    def freeze(self, ids: Ids, reason: str) -> None:
        """These units may not be cut."""
        self._frozen.append((ids.ravel(), reason))

    def inexact(self, ids: Ids, reason: str) -> None:
        """Cutting these units changes a statistic over the units that stay."""
        self._inexact.append((ids.ravel(), reason))

    def solve(self) -> Solution:
        """The classes of units that are one: those found before, joined by what was said since."""
        classes = self._classes + self.count - len(self._root)
        root = np.concatenate([self._root, np.arange(self._classes, classes)])
        none = np.empty(0, np.int64)
        sources = root[np.concatenate([none, *(a for a, _ in self._edges)])]
        targets = root[np.concatenate([none, *(b for _, b in self._edges)])]
        apart = sources != targets
        if apart.any():
            edges = (sources[apart], targets[apart])
            graph = coo_array((np.ones(len(edges[0]), np.int8), edges), shape=(classes, classes))
            classes, label = connected_components(graph, directed=False)
            root = label.astype(np.int64)[root]
        self._root, self._classes, self._edges = root, classes, []
        return Solution(root, _reasons(root, classes, self._frozen), _reasons(root, classes, self._inexact))


@dataclass(frozen=True)
class Solution:
    """`root[unit]` is its class; `frozen[class]` and `inexact[class]` index `reasons`, -1 where there is none."""

    root: Ids
    _frozen: tuple[Ids, tuple[str, ...]]
    _inexact: tuple[Ids, tuple[str, ...]]

    def frozen(self, roots: Ids) -> NDArray[np.bool_]:
        return np.asarray(self._frozen[0][roots] >= 0)

    def why_frozen(self, root: int) -> str:
        return self._frozen[1][int(self._frozen[0][root])]

    def why_inexact(self, root: int) -> str:
        index = int(self._inexact[0][root])
        return self._inexact[1][index] if index >= 0 else ""


def _reasons(root: Ids, count: int, said: Sequence[tuple[Ids, str]]) -> tuple[Ids, tuple[str, ...]]:
    first = np.full(count, -1, np.int64)
    # Backwards, so that the reason given first is the one that stays.
    for index in range(len(said) - 1, -1, -1):
        first[root[said[index][0]]] = index
    return first, tuple(reason for _, reason in said)
