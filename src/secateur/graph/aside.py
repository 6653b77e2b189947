"""Heads that run in training only, such as GoogLeNet's: cut along with what they read, so that the cut model trains.

A run in eval mode never meets them. So, where a model has parameters that no op has read, a second run in training mode
shows what those share with the others; the rest of that run counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from secateur.errors import CaptureError
from secateur.graph.axes import Field, refs_in
from secateur.graph.capture import Trace, capture
from secateur.graph.units import Ids, Solution

STAYS = "is read by a part that runs in training only, and that does not follow a cut"


@dataclass(frozen=True)
class Aside:
    """The trace of a run in training mode, and the parameters that are met in it alone; `follows` unless it failed."""

    trace: Trace
    tensors: frozenset[str]
    follows: bool = True


def find_aside(model: nn.Module, example_inputs: Any, trace: Trace) -> Aside | None:
    """What runs in training only; None if nothing does, or if the model cannot be trained on these inputs.

    Args:
        trace: of a run in eval mode.
    """
    unread = _parameters(trace, read=False)
    if not unread:
        return None
    try:
        training = capture(model, example_inputs, training=True)
    except CaptureError:  # it wants targets as well
        return None
    tensors = unread & _parameters(training, read=True)
    return Aside(training, tensors) if tensors else None


def _parameters(trace: Trace, *, read: bool) -> frozenset[str]:
    operands = {ref.id for call in trace.calls for ref in refs_in((call.args, call.kwargs))}
    known = (value for i, value in enumerate(trace.values) if (i in operands) is read)
    return frozenset(value.name for value in known if value.origin == "parameter")


def join(state: Field, aside: Field, solution: Solution, shapes: dict[str, tuple[int, ...]], what: Aside) -> None:
    """Unite in `state` what is one in `aside`, for all units that are on one of the tensors met there alone.

    Args:
        state: of the run in eval mode; its units and integers grow.
        aside: of the run in training mode, and its solution.
        shapes: of the model's tensors.
    """
    met = np.zeros(len(solution.root) + 1, bool)
    for start, tensor, dim in aside.owners:
        if tensor in what.tensors:
            met[solution.root[start : start + shapes[tensor][dim]]] = True
    lead = np.full(len(solution.root) + 1, -1, np.int64)
    starts = {(tensor, dim): start for start, tensor, dim in state.owners}
    for start, tensor, dim in aside.owners:
        roots = solution.root[start : start + shapes[tensor][dim]]
        places = np.flatnonzero(met[roots])
        if not places.size:
            continue
        own = starts.get((tensor, dim))
        ids = (np.arange(own, own + len(roots)) if own is not None else state.own(tensor, dim, len(roots)))[places]
        _unite(state, ids, roots[places], lead, solution, what.follows)
    for place, role in aside.roles.items():
        state.roles.setdefault(place, role)
    modules = {tensor.rpartition(".")[0] for tensor in what.tensors}
    for item in aside.ints:
        counted = lead[solution.root[item.ids]]
        if item.module in modules and (counted >= 0).all():
            state.ints.append(replace(item, ids=counted, python=None, place=None, search=False))


def _unite(state: Field, ids: Ids, roots: Ids, lead: Ids, solution: Solution, follows: bool) -> None:
    """Each of `ids` with the first one of its class, kept in `lead`; frozen as its class is."""
    for unit, root in zip(ids.tolist(), roots.tolist()):
        if lead[root] < 0:
            lead[root] = unit
    state.units.unite(ids, lead[roots])
    stuck = solution.frozen(roots)
    for unit, root in zip(ids[stuck], roots[stuck]):
        state.units.freeze(np.array([unit]), solution.why_frozen(int(root)))
    if not follows:
        state.units.freeze(ids, STAYS)
