"""Training in more than one process, as `torchrun` starts them: what `loop` and `place` ask of the others.

Every process makes the same batches, as a function of the same seeds, and takes its slice of each to its model. The
outputs of all slices are gathered, so that each process computes the whole batch's loss, figures and refusals by the
same code as one process alone; only the gradient of its own slice goes back into its model, and the gradients are
averaged. What a model does with a whole batch, such as batch norm, is done across the slices (`pooled`).

`Alone` is one process: everything is left as it is. `Several` keeps the whole model in each (DistributedDataParallel),
and `sharded.Sharded` a part of it (FSDP2). Devices, the process group and the averaging come from Lightning Fabric.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from secateur.errors import TrainingError
from secateur.recover.checkpoint import random_state, set_random_state
from secateur.recover.pooled import Pooled, Slice, whole

Parallel = Literal["replicated", "sharded"]
"""What each process holds of a model: all of it, or a share."""

# Whoever dies takes the others with it, by closed connections and by torchrun; a long wait is no failure.
PATIENCE_DAYS = 30

Forward = Callable[[Tensor], Any]


def started() -> int:
    """How many processes `torchrun` has started; 1 without it.

    >>> started()
    1
    """
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ["RANK"]) if started() > 1 else 0


def own_device(device: str | torch.device) -> str | torch.device:
    """The device of this process where only a kind is named: each process has a GPU of its own.

    Raises:
        TrainingError: there are fewer GPUs than processes, or no way to talk between such devices.

    >>> own_device("cuda")  # in one process: which, torch says
    'cuda'
    """
    if started() == 1:
        return device
    kind = str(device).partition(":")[0]
    if kind == "cpu":
        return device
    if kind != "cuda":
        raise TrainingError(f"several processes train on CPUs or CUDA GPUs, not on {str(device)!r}; choose one.")
    number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= there:
        raise TrainingError(
            f"there are {there} GPUs here and process {number} of this machine needs one of its own; start "
            f"torchrun with --nproc-per-node {max(1, there)}."
        )
    return torch.device("cuda", number)


def join() -> None:
    """Makes this process one of the group, if it is not yet; returns when all have joined.

    Raises:
        TrainingError: lightning-fabric is not installed.
    """
    if not distributed.is_initialized():
        _fabric(torch.device("cpu"))


def leave() -> None:
    """Ends this process's part in the group, if it has one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def first(value: Any) -> Any:
    """What the first process has called this with, a JSON value, in all of them; every process has to call it."""
    text = json.dumps(value).encode() if rank() == 0 else b""
    size = torch.tensor(len(text))
    distributed.broadcast(size, 0)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(int(size), dtype=torch.uint8)
    distributed.broadcast(data, 0)
    return json.loads(bytes(data.tolist()))


