"""Fine-tuning: stages of SGD on cross-entropy, one row per epoch, and the best epoch's weights at the end.

`fine_tune` is the verb. The data come from two functions of the caller, so any source will do, and an epoch's
batches depend on its number alone: a run that was broken off goes on from its checkpoint to the same weights,
bit for bit. The learning rate is a function of the step (`learning_rate`) and no scheduler's state. Losses
and hits stay on the device and are read now and then, so a step costs what a bare PyTorch loop's step costs.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn

from secateur.errors import TrainingError, UnknownName
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
from secateur.recover.history import EpochRow, History, Tally

Batches = Iterable[tuple[Tensor, Tensor]]
Schedule = Literal["staged", "one-cycle", "cosine"]

# The shape of the one-cycle policy is that of `torch.optim.lr_scheduler.OneCycleLR` as it comes.
RISE, START_DIVISOR, END_DIVISOR = 0.3, 25.0, 25.0 * 1e4
# Steps between two readings of the loss on an accelerator.
READ_EVERY = 32


@dataclass(frozen=True)
class Stage:
    """So many epochs at this learning rate (the peak, where the schedule is not staged).

    Raises:
        TrainingError: a learning rate below 0 or not finite, or epochs that are not a whole number from 0.

    >>> report = (Stage(1e-3, 10), Stage(1e-4, 5), Stage(1e-6, 5))
    >>> sum(stage.epochs for stage in report)
    20
    """

    lr: float
    epochs: int

    def __post_init__(self) -> None:
        if not 0 <= self.lr < math.inf:
            raise TrainingError(f"a stage has the learning rate {self.lr}; give a finite one of 0 or more.")
        if not isinstance(self.epochs, int) or self.epochs < 0:
            raise TrainingError(f"a stage has {self.epochs} epochs; give a whole number of 0 or more.")


def learning_rate(
    stages: Sequence[Stage],
    epoch: int,
    step: int = 0,
    *,
    schedule: Schedule = "staged",
    batches_per_epoch: int = 1,
) -> float:
    """The learning rate of one step.

    - staged: that of the epoch's stage.
    - cosine: that times (1 + cos(pi t)) / 2, where t is the share of all steps already done (Loshchilov and
      Hutter, arXiv 1608.03983, eq. 5, without restarts).
    - one-cycle: that times a factor that rises from 1/25 to 1 over the first 30 % of all steps and then falls
      to 1/250000, both as half a cosine (Smith and Topin, arXiv 1708.07120, in PyTorch's form of it).

    Args:
        stages: with `epoch + 1` epochs or more in all.
        epoch: counted from 0.
        step: counted from 0 within the epoch.
        schedule: see above.
        batches_per_epoch: the steps of an epoch, for cosine and one-cycle.

    >>> stages = (Stage(0.1, 2), Stage(0.01, 1))
    >>> [learning_rate(stages, epoch) for epoch in range(3)]
    [0.1, 0.1, 0.01]
    >>> learning_rate((Stage(0.1, 2),), 1, schedule="cosine", batches_per_epoch=5)
    0.05
    """
    peak = [stage.lr for stage in stages for _ in range(stage.epochs)][epoch]
    if schedule == "staged":
        return peak
    total = batches_per_epoch * sum(stage.epochs for stage in stages)
    done = epoch * batches_per_epoch + step
    if schedule == "cosine":
        return peak * _half_cosine(1.0, 0.0, done / total)
    top = max(RISE * total - 1, 0.0)
    if done < top:
        return peak * _half_cosine(1 / START_DIVISOR, 1.0, done / top)
    return peak * _half_cosine(1.0, 1 / END_DIVISOR, (done - top) / max(total - 1 - top, 1))


def fine_tune(
    model: nn.Module,
    train: Callable[[int], Batches],
    validation: Callable[[], Batches],
    stages: Sequence[Stage],
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    schedule: Schedule = "staged",
    label_smoothing: float = 0.0,
    after_step: Callable[[], None] | None = None,
    device: str | torch.device = "cpu",
    channels_last: bool = False,
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochRow], None] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    batches_per_epoch: int | None = None,
) -> History:
    """Trains `model` in place with SGD on cross-entropy and leaves the weights of its best epoch in it.

    The best epoch has the highest validation accuracy; at a tie the lowest validation loss decides.
    However the call ends, by an error or Ctrl-C too, the model holds the parameters and buffers of the best
    epoch so far (before the first is finished, those it came with), is on `device`, and each module is in the
    mode in which it was found. While training, all of them are in training mode, so a BatchNorm that the caller had
    frozen with `.eval()` takes the batches' statistics and learns them.

    With `checkpoint`, a call goes on after the last epoch that an earlier one finished. On the CPU, with as
    many threads, it ends as an unbroken run would, bit for bit. Only torch's random generators are restored.

    Args:
        model: images to logits (batch, classes). Parameters that need no gradient stay as they are.
        train: batches (images, labels) of an epoch **counted from 0**; a function of that number alone.
        validation: the batches on which the best epoch is chosen; never the test images.
        stages: in order; those of 0 epochs are passed over. The report's: 1e-3 x 10, 1e-4 x 5, 1e-6 x 5.
        momentum, weight_decay, nesterov: as in `torch.optim.SGD`; the decay is on all parameters.
        schedule: "one-cycle" and "cosine" run over all steps, a stage's lr being the peak (`learning_rate`).
        label_smoothing: of the training loss (Szegedy et al., arXiv 1512.00567, section 7), in [0, 1].
        after_step: called after each optimizer step, as to set masked weights, which momentum moves, to zero.
        channels_last: train in that memory format; the weights are in the usual one afterwards.
        checkpoint: a folder, made if missing; written after each epoch.
        on_epoch: called with each new row once its checkpoint is written.
        on_step: called with the step of the epoch and of the whole run, both from 1, and the epoch's mean
            training loss as last read (on the CPU after each step, elsewhere after every 32).
        batches_per_epoch: needed by "one-cycle" and "cosine"; checked wherever it is given.

    Raises:
        TrainingError: a loss that is not finite, labels that do not fit the outputs, no batches, settings out
            of range, or a checkpoint of another run. Checkpoints are kept.
        UnknownName: no such schedule.
        RunError: the checkpoint cannot be written.

    >>> data = [(torch.eye(4), torch.tensor([0, 1, 0, 1]))]
    >>> history = fine_tune(nn.Linear(4, 2), lambda epoch: data, lambda: data, [Stage(1.0, 20)])
    >>> len(history.rows), history.best.validation_accuracy
    (20, 1.0)
    """
    settings = _Settings(
        tuple(stages), momentum, weight_decay, nesterov, schedule, label_smoothing, batches_per_epoch
    )
    with _prepared(model, device, channels_last) as place:
        run = _Run(model, settings, place, channels_last, after_step, on_step, checkpoint)
        try:
            run.go_on()
            for epoch in range(len(run.history.rows), settings.epochs):
                row = run.epoch(epoch, train, validation)
                if on_epoch is not None:
                    on_epoch(row)
        finally:
            set_model_state(model, run.best)
    return run.history


@dataclass(frozen=True)
class _Settings:
    """What decides the numbers: a run goes on from a checkpoint only under the same."""

    stages: tuple[Stage, ...]
    momentum: float
    weight_decay: float
    nesterov: bool
    schedule: Schedule
    label_smoothing: float
    batches_per_epoch: int | None

    def __post_init__(self) -> None:
        if not self.epochs:
            raise TrainingError(f"the stages {list(self.stages)} have no epoch; give one or more.")
        if not 0 <= self.momentum < 1:
            raise TrainingError(f"momentum is {self.momentum}; give a number in [0, 1), usually 0.9.")
        if not 0 <= self.weight_decay < math.inf:
            raise TrainingError(f"weight_decay is {self.weight_decay}; give 0 or more, such as 5e-4.")
        if self.nesterov and not self.momentum:
            raise TrainingError("nesterov needs a momentum above 0; give one, usually 0.9, or turn it off.")
        if not 0 <= self.label_smoothing <= 1:
            raise TrainingError(f"label_smoothing is {self.label_smoothing}; give a number in [0, 1].")
        if self.schedule not in get_args(Schedule):
            raise UnknownName("schedule", self.schedule, get_args(Schedule))
        if self.batches_per_epoch is None and self.schedule != "staged":
            raise TrainingError(f"the {self.schedule} schedule runs over all steps; give batches_per_epoch.")
        if self.batches_per_epoch is not None and self.batches_per_epoch < 1:
            raise TrainingError(f"batches_per_epoch is {self.batches_per_epoch}; give a whole number from 1.")

    @property
    def epochs(self) -> int:
        return sum(stage.epochs for stage in self.stages)

    def lr(self, epoch: int, step: int) -> float:
        length = self.batches_per_epoch or 1
        return learning_rate(self.stages, epoch, step, schedule=self.schedule, batches_per_epoch=length)


@dataclass
class _Run:
    """The state of one call of `fine_tune`; what has to outlive it goes into the checkpoint."""

    model: nn.Module
    settings: _Settings
    device: torch.device
    channels_last: bool
    after_step: Callable[[], None] | None
    on_step: Callable[[int, int, float], None] | None
    folder: Path | None

    def __post_init__(self) -> None:
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not trainable:
            raise TrainingError("no parameter of the model needs a gradient; set requires_grad on some.")
        self.optimizer = torch.optim.SGD(
            trainable,
            lr=0.0,
            momentum=self.settings.momentum,
            weight_decay=self.settings.weight_decay,
            nesterov=self.settings.nesterov,
            foreach=True,
        )
        self.history, self.steps = History(), 0
        self.best = self._copy()
        self.random = random_state(self.device)

    def go_on(self) -> None:
        """Takes the run up where the checkpoint left it, if there is one."""
        found = None if self.folder is None else read_checkpoint(self.folder)
        if self.folder is None or found is None:
            return
        check_same_run(self.folder, found, self._identity(), model_state(self.model))
        self.history, self.steps, self.random = found.history, found.steps, dict(found.random)
        set_model_state(self.model, found.best)
        self.best = self._copy()
        set_model_state(self.model, found.model)
        for name, parameter in self.model.named_parameters():
            if name in found.momentum:
                # In the parameter's own strides, as the optimizer makes it.
                buffer = torch.empty_like(parameter, requires_grad=False).copy_(found.momentum[name])
                self.optimizer.state[parameter]["momentum_buffer"] = buffer

    def epoch(
        self, epoch: int, train: Callable[[int], Batches], validation: Callable[[], Batches]
    ) -> EpochRow:
        """Trains and validates for one epoch, counted from 0, and writes the checkpoint."""
        # From the state that a checkpoint would give back, whatever on_epoch has drawn in between.
        set_random_state(self.random, self.device)
        start = time.perf_counter()
        loss, accuracy, lr = self._train(epoch, train(epoch))
        validation_loss, validation_accuracy = self._validate(epoch, validation())
        seconds = time.perf_counter() - start
        row = EpochRow(epoch + 1, lr, loss, accuracy, validation_loss, validation_accuracy, seconds)
        self.history = self.history.with_row(row)
        if self.history.best_epoch == row.epoch:
            self.best = self._copy()
        self.random = random_state(self.device)
        if self.folder is not None:
            write_checkpoint(self.folder, self._checkpoint())
        return row

    def _train(self, epoch: int, batches: Batches) -> tuple[float, float, float]:
        self.model.train()
        where, expected = f"epoch {epoch + 1}", self.settings.batches_per_epoch
        tally = Tally(where, 1 if self.device.type == "cpu" else READ_EVERY, self._fail)
        step, lr = 0, math.nan
        for step, (images, labels) in enumerate(batches, start=1):
            if expected is not None and step > expected:
                self._fail(f"{where} has more batches than batches_per_epoch, {expected}; give their number.")
            lr = self.settings.lr(epoch, step - 1)
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.zero_grad(set_to_none=True)
            outputs, labels = self._forward(images, labels)
            loss = tally.add(outputs, labels, lr, self.settings.label_smoothing)
            loss.backward()
            self.optimizer.step()
            if self.after_step is not None:
                self.after_step()
            self.steps += 1
            if self.on_step is not None:
                self.on_step(step, self.steps, tally.loss)
        if not step:
            self._fail(f"train({epoch}) gave no batch; check that there are images enough for one.")
        if expected is not None and step < expected:
            self._fail(f"{where} has {step} batches, and batches_per_epoch is {expected}; give their number.")
        tally.read()
        return tally.loss, tally.accuracy, lr

    @torch.no_grad()
    def _validate(self, epoch: int, batches: Batches) -> tuple[float, float]:
        self.model.eval()
        lr = self.optimizer.param_groups[0]["lr"]
        tally = Tally(f"the validation after epoch {epoch + 1}", READ_EVERY, self._fail)
        for images, labels in batches:
            outputs, labels = self._forward(images, labels)
            tally.add(outputs, labels, lr, smoothing=0.0)
        tally.read()
        if not tally.images:
            self._fail("validation() gave no batch; the best epoch is chosen on it, so give it some images.")
        return tally.loss, tally.accuracy

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels of a batch, on the device and found to fit each other."""
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        if self.channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        outputs = self.model(images)
        if not isinstance(outputs, Tensor):
            self._fail(f"the model gives a {type(outputs).__name__}; wrap it so that it gives logits alone.")
        fit = outputs.ndim == 2 and labels.shape == outputs.shape[:1] and not labels.is_floating_point()
        if not fit or not len(labels):
            self._fail(
                f"outputs {tuple(outputs.shape)} and {labels.dtype} labels {tuple(labels.shape)} do not fit "
                "each other; logits (batch, classes) and one whole number for each image are needed."
            )
        return outputs, labels.long()

    def _fail(self, what: str) -> NoReturn:
        """Raises, with `what` and then where the model and the checkpoint stand."""
        best = self.history.best_epoch
        ending = f"has the weights of its best epoch, {best}, back" if best else "is as it came"
        if self.folder is not None and best:
            kept = f"the checkpoint after epoch {len(self.history.rows)} is kept in {self.folder / LATEST}"
            ending = f"{ending}; {kept}"
        raise TrainingError(f"{what} The model {ending}.")

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in model_state(self.model).items()}

    def _identity(self) -> dict[str, Any]:
        frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        return {**asdict(self.settings), "frozen parameters": frozen}

    def _checkpoint(self) -> Checkpoint:
        momentum = {
            name: buffer
            for name, parameter in self.model.named_parameters()
            if (buffer := self.optimizer.state.get(parameter, {}).get("momentum_buffer")) is not None
        }
        model = model_state(self.model)
        return Checkpoint(self._identity(), self.history, self.steps, model, self.best, momentum, self.random)


def _half_cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


@contextlib.contextmanager
def _prepared(model: nn.Module, device: str | torch.device, channels_last: bool) -> Iterator[torch.device]:
    """The model on the device and in the memory format; modes and the usual format come back afterwards."""
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        what = f"the device {str(device)!r} cannot be used on this machine"
        raise TrainingError(f"{what}; choose another, such as 'cpu'.") from error
    modes = [(module, module.training) for module in model.modules()]
    model.to(place)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    try:
        yield place
    finally:
        if channels_last:
            model.to(memory_format=torch.contiguous_format)
        for module, training in modes:
            module.training = training
