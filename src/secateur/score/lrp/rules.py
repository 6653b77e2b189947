"""How a linear layer hands the relevance of its outputs to its inputs: the rules of layer-wise relevance propagation.

Input i gives x_i w_ij to output j. Every rule takes terms of that kind, (x', w', b'), adds up what the layer makes of
them, z_j, and gives input i the sum over j of x'_i w'_ij R_j / z_j, worked out as x' times a vector-Jacobian product
(Montavon et al. 2019, "Layer-Wise Relevance Propagation: An Overview"). A bias takes its share and keeps it. To z_j a
`stabilizer` is added with z_j's own sign, so that nothing is divided by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import PlanError

STABILIZER = 1e-6


@dataclass(frozen=True)
class Product:
    """A layer with its input: `apply(x, weight, bias)` is what it computes, for any tensors of these shapes.

    A batch norm that follows is in `weight` and `bias` already.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]


Rule = Callable[[Product, Tensor], Tensor]
"""(layer, relevance of its output) -> relevance of its input, of the shape of `layer.x`."""

Term = tuple[Tensor, Tensor, Tensor | None]


def stabilized(z: Tensor, by: float) -> Tensor:
    """`z`, moved by `by` away from zero; zero counts as positive.

    >>> stabilized(torch.tensor([2.0, 0.0, -2.0]), 0.5)
    tensor([ 2.5000,  0.5000, -2.5000])
    """
    return z + torch.where(z < 0, -by, by).to(z.dtype)


def shared(layer: Product, terms: Sequence[Term], relevance: Tensor, stabilizer: float) -> Tensor:
    """The relevance of the inputs, in proportion to what `terms` add to the output.

    >>> row = Product(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2), None, torch.nn.functional.linear)
    >>> shared(row, [(row.x, row.weight, None)], torch.tensor([[8.0]]), 0.0)
    tensor([[2., 6.]])
    """
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x, _, _ in terms]
        outputs = [layer.apply(x, weight, bias) for x, (_, weight, bias) in zip(inputs, terms)]
        total = torch.stack([out.detach() for out in outputs]).sum(0) if len(outputs) > 1 else outputs[0].detach()
        ratio = relevance / stabilized(total, stabilizer)
        slopes = torch.autograd.grad(outputs, inputs, [ratio] * len(outputs))
    out = torch.zeros_like(layer.x)
    for (x, _, _), slope in zip(terms, slopes):
        out += x * slope
    return out


@dataclass(frozen=True)
class Epsilon:
    """In proportion to x w, with `epsilon` added to the sum (Bach et al. 2015, eq. 58).

    It absorbs what is weak and contradictory. With `epsilon` near 0 and no bias it conserves relevance.

    >>> layer = Product(torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, -1.0]]), None, torch.nn.functional.linear)
    >>> Epsilon(0.0)(layer, torch.tensor([[2.0]]))
    tensor([[ 3., -1.]])
    """

    epsilon: float = STABILIZER

    def __call__(self, layer: Product, relevance: Tensor) -> Tensor:
        return shared(layer, [(layer.x, layer.weight, layer.bias)], relevance, self.epsilon)


@dataclass(frozen=True)
class AlphaBeta:
    """`alpha` times the share in what is positive, less `beta` times that in what is negative (Bach et al., eq. 60).

    It conserves relevance, but for biases, where an output has contributions of both signs (of positive ones, if `beta`
    is 0).

    Raises:
        PlanError: alpha - beta is not 1, or one is negative.

    >>> layer = Product(torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, -1.0]]), None, torch.nn.functional.linear)
    >>> AlphaBeta(2.0, 1.0, stabilizer=0.0)(layer, torch.tensor([[2.0]]))
    tensor([[ 4., -2.]])
    """

    alpha: float = 2.0
    beta: float = 1.0
    stabilizer: float = STABILIZER

    def __post_init__(self) -> None:
        if self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise PlanError(
                f"alpha = {self.alpha} and beta = {self.beta}: beta must not be negative and alpha must be beta + 1, "
                "or relevance is not conserved."
            )

    def __call__(self, layer: Product, relevance: Tensor) -> Tensor:
        grown = shared(layer, _positive(layer), relevance, self.stabilizer) * self.alpha
        if self.beta:
            grown -= shared(layer, _negative(layer), relevance, self.stabilizer) * self.beta
        return grown


@dataclass(frozen=True)
class ZPlus:
    """In proportion to what is positive (Montavon et al. 2017, for inputs of any sign): `AlphaBeta(1, 0)`.

    >>> layer = Product(torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, -1.0]]), None, torch.nn.functional.linear)
    >>> ZPlus(0.0)(layer, torch.tensor([[2.0]]))
    tensor([[2., 0.]])
    """

    stabilizer: float = STABILIZER

    def __call__(self, layer: Product, relevance: Tensor) -> Tensor:
        return shared(layer, _positive(layer), relevance, self.stabilizer)


