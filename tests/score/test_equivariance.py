"""Scores belong to the units, not to their places: with the units in another order, the scores follow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import networks
from secateur.graph.groups import find_groups
from secateur.graph.nested import map_tensors, tensors_in
from secateur.graph.records import Groups
from secateur.score.batch_norm import BatchNormScale
from secateur.score.combining import largest, product
from secateur.score.fisher import Fisher
from secateur.score.magnitude import Magnitude
from secateur.score.median import Median
from secateur.score.scaling import by_max, by_mean, gaussian, lamp
from secateur.score.scoring import Criterion, score
from secateur.score.taylor import Taylor
from secateur.surgery.shuffle import Shuffle, shaken

SEED = 3


def squares(outputs: Any, targets: Any) -> Tensor:
    return sum((out.square().mean() for out in tensors_in(outputs)), torch.zeros((), dtype=torch.float64))


def criteria(inputs: Any) -> list[Criterion]:
    batches = [(inputs, None), (map_tensors(lambda t: t.flip(0) * 0.5, inputs), None)]
    every = ("write", "read", "scale")
    return [
        Magnitude(1),
        Magnitude(2, roles=every),
        Magnitude(2, roles=("read",), combine=largest),
        Magnitude(1, roles=every, combine=product),
        Median(),
        Median(roles=("read",)),
        BatchNormScale(otherwise=Magnitude()),
        Taylor(batches, squares),
        Taylor(batches, squares, roles=("write",), p=1),
        Fisher([(inputs, next(tensors_in(inputs)))], squares),
    ]


def orders(groups: Groups) -> list[np.ndarray]:
    """What `Shuffle` draws."""
    random = np.random.default_rng(SEED)
    return [np.roll(np.arange(g.size), 1) if g.size < 3 else random.permutation(g.size) for g in groups.groups]


@pytest.mark.parametrize("net", networks.NETWORKS, ids=lambda net: net.make.__name__)
def test_scores_follow_the_units(net: networks.Net) -> None:
    inputs = map_tensors(lambda t: t.double(), net.inputs())
    model = shaken(networks.build(net).double(), 0).eval()
    groups = find_groups(model, inputs)
    assert [group.size for group in groups.groups] == list(net.sizes)
    for criterion in criteria(inputs):
        before = score(model, groups, criterion)
        with Shuffle(model, groups, SEED):
            after = score(model, groups, criterion)
        for old, new, order in zip(before.values, after.values, orders(groups), strict=True):
            torch.testing.assert_close(new, old[torch.from_numpy(order)], rtol=1e-6, atol=1e-12)  # norms are in float32


@pytest.mark.parametrize("scale", [by_mean, by_max, gaussian, lamp])
def test_scaled_scores_follow_the_units(scale: Any) -> None:
    net = networks.NETWORKS[1]
    model = networks.build(net).double()
    groups = find_groups(model, net.inputs().double())
    before = score(model, groups, Magnitude(), scale)
    with Shuffle(model, groups, SEED):
        after = score(model, groups, Magnitude(), scale)
    for old, new, order in zip(before.values, after.values, orders(groups), strict=True):
        torch.testing.assert_close(new, old[torch.from_numpy(order)])
