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


def shaken(model: nn.Module, seed: int) -> nn.Module:
    """A copy in which tensors that are constant or nearly zero have random values.

    Fresh batch norm, layer scale of 1e-6 and zero heads would hide a shuffle that is wrong.
    """
    random = torch.Generator().manual_seed(seed)
    new = {}
    for name, tensor in tensors_of(model).items():
        flat = tensor.detach().flatten()
        if tensor.is_floating_point() and flat.numel() and (flat.max() == flat.min() or flat.abs().max() < 1e-3):
            noise = torch.rand(tensor.shape, generator=random, dtype=torch.float64).to(tensor.device)
            new[name] = (tensor.detach() if flat.abs().max() >= 1e-3 else 0.5) + noise
    return share(model, new)


@contextlib.contextmanager
def shuffled(
    model: nn.Module, groups: Groups, seed: int, *, left_out: Slot | None = None, only: Collection[int] | None = None
) -> Iterator[None]:
    """Within it, the units of every group of `model` are in another order; one tensor at a time is in memory twice.

    Args:
        left_out: a slot that keeps the old order, which makes the shuffle wrong.
        only: shuffle these groups, by number, and no others.
    """
    random = np.random.default_rng(seed)
    tensors = tensors_of(model)
    moves: list[tuple[Tensor, int, Ids]] = []
    for number, group in enumerate(groups.groups):
        order = np.roll(np.arange(group.size), 1) if group.size < 3 else random.permutation(group.size)
        for slot in group.slots if only is None or number in only else ():
            if slot is not left_out:
                tensor = tensors[slot.tensor]
                moves.append((tensor, slot.dim, _moved(slot.index, order, tensor.shape[slot.dim])))
    done: list[tuple[Tensor, int, Ids]] = []
    try:
        for tensor, dim, places in moves:
            _move(tensor, dim, places)
            done.append((tensor, dim, np.argsort(places)))
        yield
    finally:
        for tensor, dim, places in reversed(done):
            _move(tensor, dim, places)


def _move(tensor: Tensor, dim: int, places: Ids) -> None:
    tensor.data = tensor.detach().index_select(dim, torch.from_numpy(places).to(tensor.device))


def _moved(index: Any, order: Any, size: int) -> Ids:
    places = np.asarray(index)
    moved = np.arange(size)
    moved[places.ravel()] = places[order].ravel()
    return moved
