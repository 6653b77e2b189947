"""`find_groups`: any model and example inputs -> `Groups`."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.graph.aside import find_aside
from secateur.graph.capture import Trace, capture
from secateur.graph.probe import settle
from secateur.graph.records import Groups
from secateur.graph.units import Split


def find_groups(model: nn.Module, example_inputs: Any, *, split: Split = "outer") -> Groups:
    """Every channel group of the model: what can be cut, with all that must go along, and what cannot and why.

    Args:
        model: any module, in train or eval mode; left exactly as found.
        example_inputs: one tensor, a tuple of positional or a dict of keyword arguments; a batch of one or two does.
            In an `Example`, they come with the part of the model's outputs that is read.
        split: where the model splits an axis into heads x width, "outer" cuts whole heads, and "inner" the same
            places of all heads. Grouped queries keep their ratio.

    Raises:
        CaptureError: the model does not run on these inputs.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5))
    >>> (group,) = find_groups(net, torch.zeros(2, 3, 4, 4)).groups
    >>> [(slot.tensor, slot.dim, slot.index[1]) for slot in group.slots if slot.role != "scale"]
    [('0.weight', 0, (1,)), ('3.weight', 1, (4, 5, 6, 7))]
    """
    trace = capture(model, example_inputs)
    found = settle(model, example_inputs, trace, split, find_aside(model, example_inputs, trace))
    if not (trace.fake and found.groups.sizes):
        return found.groups
    # Calls are replayed by their numbers, and a model may take another path where it sees that tensors are fake.
    real = capture(model, example_inputs, fake=False)
    if _sites(real) == _sites(trace):
        return found.groups
    return settle(model, example_inputs, real, split, find_aside(model, example_inputs, real)).groups


def _sites(trace: Trace) -> list[tuple[str, str, int]]:
    """The calls that ran ops, each by its place in its module; attributes, such as `x.mT`, are never replayed, so that
    it does not matter how many others (`x.device`) were read before."""
    running = {call.python for call in trace.calls}
    called = (call for number, call in enumerate(trace.python) if number in running)
    return [(call.module, call.function, 0 if call.function == "__get__" else call.ordinal) for call in called]
