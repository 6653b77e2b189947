"""The record of `simplify`: what went, what stayed and why, how exact it is, and what a saved model must be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.allocate.plan import Plan
from secateur.graph import replay
from secateur.graph.rebuild import Attributes, Shapes, attributes_from_json, attributes_to_json
from secateur.graph.replay import Change


@dataclass(frozen=True)
class Found:
    """`count` units, features or norms of one kind, which went from `where`: a group, a layer or a norm."""

    kind: str
    where: str
    count: int


@dataclass(frozen=True)
class Left:
    """`count` units, maps or norms that might have gone, and why they did not."""

    where: str
    count: int
    why: str


@dataclass(frozen=True)
class Simplification:
    """What `simplify` did to a model of `params` parameters, of which `params_left` are left.

    `error` is how far the outputs are from the model's own in float64, as a share of the largest, over `inputs` inputs;
    `rounding` is the same, on the example, once the new weights have been rounded to the types of the old ones.

    `plans` are the cuts, in order, each for the model as the one before left it. `attributes` and `replays` are what
    all of it told the modules in the end, `identities` the norms that an `nn.Identity` stands for now, `biases` the
    parameters that were added, `shapes` and `shapes_left` those of all tensors before and after: all that `save` needs
    to know beside the model, `save(smaller, folder, plan=record, source=...)`.
    """

    params: int
    params_left: int
    found: tuple[Found, ...]
    left: tuple[Left, ...]
    plans: tuple[Plan, ...]
    attributes: Attributes
    replays: Mapping[str, Change]
    identities: tuple[str, ...]
    biases: tuple[str, ...]
    shapes: Shapes
    shapes_left: Shapes
    error: float
    rounding: float
    inputs: int

    def count(self, kind: str) -> int:
        """How many of one kind went."""
        return sum(item.count for item in self.found if item.kind == kind)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rest = ("params", "params_left", "error", "rounding", "inputs")
        return {
            **{name: getattr(self, name) for name in rest},
            "found": [asdict(item) for item in self.found],
            "left": [asdict(item) for item in self.left],
            "plans": [plan.to_json() for plan in self.plans],
            "attributes": attributes_to_json(self.attributes),
            "replays": replay.to_json(self.replays),
            "identities": list(self.identities),
            "biases": list(self.biases),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "shapes_left": {name: list(shape) for name, shape in self.shapes_left.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Simplification:
        """The record that `to_json` wrote."""
        made = {
            "found": tuple(Found(**item) for item in value["found"]),
            "left": tuple(Left(**item) for item in value["left"]),
            "plans": tuple(Plan.from_json(plan) for plan in value["plans"]),
            "attributes": attributes_from_json(value["attributes"]),
            "replays": replay.from_json(value["replays"]),
            "identities": tuple(value["identities"]),
            "biases": tuple(value["biases"]),
            "shapes": {name: tuple(shape) for name, shape in value["shapes"].items()},
            "shapes_left": {name: tuple(shape) for name, shape in value["shapes_left"].items()},
        }
        return cls(**{**value, **made})

    def __str__(self) -> str:
        times = f", {self.params / self.params_left:.2f} times fewer" if 0 < self.params_left < self.params else ""
        lines = [
            f"{self.params_left:,} of {self.params:,} parameters are left{times}; outputs equal to {self.error:.1e} in "
            f"float64 on {self.inputs} inputs ({self.rounding:.1e} with the weights rounded to their types)"
        ]
        for kind in dict.fromkeys(item.kind for item in self.found):
            lines.append(f"  {self.count(kind)} {kind} in {_places([i.where for i in self.found if i.kind == kind])}")
        if not self.found:
            lines.append("  nothing was found")
        if self.left:
            lines.append("left as they are:")
        for why in dict.fromkeys(item.why for item in self.left):
            alike = [item for item in self.left if item.why == why]
            lines.append(f"  {sum(item.count for item in alike)} in {_places([i.where for i in alike])}: {why}")
        return "\n".join(lines)


def _places(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{more}"
