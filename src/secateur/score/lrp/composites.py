"""Which rule for which layer: a composite is a function from `Layer` to `Rule`, a lambda of yours or one of these.

Names and constituents of the usual ones follow Kohlbrenner et al. 2020 ("Towards Best Practice in Explaining Neural
Network Decisions with LRP") and Montavon et al. 2019; "first" are the layers that read the model's input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from secateur.score.lrp.rules import STABILIZER, AlphaBeta, Box, Epsilon, Flat, Gamma, Rule, ZPlus


@dataclass(frozen=True)
class Layer:
    """A linear layer as a composite sees it.

    Args:
        name: dotted path of the module that makes the call; "" is the model's own forward.
        dense: a matrix product and not a convolution.
        first: no other layer lies between it and the model's input.
    """

    name: str
    dense: bool
    first: bool


Composite = Callable[[Layer], Rule]
"""For each layer, its rule: `lambda layer: ZPlus() if layer.name.startswith("features") else Epsilon()`."""


@dataclass(frozen=True)
class AllEpsilon:
    """Epsilon everywhere: with `epsilon` near 0, gradient x input in networks of ReLUs (Bach et al. 2015)."""

    epsilon: float = STABILIZER

    def __call__(self, layer: Layer) -> Rule:
        return Epsilon(self.epsilon)


@dataclass(frozen=True)
class EpsilonPlus:
    """Epsilon for dense layers, z+ for convolutions.

    >>> [EpsilonPlus()(Layer("fc", dense, first=False)) for dense in (True, False)]
    [Epsilon(epsilon=1e-06), ZPlus(stabilizer=1e-06)]
    """

    epsilon: float = STABILIZER
    stabilizer: float = STABILIZER

    def __call__(self, layer: Layer) -> Rule:
        return Epsilon(self.epsilon) if layer.dense else ZPlus(self.stabilizer)


@dataclass(frozen=True)
class EpsilonAlphaBeta:
    """Epsilon for dense layers, alpha-beta for convolutions; by default EpsilonAlpha2Beta1."""

    epsilon: float = STABILIZER
    alpha: float = 2.0
    beta: float = 1.0
    stabilizer: float = STABILIZER

    def __call__(self, layer: Layer) -> Rule:
        return Epsilon(self.epsilon) if layer.dense else AlphaBeta(self.alpha, self.beta, self.stabilizer)


@dataclass(frozen=True)
class EpsilonGammaBox:
    """z^B for the first layers, gamma for the other convolutions, epsilon for the other dense layers.

    Args:
        low, high: the lowest and the highest inputs, as for `Box`.
    """

    low: float | Tensor
    high: float | Tensor
    epsilon: float = STABILIZER
    gamma: float = 0.25
    stabilizer: float = STABILIZER

    def __call__(self, layer: Layer) -> Rule:
        if layer.first:
            return Box(self.low, self.high, self.stabilizer)
        return Epsilon(self.epsilon) if layer.dense else Gamma(self.gamma, self.stabilizer)


@dataclass(frozen=True)
class FlatFirst:
    """Flat for the first layers, and `rest` for all others.

    >>> FlatFirst(EpsilonPlus())(Layer("conv1", dense=False, first=True))
    Flat(stabilizer=1e-06)
    """

    rest: Composite = field(default_factory=EpsilonPlus)
    stabilizer: float = STABILIZER

    def __call__(self, layer: Layer) -> Rule:
        return Flat(self.stabilizer) if layer.first else self.rest(layer)
