"""A recipe: what is compressed, on which data, by which steps, as one immutable typed value.

`Recipe` is what a TOML file says (`reading.read_recipe`), what the command line's flags build, and what a run
keeps as `recipe.toml`. It holds names and numbers only; `steps` turns the names into objects.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Device = Literal["auto", "cpu", "cuda", "mps"]
Augmentation = Literal["crop", "flip"]
Norm = Annotated[
    float,
    Field(gt=0),
    BeforeValidator(lambda value: math.inf if value == "inf" else value),
    PlainSerializer(lambda value: "inf" if math.isinf(value) else value, when_used="json"),
]


class Part(BaseModel):
    """What the parts of a recipe have in common: they cannot be changed, and know no key but their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataPart(Part):
    """Where the images come from; `source` is as `zoo.data.load_data` reads it."""

    source: str
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    normalise: Literal["data", "imagenet"] = "data"
    batch_size: Count = 64
    augment: tuple[Augmentation, ...] = ()
    label: str | None = None
    image_size: Count | None = None
    folder: str | None = None
    download: bool = False


class ModelPart(Part):
    """Where the network comes from; `source` is as `zoo.models.build_model` reads it."""

    source: str
    weights: str | None = None
    pretrained: bool = False


class StagePart(Part):
    """A learning rate and for how many epochs it is kept."""

    lr: Annotated[float, Field(gt=0)]
    epochs: Count


class Train(Part):
    """Train every weight that is still there: dense training before a cut, fine-tuning after it."""

    kind: Literal["train"] = "train"
    stages: Annotated[tuple[StagePart, ...], Field(min_length=1)]
    momentum: Share = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    nesterov: bool = False
    schedule: Literal["staged", "one-cycle", "cosine"] = "staged"
    label_smoothing: Share = 0.0
    batch_size: Count | None = None
    augment: tuple[Augmentation, ...] | None = None
    channels_last: bool = False


class Sparsify(Part):
    """Set the smallest weights to zero where they stand; the train steps that follow keep them zero."""

    kind: Literal["sparsify"] = "sparsify"
    sparsity: Share
    scope: Literal["global", "layer"] = "global"
    layers: tuple[str, ...] = ()


class Cut(Part):
    """Take channels out; `guide` says how much each layer gives, `criterion` which of its channels go."""

    kind: Literal["cut"] = "cut"
    sparsity: Share
    guide: Literal["sparsity", "uniform"] = "sparsity"
    criterion: Literal["magnitude", "random"] = "magnitude"
    p: Norm = 1.0
    keep: tuple[str, ...] = ()
    least: Count = 1
    multiple: Count = 1


Step = Annotated[Train | Sparsify | Cut, Field(discriminator="kind")]


class Recipe(Part):
    """Everything that a run depends on, and nothing that it finds out.

    >>> recipe = Recipe(data=DataPart(source="digits"), model=ModelPart(source="secateur:digits_vgg"),
    ...                 steps=(Cut(sparsity=0.5),))
    >>> print(recipe.to_toml())
    title = ""
    seed = 0
    device = "cpu"
    <BLANKLINE>
    [data]
    source = "digits"
    validation = 0.1
    normalise = "data"
    batch_size = 64
    augment = []
    download = false
    <BLANKLINE>
    [model]
    source = "secateur:digits_vgg"
    pretrained = false
    <BLANKLINE>
    [[steps]]
    kind = "cut"
    sparsity = 0.5
    guide = "sparsity"
    criterion = "magnitude"
    p = 1.0
    keep = []
    least = 1
    multiple = 1
    <BLANKLINE>
    """

    title: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    device: Device = "cpu"
    threads: Count | None = None
    data: DataPart
    model: ModelPart
    steps: Annotated[tuple[Step, ...], Field(min_length=1)]

    def to_toml(self) -> str:
        """The recipe as TOML with every default written out; `reading.parse` gives back an equal recipe."""
        value = self.model_dump(mode="json", exclude_none=True)
        tables = [("[data]", value.pop("data")), ("[model]", value.pop("model"))]
        tables += [("[[steps]]", step) for step in value.pop("steps")]
        return "\n".join([_lines(value), *(f"{header}\n{_lines(table)}" for header, table in tables)])

    def with_sparsity(self, sparsity: float) -> Recipe:
        """The recipe with `sparsity` in every step that prunes."""
        return self._with_steps(
            step if isinstance(step, Train) else step.model_copy(update={"sparsity": sparsity})
            for step in self.steps
        )

    def with_epochs(self, epochs: int) -> Recipe:
        """The recipe with its last training step made `epochs` epochs at that step's first rate."""
        last = max((i for i, step in enumerate(self.steps) if isinstance(step, Train)), default=None)

        def shortened(step: Train) -> Train:
            stage = StagePart(lr=step.stages[0].lr, epochs=epochs)
            return step.model_copy(update={"stages": (stage,)})

        return self._with_steps(
            shortened(step) if i == last and isinstance(step, Train) else step
            for i, step in enumerate(self.steps)
        )

    def _with_steps(self, steps: Any) -> Recipe:
        # Built anew, not copied: `model_copy` would let a sparsity of 1.2 through.
        return Recipe.model_validate({**dict(self), "steps": [step.model_dump() for step in steps]})


def _lines(table: dict[str, Any]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in table.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    # A TOML basic string is a JSON string, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
