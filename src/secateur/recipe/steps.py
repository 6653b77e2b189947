"""Where names become objects: a recipe's data and model (`prepare`), and each of its steps as a function (`take`).

A step takes the model, how it is built, and the masks in force (`State`), and gives the next ones and what it has to
show (`Outcome`). It knows nothing of folders but where a training step keeps its checkpoint and a cut its table.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.errors import ProofError, RecipeError
from secateur.graph.groups import find_groups
from secateur.graph.rebuild import tensor_shapes
from secateur.graph.twin import duplicate
from secateur.measure.reasons import why_not_faster
from secateur.recipe.architecture import Architecture
from secateur.recipe.criteria import scores_for
from secateur.recipe.journal import Outcome
from secateur.recipe.parts import BudgetPart, MovingPart
from secateur.recipe.planning import how_much, plan_for, sensitivity_for, sparsity_for
from secateur.recipe.recovery import masks_for, recover, sparsified
from secateur.recipe.schema import Cut, Recipe, Sparsify, Train
from secateur.recipe.timing import RUNTIMES, table_for
from secateur.recipe.training import Batch, distillation_of, fixed_logits, options_of, penalty_of, reader
from secateur.recipe.unlabelled import beside, images_of
from secateur.recover.history import EpochRow
from secateur.recover.parallel import own_device
from secateur.recover.train import fine_tune
from secateur.report import numbers
from secateur.report.ledger import ChannelRow, CheckRow, FrozenRow
from secateur.surgery.certify import certify
from secateur.surgery.cut import apply
from secateur.surgery.masks import Masks, find_masks, find_zeros
from secateur.zoo.data import Data
from secateur.zoo.images import Images
from secateur.zoo.models import build_model


@dataclass(frozen=True)
class Setting:
    """What all steps of a run share.

    Attributes:
        recipe: what to do.
        data: the images.
        device: where the model is.
        trained: whether the model came with weights worth measuring.
        notes: what data and model had to say.
        seed: of what the steps draw; the recipe's, which also parts the data.
        unlabelled: images that only a teacher judges, by the name of their data set.
    """

    recipe: Recipe
    data: Data
    device: torch.device
    trained: bool
    notes: tuple[str, ...]
    seed: int
    unlabelled: Mapping[str, Images] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """The model between two steps, how it is built, which of its weights are held at zero, and the first measured.

    That one, `original`, is there only if a step is to learn from it.
    """

    model: nn.Module
    architecture: Architecture
    masks: Masks | None = None
    original: nn.Module | None = None


def prepare(recipe: Recipe) -> tuple[Setting, State]:
    """Reads the data and builds the model; raises what is wrong with either, before anything is written."""
    device = _device(recipe.device)
    data, unlabelled, notes = images_of(recipe)
    network = recipe.model
    built = build_model(
        network.source, classes=len(data.classes), weights=network.weights, pretrained=network.pretrained
    )
    _rehearse(recipe, built.model, data)
    # A network that a recipe begins by training has nothing to lose yet: measuring it would flatter the run.
    trained = network.weights is not None or not isinstance(recipe.steps[0], Train)
    notes = (*data.notes, *built.notes, *notes)
    setting = Setting(recipe, data, device, trained, notes, recipe.seed, unlabelled)
    architecture = Architecture(built.spec, len(data.classes), {}, uncut=tensor_shapes(built.model))
    state = State(built.model.to(device).eval(), architecture)
    return setting, _with_original(state, setting) if trained else state


def take(
    number: int,
    state: State,
    setting: Setting,
    *,
    checkpoint: Path | None = None,
    table: Path | None = None,
    on_epoch: Callable[[EpochRow], None] | None = None,
    on_step: Callable[[float], None] | None = None,
) -> tuple[State, Outcome]:
    """Takes step `number` (from 1) of the recipe.

    Args:
        number: which step.
        state: the model before it; a training step changes it in place.
        setting: what all steps share.
        checkpoint: the folder where a training step keeps its last epoch, and goes on from.
        table: the file where a cut for latency keeps the times that it measures, if the recipe names none.
        on_epoch: called with the row of each epoch.
        on_step: called after each optimizer step with the share of the epoch's steps that are done.
    """
    step = setting.recipe.steps[number - 1]
    if isinstance(step, Train):
        outcome = train(step, number, state, setting, checkpoint, on_epoch, on_step)
        if step.masks is not None:
            masks = find_zeros(state.model)
            state, outcome = replace(state, masks=masks), replace(outcome, sparsity=masks.table())
        return _with_original(state, setting), outcome
    if isinstance(step, Sparsify):
        return sparsify(step, state, setting)
    return cut(step, state, setting, table)


def train(
    step: Train,
    number: int,
    state: State,
    setting: Setting,
    checkpoint: Path | None,
    on_epoch: Callable[[EpochRow], None] | None,
    on_step: Callable[[float], None] | None,
) -> Outcome:
    """Trains the model in place; weights that masks hold at zero stay there."""
    data, device, part = setting.data, setting.device, setting.recipe.data
    size = step.batch_size or part.batch_size
    augment = part.augment if step.augment is None else step.augment
    # BatchNorm has no variance to take over a last batch of one image.
    count = max(1, len(data.train) // size + (len(data.train) % size > 1))
    first_seed = setting.seed + 100_000 * number

    table = fixed_logits(step, augment, state.original, data, device)
    read = reader(data, device, numbered=table is not None)

    others = None if step.distill is None else setting.unlabelled.get(step.distill.unlabelled or "")

    def batches(epoch: int) -> Iterator[Batch]:
        given = itertools.islice(read("train", size, shuffle=first_seed + epoch, augment=augment), count)
        if others is None:
            return given
        more, seed = replace(data, train=others).batches, first_seed + 50_000 + epoch
        return beside(given, lambda n: more("train", size, shuffle=seed + 1000 * n, augment=augment, device=device))

    history = fine_tune(
        state.model,
        batches,
        lambda: data.batches("validation", max(size, 256), device=device),
        **options_of(step, state.model),
        **_penalty(step, number, state, setting),
        distill=None if step.distill is None else distillation_of(step.distill, state.original, table),
        masks=state.masks if step.masks is None else step.masks.moving(state.masks),
        device=device,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
        on_step=None if on_step is None else lambda step, steps, loss: on_step(step / count),
        batches_per_epoch=count,
    )
    state.model.to(device)  # a model in shares was left on the CPU
    earlier = setting.recipe.steps[: number - 1]
    dense = all(isinstance(before, Train) for before in earlier) and not setting.trained
    all_epochs = f"of {len(history.rows)} epochs"
    epochs = f"last {all_epochs}" if step.keep == "last" else f"best {all_epochs}: {history.best_epoch}"
    return Outcome("trained" if dense else "fine-tuned", note=epochs, notes=history.notes, history=history)


def _penalty(step: Train, number: int, state: State, setting: Setting) -> dict[str, Any]:
    """The penalty of a training step, on the channels of the model as it is now."""
    if step.penalty is None:
        return {}
    model, plan = state.model.eval(), None
    groups = find_groups(model, setting.data.example(2, setting.device))
    if step.penalty.units == "next-cut":
        then = next((after for after in setting.recipe.steps[number:] if isinstance(after, Cut)), None)
        if then is None:
            raise RecipeError(f"step {number} penalises what the next cut would take, and no step after it cuts.")
        images = Drawn(setting, then.images)
        scores = scores_for(then, model, groups, setting.recipe.seed, images)
        sensitivity = sensitivity_for(then, model, scores, Drawn(setting, then.images, "validation"))
        plan = plan_for(then, model, scores, sensitivity=sensitivity)
    return penalty_of(step.penalty, groups, plan)


def _with_original(state: State, setting: Setting) -> State:
    """The state with a copy of its model as the original, if a step wants one and there is none yet."""
    wanted = distils(setting.recipe) and state.original is None
    return replace(state, original=duplicate(state.model)) if wanted else state


def distils(recipe: Recipe) -> bool:
    """Whether a step learns from the original."""
    return any(isinstance(step, Train) and step.distill is not None for step in recipe.steps)


def sparsify(step: Sparsify, state: State, setting: Setting) -> tuple[State, Outcome]:
    """Sets weights to zero; the masks stay in force for the training steps that follow."""
    model, masks, notes = sparsified(step, state.model.eval(), Drawn(setting, step.recover_images))
    outcome = Outcome("sparsified", note=_how_sparse(step), notes=notes, sparsity=masks.table())
    return replace(state, model=model, masks=masks), outcome


def cut(step: Cut, state: State, setting: Setting, table: Path | None = None) -> tuple[State, Outcome]:
    """Takes channels out of a copy of the model, and proves that the copy computes what it should.

    Raises `ProofError` with the certificate's sentence where it does not.
    """
    model, example = state.model.eval(), setting.data.example(2 if step.latency is None else 1, setting.device)
    groups = find_groups(model, example)
    scores = scores_for(step, model, groups, setting.seed, Drawn(setting, step.images))
    times = None if step.latency is None else table_for(step, model, groups, example, table)
    sensitivity = sensitivity_for(step, model, scores, Drawn(setting, step.images, "validation"))
    plan = plan_for(step, model, scores, times, sensitivity)
    smaller = apply(model, plan)
    certificate = certify(model, smaller, plan, example)
    if not certificate.ok:
        raise ProofError(certificate.sentence)
    mirrored = "flip" in setting.recipe.data.augment
    found = recover(step, model, smaller, plan, Drawn(setting, step.recover_images), mirrored=mirrored)
    slow = () if times is None else why_not_faster(times, plan)[:REASONS]
    notes = (certificate.sentence, *slow, *found, *(() if state.masks is None else (MASKS_END,)))
    outcome = Outcome(
        "cut",
        note=how_much(step),
        notes=notes,
        sparsity=sparsity_for(step, model),
        sensitivity=sensitivity,
        channels=tuple(ChannelRow(*row) for row in plan.channels()),
        frozen=tuple(FrozenRow(axis.tensor, axis.reason) for axis in groups.frozen),
        certificate=tuple(CheckRow(*row) for row in certificate.rows()),
    )
    architecture = state.architecture.after(plan.attributes(), plan.replays())
    return State(smaller, architecture, original=state.original), outcome


REASONS = 5
"""So many sentences at most say how much faster a cut is, and why not more."""

MASKS_END = (
    "The masks that were in force ended with the cut: the zeros that are left in the layers may grow again in "
    "training; sparsify once more after the cut to hold them."
)


@dataclass(frozen=True)
class Drawn:
    """`count` images of a split with their labels, drawn with the setting's seed; all, if there are no more."""

    setting: Setting
    count: int
    split: Literal["train", "validation"] = "train"

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        setting, left = self.setting, self.count
        size = min(setting.recipe.data.batch_size, left)
        for images, labels in setting.data.batches(self.split, size, shuffle=setting.seed, device=setting.device):
            yield images[:left], labels[:left]
            left -= len(labels)
            if left <= 0:
                return


