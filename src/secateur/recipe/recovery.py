"""What a step that cuts or sparsifies does at once to get accuracy back: no labels, no training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.allocate.plan import Plan
from secateur.recipe.schema import Cut, Sparsify
from secateur.recover.prune import prune_weights
from secateur.recover.reconstruct import reconstruct
from secateur.recover.statistics import reset_statistics
from secateur.surgery.masks import Masks, find_masks
from secateur.surgery.pattern import find_pattern


def recover(
    step: Cut,
    model: nn.Module,
    smaller: nn.Module,
    plan: Plan,
    images: Iterable[tuple[Tensor, Tensor]],
    *,
    mirrored: bool = False,
) -> tuple[str, ...]:
    """Set batch norm's statistics, or solve all layers, of the smaller model in place; says what was done.

    Args:
        mirrored: least squares also see each image from left to right.
    """
    inputs = Inputs(images, mirrored and step.recover == "least-squares")
    if step.recover == "statistics":
        layers = reset_statistics(smaller, inputs)
        if not layers:
            return ("There is no batch norm whose statistics could be estimated anew.",)
        return (f"The statistics of {len(layers)} batch norms were estimated anew on train images, without labels.",)
    if step.recover == "least-squares":
        solved = reconstruct(model, smaller, plan, inputs, together=step.recover_together)
        on = "train images and their mirror images" if mirrored else "train images"
        return (f"The weights of {len(solved)} layers were solved by least squares on {on}, without labels.",)
    return ()


def sparsified(
    step: Sparsify, model: nn.Module, images: Iterable[tuple[Tensor, Tensor]]
) -> tuple[nn.Module, Masks, tuple[str, ...]]:
    """The model with weights at zero, which ones, and what was done about the others."""
    masks = masks_for(step, model)
    if step.recover == "nothing":
        masks.apply_(model)
        return model, masks, ()
    pruned = prune_weights(model, step.pattern or masks, Inputs(images), names=step.layers or None)
    said = f"The weights that stay were solved by least squares in {len(pruned.layers)} layers, on train images, "
    return pruned.model, pruned.masks, (f"{said}without labels.",)


def masks_for(step: Sparsify, model: nn.Module) -> Masks:
    """The masks of a step by magnitude."""
    names = step.layers or None
    if step.pattern is not None:
        return find_pattern(model, *step.pattern, names=names)
    return find_masks(model, step.sparsity or 0.0, scope=step.scope, names=names)


@dataclass(frozen=True)
class Inputs:
    """The images of batches, without their labels, as often as they are asked for; then mirrored, if they are to be."""

    batches: Iterable[tuple[Tensor, Tensor]]
    mirrored: bool = False

    def __iter__(self) -> Iterator[Tensor]:
        yield from (images for images, _ in self.batches)
        if self.mirrored:
            yield from (images.flip(-1) for images, _ in self.batches)
