"""Two convolutions with a ReLU between them, solved together: what lies between them need not be what it was.

Of S = W2 relu(W1 x + b1) + b2 + c, with c what is added to it, the least squares for W1 and W2 at once are not linear.
By Gauss and Newton (Nocedal and Wright 2006, "Numerical Optimization", section 10.3) S is replaced by what is tangent
to it, which leaves linear least squares, and those are solved by conjugate gradients (Hestenes and Stiefel 1952), so
that no matrix of all weights by all weights is made. Nothing goes back through more than these two layers, and no label
is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.graph.rebuild import LAYOUTS
from secateur.recover.held import SideBySide
from secateur.recover.layers import Layer
from secateur.recover.normal import Affine
from secateur.recover.rows import inputs, matrix
from secateur.recover.solving import Solved, Solving, Way

ROUNDS = 4
"""Of conjugate gradients, for each linear system."""
ROWS = 1 << 13
"""Places at which what a layer takes in is looked at for its moments."""
ROUGH = 1e-4
"""The least that moments are raised by: they need only be about right."""
HALVINGS = 4
"""Times that a step which makes the error larger is halved before it is not taken."""
FREE = 1e-6
"""How strongly offsets are drawn to what they were: as good as not at all."""

Weights = list[Tensor]
"""Weight and offset of the first, weight and offset of the second."""


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution's stride, padding, dilation and groups."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    @classmethod
    def of(cls, args: Sequence[Any]) -> Convolution:
        return cls(args[3], args[4], args[5], args[8])

    def __call__(self, x: Tensor, weight: Tensor, offset: Tensor | None = None) -> Tensor:
        """(n, i, ...), (o, i / groups, ...), (o,) -> (n, o, ...)."""
        none = [0] * len(self.stride)
        out: Tensor = torch.ops.aten.convolution(
            x, weight, offset, self.stride, self.padding, self.dilation, False, none, self.groups
        )
        return out

    def rows(self, x: Tensor, weight: Tensor) -> Tensor:
        """What makes outputs, at places drawn at random: (groups, places, columns of the weight's matrix)."""
        args = (x, weight, None, self.stride, self.padding, self.dilation, False, None, self.groups)
        count = len(x) * self(x[:1], weight)[0, 0].numel()
        random = torch.Generator().manual_seed(0)
        drawn = torch.randint(count, (ROWS,), generator=random).sort().values if count > ROWS else torch.arange(count)
        return torch.cat([rows for rows, _ in inputs(0, args, drawn.to(x.device))], 1)

    def turned(self, given: Tensor, x: Tensor, weight: Tensor, *, inputs: bool = True) -> tuple[Tensor, ...]:
        """The transposed map of values (n, o, ...): to the inputs, the weight and the offset."""
        none, sizes = [0] * len(self.stride), [weight.shape[0]]
        how = (sizes, self.stride, self.padding, self.dilation, False, none, self.groups, [inputs, True, True])
        out: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(given, x, weight, *how)
        return out


@dataclass(frozen=True, eq=False)
class Tangent:
    """The linear map from changes of the weights to changes of S, where S counts, at some weights."""

    maps: tuple[Convolution, Convolution]
    x: Tensor
    hidden: Tensor
    counts: Tensor
    weights: Weights
    free: tuple[bool, bool]

    def __call__(self, changes: Weights) -> Tensor:
        first, second = self.maps
        inner = self._where_on(first(self.x, changes[0], changes[1]))
        return (second(inner, self.weights[2]) + second(self.hidden, changes[2], changes[3])).mul_(self.counts)

    def turned(self, values: Tensor) -> Weights:
        """The transposed map."""
        first, second = self.maps
        back, weight, offset = second.turned(values * self.counts, self.hidden, self.weights[2])
        _, inner, inner_offset = first.turned(self._where_on(back), self.x, self.weights[0], inputs=False)
        return [inner, inner_offset * self.free[0], weight, offset * self.free[1]]

    def _where_on(self, values: Tensor) -> Tensor:
        """Zero where the rectifier between the layers gives zero."""
        out: Tensor = torch.ops.aten.threshold_backward(values, self.hidden, 0)
        return out


class Moments:
    """What a layer's own part of the Gauss-Newton matrix is about: the second moments of what it takes in, times how
    far each output reaches.

    With that as preconditioner a few rounds do (Martens and Grosse 2015, "Optimizing Neural Networks with Kronecker-
    factored Approximate Curvature", section 3).

    Args:
        own, x, weight: the convolution, what it takes in, and its weight.
        reach: for each output, the square of what comes of 1 at the end.
        free, ridge: as for `Pair.solve`.
    """

    def __init__(self, own: Convolution, x: Tensor, weight: Tensor, reach: Tensor, free: bool, ridge: float) -> None:
        rows = own.rows(x, weight)
        rows = torch.cat([rows, torch.full_like(rows[..., :1], float(free))], 2)
        second = (rows.mT @ rows).double() / rows.shape[1]
        raised = max(ridge, ROUGH) * second.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(second.shape[:2])
        raised = raised.clamp(min=torch.finfo(rows.dtype).tiny)  # a layer that takes in nothing has no moments
        offset = torch.full_like(raised[:, :1], FREE if free else 1.0)
        self._factor = torch.linalg.cholesky(second + torch.cat([raised[:, :-1], offset], 1).diag_embed()).to(rows)
        self._reach = reach.clamp(min=max(1e-3 * float(reach.mean()), torch.finfo(reach.dtype).tiny))

    def step(self, weight: Tensor, offset: Tensor) -> Weights:
        """The gradients of weight and offset as a step."""
        both = torch.cat([weight.flatten(1), offset.unsqueeze(1)], 1) / self._reach.unsqueeze(1)
        grouped = both.unflatten(0, (len(self._factor), -1))
        found = torch.cholesky_solve(grouped.mT, self._factor).mT.flatten(0, 1)
        return [found[:, :-1].reshape(weight.shape), found[:, -1]]


class Pair:
    """The two layers on all images: x in, c added, and the targets of S."""

    def __init__(
        self, maps: tuple[Convolution, Convolution], x: Tensor, added: Tensor | float, targets: Tensor, rectified: bool
    ) -> None:
        self.maps, self.x, self.added, self.targets, self.rectified = maps, x, added, targets, rectified

    def solve(self, start: Weights, free: tuple[bool, bool], ridge: float, steps: int) -> tuple[Weights, float, float]:
        """The weights after so many steps, drawn towards the start; the error per value before and after.

        It minimises |S - t|^2 + |W - W_start|^2 weighed, for each of the weights, by `ridge` times its mean on the
        diagonal of the Gauss-Newton matrix; where S goes into a ReLU, S and t below zero are alike.
        """
        weights, before = start, self._error(start)
        error, moments = before, self._moments(start, free, ridge)
        for _ in range(steps):
            hidden, sums = self._forward(weights)
            off, counts = self._off(sums)
            tangent = Tangent(self.maps, self.x, hidden, counts, weights, free)
            scales = self._diagonal(hidden, weights)
            pulls = [ridge * scales[0], FREE * scales[1], ridge * scales[2], FREE * scales[3]]
            away = [pull * (w - s) for pull, w, s in zip(pulls, weights, start)]
            right = [g - a for g, a in zip(tangent.turned(-off), away)]
            change = _conjugate(tangent, pulls, moments, right)
            for halved in range(HALVINGS):
                tried = [w + c / 2**halved for w, c in zip(weights, change)]
                if (now := self._error(tried)) < error:
                    weights, error = tried, now
                    break
        return weights, before, error

    def _forward(self, weights: Weights) -> tuple[Tensor, Tensor]:
        hidden = self.maps[0](self.x, weights[0], weights[1]).relu_()
        return hidden, self.maps[1](hidden, weights[2], weights[3]) + self.added

    def _off(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """How far S is from its targets, and where that counts."""
        if not self.rectified:
            return sums - self.targets, torch.ones_like(sums)
        counts = ((sums > 0) | (self.targets > 0)).to(sums)
        return (sums - self.targets.clamp(min=0)) * counts, counts

    def _error(self, weights: Weights) -> float:
        sums = self._forward(weights)[1]
        if self.rectified:
            return float((sums.relu_() - self.targets.clamp(min=0)).square().mean(dtype=torch.float64))
        return float((sums - self.targets).square().mean(dtype=torch.float64))

    def _moments(self, weights: Weights, free: tuple[bool, bool], ridge: float) -> tuple[Moments, Moments]:
        """Those of both layers; a unit between them reaches as far as its weights in the second, half of the time."""
        hidden = self.maps[0](self.x, weights[0], weights[1]).relu_()
        reach = weights[2].unflatten(0, (self.maps[1].groups, -1)).square().flatten(3).sum((1, 3)).flatten() / 2
        given = (self.x, weights[0], reach), (hidden, weights[2], torch.ones_like(weights[3]))
        one, other = (Moments(own, *each, f, ridge) for own, each, f in zip(self.maps, given, free))
        return one, other

    def _diagonal(self, hidden: Tensor, weights: Weights) -> tuple[float, ...]:
        """The mean of each weight's entries on the diagonal of the Gauss-Newton matrix, half of all units being on."""
        places = self.targets.numel() / self.targets.shape[1]
        reach = float(weights[2].square().sum()) / hidden.shape[1] / 2
        size = [float(value.square().mean()) for value in (self.x, hidden)]
        tiny = torch.finfo(self.x.dtype).tiny
        return tuple(max(places * v, tiny) for v in (reach * size[0], reach, size[1], 1.0))


def _conjugate(
    tangent: Tangent, pulls: Sequence[float], moments: tuple[Moments, Moments], right: Weights
) -> Weights:
    """(J^T J + pulls) change = right, begun at nothing, with the moments as preconditioner."""
    one, other = moments

    def step(gradients: Weights) -> Weights:
        return [*one.step(*gradients[:2]), *other.step(*gradients[2:])]

    change, rest = [torch.zeros_like(r) for r in right], right
    scaled = step(rest)
    way, size = scaled, _dot(rest, scaled)
    for _ in range(ROUNDS):
        if size <= 0:
            break
        turned = [t + pull * w for t, pull, w in zip(tangent.turned(tangent(way)), pulls, way)]
        length = size / _dot(way, turned)
        change = [c + length * w for c, w in zip(change, way)]
        rest = [r - length * t for r, t in zip(rest, turned)]
        scaled = step(rest)
        before, size = size, _dot(rest, scaled)
        way = [s + size / before * w for s, w in zip(scaled, way)]
    return change


def _dot(a: Weights, b: Weights) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b))


