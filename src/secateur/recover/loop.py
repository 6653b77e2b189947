"""The loop of a run: epochs of steps, validation, the best weights, and the checkpoint that each epoch leaves.

A step costs what the same step of a bare PyTorch loop costs: losses and hits stay on the device and are read now and
then, and what is not asked for is not there.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import TrainingError
from secateur.recover.average import Average
from secateur.recover.checkpoint import (
    LATEST,
    Checkpoint,
    check_same_run,
    model_state,
    random_state,
    read_checkpoint,
    set_model_state,
    set_random_state,
    write_checkpoint,
)
from secateur.recover.history import EpochRow, History
from secateur.recover.keeping import Keeping
from secateur.recover.mixing import Mix
from secateur.recover.objective import Batch, Objective, label_loss
from secateur.recover.optimizers import Rates, optimizer_state, set_optimizer_state
from secateur.recover.place import Place, wide
from secateur.recover.settings import Settings
from secateur.recover.tally import Tally

Batches = Iterable[tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]]
# Steps between two readings of the loss on an accelerator.
READ_EVERY = 32


@dataclass
class Loop:
    """One run under way; what has to outlive it goes into the checkpoint.

    Args:
        model: on the place, as `Place.prepared` leaves it.
        identity: all that was asked for, as JSON values: a checkpoint of anything else is refused.
        after_step: called with the learning rate after each step, one after the other.
        keeping: the masks in force, if there are any.
    """

    model: nn.Module
    settings: Settings
    identity: Mapping[str, Any]
    place: Place
    optimizer: Optimizer
    objective: Objective
    mix: Mix | None
    after_step: tuple[Callable[[float], None], ...]
    on_step: Callable[[int, int, float], None] | None
    folder: Path | None
    keeping: Keeping | None = None
    history: History = field(default_factory=History)
    steps: int = 0

    def __post_init__(self) -> None:
        self.rates = Rates.of(self.optimizer)
        self.together = self.place.together
        self.forward = self.place.runner(self.model)
        self.loss_of = self.together.trained(self.model, self._loss)
        self.average = None if self.settings.ema is None else Average(self.model, self.settings.ema)
        self.clipped = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.best = self._copy()
        self.random = self.together.agreed_draws(random_state(self.place.on))

    def go_on(self) -> None:
        """Takes the run up where the checkpoint left it, if there is one."""
        found = None if self.folder is None else read_checkpoint(self.folder)
        self._check_seen(0 if found is None else found.steps)
        if self.folder is None or found is None:
            self._begin()
            return
        check_same_run(self.folder, found, self.identity, model_state(self.model))
        self.history, self.steps, self.random = found.history, found.steps, dict(found.random)
        set_model_state(self.model, self._shares(found.best))
        self.best = self._copy()
        set_model_state(self.model, self._shares(found.model))
        set_optimizer_state(self.optimizer, self.model, self._shares(found.optimizer), found.values)
        if self.average is not None:
            self.average.set(self._shares(found.average))
        if self.keeping is not None:
            self.keeping.set(found.masks)

    def _begin(self) -> None:
        """Puts the first masks in force."""
        if self.keeping is not None:
            self.keeping.begin()
            self.keeping.zero_({} if self.average is None else self.average.tensors)

    def epoch(self, epoch: int, train: Callable[[int], Batches], validation: Callable[[], Batches]) -> EpochRow:
        """Trains and validates for one epoch, counted from 0, and writes the checkpoint."""
        # From the state that a checkpoint would give back, whatever on_epoch has drawn in between.
        set_random_state(self.random, self.place.on)
        start = time.perf_counter()
        moving = self.keeping is not None and not self.keeping.settled(self.steps)
        loss, accuracy, lr = self._train(epoch, train(epoch))
        self.together.agree(self.model)
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            validation_loss, validation_accuracy = self._validate(epoch, validation(), lr)
            seconds = time.perf_counter() - start
            figures = [lr, loss, accuracy, validation_loss, validation_accuracy, seconds]
            row = EpochRow(epoch + 1, *self.together.first(figures))
            self.history = self.history.with_row(row, last=moving or self.settings.keep == "last")
            if self.history.best_epoch == row.epoch:
                self.best = self._copy()
        self.random = random_state(self.place.on)
        if self.folder is not None:
            checkpoint = self._checkpoint()
            if self.together.writes:
                write_checkpoint(self.folder, checkpoint)
        return row

    def _train(self, epoch: int, batches: Batches) -> tuple[float, float, float]:
        self.model.train()
        where, expected = f"epoch {epoch + 1}", self.settings.batches_per_epoch
        every = 1 if self.place.on.type == "cpu" else READ_EVERY
        tally = Tally(where, every, self._fail, unlabelled=self.objective.lesson is not None)
        step, lr = 0, math.nan
        for step, given in enumerate(batches, start=1):
            if expected is not None and step > expected:
                self._fail(f"{where} has more batches than batches_per_epoch, {expected}; give their number.")
            lr = self.settings.lr(epoch, step - 1)
            self.rates.set(lr)
            self.optimizer.zero_grad(set_to_none=True)
            if step == 1:
                self.together.check_batch(given, where)
            batch = self._batch(given, self.mix)
            loss, outputs = self.loss_of(batch)
            tally.add(loss, outputs, batch.main, lr)
            self._step(loss, lr)
            if self.on_step is not None and self.together.writes:
                self.on_step(step, self.steps, tally.loss)
        if not step:
            self._fail(f"train({epoch}) gave no batch; check that there are images enough for one.")
        if expected is not None and step < expected:
            self._fail(f"{where} has {step} batches, and batches_per_epoch is {expected}; give their number.")
        tally.read()
        return tally.loss, tally.accuracy, lr

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = self._outputs(batch)
        return self.objective(outputs, batch, self.steps), outputs

    def _step(self, loss: Tensor, lr: float) -> None:
        self.together.backward(loss)
        if self.keeping is not None:
            self.keeping.before(self.steps)
        if self.settings.clip is not None:
            nn.utils.clip_grad_norm_(self.clipped, self.settings.clip)
        self.optimizer.step()
        for then in self.after_step:
            then(lr)
        self.steps += 1
        if self.average is not None:
            self.average.update(self.steps)
        if self.keeping is not None:
            self.keeping.after()
            self.keeping.zero_({} if self.average is None else self.average.tensors)

    @torch.no_grad()
    def _validate(self, epoch: int, batches: Batches, lr: float) -> tuple[float, float]:
        self.model.eval()
        tally = Tally(f"the validation after epoch {epoch + 1}", READ_EVERY, self._fail)
        for given in batches:
            batch = self._batch(given, None)
            outputs = self._outputs(batch)
            tally.add(label_loss(outputs, batch.labels), outputs, batch.labels, lr)
        tally.read()
        if not tally.images:
            self._fail("validation() gave no batch; the best epoch is chosen on it, so give it some images.")
        return tally.loss, tally.accuracy

    def _batch(self, given: tuple[Tensor, ...], mix: Mix | None) -> Batch:
        images, labels, *numbers = (self.place.tensor(tensor) for tensor in given)
        labels = labels if labels.is_floating_point() else labels.long()
        if mix is None:
            return Batch(self.place.images(images), labels, numbers[0] if numbers else None)
        mixed = mix(images)  # the images are others now, so their numbers say nothing
        return Batch(self.place.images(mixed.images), labels, None, mixed)

    def _outputs(self, batch: Batch) -> Tensor:
        """The logits of a batch, found to fit its labels."""
        outputs, labels = self.forward(batch.images), batch.labels
        if not isinstance(outputs, Tensor):
            self._fail(f"the model gives a {type(outputs).__name__}; wrap it so that it gives logits alone.")
        fit = outputs.ndim == 2 and labels.shape == outputs.shape[:1] and not labels.is_floating_point()
        if not fit or not len(labels):
            self._fail(
                f"outputs {tuple(outputs.shape)} and {labels.dtype} labels {tuple(labels.shape)} do not fit "
                "each other; logits (batch, classes) and one whole number for each image are needed."
            )
        return wide(outputs)

    def _fail(self, what: str) -> NoReturn:
        """Raises, with `what` and then where the model and the checkpoint stand."""
        best = 0 if self.together.shards else self.history.best_epoch
        ending = f"has the weights of its best epoch, {best}, back" if best else "is as it came"
        if self.folder is not None and self.history.rows:
            kept = f"the checkpoint after epoch {len(self.history.rows)} is kept in {self.folder / LATEST}"
            ending = f"{ending}; {kept}"
        raise TrainingError(f"{what} The model {ending}.")

    def _check_seen(self, steps: int) -> None:
        if not self.together.same(steps):
            raise TrainingError(
                f"not all processes find the same checkpoint in {self.folder}; give a folder on a disk that they share."
            )

    def _shares(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.together.shared_out(tensors, self.model)

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in model_state(self.model).items()}

    def _checkpoint(self) -> Checkpoint:
        tensors, values = optimizer_state(self.optimizer, self.model)
        return Checkpoint(
            self.identity,
            self.history,
            self.steps,
            self.together.full(model_state(self.model)),
            self.together.full(self.best),
            self.together.full(tensors),
            self.random,
            {} if self.average is None else self.together.full(self.average.tensors),
            values,
            {} if self.keeping is None else self.keeping.keeps,
        )
