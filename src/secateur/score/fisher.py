"""Diagonal Fisher information: how much the loss curves along a unit's gate (Theis et al. 2018, Faster Gaze Prediction
with Dense Networks and Fisher Pruning; for coupled channels Liu et al. 2021, Group Fisher Pruning)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.graph.nested import Nested, map_tensors, tensors_in
from secateur.graph.records import Groups
from secateur.score.gates import Batches, Loss, cross_entropy, pair
from secateur.score.taylor import Taylor
from secateur.score.weights import check_roles


@dataclass(frozen=True)
class Fisher:
    """The mean over samples of (dL/dg)^2, for one gate g = 1 on all that is coupled in the unit.

    Half of it is the second-order estimate of what the loss rises by without the unit (Theis et al., equation 6). The
    gradients are those of each sample by itself: the model is run on one at a time, which takes any model.

    Args:
        batches: (inputs, targets), as for `Taylor`, of any size: all tensors have the samples along their first axis.
        loss: of a batch of one sample.
        roles: where the gate is, as for `Taylor`.

    Raises:
        PlanError: when called, as for `Taylor`, and for tensors that do not have as many samples. UnknownName: a role
            that does not exist.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.eye(2)), net[1].weight.data.fill_(1.0)
    >>> batches = [(torch.tensor([[1.0, 2.0], [-1.0, 0.0]]), torch.zeros(2, 1))]
    >>> from secateur.graph.groups import find_groups
    >>> fisher = Fisher(batches, loss=lambda outputs, targets: (outputs - targets).sum())
    >>> fisher(net, find_groups(net, torch.zeros(1, 2)))[0].tolist()  # over the batch, the first would cancel out
    [1.0, 2.0]
    """

    batches: Batches = field(repr=False)
    loss: Loss = cross_entropy
    roles: tuple[str, ...] = ("read",)

    def __post_init__(self) -> None:
        check_roles(self.roles)

    def __call__(self, model: nn.Module, groups: Groups) -> Sequence[Tensor]:
        """One score per unit."""
        return Taylor(_Samples(self.batches), self.loss, self.roles)(model, groups)


@dataclass(frozen=True)
class _Samples:
    """The same data in batches of one."""

    batches: Batches

    def __iter__(self) -> Iterator[tuple[Nested, Any]]:
        return chain.from_iterable(map(_split, self.batches))


def _split(batch: Any) -> Iterator[tuple[Nested, Any]]:
    whole = pair(batch)
    shapes = [tuple(tensor.shape) for tensor in tensors_in(whole)]
    counts = {shape[:1] for shape in shapes}
    if len(counts) != 1 or counts == {()}:
        raise PlanError(
            f"a batch has tensors of shapes {shapes[:4]}, and the samples are those along a first axis that all have; "
            "where it is otherwise, give batches of one sample to Taylor, which is the same."
        )

    def sample(number: int) -> tuple[Nested, Any]:
        return pair(map_tensors(lambda tensor: tensor[number : number + 1], whole))

    return map(sample, range(shapes[0][0]))
