"""Masks that move while a model is trained: `fine_tune(masks=...)` takes one of these, or `Masks` that stay.

A way of moving says which masks a run begins with, at which steps they change, and from when on they stay as they are;
`keeping` holds the weights at zero. Steps are counted from 0, by how many were taken before, and begin, end and length
are shares of the run, for they are to fit runs of any length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from secateur.errors import TrainingError
from secateur.surgery.masks import Masks, find_masks

Scope = Literal["global", "layer"]
Keeps = Mapping[str, Tensor]
"""By parameter, which of its weights stay: bool, of its shape, where it is."""


@dataclass(frozen=True, eq=False)
class Moment:
    """A run just before an optimizer step.

    Args:
        model: as it is; weights that do not stay are zero.
        step: how many were taken before.
        steps: of the whole run.
        keeps: the masks in force.
    """

    model: nn.Module
    step: int
    steps: int
    keeps: Keeps

    def slope(self, name: str) -> Tensor:
        """The gradient of this step's loss by a parameter, by the weights that are masked as well."""
        parameter = self.model.get_parameter(name)
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class Moving(Protocol):
    """What a way of moving masks has to say."""

    def start(self, model: nn.Module) -> Masks:
        """The masks that a run begins with, of all tensors that it ever masks."""

    def move(self, at: Moment) -> Keeps | None:
        """The masks from this step on; None if they stay. It draws nothing at random but from torch's generators."""

    def settled(self, step: int, steps: int) -> bool:
        """Whether masks stay to the end, once `step` of `steps` steps are taken."""


@dataclass(frozen=True)
class Fixed:
    """Masks that stay, whatever their pattern; `fine_tune(masks=Masks)` means it."""

    masks: Masks

    def start(self, model: nn.Module) -> Masks:
        """The masks."""
        return self.masks

    def move(self, at: Moment) -> Keeps | None:
        """They stay."""
        return None

    def settled(self, step: int, steps: int) -> bool:
        """From the beginning."""
        return True


@dataclass(frozen=True)
class Gradual:
    """More and more weights go, the smallest at the time: many at first, fewer later.

    Zhu and Gupta 2017 (To Prune, or Not to Prune, arXiv 1710.01878), equation 1: with the steps t_0 = begin and
    t_1 = end, at every so many steps from t_0 to t_1,

        s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3.

    They take the same share of each layer; so does scope "layer". As there, what went has no gradient and stays.

    Args:
        sparsity: the share of weights that are gone in the end, s_f.
        begin, end: shares of the run, 0 <= begin < end < 1; the rest of it trains the masks of the end.
        every: steps between two changes.
        initial: s_i.
        scope, names: as `find_masks` takes them.

    Raises:
        TrainingError: shares out of range.

    >>> [round(Gradual(0.9, begin=0.0, end=0.8, every=2).at(step, 10), 3) for step in (0, 2, 4, 8, 9)]
    [0.0, 0.52, 0.787, 0.9, 0.9]
    """

    sparsity: float
    begin: float = 0.0
    end: float = 0.75
    every: int = 10
    initial: float = 0.0
    scope: Scope = "global"
    names: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check(self.sparsity, self.every)
        if not 0 <= self.initial <= self.sparsity:
            raise TrainingError(f"masks cannot go from sparsity {self.initial} up to {self.sparsity}; give less first.")
        if not 0 <= self.begin < self.end < 1:
            raise TrainingError(f"masks cannot move from {self.begin} to {self.end} of a run; give shares of it.")

    def at(self, step: int, steps: int) -> float:
        """The sparsity at a step."""
        first, last = self._ends(steps)
        left = 1 - min(max((step - first) / max(last - first, 1), 0.0), 1.0)
        return self.sparsity if step >= last else self.sparsity + (self.initial - self.sparsity) * left**3

    def start(self, model: nn.Module) -> Masks:
        """The smallest go, up to the initial sparsity."""
        return find_masks(model, self.initial, scope=self.scope, names=self.names)

    def move(self, at: Moment) -> Keeps | None:
        """The smallest go, up to the sparsity of this step."""
        first, last = self._ends(at.steps)
        if not first <= at.step <= last or ((at.step - first) % self.every and at.step != last):
            return None
        masks = find_masks(at.model, self.at(at.step, at.steps), scope=self.scope, names=self.names)
        return {name: keep & at.keeps[name] for name, keep in unpacked(masks, at.model).items()}

    def settled(self, step: int, steps: int) -> bool:
        """After the last change."""
        return step > self._ends(steps)[1]

    def _ends(self, steps: int) -> tuple[int, int]:
        return round(self.begin * steps), min(round(self.end * steps), steps - 1)


