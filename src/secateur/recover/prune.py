"""`prune_weights`: single weights go, chosen by what their layer's output loses when the others make up for them.

No labels and no training: optimal brain surgery on a few hundred inputs, layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor, nn

from secateur.allocate.threshold import global_threshold
from secateur.errors import PlanError
from secateur.graph.nested import Nested
from secateur.graph.twin import duplicate, tensors_of
from secateur.recover.layers import Layer
from secateur.recover.normal import Affine, Together
from secateur.recover.rows import shaped
from secateur.recover.solving import RIDGES, Solved, Solving, Way, side_by_side
from secateur.recover.surgeon import in_blocks, prices
from secateur.surgery.masks import Mask, Masks, find_masks
from secateur.surgery.pattern import find_pattern


@dataclass(frozen=True, eq=False)
class Pruned:
    """A model with weights at zero, which ones, and what each layer has lost."""

    model: nn.Module
    masks: Masks
    layers: tuple[Solved, ...]


@torch.no_grad()
def prune_weights(
    model: nn.Module,
    amount: float | tuple[int, int] | Masks,
    batches: Iterable[Nested],
    *,
    names: str | Iterable[str] | None = None,
    damping: float = 0.01,
    exact: int = 1200,
    ridge: float | Sequence[float] = RIDGES,
    positions: int | None = 64,
    rectify: int = 3,
    held: int = 8,
    seed: int = 0,
) -> Pruned:
    """Choose weights and set them to zero in a copy of the model, and solve those that stay, one layer after the other.

    Each layer sees what the layers before it give by then, and is to give what it gives in the whole model, as in
    `reconstruct`. With H the second moments of its inputs, raised by the damping, weights go one by one, the one next
    whose going costs least when all others of its row make up for it: `surgeon.prices` (Frantar and Alistarh 2022,
    Optimal Brain Compression); in layers with more than `exact` inputs by blocks of columns, `surgeon.in_blocks`
    (Frantar and Alistarh 2023, SparseGPT). What stays is then solved by least squares, with what a batch norm or a ReLU
    behind the layer allows.

    Weights that `reconstruct` would leave as they are cannot be chosen in this way: they are by magnitude, each tensor
    by itself, and stay as they are.

    Args:
        model: left as found.
        amount: the share of all weights that go, in [0, 1): of each layer as many as one limit takes for the prices of
            all layers in the whole model, as shares of what their outputs vary; or masks, of which only the number of
            weights in each tensor counts, as `find_masks(model, 0.9)` for as many as magnitude would take, which was no
            worse for ResNet-20 on CIFAR-10 (held-out images); or (n, m): n of every m weights in a row along the
            inputs stay (see `find_pattern`).
        batches: model inputs, as `reconstruct` takes them. No labels.
        names: which tensors, as `find_masks` takes them; all if left out, and those of the masks where these are given.
        damping: of the choice, as a share of the mean of H's diagonal; above 0.
        exact: see above; the time for a layer grows with outputs x inputs^3, and in blocks with outputs x inputs^2,
            where as many go of each block, to within rounding.
        ridge, positions, rectify, held, seed: as in `reconstruct`.

    Raises:
        PlanError: a share or pattern out of range, nothing to mask, a ridge below 0, or a damping that is
            not above 0.
        UnknownName: a name or pattern that fits no tensor.
        DataError, CaptureError: as `reconstruct`.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Linear(3, 1).double()
    >>> net.weight.data = torch.tensor([[1.0, 1.5, 0.5]]).double()
    >>> x = torch.randn(64, 2).double()
    >>> x = torch.cat([x, x[:, :1]], 1)  # the first input comes twice, so one of its weights can stand in for both
    >>> pruned = prune_weights(net, 1 / 3, [x], ridge=1e-9)
    >>> pruned.masks.keep("weight").tolist(), torch.allclose(pruned.model(x), net(x))
    ([[True, True, False]], True)
    """
    if not damping > 0:
        raise PlanError(f"the damping is {damping}; give a share above 0, usually 0.01.")
    way, begin, sparse = Way(ridge, positions, rectify, held, seed), _first(model, amount, names), duplicate(model)
    chosen = _Choosing(begin, exact, damping, amount if isinstance(amount, tuple) else None)
    if isinstance(amount, float | int):
        chosen.gone = _by_limit(model, chosen, batches, way, amount)
    with side_by_side(model, sparse, batches, way, tuple) as pairs:
        solvable = {layer.weight for layer in pairs.layers}
        by_size = tuple(mask for mask in begin.masks if mask.name not in solvable)
        if by_size and isinstance(amount, float | int):
            by_size = find_masks(model, amount, scope="layer", names=[mask.name for mask in by_size]).masks
        Masks(by_size).apply_(sparse)
        layers = tuple(Solving(layer, pairs, tensors_of(sparse), way).solve(chosen) for layer in pairs.layers)
    found = {mask.name: mask for mask in (*by_size, *chosen.found)}
    masks = Masks(tuple(found[mask.name] for mask in begin.masks))
    masks.apply_(sparse)
    return Pruned(sparse, masks, layers)


def _first(model: nn.Module, amount: float | tuple[int, int] | Masks, names: str | Iterable[str] | None) -> Masks:
    """Masks by magnitude of the tensors that are asked for."""
    if isinstance(amount, Masks):
        amount.holds(model)  # refuses those of another model
        return amount
    if isinstance(amount, tuple):
        return find_pattern(model, *amount, names=names)
    return find_masks(model, amount, names=names)


@dataclass
class _Choosing:
    """Chooses the weights of each layer in turn, and notes their masks."""

    begin: Masks
    exact: int
    damping: float
    pattern: tuple[int, int] | None
    found: list[Mask] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shapes = {mask.name: mask.shape for mask in self.begin.masks}
        self.gone: Mapping[str, int] = {mask.name: mask.elements - mask.kept for mask in self.begin.masks}

    def __call__(self, layer: Layer, halves: tuple[Together, Together], start: Affine, free: bool) -> Tensor | None:
        """Which weights of a layer stay: (groups, outputs, inputs)."""
        if layer.weight not in self.shapes:
            return None
        best, hessians = self.quadratic(halves, start, free)
        parts, most = self.parts(layer, best)
        count = self.gone[layer.weight]
        if best.shape[2] > self.exact:
            pairs = zip(best, hessians, strict=True)
            stays = torch.stack([in_blocks(w, h, count / best.numel(), parts, most) for w, h in pairs])
        else:
            costs = self.prices(best, hessians, parts, most)
            last = count if parts is None else int(costs.isfinite().sum())
            stays = torch.ones(best.numel(), dtype=torch.bool)
            stays[costs.flatten().argsort(stable=True)[:last]] = False
            stays = stays.view_as(best)
        shape = self.shapes[layer.weight]
        bits = shaped(layer, stays, torch.empty(shape)).numpy()
        self.found.append(Mask(layer.weight, shape, numpy.packbits(bits).tobytes()))
        return stays

    def quadratic(self, halves: tuple[Together, Together], start: Affine, free: bool) -> tuple[Tensor, Tensor]:
        """The best weights, (groups, outputs, inputs), and the raised second moments of each group's inputs."""
        seen = halves[0] | halves[1]
        hessians = seen.moments(free)
        raised = (self.damping * hessians.diagonal(dim1=1, dim2=2).mean(1)).clamp(min=1e-30)
        hessians = hessians + raised[:, None, None] * torch.eye(hessians.shape[1], dtype=hessians.dtype)
        return seen.solve(start, self.damping, free).weight, hessians

    def prices(self, best: Tensor, hessians: Tensor, parts: Tensor | None = None, most: int = 0) -> Tensor:
        """What each weight costs, (groups, outputs, inputs)."""
        return torch.stack([prices(w, h, parts, most) for w, h in zip(best, hessians, strict=True)])

    def parts(self, layer: Layer, best: Tensor) -> tuple[Tensor | None, int]:
        """To which set of the pattern each column belongs, and how many of each set go."""
        if self.pattern is None:
            return None, 0
        keep, of = self.pattern
        places = 1 if layer.turned else int(numpy.prod(self.shapes[layer.weight][2:]))
        inputs = torch.arange(best.shape[2] // places) // of
        return (inputs.unsqueeze(1) * places + torch.arange(places)).flatten(), of - keep


def _by_limit(
    model: nn.Module, chosen: _Choosing, batches: Iterable[Nested], way: Way, share: float
) -> dict[str, int]:
    """How many weights of each tensor go, by one limit for all prices in the whole model."""
    costs: dict[str, Tensor] = {}
    with side_by_side(model, model, batches, way, tuple) as pairs:
        for layer in pairs.layers:
            if layer.weight in chosen.shapes:
                solving = Solving(layer, pairs, tensors_of(model), way)
                halves, start = solving.seen()
                best, hessians = chosen.quadratic(halves, start, solving.free)
                spread = (halves[0] | halves[1]).spread
                costs[layer.weight] = _costs(chosen, best, hessians) / (spread if spread > 0 else 1.0)
    count = round(share * sum(cost.numel() for cost in costs.values()))
    if not costs:
        return {}
    limit = global_threshold(list(costs.values()), count, names=list(costs))
    ties, gone = limit.count - limit.below, {}
    for name, cost in costs.items():
        here = min(ties, int((cost == limit.value).sum()))
        gone[name], ties = int((cost < limit.value).sum()) + here, ties - here
    return gone


def _costs(chosen: _Choosing, best: Tensor, hessians: Tensor) -> Tensor:
    """The prices of a layer; where it has too many columns, those of weights that go alone."""
    if best.shape[2] <= chosen.exact:
        return chosen.prices(best, hessians)
    alone: Tensor = best.square() / torch.linalg.inv(hessians).diagonal(dim1=1, dim2=2).unsqueeze(1)
    return alone
