"""Units in another order: if the slots are right and complete, the model's output stays as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.graph.rebuild import share
from secateur.graph.records import Groups
from secateur.graph.slots import Slot
from secateur.graph.twin import tensors_of
from secateur.graph.units import Ids
from secateur.surgery.widened import Widened


def shaken(model: nn.Module, seed: int) -> nn.Module:
    """A copy in which tensors that are constant or nearly zero have random values.

    Fresh batch norm, layer scale of 1e-6 and zero heads would hide a shuffle that is wrong. The values are mild: with
    gains of residual branches around 1, a deep network without norms makes 1e-7 of a rounding error.
    """
    random = torch.Generator().manual_seed(seed)
    new = {}
    for name, tensor in tensors_of(model).items():
        if not (tensor.is_floating_point() and tensor.numel()):
            continue
        low, high = torch.aminmax(tensor.kept if isinstance(tensor, Widened) else tensor.detach())
        small = bool(low > -1e-3 and high < 1e-3)
        if small or (low == high and tensor.numel() > 1):  # no unit hides in one number, and it may be a count
            noise = torch.rand(tensor.shape, generator=random, dtype=torch.float64).to(tensor.device)
            new[name] = 0.1 + 0.2 * noise if small else tensor.detach() * (0.9 + 0.2 * noise)
    return share(model, new)


class Shuffle:
    """Within it, the units of every group of `model` are in another order.

    Args:
        only: shuffle these groups, by number, and no others.
    """

    def __init__(self, model: nn.Module, groups: Groups, seed: int, only: Collection[int] | None = None) -> None:
        random = np.random.default_rng(seed)
        tensors = tensors_of(model)
        self._moves: list[tuple[Slot, Tensor, Ids]] = []
        for number, group in enumerate(groups.groups):
            order = np.roll(np.arange(group.size), 1) if group.size < 3 else random.permutation(group.size)
            for slot in group.slots if only is None or number in only else ():
                tensor = tensors[slot.tensor]
                self._moves.append((slot, tensor, _moved(slot.index, order, tensor.shape[slot.dim])))
        self._done = 0

    def __enter__(self) -> Shuffle:
        try:
            for slot, tensor, places in self._moves:
                _move(tensor, slot.dim, places)
                self._done += 1
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._done:
            self._done -= 1
            slot, tensor, places = self._moves[self._done]
            _move(tensor, slot.dim, np.argsort(places))

    @contextlib.contextmanager
    def without(self, left_out: Slot) -> Iterator[None]:
        """Within it, this slot has its old order, which makes the shuffle wrong. No two slots share a place."""
        ((tensor, places),) = [(tensor, places) for slot, tensor, places in self._moves if slot is left_out]
        _move(tensor, left_out.dim, np.argsort(places))
        try:
            yield
        finally:
            _move(tensor, left_out.dim, places)


def _move(tensor: Tensor, dim: int, places: Ids) -> None:
    if isinstance(tensor, Widened):
        tensor.reorder(dim, places)
    else:
        tensor.data = tensor.detach().index_select(dim, torch.from_numpy(places).to(tensor.device))


def _moved(index: Any, order: Any, size: int) -> Ids:
    places = np.asarray(index)
    moved = np.arange(size)
    moved[places.ravel()] = places[order].ravel()
    return moved
