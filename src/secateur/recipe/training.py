"""What a training step of a recipe asks for, as the objects that `fine_tune` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocate.plan import Plan
from secateur.errors import RecipeError
from secateur.graph.records import Groups
from secateur.recipe.parts import DistillPart, PenaltyPart
from secateur.recipe.schema import Train
from secateur.recover.distillation import Attention, Distillation, teacher_logits
from secateur.recover.mixing import CutMix, Mix, Mixup, OneOf
from secateur.recover.penalties import L1, L2, GroupLasso, Growing, Slimming
from secateur.recover.place import norms_and_head
from secateur.recover.schedule import Stage
from secateur.zoo.data import Data
from secateur.zoo.images import Images

Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


def options_of(step: Train, model: nn.Module) -> dict[str, Any]:
    """The arguments of `fine_tune` that a step says in words and numbers.

    >>> options = options_of(Train(stages=({"lr": 0.1, "epochs": 2},), cutmix=1.0, ema=0.99), nn.Linear(1, 1))
    >>> options["stages"], options["mix"], options["ema"]
    ([Stage(lr=0.1, epochs=2)], CutMix(alpha=1.0), 0.99)
    """
    names = ("schedule", "warmup", "rewind", "label_smoothing", "clip", "ema", "keep")
    return {
        **{name: getattr(step, name) for name in (*names, "channels_last", "bf16", "compile", "parallel")},
        **_optimizer(step),
        "stages": [Stage(stage.lr, stage.epochs) for stage in step.stages],
        "mix": mix_of(step),
        "only": norms_and_head(model) if step.only == "norms-and-head" else None,
    }


def mix_of(step: Train) -> Mix | None:
    """How images are mixed; with both ways, one or the other is drawn for each batch."""
    mixes = [kind(alpha) for kind, alpha in ((Mixup, step.mixup), (CutMix, step.cutmix)) if alpha is not None]
    return None if not mixes else mixes[0] if len(mixes) == 1 else OneOf(tuple(mixes))


def penalty_of(part: PenaltyPart, groups: Groups, plan: Plan | None) -> dict[str, Any]:
    """The penalty, its strength, and whether it is proximal."""
    kinds = {"l1": L1, "l2": L2, "group-lasso": GroupLasso}
    penalty = Slimming(groups, plan) if part.kind == "slimming" else kinds[part.kind](groups, plan=plan)
    grows = part.every is not None and part.most is not None
    strength = Growing(part.strength, part.every or 1, part.most or 1.0) if grows else part.strength
    return {"penalty": penalty, "strength": strength, "proximal": part.proximal}


def distillation_of(part: DistillPart, teacher: nn.Module | None, table: Tensor | None) -> Distillation:
    """What is learned from the original, of which `table` has the logits if they are always the same.

    Raises:
        RecipeError: there is no original yet.
    """
    if teacher is None:
        raise RecipeError(
            "a step distils from the original, and there is none yet, for the first step trains it; distil in a later "
            "step, or give the model weights."
        )
    matches = (Attention(part.attention, part.attention_weight),) if part.attention else ()
    return Distillation(teacher if table is None else table, part.temperature, part.weight, matches)


def fixed_logits(
    step: Train, augment: tuple[str, ...], teacher: nn.Module | None, data: Data, device: torch.device
) -> Tensor | None:
    """The teacher's logits for all training images, where these are the same in every epoch; else None."""
    changing = augment or step.mixup is not None or step.cutmix is not None
    if step.distill is None or teacher is None or step.distill.attention or step.distill.unlabelled or changing:
        return None
    every = data.batches("train", 256, device=device, channels_last=step.channels_last)
    return teacher_logits(teacher, every, device=device, bf16=step.bf16)


def reader(data: Data, device: torch.device, numbered: bool) -> Callable[..., Iterator[Batch]]:
    """`data.batches` on the device; `numbered`, each batch with its images' numbers besides."""
    if not numbered:
        return lambda split, size, **options: data.batches(split, size, device=device, **options)
    labels = data.train.labels.to(device)
    indices = replace(data, train=Images(data.train.pixels, torch.arange(len(data.train))))

    def read(split: Any, size: int, **options: Any) -> Iterator[Batch]:
        for images, numbers in indices.batches(split, size, device=device, **options):
            yield images, labels[numbers], numbers

    return read


def _optimizer(step: Train) -> dict[str, Any]:
    if step.optimizer == "adamw":
        return {"optimizer": lambda parameters: torch.optim.AdamW(parameters, weight_decay=step.weight_decay)}
    return {"momentum": step.momentum, "weight_decay": step.weight_decay, "nesterov": step.nesterov}
