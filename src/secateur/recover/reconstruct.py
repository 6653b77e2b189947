"""`reconstruct`: after a cut, each layer's weights are solved so that it gives what it gave in the whole model.

No labels and no training: least squares on a few hundred inputs, layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.allocate.plan import Plan
from secateur.errors import DataError, PlanError
from secateur.graph.attention import see_heads
from secateur.graph.capture import record
from secateur.graph.nested import Nested, map_tensors
from secateur.graph.rebuild import share, tensor_shapes
from secateur.graph.twin import empty_caches, slow_attention
from secateur.recover.held import SideBySide
from secateur.recover.layers import Layer, find_layers
from secateur.recover.normal import Affine, Together, best_ridge
from secateur.recover.rows import inputs, matrix, outputs, places, shaped
from secateur.score.scoring import tensors_of
from secateur.surgery.cut import check_fits

RIDGES = (1e-2, 1e-1, 1.0)
"""From weights that are as good as free to weights that hardly move."""


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


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    smaller: nn.Module,
    plan: Plan,
    batches: Iterable[Nested],
    *,
    ridge: float | Sequence[float] = RIDGES,
    positions: int | None = 64,
    rectify: int = 3,
    held: int = 8,
    seed: int = 0,
) -> tuple[Solved, ...]:
    """Solve the weights of `smaller` in place, one layer after the other, to give what the whole model gives.

    Of a layer y = W x, let s be the inputs that stay. Least squares over the batches, with C = E[x x^T], gives

        W'_s = W_s + W_r C_rs C_ss^-1,

    so a unit r that was cut is folded into the units it resembles, by the coefficients of its regression on them: it
    is merged, and pruned only as far as no other can stand in. (Optimal Brain Surgeon, Hassibi and Stork 1993, for
    whole sets of weights; ThiNet, Luo et al. 2017, equation 7, with a factor for each channel; He, Zhang and Sun 2017,
    "Channel Pruning", equation 4.) Here more is asked: x comes from the layers that have been cut and solved before,
    and t is what the whole model computes of its own, so that a layer makes up for the errors before it:

        min over W, b of  E |t - W x - b|^2 + ridge * mean(diag C) * |W - W_s|^2.

    - Every convolution (in groups, depthwise) and linear layer with a weight of its own is solved, from the first that
      reads a cut unit on; in attention, the projections.
    - Where the output is added to something that was computed before (a residual stream), t is the whole model's sum
      less the smaller model's other part: the sums are matched, and the layer takes over the stream's error.
    - Where a batch norm follows, t is what comes out of it, and b is free. The running statistics become those of the
      solved W x, which follow from its moments without a further pass, and scale and offset are set so that the norm
      gives W x + b exactly. So the norm stays one, with statistics that are true, and training can go on.
    - Where none follows, b is the layer's bias; with no bias, b stays 0 and the moments are not about the mean.
    - Where that goes into a ReLU, whatever is below zero is as good as zero: with S the sum to be matched and P what
      the solution gives, the targets below zero are set to min(P, 0), and W is solved again, `rectify` times, by which
      the error above the rectifier falls each time. (Zhang, Zou, He and Sun 2015, "Accelerating Very Deep Convolutional
      Networks for Classification and Detection", section 3.2, solve it by alternating in the same manner.)

    What stays as it was cut: weights that are used twice or computed by a parametrization, transposed convolutions,
    recurrent layers, and products of activations (attention itself).

    Args:
        model: the whole one, as it was before the cut; left as found.
        smaller: what `apply(model, plan)` gave, trained on or not; changed in place, and on failure as it was.
        plan: by which it was cut.
        batches: model inputs, as `find_groups` takes them, which can be gone through again and again. No labels. They
            may be of different sizes, but the model runs the same ops on all.
        ridge: how strongly weights are drawn to what they were, as a share of the mean second moment of x; of several,
            for each layer the one with which what is solved on one half of the images is best on the other. With any,
            a layer's error on the batches does not grow. 0 is allowed: of many solutions, the one nearest.
        positions: of each input, at most so many positions of a layer's output are looked at, drawn at random; None
            for all. The cost of a layer is proportional.
        rectify: see above; each time costs a further pass over the layer's inputs.
        held: for so many batches both runs are held where they stopped, with what they have in memory, and go on from
            there; for any more, they are run anew for each layer. So memory does not grow with the number of batches,
            and time does not grow with the square of the number of layers if all are held.
        seed: of the positions.

    Returns:
        What was solved, in the order in which the layers run.

    Raises:
        PlanError: the plan is not for these models, or a ridge is below 0. DataError: there is no batch, or what a
            layer takes in or gives is not finite.
        CaptureError: the model does not run on a batch, or runs other ops than on the first.

    >>> import secateur as sc
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).double()
    >>> _ = net[0].weight.data[1].copy_(2 * net[0].weight.data[0])  # the second unit is twice the first
    >>> x = torch.randn(64, 2, dtype=torch.float64)
    >>> plan = sc.Plan(sc.find_groups(net, x), keep=((0, 2),))
    >>> smaller = sc.apply(net, plan)
    >>> (solved,) = reconstruct(net, smaller, plan, [x], ridge=1e-12)
    >>> solved.layer, solved.after < 1e-9, torch.allclose(smaller(x), net(x), atol=1e-6)
    ('1', True, True)
    """
    _check(model, smaller, plan)
    ridges = tuple(ridge) if isinstance(ridge, Sequence) else (ridge,)
    if not ridges or not all(0 <= value < float("inf") for value in ridges):
        raise PlanError(f"the ridge is {ridge}; give a share of 0 or more, or several.")
    whole, pruned = _twin(model), _twin(smaller)
    before = {name: tensor.clone() for name, tensor in tensors_of(smaller).items()}
    with empty_caches(), slow_attention():
        first = next(iter(batches), None)
        if first is None:
            raise DataError("there are no batches to solve the weights from; give one or more.")
        trace = record(_twin(model), map_tensors(torch.clone, first), fake=False)
        pairs = SideBySide(whole, pruned, trace, _due(find_layers(trace), plan), batches, held)
        solved = []
        try:
            for layer in pairs.layers:
                solved.append(_Solving(layer, pairs, plan, tensors_of(smaller), positions, seed).solve(ridges, rectify))
        except BaseException:
            for name, tensor in tensors_of(smaller).items():
                tensor.copy_(before[name])
            raise
        finally:
            pairs.close()
    return tuple(solved)


def _check(model: nn.Module, smaller: nn.Module, plan: Plan) -> None:
    check_fits(model, plan)
    have, want = tensor_shapes(smaller), plan.groups.shapes(plan.keep)
    odd = [name for name in {**want, **have} if have.get(name) != want.get(name)]
    if odd:
        raise PlanError(
            f"the smaller model was not cut by this plan: {odd[0]} is {have.get(odd[0], 'missing')} and would be "
            f"{want.get(odd[0], 'missing')}. Give the plan that it was cut by."
        )


def _twin(model: nn.Module) -> nn.Module:
    """A copy to run, in eval mode, whose parameters and buffers are the model's own memory."""
    return see_heads(share(model, dict(model.named_buffers())).eval())


