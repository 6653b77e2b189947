"""The names of criteria and scales in a recipe, and what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn

from secateur.graph.records import Groups
from secateur.recipe.schema import Cut
from secateur.score.activation import Activation
from secateur.score.batch_norm import BatchNormScale
from secateur.score.brain_surgeon import BrainSurgeon
from secateur.score.direction import Direction
from secateur.score.energy import Energy
from secateur.score.fisher import Fisher
from secateur.score.gates import Batches
from secateur.score.magnitude import Magnitude
from secateur.score.median import Median
from secateur.score.random import Random
from secateur.score.reconstruction import Reconstruction
from secateur.score.relevance import Relevance
from secateur.score.scaling import Scale, by_max, by_mean, gaussian, lamp, none
from secateur.score.scoring import Criterion, Scores, score
from secateur.score.taylor import Taylor

CRITERIA: Mapping[str, Callable[[Cut, Batches, int], Criterion]] = MappingProxyType(
    {
        "magnitude": lambda step, batches, seed: Magnitude(step.p),
        "random": lambda step, batches, seed: Random(seed),
        "median": lambda step, batches, seed: Median(),
        "batch-norm": lambda step, batches, seed: BatchNormScale(otherwise=Magnitude(step.p)),
        "taylor": lambda step, batches, seed: Taylor(batches),
        "fisher": lambda step, batches, seed: Fisher(batches),
        "relevance": lambda step, batches, seed: Relevance(batches),
        "activation": lambda step, batches, seed: Activation(Unlabelled(batches)),
        "energy": lambda step, batches, seed: Energy(Unlabelled(batches)),
        "direction": lambda step, batches, seed: Direction(Unlabelled(batches)),
        "reconstruction": lambda step, batches, seed: Reconstruction(Unlabelled(batches)),
        "brain-surgeon": lambda step, batches, seed: BrainSurgeon(Unlabelled(batches)),
    }
)
"""Each of a cut step, the images that it may look at, and a seed."""

SCALES: Mapping[str, Scale] = MappingProxyType(
    {"none": none, "mean": by_mean, "max": by_max, "gaussian": gaussian, "lamp": lamp}
)


@dataclass(frozen=True)
class Unlabelled:
    """The images of batches alone, as often as they are gone through."""

    batches: Batches

    def __iter__(self) -> Iterator[Tensor]:
        for images, _ in self.batches:
            yield images


def scores_for(step: Cut, model: nn.Module, groups: Groups, seed: int, batches: Batches) -> Scores:
    """How much each channel matters to a cut step; `batches` are for criteria that look at images."""
    return score(model, groups, CRITERIA[step.criterion](step, batches, seed), SCALES[step.scale])
