"""How much of the user's own class a cut model still is: the lower the tier, the less there is beside its code."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from secateur.codec.program import Program
from secateur.errors import CaptureError
from secateur.graph.attention import HeadwiseAttention
from secateur.graph.capture import Trace, capture, steps
from secateur.graph.passing import Passing
from secateur.graph.replay import replay_of
from secateur.graph.twin import duplicate

Tier = Literal["a", "b", "c"]

SHAPED = frozenset(("split", "view", "expand"))
"""Ops that are told by the shapes they make, whichever way their sizes are given."""


def tier_of(model: nn.Module, example_inputs: Any = None) -> Tier:
    """The tier of a cut model.

    "a": the user's class as it is, with other integers in its attributes and smaller tensors. "b": besides, hooks give
    calls other sizes than Python computes (`graph.replay`), attention modules are `HeadwiseAttention`, or a `Passing`
    stands where a block was. "c": a program of ops, without any class (`export_program`).

    Args:
        model: untouched.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. With them, hooks that only
            repeat what the model computes anyway do not count: the model is run with and without. Else all do.

    >>> tier_of(nn.Linear(2, 3))
    'a'
    """
    if isinstance(model, Program):
        return "c"
    if any(isinstance(module, HeadwiseAttention | Passing) for module in model.modules()):
        return "b"
    if all(replay_of(module) is None for module in model.modules()):
        return "a"
    return "b" if example_inputs is None or _replays_matter(model, example_inputs) else "a"


def _replays_matter(model: nn.Module, example_inputs: Any) -> bool:
    """Whether the model without its replays runs other ops, makes other shapes or is given other numbers."""
    bare = duplicate(model)
    for module in bare.modules():
        replay = replay_of(module)
        if replay is not None:
            replay.changes.clear()
    wanted = _told(capture(model, example_inputs))
    try:
        return _told(capture(bare, example_inputs)) != wanted
    except CaptureError:
        return True


def _told(trace: Trace) -> list[Any]:
    """Of each op its name, the shapes that it makes and, where these do not tell it, its arguments."""
    return [
        (
            name,
            [trace.values[ref.id].shape for ref in call.outputs if ref is not None],
            None if name in SHAPED else (call.args, call.kwargs),
        )
        for name, call in steps(trace.calls)
    ]
