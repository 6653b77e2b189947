"""Where and how a model runs while it is trained: device, memory format, precision, compiled or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import TrainingError
from secateur.recover.parallel import Alone

WIDE = (
    "bf16 was asked for, and this CPU has no instructions for bfloat16: a step in it would take 5 to 8 times as long, "
    "so it was done in float32."
)


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16, and does not merely round to it."""
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True)
class Place:
    """A device, and how to compute on it.

    Args:
        device: as torch names it.
        channels_last: images and weights of convolutions in that memory format.
        bf16: forward passes under `torch.autocast` in bfloat16, where the device has it; weights, gradients and losses
            stay as they are.
        compile: forward passes by way of `torch.compile`.
        together: the processes that train, of which this one runs its slice of each batch.

    Raises:
        TrainingError: torch cannot put a tensor there.

    >>> Place("cpu").images(torch.zeros(1, 3, 4, 4)).shape
    torch.Size([1, 3, 4, 4])
    """

    device: str | torch.device
    channels_last: bool = False
    bf16: bool = False
    compile: bool = False
    together: Alone = field(default_factory=Alone)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "device", torch.empty(0, device=self.device).device)
        except (RuntimeError, AssertionError) as error:
            what = f"the device {str(self.device)!r} cannot be used on this machine"
            raise TrainingError(f"{what}; choose another, such as 'cpu'.") from error

    @property
    def on(self) -> torch.device:
        """The device."""
        return torch.device(self.device)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not done as asked, in sentences for the report."""
        return (WIDE,) if self.bf16 and not has_bf16(self.on) else ()

    def tensor(self, tensor: Tensor) -> Tensor:
        """A tensor on the device."""
        return tensor.to(self.on, non_blocking=True)

    def images(self, images: Tensor) -> Tensor:
        """A batch that is on the device, in the memory format."""
        if self.channels_last and images.ndim == 4:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def runner(self, model: nn.Module) -> Callable[[Tensor], Any]:
        """The model's forward pass in this precision, of a batch of which each process runs its slice."""
        forward = torch.compile(model) if self.compile else model
        if not self.bf16 or not has_bf16(self.on):
            return self.together.runner(forward)

        def run(images: Tensor) -> Any:
            with torch.autocast(self.on.type, torch.bfloat16):
                return forward(images)

        return self.together.runner(run)

    def move(self, model: nn.Module) -> nn.Module:
        """The model, in place, on the device and in the memory format."""
        model.to(self.on)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    @contextlib.contextmanager
    def prepared(self, model: nn.Module, only: Callable[[str], bool] | None = None) -> Iterator[None]:
        """The model there, and its parameters but `only` frozen; modes, format and what was frozen come back after."""
        modes = [(module, module.training) for module in model.modules()]
        idle = [p for name, p in model.named_parameters() if p.requires_grad and only is not None and not only(name)]
        model.cpu() if self.together.shards else self.move(model)
        for parameter in idle:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in idle:
                parameter.requires_grad_(True)
            if self.channels_last:
                model.to(memory_format=torch.contiguous_format)
            for module, training in modes:
                module.training = training


def norms_and_head(model: nn.Module) -> Callable[[str], bool]:
    """Says of a parameter's name whether it is a norm's, or the last layer's: a cheap choice for `fine_tune(only=)`.

    A norm is a module whose own parameters are vectors; the last layer is the last module that has a matrix.
    Frankle et al. 2021 (Training BatchNorm and Only BatchNorm) show how far that goes.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    >>> only = norms_and_head(net)
    >>> [name for name, _ in net.named_parameters() if only(name)]
    ['1.weight', '1.bias', '3.weight', '3.bias']
    """
    own = {path: list(module.parameters(recurse=False)) for path, module in model.named_modules()}
    matrices = [path for path, held in own.items() if any(p.ndim > 1 for p in held)]
    norms = [path for path, held in own.items() if held and path not in matrices]
    chosen = frozenset([*norms, *matrices[-1:]])
    return lambda name: name.rpartition(".")[0] in chosen


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least, for losses.

    >>> wide(torch.zeros(1, dtype=torch.bfloat16)).dtype, wide(torch.zeros(1, dtype=torch.float64)).dtype
    (torch.float32, torch.float64)
    """
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
