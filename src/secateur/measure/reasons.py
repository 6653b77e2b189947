"""Why a cut is not as much faster as it is smaller: `why_not_faster`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from secateur.measure.table import BLOCK, LatencyTable, LayerTimes, Planned, kinds

LEAST = 0.01
"""Layers that take a smaller share of the time are passed over."""

SHORT = 0.1
"""And those whose time falls nearly as their work: the shares differ by no more."""


def why_not_faster(table: LatencyTable, plan: Planned) -> tuple[str, ...]:
    """What stands in the way of the cut model's speed, in sentences: first of the whole, then of each layer.

    A layer is told of if it takes a hundredth of the time or more, and its time falls by clearly less than its work,
    the product of its widths. The reasons, as the table has them:

    - launch bound: even at the smallest widths measured it takes half as long;
    - memory bound: the bytes of its operands take half of its time to copy;
    - off the step: a wider layer is as fast or faster, as its kernel works on blocks.

    Args:
        table: from `measure_table`, for the groups of the plan.
        plan: from `allocate`.

    Raises:
        ValueError: the plan is of another model.
    """
    now = table.predict(plan)
    clock = table.clock
    lengths = clock.lengths(plan.groups.stays(plan.keep))[None]
    whole = clock.lengths(np.ones(table.units + 1, np.bool_))[None]
    alone, before = table.fit.scale * clock.alone(lengths)[0], table.fit.scale * clock.alone(whole)[0]
    rest, rest_before = float(clock.rest(lengths)[0]), float(clock.rest(whole)[0])
    macs = plan.groups.macs_left(plan.keep) / max(plan.groups.macs, 1)
    lines = [
        f"the plan leaves {100 * macs:.0f} % of the MACs and, by the table, {100 * now / table.whole_ms:.0f} % of the "
        f"time: {table.whole_ms:.3g} ms become {now:.3g} ms. What is in no layer (norms, activations, sums, Python) "
        f"takes {rest_before:.3g} ms, then {rest:.3g} ms."
    ]
    said: dict[str, list[str]] = {}
    for number, call in enumerate(table.calls):
        layer = table.layers[call.layer]
        widths = tuple(int(n) for n in lengths[0, clock.calls[number]])
        work = math.prod(n / size for n, size in zip(widths, layer.sizes))
        share = alone[number] / before[number] if before[number] > 0 else 1.0
        if work < 1 and share > work + SHORT and alone[number] >= LEAST * now:
            reason = next(_reasons(layer, widths, table.conditions.copied_gb_s), "no single reason stands out")
            sizes = " x ".join(f"{n} of {size}" for n, size in zip(widths, layer.sizes))
            text = f"{sizes} is {100 * work:.0f} % of the work and {100 * share:.0f} % of the time; {reason}."
            said.setdefault(text, []).append(call.module or "the model itself")
    return (*lines, *(f"{', '.join(names)}: {text}" for text, names in said.items()))


def _reasons(layer: LayerTimes, widths: tuple[int, ...], gb_s: float) -> Iterator[str]:
    """Those that hold, the most telling first; times are of the layer alone."""
    now = float(layer.at(np.array([widths]))[0])
    if not layer.joint:
        yield from _off_step(layer, widths, now)
    least = min(layer.ms)
    if least >= 0.5 * now:
        yield f"launch bound: of {now:.3g} ms alone, {least:.3g} ms remain at the smallest width measured"
    mb = sum(constant * math.prod(widths[v] for v in along) for constant, along in layer.traffic) / 1e6
    if mb / gb_s >= 0.5 * now:
        yield (
            f"memory bound: it reads {mb:.3g} MB, which takes {mb / gb_s:.3g} of its {now:.3g} ms at the {gb_s:.3g} "
            "GB/s of a copy"
        )


def _off_step(layer: LayerTimes, widths: tuple[int, ...], now: float) -> Iterator[str]:
    for v, (width, size, repeat) in enumerate(zip(widths, layer.sizes, layer.repeats)):
        units, kind = width // repeat, int(kinds(np.array([width // repeat]))[0])
        if not kind or width == size:
            continue
        wider = min(-(-units // BLOCK) * BLOCK * repeat, size)
        there = float(layer.at(np.array([(*widths[:v], wider, *widths[v + 1 :])]))[0])
        if there <= 1.03 * now:
            yield f"off the step: {wider} in place of {width} take {there:.3g} ms, and these {now:.3g} ms"
