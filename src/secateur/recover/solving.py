"""One layer after the other is solved by least squares, so that it gives what it gives in the whole model.

What the verbs `reconstruct` and `prune_weights` have in common.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import DataError, PlanError
from secateur.graph.attention import see_heads
from secateur.graph.capture import record
from secateur.graph.nested import Nested, map_tensors
from secateur.graph.rebuild import share
from secateur.graph.twin import slow_attention, tensors_of
from secateur.recover.held import SideBySide
from secateur.recover.layers import Layer, find_layers
from secateur.recover.normal import Affine, Together, best_ridge
from secateur.recover.rows import inputs, matrix, outputs, places, shaped

RIDGES = (1e-2, 1e-1, 1.0)
"""From weights that are as good as free to weights that hardly move."""
Due = Callable[[tuple[Layer, ...]], tuple[Layer, ...]]
"""Which of a model's layers are to be solved."""
Choose = Callable[[Layer, tuple[Together, Together], Affine, bool], Tensor | None]
"""Which weights of a layer stay: (groups, outputs, inputs), or None for all; from the moments of both halves of the
images, what the layer is as it stands, and whether its offset is free."""


@dataclass(frozen=True)
class Solved:
    """A layer that was solved: the error of its output, as a share of its variance in the whole model.

    Args:
        layer: the module's name.
        rows: how many output positions were looked at.
        before: with the weights as they were cut, on the inputs that the solved layers before it give.
        after: with the solved weights, on the same inputs; if a ReLU follows, from the targets that were set last.
        ridge: the one that was taken.
    """

    layer: str
    rows: int
    before: float
    after: float
    ridge: float


@dataclass(frozen=True)
class Way:
    """How layers are solved; what the numbers mean is told at `reconstruct`.

    Raises:
        PlanError: a ridge below 0, or none; steps below 0.
    """

    ridge: float | Sequence[float] = RIDGES
    positions: int | None = 64
    rectify: int = 3
    together: int = 0
    held: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.ridges or not all(0 <= value < float("inf") for value in self.ridges):
            raise PlanError(f"the ridge is {self.ridge}; give a share of 0 or more, or several.")
        if self.together < 0:
            raise PlanError(f"together is {self.together}; give a number of steps, 0 for one layer after the other.")

    @property
    def ridges(self) -> tuple[float, ...]:
        """All ridges that are tried."""
        return tuple(self.ridge) if isinstance(self.ridge, Sequence) else (self.ridge,)


@contextlib.contextmanager
def side_by_side(
    model: nn.Module, smaller: nn.Module, batches: Iterable[Nested], way: Way, due: Due
) -> Iterator[SideBySide]:
    """Runs of both models, as they are, on the batches; on an error the smaller one is left as it came."""
    whole, pruned = _twin(model), _twin(smaller)
    before = {name: tensor.clone() for name, tensor in tensors_of(smaller).items()}
    with slow_attention():
        first = next(iter(batches), None)
        if first is None:
            raise DataError("there are no batches to solve the weights from; give one or more.")
        trace = record(_twin(model), map_tensors(torch.clone, first), fake=False)
        pairs = SideBySide(whole, pruned, trace, due(find_layers(trace)), batches, way.held)
        try:
            yield pairs
        except BaseException:
            for name, tensor in tensors_of(smaller).items():
                tensor.copy_(before[name])
            raise
        finally:
            pairs.close()


def _twin(model: nn.Module) -> nn.Module:
    """A copy to run, in eval mode, whose parameters and buffers are the model's own memory."""
    return see_heads(share(model, dict(model.named_buffers())).eval())


