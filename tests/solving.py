"""What the tests of solved layers have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import networks
import secateur as sc
from secateur.graph.nested import map_tensors, tensors_in
from secateur.graph.twin import run


def double(net: networks.Net) -> tuple[nn.Module, Any]:
    """A network and more inputs than it comes with, in float64."""
    random = torch.Generator().manual_seed(3)

    def more(x: Tensor) -> Tensor:
        return torch.randn(40, *x.shape[1:], generator=random, dtype=torch.float64)

    return networks.build(net).double(), map_tensors(more, net.inputs())


def first_half(groups: sc.Groups) -> sc.Plan:
    return sc.Plan(groups, tuple(tuple(range((group.size + 1) // 2)) for group in groups.groups))


def error(model: nn.Module, smaller: nn.Module, x: Any) -> float:
    pairs = zip(tensors_in(run(model, x)), tensors_in(run(smaller, x)), strict=True)
    return sum(float((a - b).square().sum()) for a, b in pairs)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
