"""What a cutting step does at once to get accuracy back: no labels, no training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.allocate.plan import Plan
from secateur.recipe.schema import Cut
from secateur.recover.reconstruct import reconstruct
from secateur.recover.statistics import reset_statistics


def recover(
    step: Cut, model: nn.Module, smaller: nn.Module, plan: Plan, images: Iterable[tuple[Tensor, Tensor]]
) -> tuple[str, ...]:
    """Set batch norm's statistics, or solve all layers, of the smaller model in place; says what was done."""
    inputs = Inputs(images)
    if step.recover == "statistics":
        layers = reset_statistics(smaller, inputs)
        return (f"The statistics of {len(layers)} batch norms were estimated anew on train images, without labels.",)
    if step.recover == "least-squares":
        solved = reconstruct(model, smaller, plan, inputs)
        return (f"The weights of {len(solved)} layers were solved by least squares on train images, without labels.",)
    return ()


@dataclass(frozen=True)
class Inputs:
    """The images of batches, without their labels; as often as they are asked for."""

    batches: Iterable[tuple[Tensor, Tensor]]

    def __iter__(self) -> Iterator[Tensor]:
        return (images for images, _ in self.batches)