class Solving:
    """One layer being solved: what it starts from, and passes over its rows."""

    def __init__(
        self,
        layer: Layer,
        pairs: SideBySide,
        tensors: dict[str, Tensor],
        way: Way,
        kept: Sequence[int] | None = None,
        groups: int = 1,
    ) -> None:
        self._layer, self._pairs, self._tensors, self._way = layer, pairs, tensors, way
        self._kept = None if kept is None else torch.tensor(kept)
        self._groups = groups
        self.free = layer.norm is not None or layer.bias != ""

    def solve(self, choose: Choose | None = None) -> Solved:
        """Set the layer's tensors, and its batch norm's, to the solution."""
        layer, (halves, start), free = self._layer, self.seen(), self.free
        seen = halves[0] | halves[1]
        stays = None if choose is None else choose(layer, halves, start, free)
        start = start if stays is None else Affine(start.weight * stays, start.offset)
        ridge = best_ridge(halves, start, self._way.ridges, free, stays)
        found, before = seen.solve(start, ridge, free, stays), _share(seen.error(start), seen.spread)
        for _ in range(self._way.rectify if layer.rectified else 0):
            again = self._moments(found)
            inputs, seen = seen.inputs, again[0] | again[1]
            seen.inputs = inputs
            found = seen.solve(start, ridge, free, stays)
        self.set(found, seen.outcome)
        return Solved(layer.name, seen.count, before, _share(seen.error(found), seen.spread), ridge)

    def seen(self) -> tuple[tuple[Together, Together], Affine]:
        """The moments of both halves of the images, and what the layer is as it stands.

        Raises:
            DataError: they are not finite.
        """
        halves = self._moments(None)
        for half in halves:
            if half.count and not (half.inputs.isfinite().all() and half.crossed.isfinite().all()):
                name = self._layer.name
                raise DataError(f"layer {name!r} takes in or gives numbers that are not finite; nothing was changed.")
        return halves, self.start()

    def start(self) -> Affine:
        """What the layer, and its batch norm, compute as they are."""
        tensors, norm = self._tensors, self._layer.norm
        own = matrix(self._layer, tensors[self._layer.weight], self._groups)
        bias = _vector(tensors, self._layer.bias, own, 0.0)
        if norm is None:
            return Affine(own, bias)
        scale = _vector(tensors, norm.weight, own, 1.0) * (_vector(tensors, norm.variance, own, 1.0) + norm.eps).rsqrt()
        shift = _vector(tensors, norm.bias, own, 0.0) - _vector(tensors, norm.mean, own, 0.0) * scale
        return Affine(own * scale.unsqueeze(2), bias * scale + shift)

    def _moments(self, found: Affine | None) -> tuple[Together, Together]:
        """Moments of the smaller model's inputs with what is to come out of the layer; of every second image apart.

        Args:
            found: what is solved so far; targets below zero are set by it, and products of inputs are left out.
        """
        layer, halves, images = self._layer, (Together(), Together()), 0
        # Other positions for each layer.
        random = torch.Generator().manual_seed(self._way.seed * 1_000_003 + layer.call)
        for size, target, args, added in self._pairs.at(layer):
            weight = args[1] if len(args) >= 9 else args[-1]
            self._groups = args[8] if len(args) >= 9 else 1
            sums = outputs(target, weight.ndim, self._kept)
            other = None if added is None else outputs(added, weight.ndim, None)
            at, each = places(size, len(sums), self._way.positions, random), max(1, len(sums) // max(size, 1))
            at = torch.arange(len(sums)) if at is None else at
            odd = (at // each + images) % 2
            for half, seen in enumerate(halves):
                mine = at[odd == half].to(sums.device)
                for rows, piece in inputs(layer.operand, args, mine):
                    wanted = self._rows(sums, mine[piece], rows)
                    rest = torch.zeros_like(wanted) if other is None else self._rows(other, mine[piece], rows)
                    if found is not None:
                        given = rows @ found.weight.mT.to(rows) + found.offset.unsqueeze(1).to(rows) + rest
                        wanted = torch.where(wanted <= 0, given.clamp(max=0), wanted)
                    seen.add(rows, wanted - rest, inputs_too=found is None)
            images += size
        return halves

    def _rows(self, values: Tensor, at: Tensor, like: Tensor) -> Tensor:
        """Some rows as (groups, rows, outputs)."""
        rows: Tensor = values[at].unflatten(1, (self._groups, -1)).transpose(0, 1).to(like.dtype)
        return rows

    def set(self, found: Affine, outcome: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        """Make the layer, and its batch norm, compute this.

        Args:
            outcome: mean and variance, (groups, outputs), of what a weight gives on the inputs.
        """
        layer, tensors, norm = self._layer, self._tensors, self._layer.norm
        weight = tensors[layer.weight]
        own = matrix(layer, weight, self._groups)
        bias = _vector(tensors, layer.bias, own, 0.0)
        if norm is None:
            weight.copy_(shaped(layer, found.weight, weight))
            if layer.bias:
                tensors[layer.bias].copy_(found.offset.flatten())
            return
        if not (norm.weight and norm.bias):  # nothing but the statistics can take the offset
            weight.copy_(shaped(layer, found.weight, weight))
            tensors[norm.variance].fill_(1 - norm.eps)
            tensors[norm.mean].copy_((bias - found.offset).flatten())
            return
        sizes = found.weight.norm(dim=2)
        factor = torch.where(sizes > 0, own.norm(dim=2) / sizes, 1.0)
        factor = torch.where(factor > 0, factor, 1.0)
        mean, spread = outcome(found.weight * factor.unsqueeze(2))
        weight.copy_(shaped(layer, found.weight * factor.unsqueeze(2), weight))
        tensors[norm.mean].copy_((mean + bias).flatten())
        tensors[norm.variance].copy_(spread.flatten())
        tensors[norm.weight].copy_(((spread + norm.eps).sqrt() / factor).flatten())
        tensors[norm.bias].copy_((found.offset + mean / factor).flatten())


def _vector(tensors: dict[str, Tensor], name: str, like: Tensor, missing: float) -> Tensor:
    """A tensor with one number for each output, (groups, outputs); "" has none."""
    if not name:
        return like.new_full(like.shape[:2], missing)
    values: Tensor = tensors[name].detach().double().cpu().reshape(like.shape[:2])
    return values


def _share(error: float, spread: float) -> float:
    return error / spread if spread > 0 else error