@dataclass(frozen=True)
class Gamma:
    """As `Epsilon`, with what is positive favoured by 1 + `gamma` (Montavon et al. 2019).

    For inputs of both signs it is the generalised rule (Andéol et al. 2021): an output above 0 favours its positive
    contributions, one below 0 its negative ones.

    >>> layer = Product(torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, -1.0]]), None, torch.nn.functional.linear)
    >>> Gamma(1.0, stabilizer=0.0)(layer, torch.tensor([[5.0]]))
    tensor([[ 6., -1.]])
    """

    gamma: float = 0.25
    stabilizer: float = STABILIZER

    def __call__(self, layer: Product, relevance: Tensor) -> Tensor:
        x, weight, bias = layer.x, layer.weight, layer.bias
        up, down = x.clamp(min=0), x.clamp(max=0)
        more, less = weight + self.gamma * weight.clamp(min=0), weight + self.gamma * weight.clamp(max=0)
        raised = None if bias is None else bias + self.gamma * bias.clamp(min=0)
        lowered = None if bias is None else bias + self.gamma * bias.clamp(max=0)
        with torch.no_grad():
            out = layer.apply(x, weight, bias)
        high = [(up, more, raised), *_if_any(down, less)]
        got = shared(layer, high, relevance * (out > 0), self.stabilizer)
        if bool((out < 0).any()):
            low = [(up, less, lowered), *_if_any(down, more)]
            got += shared(layer, low, relevance * (out < 0), self.stabilizer)
        return got


@dataclass(frozen=True)
class Flat:
    """To all inputs alike, whatever they and the weights are (Lapuschkin et al. 2019); for the first layers.

    >>> layer = Product(torch.tensor([[1.0, 9.0]]), torch.tensor([[3.0, -1.0]]), None, torch.nn.functional.linear)
    >>> Flat(0.0)(layer, torch.tensor([[2.0]]))
    tensor([[1., 1.]])
    """

    stabilizer: float = STABILIZER

    def __call__(self, layer: Product, relevance: Tensor) -> Tensor:
        ones = (torch.ones_like(layer.x), torch.ones_like(layer.weight), None)
        return shared(layer, [ones], relevance, self.stabilizer)


@dataclass(frozen=True)
class WSquare:
    """In proportion to the squared weights (Montavon et al. 2017); for a first layer with unbounded inputs.

    >>> layer = Product(torch.tensor([[1.0, 9.0]]), torch.tensor([[3.0, -1.0]]), None, torch.nn.functional.linear)
    >>> WSquare(0.0)(layer, torch.tensor([[20.0]]))
    tensor([[18.,  2.]])
    """

    stabilizer: float = STABILIZER

    def __call__(self, layer: Product, relevance: Tensor) -> Tensor:
        squares = (torch.ones_like(layer.x), layer.weight.square(), None)
        return shared(layer, [squares], relevance, self.stabilizer)


@dataclass(frozen=True)
class Box:
    """z^B: for a first layer whose inputs lie between `low` and `high` (Montavon et al. 2017).

    Args:
        low: the lowest value an input can have, as a number, or as a tensor that is broadcast to the inputs.
        high: the highest.

    >>> layer = Product(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, -1.0]]), None, torch.nn.functional.linear)
    >>> Box(0.0, 1.0, stabilizer=0.0)(layer, torch.tensor([[8.0]]))
    tensor([[6., 2.]])
    """

    low: float | Tensor
    high: float | Tensor
    stabilizer: float = STABILIZER

    def __call__(self, layer: Product, relevance: Tensor) -> Tensor:
        low, high = (torch.ones_like(layer.x) * end for end in (self.low, self.high))
        weight = layer.weight
        terms = [(layer.x, weight), (-low, weight.clamp(min=0)), (-high, weight.clamp(max=0))]
        return shared(layer, [(x, w, None) for x, w in terms], relevance, self.stabilizer)


def _positive(layer: Product) -> list[Term]:
    """The terms of what is positive: both factors are, or neither is; and the positive biases."""
    bias = None if layer.bias is None else layer.bias.clamp(min=0)
    rest = _if_any(layer.x.clamp(max=0), layer.weight.clamp(max=0))
    return [(layer.x.clamp(min=0), layer.weight.clamp(min=0), bias), *rest]


def _negative(layer: Product) -> list[Term]:
    bias = None if layer.bias is None else layer.bias.clamp(max=0)
    rest = _if_any(layer.x.clamp(max=0), layer.weight.clamp(min=0))
    return [(layer.x.clamp(min=0), layer.weight.clamp(max=0), bias), *rest]


def _if_any(x: Tensor, weight: Tensor) -> list[Term]:
    """The term of what is below zero: none after a ReLU, which halves the work."""
    return [(x, weight, None)] if bool(x.any()) else []
