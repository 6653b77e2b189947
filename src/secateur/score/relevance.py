"""Relevance: a unit matters as much as it contributes to what the model says (Yeom et al. 2021, "Pruning by Explaining:
A Novel Criterion for Deep Neural Network Pruning").

The score of an image's class is propagated back through the network by layer-wise relevance propagation, in the way of
`score.lrp`, and a unit is given what arrives at it, summed over images and positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.graph.nested import Nested
from secateur.graph.records import Groups
from secateur.score.lrp.composites import Composite, EpsilonPlus
from secateur.score.lrp.places import Places, find_places
from secateur.score.lrp.propagate import propagate
from secateur.score.lrp.rules import STABILIZER
from secateur.score.lrp.starts import Fold, Start, logit, signed, starting
from secateur.score.lrp.tape import take


@dataclass(frozen=True)
class Relevance:
    """The relevance of units on the caller's images, the mean over the images.

    Args:
        batches: what can be gone through again and again: model inputs, or with `labelled` pairs (inputs, labels). A
            model with several outputs gets them as `Example(inputs, outputs)`, which says where the logits are.
        labelled: whether batches come with labels; without, the class is the one that the model predicts.
        composite: the rule of each layer (see `score.lrp.composites`).
        start: where relevance starts: `logit`, `one_hot`, `softmax_difference`, or a function of yours.
        fold: how the relevance of a unit is summed up: `signed`, `absolute`, or a function of yours.
        made: count relevance where layers make the unit, not where it ends in a sum. For units that one layer makes
            and one reads it is the same, up to what lies between.
        mean: the mean over a unit's places, not the sum, which grows with their number.
        gates: the share that attention weights and other gates take of what they weigh: 0 is the rule of Ali et al.
            2022, under which what makes the weights only, such as queries and keys, is of no relevance.
        stabilizer: keeps additions, means and other ops that share from dividing by zero; layers have their rule's.

    Memory does not grow with the number of images: a batch's activations are held while it is propagated.

    Raises:
        PlanError: there are no batches, the model has several outputs, or a group has no place to which relevance
            comes.
        CaptureError: the model does not run on a batch, or relevance meets an op that torch does not differentiate.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[3.0, -1.0], [1.0, 0.0]]))
    >>> _ = net[2].weight.data.copy_(torch.tensor([[2.0, 5.0], [0.0, 0.0]]))
    >>> from secateur.graph.groups import find_groups
    >>> groups = find_groups(net, torch.zeros(1, 2))
    >>> images, labels = torch.ones(1, 2), torch.tensor([0])
    >>> [round(value, 3) for value in Relevance([(images, labels)])(net, groups)[0].tolist()]
    [4.0, 5.0]
    """

    batches: Iterable[Any] = field(repr=False)
    labelled: bool = True
    composite: Composite = field(default_factory=EpsilonPlus)
    start: Start = logit
    fold: Fold = signed
    made: bool = False
    mean: bool = False
    gates: float = 0.5
    stabilizer: float = STABILIZER

    def __post_init__(self) -> None:
        if not 0 <= self.gates <= 1:
            raise PlanError(f"gates take a share from 0 to 1 of the relevance, and not {self.gates}.")

    def __call__(self, model: nn.Module, groups: Groups) -> Sequence[Tensor]:
        """One score per unit."""
        with torch.inference_mode(False):
            sums, count, images = self._summed(model, groups)
        sums /= images
        if self.mean:
            sums /= count.clamp(min=1)
        return [sums[first : first + group.size] for first, group in zip(groups.offsets, groups.groups)]

    def _summed(self, model: nn.Module, groups: Groups) -> tuple[Tensor, Tensor, int]:
        """For each unit its relevance on all images, and its places; and how many images there are."""
        sums = torch.zeros(groups.offsets[-1] + 1, dtype=torch.float64)
        images, places = 0, None
        for batch in self._pairs():
            count, places = self._add(model, groups, batch, places, sums)
            images += count
        if places is None:
            raise PlanError("relevance needs images, and there are no batches.")
        return sums, places.count, images

    def _add(
        self, model: nn.Module, groups: Groups, batch: tuple[Nested, Tensor | None], places: Places | None, sums: Tensor
    ) -> tuple[int, Places]:
        """Add one batch to the sums: how many images it has, and where its units are."""
        inputs, labels = batch
        tape = take(model, inputs)
        if places is None or not places.fit(tape.trace):
            places = find_places(tape, model, groups, self.made)
            places.check(groups)
        start, output = starting(tape, labels, self.start)
        for flow in propagate(tape, output, start, self.composite, self.gates, self.stabilizer):
            places.add(flow, self.fold, sums)
        return start.shape[0], places

    def _pairs(self) -> Iterator[tuple[Nested, Tensor | None]]:
        for batch in self.batches:
            if not self.labelled:
                yield batch, None
            elif isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
                yield batch[0], batch[1]
            else:
                raise PlanError(
                    "a batch is not a pair of inputs and a tensor of labels; give labelled=False if there are none."
                )