def solve_pair(
    first: Layer,
    second: Layer,
    pairs: SideBySide,
    tensors: dict[str, Tensor],
    way: Way,
    ridge: float,
    kept: Sequence[int] | None,
) -> Solved:
    """Set the tensors of both layers, and of their batch norms, to what they are best at together.

    Args:
        kept: the outputs of the second that the whole model has and the smaller one too; None for all.
    """
    seen = list(pairs.both(first, second))
    maps = Convolution.of(seen[0][0]), Convolution.of(seen[0][2])
    x, targets = _joined([args[0] for args, *_ in seen]), _joined([target for _, target, *_ in seen])
    targets = targets if kept is None else targets[:, list(kept)]
    added = [other for *_, other in seen if other is not None]
    pair = Pair(maps, x, _joined(added) if added else 0.0, targets, second.rectified)
    one, other = (Solving(layer, pairs, tensors, way, groups=m.groups) for layer, m in zip((first, second), maps))
    shapes = [tensors[layer.weight].shape for layer in (first, second)]
    start = [*_folded(one.start(), shapes[0], x), *_folded(other.start(), shapes[1], x)]
    found, before, after = pair.solve(start, (one.free, other.free), ridge, way.together)
    hidden = maps[0](x, found[0], found[1]).relu_()
    for solving, layer, own, given, weight, offset in (
        (one, first, maps[0], x, found[0], found[1]),
        (other, second, maps[1], hidden, found[2], found[3]),
    ):
        affine = Affine(matrix(layer, weight, own.groups), offset.double().cpu().view(own.groups, -1))
        solving.set(affine, _outcome(own, given, weight.shape))
    pairs.go_on(hidden.to(seen[0][0][0].dtype).split([len(args[0]) for args, *_ in seen]))
    spread = float(targets.double().flatten(2).transpose(0, 1).flatten(1).var(1, correction=0).mean())
    rows, name = targets.numel() // targets.shape[1], f"{first.name} and {second.name}"
    return Solved(name, rows, before / spread, after / spread, ridge)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """As one batch, with the channels last, in which convolutions of few channels take half the time."""
    whole = torch.cat([part.detach() for part in parts])
    whole = whole.float() if whole.dtype.itemsize < 4 else whole
    return whole.contiguous(memory_format=LAYOUTS[whole.ndim]) if whole.ndim in LAYOUTS else whole


def _folded(affine: Affine, shape: torch.Size, like: Tensor) -> Weights:
    return [affine.weight.reshape(shape).to(like), affine.offset.flatten().to(like)]


def _outcome(own: Convolution, x: Tensor, shape: torch.Size) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def moments(weight: Tensor) -> tuple[Tensor, Tensor]:
        rows = own(x, weight.reshape(shape).to(x)).transpose(0, 1).flatten(1).double()
        return tuple(v.cpu().view(own.groups, -1) for v in (rows.mean(1), rows.var(1)))  # type: ignore[return-value]

    return moments
