"""A recipe: what is compressed, on which data, by which steps, as one immutable typed value.

`Recipe` is what a TOML file says (`reading.read_recipe`), what the command line's flags build, and what a run
keeps as `recipe.toml`. It holds names and numbers only; `steps` turns the names into objects. Its tables are in
`parts`.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from secateur.recipe.parts import (
    Augmentation,
    BudgetPart,
    Count,
    DataPart,
    DistillPart,
    FloorPart,
    LimitsPart,
    ModelPart,
    MovingPart,
    Part,
    PenaltyPart,
    Scope,
    Share,
    StagePart,
)

Device = Literal["auto", "cpu", "cuda", "mps"]
Guide = Literal["sparsity", "uniform", "ranking", "ranking-per-cost", "knapsack", "sensitivity"]
Scale = Literal["none", "mean", "max", "gaussian", "lamp"]
Runtime = Literal["eager", "compiled", "onnx"]
Criterion = Literal[
    "magnitude", "random", "median", "batch-norm", "taylor", "fisher", "relevance", "activation", "energy",
    "direction", "reconstruction", "brain-surgeon",
]  # fmt: skip
Norm = Annotated[
    float,
    Field(gt=0),
    BeforeValidator(lambda value: math.inf if value == "inf" else value),
    PlainSerializer(lambda value: "inf" if math.isinf(value) else value, when_used="json"),
]


class Train(Part):
    """Train every weight that is still there: dense training before a cut, fine-tuning after it.

    What the fields mean is told at `recover.train.fine_tune`; "norms-and-head" trains only these. Masks that an earlier
    step has put in force stay, unless `masks` moves them.
    """

    kind: Literal["train"] = "train"
    stages: Annotated[tuple[StagePart, ...], Field(min_length=1)]
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Share = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    nesterov: bool = False
    schedule: Literal["staged", "one-cycle", "cosine"] = "staged"
    warmup: Annotated[int, Field(ge=0)] = 0
    rewind: Count | None = None
    label_smoothing: Share = 0.0
    batch_size: Count | None = None
    augment: tuple[Augmentation, ...] | None = None
    mixup: Annotated[float | None, Field(gt=0)] = None
    cutmix: Annotated[float | None, Field(gt=0)] = None
    clip: Annotated[float | None, Field(gt=0)] = None
    ema: Annotated[float | None, Field(gt=0, lt=1)] = None
    only: Literal["all", "norms-and-head"] = "all"
    keep: Literal["best", "last"] = "best"
    distill: DistillPart | None = None
    penalty: PenaltyPart | None = None
    masks: MovingPart | None = None
    channels_last: bool = False
    bf16: bool = False
    compile: bool = False
    parallel: Literal["replicated", "sharded"] = "replicated"

    @property
    def epochs(self) -> int:
        """How many are trained."""
        return self.rewind or sum(stage.epochs for stage in self.stages)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        epochs = sum(stage.epochs for stage in self.stages)
        if self.warmup >= epochs:
            raise ValueError(f"warmup is {self.warmup}, of {epochs} epochs; it must be fewer.")
        if self.warmup and self.schedule == "one-cycle":
            raise ValueError("the schedule 'one-cycle' has a warm-up of its own; leave warmup out.")
        if self.rewind is not None and self.rewind > epochs:
            raise ValueError(f"rewind is {self.rewind}, and the stages have {epochs} epochs.")
        if self.nesterov and self.optimizer != "sgd":
            raise ValueError(f"nesterov is for the optimizer 'sgd', and this is {self.optimizer!r}.")
        return self


class Sparsify(Part):
    """Set the smallest weights to zero where they stand; the train steps that follow keep them zero.

    How many is said by `sparsity`, or by `pattern`: (n, m) keeps n of every m weights in a row along the inputs. With
    `recover` "least-squares" as many go of each layer, but those that its output misses least, and the others are
    solved to make up for them (`recover.prune`), on `recover_images` of train, without labels.
    """

    kind: Literal["sparsify"] = "sparsify"
    sparsity: Share | None = None
    pattern: tuple[Count, Count] | None = None
    scope: Scope = "global"
    layers: tuple[str, ...] = ()
    recover: Literal["nothing", "least-squares"] = "nothing"
    recover_images: Count = 512

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("it needs a sparsity, such as 0.9, or a pattern, such as [2, 4]; one of them.")
        if self.pattern is not None and self.pattern[0] >= self.pattern[1]:
            raise ValueError(f"{self.pattern[0]} of every {self.pattern[1]} weights is no pattern; give fewer.")
        return self


class Cut(Part):
    """Take channels out; `guide` says how much each layer gives, `criterion` which of its channels go.

    How much goes in all is said by `sparsity`, or by `budget`; the shares that sparsity guides are scaled to a budget.
    `scale` makes scores of different layers comparable, for guides that compare them. `p` is the order of "magnitude",
    also where "batch-norm" finds no batch norm; criteria that look at images see so many `images` of train: "taylor",
    "fisher" and "relevance" with labels; "activation", "energy", "direction", "reconstruction" and "brain-surgeon"
    without. The guide "sensitivity" cuts each group alone, by a quarter, half and three quarters, and takes the
    loss on so many images held out. A budget for latency goes by the times that each layer takes here in `runtime`,
    for one image: measured, or read from the file `table` if it is there, and kept in it. `recover` gets accuracy
    back at once, without labels, on `recover_images` of train: batch norm's "statistics" are estimated anew, or all
    layers are solved by "least-squares" (`recover.reconstruct`), and with `recover_together` of 1 or more two and two;
    where the data's `augment` has "flip", on the mirrored images too.
    """

    kind: Literal["cut"] = "cut"
    sparsity: Share | None = None
    budget: BudgetPart | None = None
    guide: Guide = "sparsity"
    criterion: Criterion = "magnitude"
    scale: Scale = "none"
    p: Norm = 1.0
    images: Count = 256
    runtime: Runtime = "eager"
    table: str | None = None
    recover: Literal["nothing", "statistics", "least-squares"] = "nothing"
    recover_images: Count = 512
    recover_together: Annotated[int, Field(ge=0)] = 0
    limits: LimitsPart = Field(default_factory=LimitsPart)

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        has, budgeted = self.sparsity is not None, self.budget is not None
        if self.recover_together and self.recover != "least-squares":
            raise ValueError("recover_together goes with recover = 'least-squares'.")
        if self.guide == "sparsity" and not has:
            raise ValueError("the guide 'sparsity' needs a sparsity.")
        if self.guide == "uniform" and has == budgeted:
            raise ValueError("the guide 'uniform' needs a sparsity or a budget, one of them.")
        if self.guide not in ("sparsity", "uniform") and (has or not budgeted):
            needs = "takes no sparsity" if has else "needs a budget, such as budget = {macs = 0.5}"
            raise ValueError(f"the guide {self.guide!r} {needs}.")
        if self.latency is not None and self.guide != "knapsack":
            raise ValueError(f"a budget for latency needs the guide 'knapsack', and this is {self.guide!r}.")
        return self

    @property
    def latency(self) -> float | None:
        """The share of the latency that may be left, if that is the budget."""
        return None if self.budget is None else self.budget.latency


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
    scale = "none"
    p = 1.0
    images = 256
    runtime = "eager"
    recover = "nothing"
    recover_images = 512
    recover_together = 0
    limits = {least = 1, multiple = 1, cap = 1.0, keep = [], tied = []}
    <BLANKLINE>
    """

    title: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    device: Device = "cpu"
    threads: Count | None = None
    data: DataPart
    model: ModelPart
    floor: FloorPart | None = None
    steps: Annotated[tuple[Step, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        cuts = sum(isinstance(step, Cut) for step in self.steps)
        if self.floor is not None and cuts != 1:
            raise ValueError(f"a floor is for a recipe with one step that cuts, and this one has {cuts}.")
        return self

    def to_toml(self) -> str:
        """The recipe as TOML with every default written out; `reading.parse` gives back an equal recipe."""
        value = self.model_dump(mode="json", exclude_none=True)
        tables = [(f"[{name}]", value.pop(name)) for name in ("data", "model", "floor") if name in value]
        tables += [("[[steps]]", step) for step in value.pop("steps")]
        return "\n".join([_lines(value), *(f"{header}\n{_lines(table)}" for header, table in tables)])

    def with_sparsity(self, sparsity: float) -> Recipe:
        """The recipe with `sparsity` in every step that has one."""
        return self._with_steps(
            step if isinstance(step, Train) or step.sparsity is None else step.model_copy(update={"sparsity": sparsity})
            for step in self.steps
        )

    def parted(self) -> tuple[Recipe | None, Recipe]:
        """What comes before the first cut, if anything does, and the rest; neither has a floor."""
        first = next((i for i, step in enumerate(self.steps) if isinstance(step, Cut)), len(self.steps))
        parts = (self.steps[:first], self.steps[first:])
        before, rest = (self.model_copy(update={"steps": steps, "floor": None}) for steps in parts)
        return before if first else None, rest

    def with_budget(self, budget: dict[str, float]) -> Recipe:
        """The recipe with `budget` in every step that cuts; of the guide 'uniform', it takes the sparsity's place."""

        def budgeted(step: Cut) -> dict[str, Any]:
            sparsity = None if step.guide == "uniform" else step.sparsity
            return {**step.model_dump(), "sparsity": sparsity, "budget": budget}

        return self._with_steps(budgeted(step) if isinstance(step, Cut) else step for step in self.steps)

    def with_table(self, path: str) -> Recipe:
        """The recipe with the file `path` for the measured times of every step that cuts and names none."""
        return self._with_steps(
            step.model_copy(update={"table": step.table or path}) if isinstance(step, Cut) else step
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
        parts = [step.model_dump() if isinstance(step, Part) else step for step in steps]
        return Recipe.model_validate({**dict(self), "steps": parts})


def _lines(table: dict[str, Any]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in table.items())


def _key(key: str) -> str:
    return key if key.isidentifier() and key.isascii() else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    # A TOML basic string is a JSON string, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
