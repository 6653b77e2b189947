"""First-order Taylor expansion: how much the loss would change if a unit were not there (Molchanov et al. 2019,
Importance Estimation for Neural Network Pruning)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.graph.records import Groups
from secateur.score.gates import Batches, Loss, cross_entropy, gates
from secateur.score.weights import check_roles


@dataclass(frozen=True)
class Taylor:
    """The mean over batches of |dL/dg|^p, for a gate g = 1 on the unit (equation 8, squared as there for p = 2).

    Args:
        batches: (inputs, targets), the inputs as `find_groups` takes them; read once, one at a time.
        loss: `loss(outputs, targets)`, a scalar for a batch; by default the mean cross entropy of logits.
        roles: of which weights w * dL/dw is summed: "read" is a gate on what takes the unit in, exact for convolutions
            and linear layers; "write" the paper's sum over a filter; "scale" a gate behind batch norm, and biases. A
            group without any of these roles is scored by all its weights.
        p: 2 for squares, 1 for absolute values.

    Raises:
        PlanError: a power that is not above 0; when called, batches that are no pairs or none, a loss that is not one
            number. UnknownName: a role that does not exist.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.eye(2)), net[1].weight.data.fill_(1.0)
    >>> batches = [(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0]]))]
    >>> from secateur.graph.groups import find_groups
    >>> taylor = Taylor(batches, loss=lambda outputs, targets: (outputs - targets).sum())
    >>> taylor(net, find_groups(net, torch.zeros(1, 2)))[0].tolist()
    [1.0, 4.0]
    """

    batches: Batches = field(repr=False)
    loss: Loss = cross_entropy
    roles: tuple[str, ...] = ("read",)
    p: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.p < float("inf"):
            raise PlanError(f"the power must be above 0 and finite, and {self.p} is not; 2 and 1 are usual.")
        check_roles(self.roles)

    def __call__(self, model: nn.Module, groups: Groups) -> Sequence[Tensor]:
        """One score per unit."""
        sums = [torch.zeros(group.size, dtype=torch.float64) for group in groups.groups]
        count = 0
        for found in gates(model, groups, self.batches, self.loss, self.roles):
            count += 1
            for total, gradient in zip(sums, found):
                total += gradient.abs().pow(self.p)
        return [total / count for total in sums]
