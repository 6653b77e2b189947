"""`measure_table`: time every layer of a model alone, at the widths that matter, where it is to run."""

from __future__ import annotations

import itertools
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.graph.aside import find_aside
from secateur.graph.capture import capture
from secateur.graph.nested import Nested
from secateur.graph.probe import settle
from secateur.graph.rebuild import narrow, rebuild
from secateur.graph.records import Groups, Keep
from secateur.graph.sharing import share_cut
from secateur.graph.twin import tensors_of
from secateur.measure.accuracy import evaluating
from secateur.measure.latency import _time, _wait, torch_threads
from secateur.measure.layers import Alone, Hole, Layer, find_layers, runs
from secateur.measure.macs import batch_size
from secateur.measure.runtimes import Runtime, eager
from secateur.measure.table import (
    BLOCK,
    Check,
    Conditions,
    Fit,
    LatencyTable,
    LayerTimes,
    TimedCall,
    between,
    interpolated,
)

Point = tuple[int, ...]
"""How long each variable of a layer is."""

SHARES = (0.75, 0.5, 0.25)
MIXED = 3
"""The whole model, uniform cuts to these shares, and so many with a share drawn for each group, calibrate the rest."""

FLOOR_MS = 1e-4
"""No call takes less."""

CHUNK = 1 << 30
"""Bytes of weights that are held at once."""


def likely_widths(units: int) -> tuple[int, ...]:
    """Where time is likely to bend: small multiples of 8, and quarters rounded to multiples of 8.

    >>> likely_widths(16), likely_widths(64), likely_widths(512), likely_widths(10)
    ((4, 8, 16), (8, 16, 32, 48, 64), (16, 32, 128, 256, 384, 512), (2, 5, 10))
    """
    if units < BLOCK:
        return tuple(sorted({max(1, round(units * share)) for share in (0.25, 0.5, 1)}))
    small = [4, 8, 16] if units <= 32 else [8, 16, 32] if units <= 128 else [16, 32]
    quarters = [max(8, round(units * share / 8) * 8) for share in (0.25, 0.5, 0.75)]
    return tuple(sorted({n for n in (*small, *quarters) if n < units} | {units}))


def measure_table(
    model: nn.Module,
    example_inputs: Nested,
    groups: Groups,
    *,
    runtime: Runtime = eager,
    layers: Runtime | None = None,
    widths: Callable[[int], Sequence[int]] = likely_widths,
    threads: int | None = None,
    turns: int = 9,
    seed: int = 0,
) -> LatencyTable:
    """Measure what plans for this model will take, on this machine: for the batch and dtype of the inputs.

    Every call that MACs are counted of is timed alone, at each pair of widths in and out, equal calls once; so are a
    few widths off the multiples of 16. They take turns, in an order that is drawn, so that what slows the machine
    slows all alike; each finds the weights out of the cache and the input in it, as in a model. Then the whole model
    and six cuts of it calibrate the sum (see `table`).

    Args:
        model: where it is to run, on the CPU or a GPU; left as found.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; on the model's device.
        groups: from `find_groups`, on inputs of these shapes.
        runtime: what runs the model: `eager`, `compiled`, `onnx_runtime`, or a function of yours.
        layers: what runs layers alone; `runtime` if left out. `torch.compile` takes a second for each shape, and calls
            the kernels that eager calls: give `layers=eager` with `compiled`.
        widths: how many units there are -> how many of them to measure; the whole is always measured.
        threads: of the CPU; as torch has them if left out.
        turns: how often each is timed; the lower quartile counts, as other work on the machine only adds.
        seed: of the order, and of the cuts for the calibration.

    Raises:
        PlanError: the groups are not those of this model on these inputs. ModelError: the runtime cannot run it.

    >>> from secateur.graph.groups import find_groups
    >>> net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    >>> groups = find_groups(net, torch.zeros(1, 4))
    >>> table = measure_table(net, torch.zeros(1, 4), groups, turns=2)
    >>> [layer.widths for layer in table.layers], table.predict(groups.stays([range(8)])) > 0
    ([((4, 8, 16, 24, 32),), ((4, 8, 16, 24, 32),)], True)
    """
    trace = capture(model, example_inputs)
    analysis = settle(model, example_inputs, trace, groups.split, find_aside(model, example_inputs, trace))
    if analysis.groups != groups:
        raise PlanError("the groups are not those of this model on these inputs; find them anew, with these inputs.")
    found, written = find_layers(analysis)
    unique = list(dict.fromkeys(layer for layer, _, _ in found))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch_threads(threads), evaluating(model), torch.inference_mode():
        grids = [_grid(layer, widths) for layer in unique]
        call_ms, ms = _alone(unique, grids, layers or runtime, device, turns, random.Random(seed))
        keeps = list(_cuts(groups, random.Random(seed)))
        models = [_ready(runtime, _cut(model, groups, keep), example_inputs) for keep in keeps]
        timed = [_typical(spent) for _, spent in _time(models, example_inputs, max(turns, 3), 3, None, device)]
        conditions = _conditions(example_inputs, (runtime, layers or runtime), device, model, call_ms)
    table = LatencyTable(
        conditions=conditions,
        units=groups.offsets[-1],
        layers=tuple(_times(layer, grid, times) for layer, grid, times in zip(unique, grids, ms)),
        calls=tuple(TimedCall(module, unique.index(layer), axes) for layer, module, axes in found),
        written=tuple(written),
        fit=Fit(1.0, 0.0, 0.0),
        checks=(),
    )
    return _fitted(table, [groups.stays(keep) for keep in keeps], timed)


