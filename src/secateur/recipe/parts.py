"""The tables of a recipe that its steps and its head are made of, as immutable typed values.

Names and numbers only; where a record of another room has the same fields, that record says what is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from secateur.allocate.budget import Budget
from secateur.allocate.limits import Limits
from secateur.errors import PlanError, TrainingError
from secateur.recover.moving import ACDC, Gradual, Moving, RigL
from secateur.surgery.masks import Masks

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Augmentation = Literal["crop", "flip"]
Scope = Literal["global", "layer"]
WAYS: Mapping[str, Any] = MappingProxyType({"gradual": Gradual, "acdc": ACDC, "rigl": RigL})


class Part(BaseModel):
    """What the parts of a recipe have in common: they cannot be changed, and know no key but their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _as_in(record: type[Budget | Limits]) -> BeforeValidator:
    """A field is right where the record of the same field takes it, and else wrong in the record's words."""

    def check(value: Any, info: ValidationInfo) -> Any:
        try:
            if value is not None:
                record(**{str(info.field_name): value})
        except PlanError as error:
            raise ValueError(str(error)) from error
        return _tuples(value)

    return BeforeValidator(check)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


class BudgetPart(Part):
    """What may be left, at most: shares of the whole or counts (`allocate.budget.Budget`); of latency a share."""

    params: Annotated[int | float | None, _as_in(Budget)] = None
    macs: Annotated[int | float | None, _as_in(Budget)] = None
    bytes: Annotated[int | float | None, _as_in(Budget)] = None
    units: Annotated[int | float | None, _as_in(Budget)] = None
    latency: Annotated[float | None, Field(gt=0, le=1)] = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        asked = self.model_dump(exclude_none=True)
        if not asked:
            raise ValueError("the budget is empty; say what may be left of params, macs, bytes, units or latency.")
        if self.latency is not None and len(asked) > 1:
            raise ValueError("a budget for latency stands alone; leave the others out.")
        return self


class LimitsPart(Part):
    """What no plan may do (`allocate.limits.Limits`)."""

    least: Annotated[int | dict[str, int], _as_in(Limits)] = 1
    multiple: Annotated[int | dict[str, int], _as_in(Limits)] = 1
    cap: Annotated[float | dict[str, float], _as_in(Limits)] = 1.0
    keep: Annotated[tuple[str, ...], _as_in(Limits)] = ()
    tied: Annotated[tuple[str | tuple[str, ...], ...], _as_in(Limits)] = ()


class FloorPart(Part):
    """The accuracy on the validation images that must be left, in percent; below 0, how many points may be lost.

    The step that cuts is tried at several budgets of `measure`, at most `tries`, until the smallest above the floor is
    known to within `width` (`search.floor`).
    """

    accuracy: Annotated[float, Field(gt=-100, le=100)]
    measure: Literal["macs", "params", "bytes", "latency"] = "macs"
    tries: Count = 8
    width: Annotated[float, Field(gt=0)] = 0.03


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


class DistillPart(Part):
    """Learn from the model that the recipe begins with, as its report first measures it (`recover.distillation`).

    `attention` names layers whose maps are matched too, with `attention_weight`. `unlabelled` is another data set, as
    `source` of the data: as many images of its train part are added to each batch, which the teacher alone judges. What
    it says of images that it has not been trained on tells more than what it says of those that it knows by heart.
    """

    teacher: Literal["original"] = "original"
    temperature: Annotated[float, Field(gt=0)] = 4.0
    weight: Annotated[float, Field(ge=0, le=1)] = 0.9
    attention: tuple[str, ...] = ()
    attention_weight: Annotated[float, Field(gt=0)] = 1000.0
    unlabelled: str | None = None


class PenaltyPart(Part):
    """Make channels small before they are cut (`recover.penalties`).

    It presses on all channels that can be cut, or on those that the next cut would take if it came first. With `every`,
    the strength grows by itself after so many steps, up to `most`. `proximal` sets weights exactly to zero.
    """

    kind: Literal["l1", "l2", "group-lasso", "slimming"]
    strength: Annotated[float, Field(gt=0)]
    every: Count | None = None
    most: Annotated[float | None, Field(gt=0)] = None
    units: Literal["all", "next-cut"] = "all"
    proximal: bool = False

    @model_validator(mode="after")
    def _grows_or_not(self) -> Self:
        if (self.every is None) != (self.most is None):
            raise ValueError("a strength that grows needs both every and most.")
        return self


class MovingPart(Part):
    """Masks that move while the step trains (`recover.moving`), and stay for the steps that follow.

    "gradual" masks more and more weights, up to `sparsity`; "acdc" takes turns between that and all weights; "rigl"
    exchanges weights of the masks that an earlier step has put in force. Each has its own keys besides.
    """

    way: Literal["gradual", "acdc", "rigl"]
    sparsity: Share | None = None
    scope: Scope | None = None
    every: Count | None = None
    begin: Share | None = None
    end: Share | None = None
    cycles: Count | None = None
    warmup: Share | None = None
    final: Share | None = None
    alpha: Share | None = None

    @model_validator(mode="after")
    def _as_the_way_takes_them(self) -> Self:
        given = self.model_dump(exclude={"way"}, exclude_none=True)
        taken = [field.name for field in fields(WAYS[self.way]) if field.name in MovingPart.model_fields]
        odd = next((key for key in given if key not in taken), None)
        if odd is not None:
            raise ValueError(f"the way {self.way!r} takes no {odd}, but {', '.join(taken)}.")
        if self.sparsity is None and "sparsity" in taken:
            raise ValueError(f"the way {self.way!r} needs a sparsity.")
        try:
            self.moving(Masks(()))
        except TrainingError as error:
            raise ValueError(str(error)) from error
        return self

    def moving(self, masks: Masks | None) -> Moving:
        """The way, from the masks that are in force; "gradual" goes on from their sparsity."""
        given: dict[str, Any] = self.model_dump(exclude={"way"}, exclude_none=True)
        if self.way == "rigl":
            return RigL(masks or Masks(()), **given)
        if self.way == "gradual" and masks is not None and masks.masks:
            given["initial"] = masks.table().sparsity
        way: Moving = WAYS[self.way](**given)
        return way
