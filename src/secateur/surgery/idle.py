"""Idle units: what they add to every sum that they end in is nothing, or the same on every input.

Nothing: they are zero, or nobody reads them. Such a unit can go as it is. The same: it is a constant, and can go once
what it adds is in the bias of the layer that reads it; or, where a batch norm follows a layer without bias, taken from
the mean that it subtracts, which changes nothing in training either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.graph.capture import Call, Ref, op_name
from secateur.surgery.endings import Ending, Observation, Truths
from secateur.surgery.wiring import BATCH_NORMS, Wiring, factors, trains

ZERO, CONSTANT, LEFT, BUSY = range(4)
"""Adds nothing; adds the same everywhere, which can be folded; adds the same, but that cannot be; adds what varies."""

UNEVEN = "a constant that is not the same at all positions"


@dataclass(frozen=True)
class Sink:
    """The tensor that takes up what a constant unit adds, and with which sign."""

    tensor: str
    sign: float


@dataclass(frozen=True)
class Verdict:
    """`state[unit]` is ZERO, CONSTANT, LEFT or BUSY; `why[unit]` says what keeps one that is LEFT.

    `sinks[i]` takes up the constants of ending number i.
    """

    state: NDArray[np.int8]
    why: Mapping[int, str]
    sinks: Mapping[int, Sink]


def judge(seen: Observation) -> Verdict:
    """What each unit of the observed run adds, over all its endings; one that ends nowhere adds nothing."""
    state = np.zeros(seen.analysis.groups.offsets[-1] + 1, np.int8)
    why: dict[int, str] = {}
    sinks: dict[int, Sink] = {}
    for number, ending in enumerate(seen.endings):
        sink = _sink(seen.wiring, ending) if (ending.known & ~ending.empty).any() else ""
        if isinstance(sink, Sink):
            sinks[number] = sink
        folds = ending.steady & isinstance(sink, Sink)
        here = np.where(ending.empty, ZERO, np.where(folds, CONSTANT, np.where(ending.known, LEFT, BUSY)))
        np.maximum.at(state, ending.units.ravel(), here.ravel().astype(np.int8))
        call = seen.analysis.trace.calls[ending.call]
        for unit in np.unique(ending.units[here == LEFT]):
            why.setdefault(int(unit), f"{UNEVEN if isinstance(sink, Sink) else sink} ({call.where})")
    return Verdict(state[:-1], MappingProxyType(why), MappingProxyType(sinks))


def fold(seen: Observation, verdict: Verdict, gone: Truths) -> dict[str, Tensor]:
    """What is added to each tensor so that the constant units among `gone` can go."""
    out: dict[str, Tensor] = {}
    for number, sink in verdict.sinks.items():
        ending = seen.endings[number]
        taken = gone[ending.units] & (ending.units >= 0) & ~ending.empty
        if taken.any() and ending.columns is not None:
            columns = ending.columns
            value = torch.from_numpy(np.where(taken, ending.value, 0.0)).to(columns)
            out[sink.tensor] = out.get(sink.tensor, torch.zeros_like(columns[:, 0])) + sink.sign * (columns @ value)
    return out


def _sink(wiring: Wiring, ending: Ending) -> Sink | str:
    """What can take up a constant that ends here, or why nothing can."""
    call = wiring.trace.calls[ending.call]
    sides = factors(call)
    if op_name(call) not in ("convolution", "addmm", "mm") or sides is None or ending.partner != sides[1][0]:
        return "a constant that is not read by a linear layer or convolution"
    if op_name(call) == "convolution" and call.args[6]:
        return "a constant that is read by a transposed convolution, which is not the same at all positions"
    if op_name(call) == "convolution" and any(call.args[4]):
        return "a constant that is read with zero padding, so it is missing at the borders"
    if ending.columns is None:
        return UNEVEN
    if call.kwargs:
        return "a constant in a product that is scaled"
    bias = call.args[0] if op_name(call) == "addmm" else call.args[2] if op_name(call) == "convolution" else None
    if isinstance(bias, Ref):
        held = wiring.trace.values[bias.id]
        if held.origin == "parameter" and held.shape == (len(ending.columns),) and wiring.read_once(bias):
            return Sink(held.name, 1.0)
        return "a constant, and the bias that could take it up is not one layer's own"
    return _norm_after(wiring, call) or "a constant that is read by a layer without a bias or a batch norm after it"


def _norm_after(wiring: Wiring, call: Call) -> Sink | None:
    """The mean of the batch norm that alone reads a layer's output."""
    made = call.outputs[0]
    norm = wiring.only_reader(made) if made is not None else None
    if norm is None or op_name(norm) not in BATCH_NORMS or trains(norm) or norm.args[0] != made:
        return None
    mean = norm.args[3]
    if not isinstance(mean, Ref) or wiring.trace.values[mean.id].origin != "buffer" or not wiring.read_once(mean):
        return None
    return Sink(wiring.trace.values[mean.id].name, -1.0)