class _Grid:
    """The widths at which a layer is timed: all pairs of `rows`, and for each variable some off the multiples of 16."""

    def __init__(self, rows: tuple[tuple[int, ...], ...], joint: bool, points: list[Point]) -> None:
        self.rows, self.joint, self.points = rows, joint, points
        self.off: list[list[tuple[Point, Point]]] = []


def _grid(layer: Layer, widths: Callable[[int], Sequence[int]]) -> _Grid:
    """Joint where there are more than two variables, or pairs of widths that no call has."""
    rows = []
    for size, repeat in zip(layer.sizes, layer.repeats):
        units = size // repeat
        rows.append(tuple(sorted({n * repeat for n in widths(units) if 0 < n < units} | {size})))
    points = list(itertools.product(*rows))
    if len(rows) > 2 or not all(runs(layer, point) for point in points):
        shares = (12.5, 25.0, 50.0, 75.0, 100.0)
        diagonal = {s: tuple(max(1, round(size * s / 100)) for size in layer.sizes) for s in shares}
        good = {int(s): point for s, point in diagonal.items() if s == 100 or runs(layer, point)}
        return _Grid((tuple(good),), True, list(good.values()))
    grid = _Grid(tuple(rows), False, points)
    for v, (row, repeat) in enumerate(zip(rows, layer.repeats)):
        grid.off.append(list(_off_step(layer.sizes, v, row, repeat)))
    return grid


def _off_step(sizes: Point, v: int, row: Sequence[int], repeat: int) -> Iterator[tuple[Point, Point]]:
    """Widths just under a multiple of 16, each with that multiple: 8, 4, 2 and 1 units less; the rest is whole."""
    bases = [n for n in row if n % (BLOCK * repeat) == 0 and n > row[0]]
    if bases:
        base = next((n for n in bases if n >= 2 * BLOCK * repeat), bases[-1])
        for less in (8, 4, 2, 1):
            yield (*sizes[:v], base - less * repeat, *sizes[v + 1 :]), (*sizes[:v], base, *sizes[v + 1 :])