@dataclass(eq=False)
class Alone:
    """One process: there is nobody to talk to.

    >>> Alone().first([0.5]), Alone().writes
    ([0.5], True)
    """

    @property
    def writes(self) -> bool:
        """Whether this process writes files and calls back."""
        return True

    @property
    def shards(self) -> bool:
        """Whether each process holds a share of the model."""
        return False

    def runner(self, forward: Forward) -> Forward:
        """A forward pass of a whole batch."""
        return forward

    def trained(self, model: nn.Module, loss: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`loss`, a function of a batch that runs `model`, so that its gradients will be those of all processes."""
        return loss

    def backward(self, loss: Tensor) -> None:
        """The gradients of a loss that `trained` gave."""
        loss.backward()

    def whole(self, tensor: Any) -> Any:
        """What a layer gave for this process's slice -> that of the whole batch."""
        return tensor

    def first(self, value: Any) -> Any:
        """The first process's JSON value."""
        return value

    def agree(self, model: nn.Module) -> None:
        """Puts the first process's parameters and buffers into all."""

    def agreed_draws(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first process's states of torch's generators."""
        return states

    def same(self, value: Any) -> bool:
        """Whether all processes have this JSON value; the same answer in all of them."""
        return True

    def check_batch(self, batch: Sequence[Tensor], where: str) -> None:
        """TrainingError, in all processes, unless all have this batch."""

    @contextlib.contextmanager
    def student(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model to train."""
        yield model

    def full(self, tensors: Mapping[str, Tensor], everywhere: bool = False) -> dict[str, Tensor]:
        """Tensors as one process alone would have them: in the one that writes, or in all."""
        return dict(tensors)

    def shared_out(self, tensors: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
        """What `full` gave, as this process holds it; names end in those of the model's parameters and buffers."""
        return tensors


@dataclass(eq=False)
class Several(Alone):
    """All of the model in each process, and a slice of each batch.

    Args:
        device: this process's.
        slice: of the batch under way.
    """

    device: torch.device
    slice: Slice = field(default_factory=Slice)

    def __post_init__(self) -> None:
        self.fabric = _fabric(self.device)
        self.pooled = Pooled(self.slice)

    @property
    def writes(self) -> bool:
        return rank() == 0

    def runner(self, forward: Forward) -> Forward:
        def run(images: Tensor) -> Any:
            self.slice.of(len(images), rank(), started())
            before = random_state(self.device)
            with self.pooled:
                outputs = forward(images[self.slice.rows])
            if not self.slice.even:
                self._agree_on_draws(before)
            return whole(outputs, self.slice)

        return run

    def trained(self, model: nn.Module, loss: Callable[[Any], Any]) -> Callable[[Any], Any]:
        averaged: Callable[[Any], Any] = self.fabric.strategy.setup_module(_Step(model, loss))
        return averaged

    def backward(self, loss: Tensor) -> None:
        with self.pooled.in_modules():
            loss.backward()

    def whole(self, tensor: Any) -> Any:
        return whole(tensor, self.slice)

    def first(self, value: Any) -> Any:
        return first(value)

    @torch.no_grad()
    def agree(self, model: nn.Module) -> None:
        for tensor in [*model.parameters(), *model.buffers()]:
            held = tensor.detach().contiguous()
            distributed.broadcast(held, 0)
            if held.data_ptr() != tensor.data_ptr():
                tensor.copy_(held)

    def agreed_draws(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        for state in states.values():
            distributed.broadcast(state, 0)
        return states

    def same(self, value: Any) -> bool:
        others = torch.tensor(int(first(value) != value))
        distributed.all_reduce(others)
        return not others

    def check_batch(self, batch: Sequence[Tensor], where: str) -> None:
        mine = [[list(tensor.shape), f"{tensor.double().sum().item():.9e}"] for tensor in batch]
        if not self.same(mine):
            raise TrainingError(
                f"{where}: the processes have different first batches; train(epoch) must give the same batches in "
                "all, each of which takes its slice: shuffle with a seed that is made of the epoch."
            )

    def _agree_on_draws(self, before: dict[str, Tensor]) -> None:
        """What slices of different sizes have drawn is more in one process than in another."""
        after = random_state(self.device)
        if any(not torch.equal(after[kind], state) for kind, state in before.items()):
            set_random_state(self.agreed_draws(after), self.device)


class _Step(nn.Module):
    """A step's loss as a module, for DistributedDataParallel looks for what is used only behind a module's outputs."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Any:
        return self.loss(batch)


def _fabric(device: torch.device) -> Any:
    """Lightning Fabric, launched: this process is in the group, which talks by gloo, and between GPUs by nccl."""
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ImportError as error:
        raise TrainingError(
            "training in several processes needs lightning-fabric; pip install 'secateur[parallel]'."
        ) from error
    if not distributed.is_initialized():
        atexit.register(leave)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # its banner
    size = started()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    gpus = torch.cuda.is_available() and distributed.is_nccl_available()
    strategy = DDPStrategy(
        process_group_backend="cpu:gloo,cuda:nccl" if gpus else "gloo",
        timeout=timedelta(days=PATIENCE_DAYS),
        find_unused_parameters=True,
    )
    kind = "cuda" if device.type == "cuda" else "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on what a machine has that is not used
        fabric = Fabric(
            accelerator=kind,
            devices=local,
            num_nodes=size // local,
            strategy=strategy,
            plugins=[TorchElasticEnvironment()],
        )
        fabric.launch()
    return fabric