@dataclass(frozen=True)
class ACDC:
    """Phases in which only the largest weights are trained take turns with phases in which all are.

    Peste et al. 2021 (AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks, arXiv 2106.12379),
    algorithm 1: dense at first; then, `cycles` times, compressed and dense; compressed to the end. At the beginning of
    each compressed phase the largest weights of that moment are chosen, and these stay for the phase. What was masked
    begins the next dense phase at zero, and without momentum, for it gathers none while it is masked.

    Args:
        sparsity: of compressed phases.
        cycles: how often a dense phase follows a compressed one.
        warmup: how long the run is dense at first, as a share of it.
        final: how long the last compressed phase is, as a share; the phases between are equally long.
        scope, names: as `find_masks` takes them.

    Raises:
        TrainingError: shares out of range; and at the first step, if the run has too few steps for all phases.

    >>> ACDC(0.9, cycles=2, warmup=0.1, final=0.5).phases(100)
    ((10, True), (20, False), (30, True), (40, False), (50, True))
    """

    sparsity: float
    cycles: int = 3
    warmup: float = 0.1
    final: float = 0.3
    scope: Scope = "global"
    names: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check(self.sparsity, self.cycles)
        if self.warmup < 0 or self.final <= 0 or self.warmup + self.final >= 1:
            raise TrainingError(
                f"a warm-up of {self.warmup} and a last phase of {self.final} leave nothing between them; they are "
                "shares of the run that must come to less than 1."
            )

    def phases(self, steps: int) -> tuple[tuple[int, bool], ...]:
        """At which step each phase begins, and whether it is compressed."""
        first, last, count = self.warmup * steps, (1 - self.final) * steps, 2 * self.cycles
        found = tuple((round(first + (last - first) * i / count), i % 2 == 0) for i in range(count + 1))
        if any(one >= other for (one, _), (other, _) in zip(found, [*found[1:], (steps, True)])):
            raise TrainingError(f"{count + 2} phases do not fit into {steps} steps; train for longer.")
        return found

    def start(self, model: nn.Module) -> Masks:
        """All stay."""
        return find_masks(model, 0.0, scope=self.scope, names=self.names)

    def move(self, at: Moment) -> Keeps | None:
        """The largest stay where a compressed phase begins, and all where a dense one does."""
        compressed = dict(self.phases(at.steps)).get(at.step)
        if compressed is None:
            return None
        sparsity = self.sparsity if compressed else 0.0
        return unpacked(find_masks(at.model, sparsity, scope=self.scope, names=self.names), at.model)

    def settled(self, step: int, steps: int) -> bool:
        """In the last phase."""
        return step > self.phases(steps)[-1][0]


@dataclass(frozen=True)
class RigL:
    """The smallest weights go and as many come in their place, where the loss has the steepest slope.

    Evci et al. 2020 (Rigging the Lottery: Making All Tickets Winners, arXiv 1911.11134), algorithm 1: of each layer's
    weights that stay, the share

        f(t) = alpha / 2 (1 + cos(t pi / T_end))

    goes, the smallest first, and of those that are masked by then as many come that have the largest gradient. They
    begin at zero, without momentum; one that goes and comes in the same moment is left as it is. So each layer keeps
    its sparsity. Algorithm 1 takes no optimizer step where masks move; here that step is taken, with the new masks.

    Args:
        masks: to begin with, of any sparsity for each layer: found by magnitude, by loss, or drawn.
        every: steps between two changes.
        alpha: the share at the beginning.
        end: T_end, as a share of the run; the paper's is 0.75.

    Raises:
        TrainingError: numbers out of range.

    >>> [round(RigL(Masks(()), alpha=0.3, end=0.8).share(step, 100), 3) for step in (0, 40, 80)]
    [0.3, 0.15, 0.0]
    """

    masks: Masks
    every: int = 100
    alpha: float = 0.3
    end: float = 0.75

    def __post_init__(self) -> None:
        _check(self.alpha, self.every)
        if not 0 < self.end < 1:
            raise TrainingError(f"masks cannot move up to {self.end} of a run; give a share of it, such as 0.75.")

    def share(self, step: int, steps: int) -> float:
        """The share of weights that are exchanged at a step."""
        return self.alpha / 2 * (1 + math.cos(math.pi * min(step / (self.end * steps), 1.0)))

    def start(self, model: nn.Module) -> Masks:
        """The given ones."""
        return self.masks

    def move(self, at: Moment) -> Keeps | None:
        """Exchange weights, layer by layer."""
        if not at.step or at.step % self.every or self.settled(at.step, at.steps):
            return None
        share = self.share(at.step, at.steps)
        return {
            name: _exchanged(at.model.get_parameter(name).detach(), at.slope(name), keep, share)
            for name, keep in at.keeps.items()
        }

    def settled(self, step: int, steps: int) -> bool:
        """After the end, or where no further change is due before it."""
        following = -(-max(step, 1) // self.every) * self.every
        return following >= self.end * steps


def _exchanged(weight: Tensor, slope: Tensor, keep: Tensor, share: float) -> Tensor:
    """A layer's mask after some of its weights are exchanged: equal ones by their place, the first before the last."""
    flat = keep.flatten()
    count = min(int(share * int(flat.sum())), flat.numel() - int(flat.sum()))
    sizes = weight.abs().flatten().masked_fill(~flat, torch.inf)
    after = flat.clone()
    after[sizes.argsort(stable=True)[:count]] = False
    steep = slope.abs().flatten().masked_fill(after, -1.0)
    after[steep.argsort(descending=True, stable=True)[:count]] = True
    return after.view(keep.shape)


def unpacked(masks: Masks, model: nn.Module) -> dict[str, Tensor]:
    """Each mask as a tensor, where the model's parameter is."""
    return {name: masks.keep(name).to(model.get_parameter(name).device) for name in masks.names}


def _check(share: float, every: int) -> None:
    if not 0 <= share < 1:
        raise TrainingError(f"{share} is no share of weights; give a number in [0, 1).")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise TrainingError(f"masks cannot move {every} times or every {every} steps; give a whole number from 1.")
