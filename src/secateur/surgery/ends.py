"""How far apart two runs are where each unit ends: a cut's error, group by group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.graph.analysis import Analysis
from secateur.graph.capture import COPIES, op_name
from secateur.graph.compare import Stays
from secateur.graph.decisions import name_of
from secateur.graph.nested import tensors_in

GroupErrors = tuple[tuple[str, float], ...]
"""(group, error), for each group that ends in a sum."""


class Ends(TorchDispatchMode):
    """Notes how large each unit is, by its root of the sum of squares, wherever units end in a sum.

    It is for runs of the model that was analysed, or of one that was cut from it: the same ops but for copies. Where
    a run takes other ops, it stops noting.
    """

    def __init__(self, analysis: Analysis) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        names = [op_name(call) for call in analysis.trace.calls]
        number = np.cumsum([name not in COPIES for name in names]) - 1
        self._names = [name for name in names if name not in COPIES]
        self._wanted: dict[int, list[int]] = {}
        for index, (end, _) in enumerate(analysis.contractions):
            self._wanted.setdefault(int(number[end.call]), []).append(index)
        self._ends, self._step = [end for end, _ in analysis.contractions], 0
        self.sizes: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if func.namespace != "prim" and name not in COPIES and self._step >= 0:
            self._note(name, args, kwargs)
        return func(*args, **kwargs)

    def _note(self, name: str, args: Any, kwargs: Any) -> None:
        if self._step >= len(self._names) or self._names[self._step] != name:
            self._step = -1
            return
        for index in self._wanted.get(self._step, ()):
            tensor = list(tensors_in((tuple(args), kwargs)))[self._ends[index].operand].detach()
            others = [d for d in range(tensor.ndim) if d not in self._ends[index].block.dims]
            squares = (tensor.abs() if tensor.is_complex() else tensor).double().square()
            self.sizes[index] = (squares.sum(others) if others else squares).sqrt().flatten().cpu()
        self._step += 1


def group_errors(analysis: Analysis, stays: Stays, masked: Ends, cut: Ends) -> GroupErrors:
    """For each group the largest difference of a unit that stays, as a share of the largest unit there.

    Args:
        masked: of the uncut model with the plan's units zeroed.
        cut: of the cut model.
    """
    errors: dict[int, float] = {}
    for index in sorted(masked.sizes.keys() & cut.sizes.keys()):
        units = analysis.contractions[index][1].units.ravel()
        kept = units[stays[units]]
        want, got = masked.sizes[index][torch.from_numpy(stays[units])].numpy(), cut.sizes[index].numpy()
        off = np.abs(want - got) / (want.max(initial=0) or 1) if want.shape == got.shape else np.full(len(kept), np.inf)
        for group, error in zip(_groups_of(analysis.groups.offsets, kept), off):
            if group >= 0:
                errors[group] = max(errors.get(group, 0.0), float(error))
    return tuple((analysis.groups.groups[group].name, errors[group]) for group in sorted(errors))


def _groups_of(offsets: Sequence[int], units: Any) -> list[int]:
    """The group of each unit; -1 for what is in none."""
    found: list[int] = (np.searchsorted(offsets, units, side="right") - 1).tolist()
    return found
