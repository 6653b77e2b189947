"""Sums over the weights that each unit holds, with gradients: what penalties on units are made of.

For each tensor one number is taken for each index along the units' axis, and these are added up by unit at once: a few
operations for each tensor, forth and back, however many units there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.allocate.plan import Plan
from secateur.errors import PlanError
from secateur.graph.records import Groups
from secateur.graph.slots import Slot


@dataclass(frozen=True)
class Rows:
    """The units along axis `dim` of one parameter of shape `shape`: index `places[i]` belongs to unit `units[i]`."""

    tensor: str
    dim: int
    shape: tuple[int, ...]
    places: tuple[int, ...]
    units: tuple[int, ...]

    @property
    def broadcast(self) -> tuple[int, ...]:
        """The shape in which a number for each index multiplies the parameter."""
        return tuple(size if dim == self.dim else 1 for dim, size in enumerate(self.shape))


@dataclass(frozen=True, eq=False)
class UnitWeights:
    """Which weights belong to which of `count` units; they are counted through all groups, as `Groups.offsets` does."""

    rows: tuple[Rows, ...]
    count: int

    @classmethod
    def of(cls, groups: Groups, slots: Sequence[Sequence[Slot]], plan: Plan | None = None) -> UnitWeights:
        """The weights in the given slots of each group; with `plan`, of the units that it cuts alone.

        A group of a single unit, which no plan can cut, is left out. Where two slots of a unit cross in one tensor,
        the weights there count for both.

        Raises:
            PlanError: the plan is for other groups, or there is no weight.
        """
        if plan is not None and plan.groups != groups:
            raise PlanError("the plan of a penalty was made for other groups; find the groups once, and use them here.")
        shapes = {info.name: info.shape for info in groups.tensors if info.parameter}
        found: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for number, (offset, group) in enumerate(zip(groups.offsets, groups.groups)):
            stays = frozenset(() if plan is None else plan.keep[number])
            for slot in slots[number] if group.size > 1 else ():
                pairs = [(place, offset + u) for u, spots in enumerate(slot.index) if u not in stays for place in spots]
                if slot.tensor in shapes and pairs:
                    found.setdefault((slot.tensor, slot.dim), []).extend(pairs)
        if not found:
            raise PlanError("no unit has a weight to penalise; give other roles, or a plan that cuts something.")
        return cls(
            tuple(Rows(name, dim, shapes[name], *zip(*pairs)) for (name, dim), pairs in found.items()),
            groups.offsets[-1],
        )

    def weights(self, model: nn.Module) -> list[Tensor]:
        """The parameters with rows, in their order."""
        return [_parameter(model, path) for path in self._paths]

    def sums(self, model: nn.Module, p: int) -> Tensor:
        """For each unit the sum of |w|^p over its weights, differentiable: (units,). `p` is 1 or 2.

        >>> from secateur.graph.groups import find_groups
        >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, -2.0], [0.0, 3.0], [0.0, 0.0]]))
        >>> groups = find_groups(net, torch.zeros(1, 2))
        >>> held = UnitWeights.of(groups, [group.slots[:1] for group in groups.groups])
        >>> held.sums(net, 1).tolist(), held.sums(net, 2).tolist(), held.sizes.tolist()
        ([3.0, 3.0, 0.0], [5.0, 9.0, 0.0], [2.0, 2.0, 2.0])
        """
        sums: Tensor = _Sums.apply(p, self, *self.weights(model))
        return sums

    def spread(self, values: Tensor, fill: float) -> list[Tensor]:
        """A number for each unit, (units,), as one for each index of each tensor in `rows`, which broadcasts over it.

        An index of no unit has `fill`.
        """
        places, units = self.index(values.device)
        return self.shaped(values.new_full((self.length,), fill).index_copy_(0, places, values[units]))

    def shaped(self, flat: Tensor) -> list[Tensor]:
        """Numbers for all indices of all rows, one after the other, by tensor so that they broadcast over it."""
        parts = flat.split([row.shape[row.dim] for row in self.rows])
        return [part.view(row.broadcast) for part, row in zip(parts, self.rows)]

    @property
    def index(self) -> Callable[[torch.device], tuple[Tensor, Tensor]]:
        """By device: places among the indices of all rows, one after the other, and the unit at each."""
        return self._index

    @cached_property
    def _paths(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(row.tensor.split(".")) for row in self.rows)

    @cached_property
    def length(self) -> int:
        """How many indices all rows have together."""
        return sum(row.shape[row.dim] for row in self.rows)

    @cached_property
    def sizes(self) -> Tensor:
        """The number of weights of each unit, float64; 0 for one that is left out."""
        out = torch.zeros(self.count, dtype=torch.float64)
        for row in self.rows:
            entries = np.prod(row.shape) / row.shape[row.dim]
            out.index_add_(0, torch.tensor(row.units), torch.full((len(row.units),), entries, dtype=torch.float64))
        return out

    @cached_property
    def _index(self) -> Callable[[torch.device], tuple[Tensor, Tensor]]:
        starts = np.cumsum([0, *(row.shape[row.dim] for row in self.rows)])
        places = np.concatenate([np.asarray(row.places) + start for row, start in zip(self.rows, starts)])
        units = np.concatenate([np.asarray(row.units) for row in self.rows])
        return cache(lambda device: (torch.from_numpy(places).to(device), torch.from_numpy(units).to(device)))


class _Sums(torch.autograd.Function):
    """Sums by unit; backwards each weight takes its sign, or twice itself, times what comes back to its units."""

    @staticmethod
    def forward(ctx: Any, p: int, held: UnitWeights, *weights: Tensor) -> Tensor:
        ctx.p, ctx.held = p, held
        ctx.save_for_backward(*weights)
        flat = torch.cat([_along(weight, row.dim, p) for weight, row in zip(weights, held.rows)])
        places, units = held.index(flat.device)
        return flat.new_zeros(held.count).index_add_(0, units, flat[places])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        held: UnitWeights = ctx.held
        places, units = held.index(gradient.device)
        flat = gradient.new_zeros(held.length).index_add_(0, places, gradient[units])
        factors = held.shaped(flat if ctx.p == 1 else 2 * flat)
        weights = torch._foreach_sign(ctx.saved_tensors) if ctx.p == 1 else ctx.saved_tensors
        return None, None, *torch._foreach_mul(weights, factors)


def _along(weight: Tensor, dim: int, p: int) -> Tensor:
    """The sum of |w|^p for each index along an axis."""
    others = [d for d in range(weight.ndim) if d != dim]
    if p == 1:
        return weight.abs().sum(others) if others else weight.abs()
    norms: Tensor = torch.linalg.vector_norm(weight, 2, dim=others) if others else weight
    return norms.square()


def _parameter(model: nn.Module, path: tuple[str, ...]) -> Tensor:
    """A parameter by its path: as `get_parameter`, which takes ten times as long."""
    module: nn.Module | None = model
    for name in path[:-1]:
        module = module._modules.get(name) if module is not None else None
    found = module._parameters.get(path[-1]) if module is not None else None
    return model.get_parameter(".".join(path)) if found is None else found