def _due(layers: tuple[Layer, ...], plan: Plan) -> tuple[Layer, ...]:
    """The layers from the first on that may take in other values than in the whole model."""
    kept = plan.groups.kept(plan.keep)
    for index, layer in enumerate(layers):
        if layer.weight in kept:  # one that only makes fewer units makes those that stay as they were
            return layers[index if 1 - layer.axis in kept[layer.weight] else index + 1 :]
    return layers


class _Solving:
    """One layer being solved: what it starts from, and passes over its rows."""

    def __init__(
        self, layer: Layer, pairs: SideBySide, plan: Plan, tensors: dict[str, Tensor], positions: int | None, seed: int
    ) -> None:
        self._layer, self._pairs, self._tensors, self._positions, self._seed = layer, pairs, tensors, positions, seed
        kept = plan.groups.kept(plan.keep).get(layer.weight, {}).get(layer.axis)
        self._kept = None if kept is None else torch.tensor(kept)
        self._groups = 1

    def solve(self, ridges: Sequence[float], rectify: int) -> Solved:
        """Set the layer's tensors, and its batch norm's, to the solution."""
        layer = self._layer
        halves = self._moments(None)
        seen = halves[0] | halves[1]
        if not (seen.inputs.isfinite().all() and seen.crossed.isfinite().all()):
            raise DataError(f"layer {layer.name!r} takes in or gives numbers that are not finite; nothing was changed.")
        start, free = self._start(), layer.norm is not None or layer.bias != ""
        ridge = best_ridge(halves, start, ridges, free)
        found, before = seen.solve(start, ridge, free), _share(seen.error(start), seen.spread)
        for _ in range(rectify if layer.rectified else 0):
            again = self._moments(found)
            inputs, seen = seen.inputs, again[0] | again[1]
            seen.inputs = inputs
            found = seen.solve(start, ridge, free)
        self._set(seen, found)
        return Solved(layer.name, seen.count, before, _share(seen.error(found), seen.spread), ridge)

    def _start(self) -> Affine:
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
        random = torch.Generator().manual_seed(self._seed * 1_000_003 + layer.call)  # other positions for each layer
        for size, target, args, added in self._pairs.at(layer):
            weight = args[1] if len(args) >= 9 else args[-1]
            self._groups = args[8] if len(args) >= 9 else 1
            sums = outputs(target, weight.ndim, self._kept)
            other = None if added is None else outputs(added, weight.ndim, None)
            at, each = places(size, len(sums), self._positions, random), max(1, len(sums) // max(size, 1))
            at = torch.arange(len(sums)) if at is None else at
            odd = (at // each + images) % 2
            for half, seen in enumerate(halves):
                mine = at[odd == half].to(sums.device)
                for rows, piece in inputs(layer, args, mine):
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

    def _set(self, seen: Together, found: Affine) -> None:
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
        mean, spread = seen.outcome(found.weight * factor.unsqueeze(2))
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
