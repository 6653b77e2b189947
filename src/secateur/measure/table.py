"""How long each layer of a model takes at which widths, measured; and what that says of any plan: `LatencyTable`.

The latency of a cut model is taken to be

    scale * (the sum over its layers) + per_million * (numbers that all else writes, in millions) + constant.

Layers are the calls that MACs are counted of, each timed alone (`measure_table`), and between the measured widths time
is linear in each. All else is norms, activations, sums, pooling, Python; its two rates, and how much faster or slower
layers are within the model than alone, are fitted on the whole model and a few cuts of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from secateur.graph.costs import Axis, Product, Stays
from secateur.graph.records import Groups, _from_runs, _to_runs

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BLOCK = 16
"""Kernels round widths up to a multiple of this at most, or have other kernels for the rest."""


class Planned(Protocol):
    """What a `Plan` has."""

    @property
    def groups(self) -> Groups: ...
    @property
    def keep(self) -> tuple[tuple[int, ...], ...]: ...


@dataclass(frozen=True)
class Conditions:
    """What was measured on: a table holds for these only.

    `runtime` is the name of what ran the whole models, `layers` of what ran the layers alone; `copied_gb_s` is how fast
    memory is copied, read and written; `call_ms` is what a call of one number takes, which layers' times are without.
    """

    runtime: str
    layers: str
    device: str
    machine: str
    threads: int
    batch: int
    dtype: str
    torch: str
    copied_gb_s: float
    call_ms: float


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of a layer alone, on a grid of the lengths of its variables.

    Args:
        op: the ATen op.
        shapes: of its operands, in the whole model.
        sizes: how long each variable is in the whole model, such as the channels in and out.
        repeats: entries along each variable that are one unit.
        widths: for each variable, those measured, ascending; of a `joint` layer one row, in percent of all sizes.
        ms: the last variable's widths fastest.
        pulls: for each variable, of widths that are a multiple of 16, 8, 4, 2 and 1, how far they count as rounded up
            to the next multiple of 16: 0 not at all, 1 wholly.
        slower: the same, how many times longer they take than the next multiple of 16: another kernel's price.
        traffic: bytes of its operands, as (constant, variables), each to be multiplied.
    """

    op: str
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    repeats: tuple[int, ...]
    widths: tuple[tuple[int, ...], ...]
    joint: bool
    ms: tuple[float, ...]
    pulls: tuple[tuple[float, ...], ...]
    slower: tuple[tuple[float, ...], ...]
    traffic: tuple[tuple[int, tuple[int, ...]], ...]

    @cached_property
    def grid(self) -> Floats:
        """(widths of the first variable, of the second) milliseconds."""
        return np.array(self.ms).reshape([len(row) for row in self.widths])

    @cached_property
    def places(self) -> tuple[tuple[Ints, Floats, Floats], ...]:
        """For each variable and each length: the grid point below, how far it is to the next, how much slower."""
        out = []
        for row, size, repeat, pulls, slower in zip(self.widths, self.sizes, self.repeats, self.pulls, self.slower):
            lengths = np.arange(size + 1)
            units = lengths // repeat
            kind = np.where(lengths == size, 0, kinds(units))
            rounded = np.minimum(-(-units // BLOCK) * BLOCK * repeat, size)
            low, share = between(row, lengths + np.array(pulls)[kind] * (rounded - lengths))
            out.append((low, share, np.array(slower)[kind]))
        return tuple(out)

    def at(self, widths: Ints) -> Floats:
        """(n,) milliseconds at (n, variables) widths, entries along each."""
        if self.joint:
            shares = (widths / np.array(self.sizes)).prod(1) ** (1 / len(self.sizes))
            return interpolated(self.grid, [between(self.widths[0], 100 * shares)])
        found = [(low[at], share[at]) for (low, share, _), at in zip(self.places, widths.T)]
        factors = [slower[at] for (_, _, slower), at in zip(self.places, widths.T)]
        slower = np.max([np.ones(len(widths)), *factors], axis=0)
        return np.asarray(interpolated(self.grid, found, len(widths)) * slower)


@dataclass(frozen=True)
class TimedCall:
    """A call of `module` that takes as long as layer number `layer`, whose variables are `axes`."""

    module: str
    layer: int
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Fit:
    """How whole models follow from the sum over layers (see above)."""

    scale: float
    per_million: float
    constant: float


@dataclass(frozen=True)
class Check:
    """A model that the fit was made on: how many of all units it has, what it took, and what the table says."""

    units: float
    measured_ms: float
    predicted_ms: float


@dataclass(frozen=True)
class LatencyTable:
    """What a model's layers take on one machine, and so any cut of it; from `measure_table`.

    `units` are those of all groups together, `written` the numbers that calls write which are not timed alone.
    """

    conditions: Conditions
    units: int
    layers: tuple[LayerTimes, ...]
    calls: tuple[TimedCall, ...]
    written: tuple[Product, ...]
    fit: Fit
    checks: tuple[Check, ...]

    @cached_property
    def clock(self) -> Clock:
        """The table for a search, which asks often."""
        return Clock(self)

    @cached_property
    def whole_ms(self) -> float:
        """Milliseconds of the whole model, predicted."""
        return self.predict(np.ones(self.units + 1, np.bool_))

    def predict(self, plan: Planned | Stays) -> float:
        """Milliseconds of one forward pass of the cut model, under the table's conditions.

        Args:
            plan: a `Plan`, or which units stay, as `Groups.stays` makes it.

        Raises:
            ValueError: the units are not those of the table's model.
        """
        stays = plan if isinstance(plan, np.ndarray) else plan.groups.stays(plan.keep)
        if stays.shape != (self.units + 1,):
            raise ValueError(f"the table is of a model with {self.units} units, and the plan's has {len(stays) - 1}.")
        return float(self.clock.ms(self.clock.lengths(stays)[None])[0])

    def to_json(self) -> dict[str, Any]:
        """Plain values; axes are kept as runs `[first, step, count]`, each once."""
        axes = list(self.clock.axes)
        place = {axis: i for i, axis in enumerate(axes)}
        return {
            "version": 1,
            "conditions": asdict(self.conditions),
            "units": self.units,
            "layers": [asdict(layer) for layer in self.layers],
            "axes": [_to_runs(axis) for axis in axes],
            "calls": [[call.module, call.layer, [place[axis] for axis in call.axes]] for call in self.calls],
            "written": [[product.constant, [place[axis] for axis in product.axes]] for product in self.written],
            "fit": asdict(self.fit),
            "checks": [asdict(check) for check in self.checks],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The record that `to_json` wrote."""
        axes = [_from_runs(runs) for runs in value["axes"]]
        return cls(
            Conditions(**value["conditions"]),
            value["units"],
            tuple(LayerTimes(**{key: _frozen(item) for key, item in row.items()}) for row in value["layers"]),
            tuple(TimedCall(module, layer, tuple(axes[i] for i in row)) for module, layer, row in value["calls"]),
            tuple(Product("", constant, tuple(axes[i] for i in row)) for constant, row in value["written"]),
            Fit(**value["fit"]),
            tuple(Check(**row) for row in value["checks"]),
        )


Curve = Callable[[Ints], Floats]
"""(n, axes) lengths -> (n,) milliseconds."""


class Clock:
    """A table's prediction as a function of the lengths of axes, for many plans at once."""

    def __init__(self, table: LatencyTable) -> None:
        self._table = table
        mine = [*(call.axes for call in table.calls), *(product.axes for product in table.written)]
        self.axes: tuple[Axis, ...] = tuple(dict.fromkeys([(-1,), *(axis for axes in mine for axis in axes)]))
        place = {axis: i for i, axis in enumerate(self.axes)}
        self._units = np.concatenate([np.array(axis, np.int64) for axis in self.axes])
        self._starts = np.cumsum([0, *(len(axis) for axis in self.axes[:-1])])
        self.calls = [[place[axis] for axis in call.axes] for call in table.calls]
        width = max((len(product.axes) for product in table.written), default=0)
        rows = [[*(place[a] for a in p.axes), *[0] * (width - len(p.axes))] for p in table.written]
        self._rows = np.array(rows, np.int64).reshape(len(rows), width)
        self._constants = np.array([product.constant for product in table.written], np.float64)
        self._plain = _Plain(table, self.calls)
        self._joint = [i for i, call in enumerate(table.calls) if table.layers[call.layer].joint]

    def lengths(self, stays: Stays) -> Ints:
        """(axes,) how long each axis is when these units stay."""
        return np.add.reduceat(stays[self._units], self._starts, dtype=np.int64)

    def falls(self, step_of: Ints, steps: int) -> Ints:
        """(steps, axes) how much shorter each step makes each axis; `step_of` has each unit's, -1 for never."""
        step, axis = step_of[self._units], np.repeat(np.arange(len(self.axes)), list(map(len, self.axes)))
        counts = np.bincount((step * len(self.axes) + axis)[step >= 0], minlength=steps * len(self.axes))
        return np.asarray(counts.reshape(steps, len(self.axes)), np.int64)

    def curve(self, changing: NDArray[np.bool_]) -> Curve:
        """`ms` where only these axes change from row to row: the calls that they touch are looked up, others once."""
        touched = np.array([bool(changing[list(axes)].any()) if axes else False for axes in self.calls], np.bool_)

        def ms(lengths: Ints) -> Floats:
            once = self._sum(lengths[:1], np.flatnonzero(~touched))
            layers = self._sum(lengths, np.flatnonzero(touched)) + once
            return np.asarray(self._table.fit.scale * layers + self.rest(lengths))

        return ms

    def _sum(self, lengths: Ints, calls: Ints) -> Floats:
        out = self._plain(lengths, calls).sum(1)
        for i in self._joint:
            if i in calls:
                out += self._table.layers[self._table.calls[i].layer].at(lengths[:, self.calls[i]])
        return np.asarray(out)

    def alone(self, lengths: Ints) -> Floats:
        """(n, calls) milliseconds of each call alone, for (n, axes) lengths."""
        out = np.zeros((len(lengths), len(self.calls)))
        out[:, self._plain.numbers] = self._plain(lengths, np.arange(len(self.calls)))
        for i in self._joint:
            out[:, i] = self._table.layers[self._table.calls[i].layer].at(lengths[:, self.calls[i]])
        return out

    def rest(self, lengths: Ints) -> Floats:
        """(n,) milliseconds of all that is not timed alone."""
        fit, counts = self._table.fit, lengths[:, self._rows].astype(np.float64).prod(2)
        return np.asarray(fit.constant + fit.per_million * 1e-6 * (counts @ self._constants))

    def ms(self, lengths: Ints) -> Floats:
        """(n,) milliseconds of the whole, for (n, axes) lengths."""
        return np.asarray(self._table.fit.scale * self.alone(lengths).sum(1) + self.rest(lengths))


class _Plain:
    """The calls of up to two variables, all looked up at once."""

    def __init__(self, table: LatencyTable, axes: Sequence[Sequence[int]]) -> None:
        self.numbers = [i for i, call in enumerate(table.calls) if not table.layers[call.layer].joint]
        # For a variable that is not there: the first axis, which is 1 long.
        places: list[tuple[Ints, Floats, Floats]] = [(np.zeros(2, np.int64), np.zeros(2), np.ones(2))]
        starts, grids, begins = dict[tuple[int, int], int](), [np.empty(0)], dict[int, int]()
        for number, layer in enumerate(table.layers):
            begins[number] = sum(map(len, grids))
            grids.append(layer.grid.ravel())
            for v, parts in enumerate(layer.places if not layer.joint else ()):
                starts[number, v] = sum(len(part[0]) for part in places)
                places.append(parts)
        self._low = np.concatenate([low for low, _, _ in places])
        self._share = np.concatenate([share for _, share, _ in places])
        self._slower = np.concatenate([slower for _, _, slower in places])
        self._ms = np.concatenate(grids)
        rows = []
        for i in self.numbers:
            number = table.calls[i].layer
            widths, along = [len(row) for row in table.layers[number].widths], list(axes[i])
            strides = [widths[1] if len(widths) > 1 else 1, 1]
            row = [begins[number]]
            for v in range(2):
                there = v < len(along)
                stride = strides[v] if there else 0
                row += [along[v] if there else 0, starts[number, v] if there else 0, stride]
                row.append(stride if there and widths[v] > 1 else 0)
            rows.append(row)
        self._begin, *columns = np.array(rows, np.int64).reshape(len(rows), 9).T
        self._variables = (columns[:4], columns[4:])

    def __call__(self, lengths: Ints, calls: Ints) -> Floats:
        """(n, calls) milliseconds, of those among `calls` that are plain."""
        mine = np.flatnonzero(np.isin(self.numbers, calls))
        places, sides = self._begin[mine], []
        slower: Floats | float = 1.0
        for axis, start, stride, step in (tuple(column[mine] for column in columns) for columns in self._variables):
            at = lengths[:, axis] + start
            places = places + self._low[at] * stride
            sides.append((self._share[at], step))
            slower = np.maximum(slower, self._slower[at])
        (one, one_step), (two, two_step) = sides
        near = (1 - two) * self._ms[places] + two * self._ms[places + two_step]
        far = (1 - two) * self._ms[places + one_step] + two * self._ms[places + one_step + two_step]
        return np.asarray(((1 - one) * near + one * far) * slower)


def kinds(units: Ints) -> Ints:
    """0 for a multiple of 16, 1 of 8, 2 of 4, 3 of 2, and 4 for an odd number.

    >>> kinds(np.array([48, 24, 20, 18, 17])).tolist()
    [0, 1, 2, 3, 4]
    """
    return np.asarray(sum((units % block != 0).astype(np.int64) for block in (2, 4, 8, BLOCK)))


def between(row: Sequence[int], x: Floats) -> tuple[Ints, Floats]:
    """For each x, the point of an ascending row below it, and how far it is to the next: 0 to 1, also outside.

    >>> [part.tolist() for part in between([8, 16], np.array([4.0, 12.0, 20.0]))]
    [[0, 0, 0], [0.0, 0.5, 1.0]]
    """
    points = np.asarray(row, np.float64)
    low = np.clip(np.searchsorted(points, x, side="right") - 1, 0, max(len(points) - 2, 0))
    high = np.minimum(low + 1, len(points) - 1)
    return low, np.clip((x - points[low]) / np.maximum(points[high] - points[low], 1e-9), 0, 1)


def interpolated(grid: Floats, places: Sequence[tuple[Ints, Floats]], n: int = 1) -> Floats:
    """(n,) values, linear in each variable, at the places that `between` gives for each.

    >>> grid = np.array([[0.0, 2.0], [4.0, 6.0]])
    >>> interpolated(grid, [between([1, 3], np.array([2.0, 9.0])), between([2, 4], np.array([3.0, 0.0]))]).tolist()
    [3.0, 4.0]
    """
    out = np.zeros(len(places[0][0]) if places else n)
    for corner in itertools.product((0, 1), repeat=len(places)):
        at = tuple(np.minimum(low + side, size - 1) for (low, _), side, size in zip(places, corner, grid.shape))
        weight = np.prod([share if side else 1 - share for (_, share), side in zip(places, corner)], axis=0)
        out += weight * grid[at]
    return out


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