def _alone(
    layers: Sequence[Layer],
    grids: Sequence[_Grid],
    runtime: Runtime,
    device: torch.device,
    turns: int,
    draw: random.Random,
) -> tuple[float, list[dict[Point, float]]]:
    """Milliseconds of a call of one number, and, beyond these, of each layer at each point."""
    wanted: list[tuple[int, Point]] = []
    for i, grid in enumerate(grids):
        points = dict.fromkeys([*grid.points, *(off for row in grid.off for off, _ in row)])
        wanted += [(i, point) for point in points if point in grid.points or runs(layers[i], point)]
    draw.shuffle(wanted)
    least, number = Alone(torch.ops.aten.relu.default, (Hole(0),), {}, [None]), (torch.ones(1, device=device),)
    least_ms = _typical(_by_turns([(_ready(runtime, least, number), number)], 50, device)[0])
    out: list[dict[Point, float]] = [{} for _ in layers]
    while wanted:
        held, calls = 0, []
        while wanted and held < CHUNK:
            i, point = wanted.pop()
            module, inputs = layers[i].alone(point, device)
            held += sum(t.nbytes for t in (*module.operands(inputs),))
            calls.append((i, point, _ready(runtime, module, inputs), inputs))
        spent = _by_turns([(module, inputs) for _, _, module, inputs in calls], turns, device)
        for (i, point, _, _), times in zip(calls, spent):
            out[i][point] = max(_typical(times) - least_ms, FLOOR_MS)
    return least_ms, out


def _typical(ms: Sequence[float]) -> float:
    """The lower quartile: nothing makes a call faster than it is, but other work often makes it slower."""
    return float(np.percentile(ms, 25))


def _ready(runtime: Runtime, model: nn.Module, inputs: Nested) -> nn.Module:
    """Made outside inference mode, in which no runtime expects to be built."""
    with torch.inference_mode(False), torch.no_grad():
        return runtime(model, inputs)


def _by_turns(
    calls: Sequence[tuple[nn.Module, tuple[Tensor, ...]]], turns: int, device: torch.device
) -> list[list[float]]:
    """Milliseconds of each turn of each call, after one that does not count."""
    held = [[_bytes_of(tensor) for tensor in inputs] for _, inputs in calls] if device.type == "cpu" else []
    spent: list[list[float]] = [[] for _ in calls]
    for turn in range(turns + 1):
        for i, (module, inputs) in enumerate(calls):
            for buffer in held[i] if held else ():
                buffer |= 0  # as the layer before has just written it
            _wait(device)
            start = time.perf_counter()
            module(*inputs)
            _wait(device)
            if turn:
                spent[i].append(1000 * (time.perf_counter() - start))
    return spent


def _bytes_of(tensor: Tensor) -> Any:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def _times(layer: Layer, grid: _Grid, ms: dict[Point, float]) -> LayerTimes:
    values = tuple(ms[point] for point in grid.points)
    pulls, slower = [], []
    for v, row in enumerate(grid.off):
        pull, price = [0.0], [1.0]
        for off, base in row:
            added = _pull(grid, values, off, base, ms.get(off), v)
            pull.append(added[0])
            price.append(added[1])
        # A multiple of less is no better, and close to the step there is too little to see.
        pulls.append(tuple(accumulate(pull, max)) if row else (0.0,) * 5)
        slower.append(tuple(accumulate(price, max)) if row else (1.0,) * 5)
    return LayerTimes(
        op=layer.name,
        shapes=tuple(operand.shape for operand in layer.operands),
        sizes=layer.sizes,
        repeats=layer.repeats,
        widths=grid.rows,
        joint=grid.joint,
        ms=values,
        pulls=tuple(pulls),
        slower=tuple(slower),
        traffic=layer.traffic(),
    )


