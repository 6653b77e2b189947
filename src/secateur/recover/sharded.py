"""Training of a model that fits no single device: each process holds a share of the weights, gradients and state.

A copy of the model is parted by torch's `fully_shard` (FSDP2; Zhao et al. 2023, PyTorch FSDP), block by block, and a
block's weights are gathered for the time it runs. The model itself stays whole, on the CPU, and takes the result.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from secateur.errors import TrainingError
from secateur.graph.twin import duplicate
from secateur.recover.parallel import Alone, Parallel, Several, started

BLOCK = 2**20
"""Weights that make a module worth gathering by itself."""


def processes(kind: Parallel, device: str | torch.device, refused: Mapping[str, object]) -> Alone:
    """How this process trains with the others that `torchrun` started, if any.

    Args:
        kind: what each process holds of the model; without `torchrun` all of it.
        device: this process's own.
        refused: what was asked for that works on whole weights, by name.

    Raises:
        TrainingError: no such kind, or weights are to be parted that something needs whole.

    >>> processes("replicated", "cpu", {})
    Alone()
    """
    if kind not in ("replicated", "sharded"):
        raise TrainingError(f"parallel is {kind!r}; give 'replicated' or 'sharded'.")
    if started() == 1:
        return Alone()
    if kind == "replicated":
        return Several(torch.device(device))
    for name, value in refused.items():
        if value:
            raise TrainingError(
                f"{name} works on whole weights, and parallel='sharded' leaves a share in each process; leave one out."
            )
    return Sharded(torch.device(device))


@dataclass(eq=False)
class Sharded(Several):
    """A share of the model in each process, and a slice of each batch."""

    @property
    def shards(self) -> bool:
        return True

    def trained(self, model: nn.Module, loss: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return loss  # fully_shard averages gradients itself

    def agree(self, model: nn.Module) -> None:
        """Shares are one process's own; nothing can differ."""

    @contextlib.contextmanager
    def student(self, model: nn.Module) -> Iterator[nn.Module]:
        """A copy in shares; what it needs of memory on the device is a share, and the largest block."""
        super().agree(model)
        student = duplicate(model)
        mesh = init_device_mesh(self.device.type, (started(),))
        for block in blocks(student, BLOCK):
            # The outermost too, for its state is read between passes.
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        for buffer_of, name, buffer in _buffers(student):
            buffer_of._buffers[name] = buffer.to(self.device)
        yield student

    def full(self, tensors: Mapping[str, Tensor], everywhere: bool = False) -> dict[str, Tensor]:
        whole = {}
        for name, tensor in tensors.items():
            value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            whole[name] = value.cpu() if self.writes or everywhere else value.new_empty(0)
        return whole

    def shared_out(self, tensors: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
        held = dict(model.named_parameters())

        def share(name: str, tensor: Tensor) -> Tensor:
            like = held.get(name.rpartition("/")[2])
            if not isinstance(like, DTensor) or like.shape != tensor.shape:
                return tensor
            return distribute_tensor(tensor.to(self.device), like.device_mesh, like.placements)

        return {name: share(name, tensor) for name, tensor in tensors.items()}


def blocks(model: nn.Module, least: int) -> list[nn.Module]:
    """Modules to be gathered one by one, the inner ones first, the model last.

    Each has at least so many weights that no block within it has; weights that two modules share are the model's own.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)))
    >>> [type(block).__name__ for block in blocks(net, 20)]
    ['Linear', 'Linear', 'Sequential']
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    taken = {key for key, count in owners.items() if count > 1}
    found = []
    for module in [*model.modules()][:0:-1]:  # a module comes before those within it
        own = {id(p): p.numel() for p in module.parameters() if id(p) not in taken}
        shared = any(owners[id(p)] > 1 for p in module.parameters())
        if sum(own.values()) >= least and not shared and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            found.append(module)
            taken |= own.keys()
    return [*found, model]


def _buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [(m, name, buffer) for m in model.modules() for name, buffer in m._buffers.items() if buffer is not None]
