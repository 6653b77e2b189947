"""`reconstruct`: after a cut, each layer's weights are solved so that it gives what it gave in the whole model.

No labels and no training: least squares on a few hundred inputs, layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.allocate.plan import Plan
from secateur.errors import PlanError
from secateur.graph.nested import Nested
from secateur.graph.rebuild import tensor_shapes
from secateur.graph.twin import tensors_of
from secateur.recover.layers import Layer, find_pairs
from secateur.recover.normal import Affine
from secateur.recover.pairs import solve_pair
from secateur.recover.rows import matrix
from secateur.recover.solving import RIDGES, Solved, Solving, Way, side_by_side
from secateur.surgery.cut import check_fits
from secateur.surgery.masks import Masks

__all__ = ["Solved", "reconstruct"]


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    smaller: nn.Module,
    plan: Plan | Masks,
    batches: Iterable[Nested],
    *,
    ridge: float | Sequence[float] = RIDGES,
    positions: int | None = 64,
    rectify: int = 3,
    together: int = 0,
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

    - With `together`, all is gone through once more: where two convolutions follow each other with nothing but a batch
      norm and a ReLU between, both are solved at once (see `recover.pairs`), for the units between them need not be
      what they were in the whole model. That takes several times longer, and all images in memory at once.

    - Where single weights are masked, each output is solved for the weights of its own that stay; the others are zero.

    What stays as it was cut: weights that are used twice or computed by a parametrization, transposed convolutions,
    recurrent layers, and products of activations (attention itself).

    Args:
        model: the whole one, as it was before the cut; left as found.
        smaller: what `apply(model, plan)` gave, or a copy that masks were applied to, trained on or not; changed in
            place, and on failure as it was.
        plan: by which it was cut; or the masks that were applied.
        batches: model inputs, as `find_groups` takes them, which can be gone through again and again. No labels. They
            may be of different sizes, but the model runs the same ops on all.
        ridge: how strongly weights are drawn to what they were, as a share of the mean second moment of x; of several,
            for each layer the one with which what is solved on one half of the images is best on the other. With any,
            a layer's error on the batches does not grow. 0 is allowed: of many solutions, the one nearest.
        positions: of each input, at most so many positions of a layer's output are looked at, drawn at random; None
            for all. The cost of a layer is proportional.
        rectify: see above; each time costs a further pass over the layer's inputs.
        together: Gauss-Newton steps for two layers at once; 2 is usual. Not behind masks.
        held: for so many batches both runs are held where they stopped, with what they have in memory, and go on from
            there; for any more, they are run anew for each layer. So memory does not grow with the number of batches,
            and time does not grow with the square of the number of layers if all are held.
        seed: of the positions.

    Returns:
        What was solved, in the order in which the layers run; then those solved together.

    Raises:
        PlanError: the plan is not for these models, a ridge or `together` is below 0, or it is given with masks.
        DataError: there is no batch, or what a layer takes in or gives is not finite.
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
    way = Way(ridge, positions, rectify, together, held, seed)
    if isinstance(plan, Masks):
        if together:
            raise PlanError("behind masks layers are solved one by one; leave together out.")
        return _behind_masks(model, smaller, plan, batches, way)
    _check(model, smaller, plan)
    kept = plan.groups.kept(plan.keep)
    with side_by_side(model, smaller, batches, way, lambda layers: _due(layers, plan)) as pairs:
        solved = tuple(
            Solving(layer, pairs, tensors_of(smaller), way, kept.get(layer.weight, {}).get(layer.axis)).solve()
            for layer in pairs.layers
        )
        if together:
            pairs.close()
            solved += tuple(_once_more(model, smaller, plan, batches, way, {each.layer: each.ridge for each in solved}))
        return solved


def _once_more(
    model: nn.Module, smaller: nn.Module, plan: Plan, batches: Iterable[Nested], way: Way, ridges: Mapping[str, float]
) -> Iterator[Solved]:
    """A second pass, from the layer that makes the first units to be cut on: pairs at once, others one by one."""
    kept, tensors = plan.groups.kept(plan.keep), tensors_of(smaller)
    with side_by_side(model, smaller, batches, way, lambda layers: layers[-1 - len(_due(layers, plan)) :]) as pairs:
        found = find_pairs(pairs.trace, pairs.layers)
        before = {second: first for first, second in found}
        for layer in pairs.layers:
            outputs = kept.get(layer.weight, {}).get(layer.axis)
            if layer in before:
                yield solve_pair(before[layer], layer, pairs, tensors, way, ridges[layer.name], outputs)
            elif layer not in before.values():
                yield Solving(layer, pairs, tensors, way, outputs).solve()


def _behind_masks(
    model: nn.Module, sparse: nn.Module, masks: Masks, batches: Iterable[Nested], way: Way
) -> tuple[Solved, ...]:
    have, want = tensor_shapes(sparse), tensor_shapes(model)
    if have != want or not masks.holds(sparse):
        raise PlanError("the smaller model is not the whole one with these masks; call masks.apply_ on a copy of it.")
    touched = {mask.name for mask in masks.masks if mask.kept < mask.elements}

    def due(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        first = next((index for index, layer in enumerate(layers) if layer.weight in touched), 0)
        return layers[first:]

    def stays(layer: Layer, halves: object, start: Affine, free: bool) -> Tensor | None:
        found = matrix(layer, masks.keep(layer.weight), len(start.weight)) if layer.weight in masks.names else None
        return None if found is None else found > 0

    with side_by_side(model, sparse, batches, way, due) as pairs:
        return tuple(Solving(layer, pairs, tensors_of(sparse), way).solve(stays) for layer in pairs.layers)


def _check(model: nn.Module, smaller: nn.Module, plan: Plan) -> None:
    check_fits(model, plan)
    have, want = tensor_shapes(smaller), plan.groups.shapes(plan.keep)
    odd = [name for name in {**want, **have} if have.get(name) != want.get(name)]
    if odd:
        raise PlanError(
            f"the smaller model was not cut by this plan: {odd[0]} is {have.get(odd[0], 'missing')} and would be "
            f"{want.get(odd[0], 'missing')}. Give the plan that it was cut by."
        )


def _due(layers: tuple[Layer, ...], plan: Plan) -> tuple[Layer, ...]:
    """The layers from the first on that may take in other values than in the whole model."""
    kept = plan.groups.kept(plan.keep)
    for index, layer in enumerate(layers):
        if layer.weight in kept:  # one that only makes fewer units makes those that stay as they were
            return layers[index if 1 - layer.axis in kept[layer.weight] else index + 1 :]
    return layers