def _pull(
    grid: _Grid, values: Sequence[float], off: Point, base: Point, ms: float | None, v: int
) -> tuple[float, float]:
    """How far a width off the step counts as rounded up, from 0 to 1; and how many times slower it is beyond that."""
    points = zip(grid.rows, np.array([off, base], np.float64).T)
    table = np.reshape(values, [len(row) for row in grid.rows])
    linear, rounded = interpolated(table, [between(row, x) for row, x in points])
    if ms is None or ms > 1.1 * rounded:
        return 1.0, 1.0 if ms is None else ms / rounded
    bend = rounded - linear
    return (float(np.clip((ms - linear) / bend, 0, 1)) if bend > 0.03 * rounded else 0.0), 1.0


def _cuts(groups: Groups, draw: random.Random) -> Iterator[Keep]:
    """What is kept of the models that calibrate: all, the same share of each group, a share drawn for each."""
    sizes = [group.size for group in groups.groups]

    def rounded(size: int, share: float) -> range:
        return range(size if share == 1 else max(1, min(size, round(size * share / 8) * 8 or round(size * share))))

    yield [range(size) for size in sizes]
    if not sizes:
        return
    for share in SHARES:
        yield [rounded(size, share) for size in sizes]
    for _ in range(MIXED):
        yield [rounded(size, draw.choice((1.0, *SHARES))) for size in sizes]


def _cut(model: nn.Module, groups: Groups, keep: Keep) -> nn.Module:
    kept = groups.kept(keep)
    if not kept:
        return model
    with torch.inference_mode(False):
        tensors = share_cut(tensors_of(model), narrow(model, kept), kept)
        return rebuild(model, tensors, groups.attributes(keep), groups.replays(keep))


def _fitted(table: LatencyTable, stays: Sequence[Any], measured: Sequence[float]) -> LatencyTable:
    """The rates that make the sum of the relative errors least, so that one odd timing is let be.

    None is negative, and layers within the model take from half to twice as long as alone: the calibrating models are
    few, and what layers take and what else is written fall much alike.
    """
    lengths = np.array([table.clock.lengths(stay) for stay in stays])
    unit = replace(table, fit=Fit(1.0, 1.0, 0.0))
    layers, rest = table.clock.alone(lengths).sum(1), unit.clock.rest(lengths)
    if len(measured) < 4 or not layers.any():  # nothing can be cut, or nothing is timed
        fit = Fit(1.0, 0.0, max(0.0, float(measured[0] - layers[0])))
    else:
        matrix, one = np.stack([layers, rest, np.ones(len(rest))], 1) / np.array(measured)[:, None], np.eye(len(rest))
        found = linprog(
            [0, 0, 0, *[1] * len(rest)],
            np.block([[matrix, -one], [-matrix, -one]]),
            [1] * len(rest) + [-1] * len(rest),
            bounds=[(0.5, 2), (0, None), (0, None), *[(0, None)] * len(rest)],
        )
        fit = Fit(*map(float, found.x[:3]))
    done = replace(table, fit=fit)
    said = done.clock.ms(lengths)
    checks = tuple(
        Check(float(stay[:-1].mean()) if len(stay) > 1 else 1.0, float(ms), float(p))
        for stay, ms, p in zip(stays, measured, said)
    )
    return replace(done, checks=checks)


def _conditions(
    inputs: Nested, runtimes: tuple[Runtime, Runtime], device: torch.device, model: nn.Module, call_ms: float
) -> Conditions:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return Conditions(
        runtime=_name(runtimes[0]),
        layers=_name(runtimes[1]),
        device=str(device),
        machine=machine_name(device),
        threads=torch.get_num_threads(),
        batch=batch_size(inputs),
        dtype=str(dtype).removeprefix("torch."),
        torch=torch.__version__,
        copied_gb_s=_copied(device),
        call_ms=call_ms,
    )


def machine_name(device: torch.device) -> str:
    """What the device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _name(runtime: Runtime) -> str:
    return getattr(runtime, "__name__", type(runtime).__name__)


def _copied(device: torch.device) -> float:
    """GB read and written in a second by copying 32 MiB."""
    source = torch.zeros(1 << 23, device=device)
    target = torch.empty_like(source)
    spent = []
    for _ in range(7):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        spent.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(spent) / 1e9
