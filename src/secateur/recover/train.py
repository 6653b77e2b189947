"""Fine-tuning: stages of learning rates, one row per epoch, and the best epoch's weights at the end.

`fine_tune` is the verb. The data come from two functions of the caller, so any source will do, and an epoch's
batches depend on its number alone: a run that was broken off goes on from its checkpoint to the same weights,
bit for bit. The learning rate is a function of the step (`schedule`), what is minimised is put together in
`objective`, and `loop` does the steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from secateur.errors import TrainingError
from secateur.recover.checkpoint import set_model_state
from secateur.recover.distillation import Distillation, Lesson
from secateur.recover.history import EpochRow, History
from secateur.recover.keeping import Keeping
from secateur.recover.loop import Batches, Loop
from secateur.recover.mixing import Mix
from secateur.recover.moving import Moving
from secateur.recover.objective import Objective, strength_at
from secateur.recover.optimizers import Make, Rates, optimizer_for, options_of, sgd, trained_by
from secateur.recover.parallel import Parallel, own_device
from secateur.recover.penalties import Penalty, Shrinks, Strength
from secateur.recover.place import Place
from secateur.recover.schedule import Schedule, Stage
from secateur.recover.settings import Keep, Settings, described
from secateur.recover.sharded import processes
from secateur.surgery.masks import Masks

__all__ = ["Stage", "fine_tune"]


def fine_tune(
    model: nn.Module,
    train: Callable[[int], Batches],
    validation: Callable[[], Batches],
    stages: Sequence[Stage],
    *,
    optimizer: Optimizer | Make | None = None,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    schedule: Schedule = "staged",
    warmup: int = 0,
    rewind: int | None = None,
    label_smoothing: float = 0.0,
    mix: Mix | None = None,
    distill: Distillation | None = None,
    penalty: Penalty | None = None,
    strength: Strength = 1.0,
    proximal: bool = False,
    clip: float | None = None,
    ema: float | None = None,
    only: Callable[[str], bool] | None = None,
    masks: Masks | Moving | None = None,
    keep: Keep = "best",
    after_step: Callable[[], None] | None = None,
    device: str | torch.device = "cpu",
    channels_last: bool = False,
    bf16: bool = False,
    compile: bool = False,
    parallel: Parallel = "replicated",
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochRow], None] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    batches_per_epoch: int | None = None,
) -> History:
    """Trains `model` in place, with SGD on cross-entropy if nothing else is said, and leaves its best epoch's weights.

    The best epoch has the highest validation accuracy; at a tie the lowest validation loss decides.
    However the call ends, by an error or Ctrl-C too, the model holds the parameters and buffers of the best
    epoch so far (before the first is finished, those it came with), is on `device`, and each module is in the
    mode in which it was found. While training, all of them are in training mode, so a BatchNorm that the caller had
    frozen with `.eval()` takes the batches' statistics and learns them.

    With `checkpoint`, a call goes on after the last epoch that an earlier one finished. On the CPU, with as
    many threads, it ends as an unbroken run would, bit for bit. Only torch's random generators are restored.

    Args:
        model: images to logits (batch, classes). Parameters that need no gradient stay as they are.
        train: batches (images, labels) of an epoch **counted from 0**; a function of that number alone. A third tensor,
            the images' numbers, is for a `distill` that needs them. With `distill`, a label of -100 (`UNLABELLED`) is
            that of an image that has none, which the teacher alone judges.
        validation: the batches on which the best epoch is chosen; never the test images.
        stages: in order; those of 0 epochs are passed over. The report's: 1e-3 x 10, 1e-4 x 5, 1e-6 x 5.
        optimizer: makes one over the parameters that are trained, as `lambda p: torch.optim.AdamW(p, amsgrad=True)`;
            or one that there is, whose state goes on (see `apply(model, plan, optimizer=...)`) and is that of the last
            epoch afterwards. Parameters that it lacks are not trained. Its learning rates are set by the stages: the
            highest of its groups' to theirs, the others in proportion.
        momentum, weight_decay, nesterov: as in `torch.optim.SGD`, without an `optimizer`; the decay is on all
            parameters.
        schedule: "one-cycle" and "cosine" run over all steps, a stage's lr being the peak (`learning_rate`).
        warmup: so many epochs in which the rate rises from 0, step by step.
        rewind: train for so many epochs only, at the rates of the last ones of the stages: give those that the model
            was first trained with (Renda et al. 2020, Comparing Rewinding and Fine-tuning, "learning rate rewinding").
        label_smoothing: of the training loss (Szegedy et al., arXiv 1512.00567, section 7), in [0, 1].
        mix: `Mixup`, `CutMix`, `OneOf` them, or any function like these.
        distill: learn from a teacher too.
        penalty: a function of the model that is added to the loss: `L1`, `L2`, `GroupLasso`, `Slimming`, or any.
        strength: its factor, or a function of the steps taken before, such as `Growing`.
        proximal: instead, do the penalty's proximal step, of size lr * strength, after each step: this sets weights
            exactly to zero (Parikh and Boyd 2014, Proximal Algorithms, section 4.2).
        clip: the gradients' norm, of all parameters together, is made no larger (Pascanu et al. 2013, section 3.2).
        ema: decay of an average of the weights (`recover.average`). Where it is given, it is the averaged weights, and
            never the others, that are validated, chosen from and left in the model; a weight that a proximal step has
            set to zero on the way is not zero in the average.
        only: train only the parameters of whose names this is true, such as `norms_and_head(model)`.
        masks: weights that are exactly zero from the first step on, and after each: `Masks` of any pattern, or masks
            that move, `Gradual`, `ACDC` or `RigL`. They are zero in the average of `ema` too, and gather no momentum
            (`recover.keeping`). While masks move, each epoch is the best so far; so the best one ends with the last
            masks, if any does.
        keep: "best", or "last" for the last epoch in the best one's place: to make weights small before a cut, for the
            best on validation may be the first, before any are.
        after_step: called after each optimizer step, before masked weights are set to zero.
        channels_last: train in that memory format; the weights are in the usual one afterwards.
        bf16: run under autocast in bfloat16; on a CPU that has no instructions for it, in float32, and the history says
            so.
        compile: run by way of `torch.compile`.
        parallel: what each process holds of the model where `torchrun` started several: all of it, or a share
            ("sharded", for what fits no single GPU; then the model is left on the CPU, and as it came after an error).
            Every process has to make the same call. Each takes its slice of the same batches, so that the result is
            that of one process up to rounding; the first process alone writes and calls `on_epoch` and `on_step`.
        checkpoint: a folder, made if missing; written after each epoch.
        on_epoch: called with each new row once its checkpoint is written.
        on_step: called with the step of the epoch and of the whole run, both from 1, and the epoch's mean
            training loss as last read (on the CPU after each step, elsewhere after every 32).
        batches_per_epoch: needed by "one-cycle", "cosine", `warmup` and masks that move; checked wherever it is given.

    Raises:
        PlanError: the masks are another model's.
        TrainingError: a loss that is not finite, labels that do not fit the outputs, no batches, settings out
            of range, or a checkpoint of another run. Checkpoints are kept.
        UnknownName: no such schedule, or no such layer to match.
        RunError: the checkpoint cannot be written.

    >>> data = [(torch.eye(4), torch.tensor([0, 1, 0, 1]))]
    >>> history = fine_tune(nn.Linear(4, 2), lambda epoch: data, lambda: data, [Stage(1.0, 20)])
    >>> len(history.rows), history.best.validation_accuracy
    (20, 1.0)
    >>> adam = lambda parameters: torch.optim.AdamW(parameters, weight_decay=0.01)
    >>> net = nn.Linear(4, 2)
    >>> history = fine_tune(net, lambda epoch: data, lambda: data, [Stage(0.5, 20)], optimizer=adam, ema=0.9)
    >>> history.best.validation_accuracy
    1.0
    """
    settings = Settings(
        stages=tuple(stages),
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        schedule=schedule,
        label_smoothing=label_smoothing,
        batches_per_epoch=batches_per_epoch,
        warmup=warmup,
        rewind=rewind,
        clip=clip,
        ema=ema,
        bf16=bf16,
        proximal=proximal,
        keep=keep,
    )
    if optimizer is not None and (momentum, weight_decay, nesterov) != (0.9, 0.0, False):
        raise TrainingError("momentum, weight_decay and nesterov are SGD's; give them to the optimizer that is given.")
    if proximal and not isinstance(penalty, Shrinks):
        raise TrainingError("a proximal step needs a penalty with shrink_, such as GroupLasso; give one.")
    given = optimizer or sgd(momentum, weight_decay, nesterov)
    whole = {"penalty": penalty, "masks": masks, "after_step": after_step, "compile": compile}
    made_before = isinstance(given, Optimizer)
    place = Place(own_device(device), channels_last, bf16, compile)
    together = processes(parallel, place.on, {**whole, "an optimizer that was made before": made_before})
    place = replace(place, together=together)
    found = model
    with contextlib.ExitStack() as stack:
        stack.enter_context(place.prepared(model, trained_by(given, model, only)))
        model = stack.enter_context(together.student(found))
        made = optimizer_for(given, model)
        stack.enter_context(Rates.of(made).kept())
        lesson = None if distill is None else Lesson(distill, model, place)
        if lesson is not None:
            stack.enter_context(lesson.given())
        objective = Objective(model, label_smoothing, lesson, None if proximal else penalty, strength)
        asked = {"mix": mix, "distillation": distill, "penalty": penalty, "strength": strength, "masks": masks}
        identity = {} if checkpoint is None else {**_identity(settings, model, made), **described(asked)}
        loop = Loop(model, settings, identity, place, made, objective, mix, (), on_step, checkpoint)
        loop.keeping = None if masks is None else Keeping(masks, model, made, settings.steps)
        loop.after_step = _after_step(loop, penalty if proximal else None, strength, after_step)
        try:
            loop.go_on()
            loop.history = loop.history.with_notes(*place.notes)
            for epoch in range(len(loop.history.rows), settings.epochs):
                row = loop.epoch(epoch, train, validation)
                if on_epoch is not None and together.writes:
                    on_epoch(row)
            if together.shards:
                set_model_state(found, together.full(loop.best, everywhere=True))
        finally:
            if not together.shards:
                set_model_state(found, loop.best)
    return loop.history


def _after_step(
    loop: Loop, penalty: Penalty | None, strength: Strength, then: Callable[[], None] | None
) -> tuple[Callable[[float], None], ...]:
    """What follows each step: the penalty's proximal step, then what the caller asked for."""
    out: list[Callable[[float], None]] = []
    if isinstance(penalty, Shrinks):
        shrinks = penalty
        out.append(lambda lr: shrinks.shrink_(loop.model, lr * strength_at(strength, loop.steps)))
    if then is not None:
        out.append(lambda lr: then())
    return tuple(out)


def _identity(settings: Settings, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    kind = type(optimizer).__name__
    return {**asdict(settings), "frozen parameters": frozen, "optimizer": kind, "options": options_of(optimizer)}