def _rehearse(recipe: Recipe, model: nn.Module, data: Data) -> None:
    """Plans every step on the model as it comes: a layer that does not exist shall not be found after hours."""
    cuts = [step for step in recipe.steps if isinstance(step, Cut)]
    batches = [(data.example(2), data.train.labels[:2])]
    penalised = any(isinstance(step, Train) and step.penalty is not None for step in recipe.steps)
    groups, masks = find_groups(model, batches[0][0]) if cuts or penalised else None, None
    for step in recipe.steps:
        if isinstance(step, Cut) and groups is not None:
            if step.latency is not None:
                RUNTIMES[step.runtime](model.eval(), batches[0][0][:1])
                step = step.model_copy(update={"budget": BudgetPart(macs=1.0)})
            elif step.guide == "sensitivity":
                step = step.model_copy(update={"guide": "ranking"})
            plan_for(step, model, scores_for(step, model, groups, recipe.seed, batches))
            masks = None
        elif isinstance(step, Sparsify):
            masks = masks_for(step, model)
        elif isinstance(step, Train) and step.masks is not None:
            masks = _rehearsed(step.masks, model, masks)
        if isinstance(step, Train) and step.penalty is not None and groups is not None:
            if step.penalty.units == "next-cut" and any(cut.latency is not None for cut in cuts):
                raise RecipeError(
                    "what a cut for latency would take is known when its layers are timed, not while a penalty presses "
                    "on it; let the penalty press on all units, or give the cut a budget for macs."
                )
            penalty_of(step.penalty, groups, None)


def _rehearsed(part: MovingPart, model: nn.Module, masks: Masks | None) -> Masks:
    """As many weights as are masked in the end."""
    if part.way == "rigl" and masks is None:
        raise RecipeError(
            "masks that move by 'rigl' begin with those that are in force, and none are; sparsify in a step before."
        )
    part.moving(masks).start(model)
    return find_masks(model, masks.table().sparsity if masks and part.sparsity is None else part.sparsity or 0.0)


def _device(name: str) -> torch.device:
    """The device that a recipe names, once it is known that tensors can be put there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=own_device(name)).device
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"this machine has no device {name!r} that torch can use; set device to 'cpu'.") from error


def _how_sparse(step: Sparsify) -> str:
    if step.pattern is not None:
        return "{} of every {} weights stay".format(*step.pattern)
    scope = "of all weights together" if step.scope == "global" else "of each layer"
    return f"{numbers.share(step.sparsity or 0.0)} {scope}"
