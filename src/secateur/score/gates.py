"""What a loss feels of each unit: its derivative by a gate, a factor of 1 on the unit.

A gate before a convolution or a linear layer can as well stand on the layer's weights that read the unit, and the
derivative by it is the sum of w * dL/dw over them: exact, and the model runs as it is. So it is with a gate behind the
layer that makes the unit, and with that layer's weights and bias. Where units are read without weights, as in a product
of two activations, the sum is over the weights that the group has, and each factor counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import PlanError
from secateur.graph.nested import Example, Nested, as_arguments
from secateur.graph.rebuild import share
from secateur.graph.records import Groups
from secateur.graph.slots import Slot
from secateur.graph.twin import slow_attention, tensors_of
from secateur.score.weights import along, by_unit, chosen, wide

Batches = Iterable[tuple[Nested, Any]]
"""(inputs, targets), read anew each time: a list, or an object with `__iter__`."""

Loss = Callable[[Any, Any], Tensor]
"""`loss(outputs, targets)` -> a scalar."""


def cross_entropy(outputs: Any, targets: Any) -> Tensor:
    """The mean cross entropy of logits (n, classes, ...) and labels (n, ...).

    Raises:
        PlanError: the outputs are no tensor.
    """
    if not isinstance(outputs, Tensor):
        raise PlanError(
            f"the model returns a {type(outputs).__name__}, and the loss is of a tensor of logits; give loss=, such as "
            "lambda outputs, targets: cross_entropy(outputs.logits, targets)."
        )
    return F.cross_entropy(outputs, targets)


def gates(
    model: nn.Module, groups: Groups, batches: Batches, loss: Loss, roles: Sequence[str]
) -> Iterator[list[Tensor]]:
    """For each batch the derivative of its loss by a gate on each unit: for each group (units,), float64 on the CPU.

    Args:
        model: run as a copy in eval mode; left as found.
        groups: of this model.
        batches: (inputs, targets); one at a time is held.
        loss: of a batch.
        roles: of which weights the sums are, as for `Taylor`.

    Raises:
        PlanError: batches that are no pairs, or none at all; a loss that is not one number or depends on no weight.
    """
    if not groups.groups:
        return
    with torch.inference_mode(False):
        twin = share(model).eval()
    slots = chosen(groups, roles)
    tensors = tensors_of(twin)
    wanted = {slot.tensor: tensors[slot.tensor].requires_grad_() for of_group in slots for slot in of_group}

    def derive(batch: tuple[Nested, Any]) -> list[Tensor]:
        gradients = dict(zip(wanted, _gradients(twin, batch, loss, list(wanted.values()))))
        return _on_units(slots, {name: tensor.detach() for name, tensor in wanted.items()}, gradients)

    # Without a loop variable: while the next batch is made, this one is let go.
    empty = True
    for found in map(derive, batches):
        empty = False
        yield found
    if empty:
        raise PlanError(
            "there are no batches; give a list of (inputs, targets), or an object that can be read again: an iterator "
            "is empty once it has been read."
        )


def _gradients(
    model: nn.Module, batch: tuple[Nested, Any], loss: Loss, tensors: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    inputs, targets = pair(batch)
    args, kwargs = as_arguments(inputs)
    # cuDNN has no backward pass of recurrent layers in eval mode.
    with torch.inference_mode(False), torch.enable_grad(), slow_attention(), torch.backends.cudnn.flags(enabled=False):
        given = model(*args, **kwargs)
        value = loss(inputs.outputs(given) if isinstance(inputs, Example) else given, targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise PlanError(f"the loss is {shape}, and one number is needed; take its mean over the batch.")
        if not value.requires_grad:
            raise PlanError(
                "the loss depends on no weight that units are read or made by: the model, or the loss, cuts off "
                "gradients, as torch.no_grad and detach do."
            )
        return torch.autograd.grad(value.sum(), tensors, allow_unused=True)


def _on_units(
    slots: Sequence[Sequence[Slot]], tensors: dict[str, Tensor], gradients: dict[str, Tensor | None]
) -> list[Tensor]:
    """For each group the sum of w * dL/dw over the places of each unit."""

    @cache
    def sums(name: str, dim: int) -> Tensor:
        tensor, gradient = tensors[name], gradients[name]
        if gradient is None:
            return torch.zeros(tensor.shape[dim], dtype=torch.float64)
        return along(torch.mul, _total, dim, tensor, gradient.to_dense().conj())

    return [
        torch.stack([by_unit(sums(slot.tensor, slot.dim), slot).sum(1) for slot in of_group]).sum(0)
        for of_group in slots
    ]


def _total(rows: Tensor) -> Tensor:
    return (rows.real if rows.is_complex() else rows).sum(1, dtype=wide(rows))


def pair(batch: Any) -> tuple[Nested, Any]:
    """(inputs, targets) of a batch; PlanError if it is something else."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise PlanError(f"a batch is a pair (inputs, targets), and this one is a {type(batch).__name__}.")
