"""Which blocks to leave out: `Drop`, the plan, and `choose_blocks`, which makes it from scores and a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.allocate.budget import Budget
from secateur.errors import PlanError
from secateur.graph.blocks import Block, Blocks
from secateur.graph.passing import Forms, Renumbered
from secateur.graph.rebuild import Shapes
from secateur.score.blocks import BlockScores

Again = Callable[[tuple[str, ...]], BlockScores]
"""Scores of the blocks of a model without those that are named."""


@dataclass(frozen=True)
class Drop:
    """Which blocks of a model are left out; `save` takes it as a plan.

    Raises:
        UnknownName: there is no such block. PlanError: one cannot be left out, or lies in another.

    >>> import torch, secateur as sc
    >>> from secateur.graph.residual import find_blocks
    >>> blocks = find_blocks(sc.build_model("secateur:resnet20").model, torch.zeros(1, 3, 32, 32))
    >>> print(Drop(blocks, ("layer1.1", "layer3.2")))
    2 blocks left out: layer1.1, layer3.2
      191,066 of 269,722 parameters and 31,113,856 of 40,551,040 MACs are left
    """

    blocks: Blocks
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        self.blocks.chosen(self.names)

    @property
    def forms(self) -> Forms:
        """Path of each block -> what is given in its place."""
        return {block.name: block.form for block in self.blocks.chosen(self.names)}

    @property
    def renumbered(self) -> Renumbered:
        """How calls that are given sizes are counted without the blocks."""
        return self.blocks.renumbered(self.names)

    @property
    def assumed(self) -> tuple[str, ...]:
        """What was seen on the trace so that activations can go too, block by block."""
        return tuple(f"{block.name}: {why}" for block in self.blocks.chosen(self.names) for why in block.assumed)

    @property
    def shapes_left(self) -> Shapes:
        """Name -> shape of every tensor that is left."""
        return self.blocks.shapes_left(self.names)

    @property
    def params_left(self) -> int:
        return self.blocks.params_left(self.names)

    @property
    def macs_left(self) -> int:
        """For the batch of the example inputs."""
        return self.blocks.macs_left(self.names)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"blocks": self.blocks.to_json(), "names": list(self.names)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Drop:
        """The record that `to_json` wrote."""
        return cls(Blocks.from_json(value["blocks"]), tuple(value["names"]))

    def __str__(self) -> str:
        params, macs = self.blocks.params, self.blocks.macs
        return (
            f"{len(self.names)} blocks left out: {', '.join(self.names)}\n"
            f"  {self.params_left:,} of {params:,} parameters and {self.macs_left:,} of {macs:,} MACs are left"
        )


def choose_blocks(scores: BlockScores, goal: int | Budget, *, again: Again | None = None) -> Drop:
    """Leave out blocks in the order of their score per cost, lowest first, until the goal is met.

    The cost is what the goal counts: blocks that hold no others, parameters or MACs. Blocks that lie in one that is
    gone, or hold it, are passed over; of a goal in blocks no more go than asked.

    Args:
        scores: from `score_blocks`.
        goal: how many blocks go, a stage counting as the blocks in it; or a `Budget` of parameters or MACs that may be
            left.
        again: scores the rest anew after each block that has gone, as
            `lambda gone: sc.score_blocks(model, blocks, batches, by, gone=gone)`; blocks that lean on each other are
            not both dropped then.

    Raises:
        PlanError: the goal cannot be met, or is a budget of bytes or of several measures.

    >>> import torch, secateur as sc
    >>> from secateur.graph.residual import find_blocks
    >>> blocks = find_blocks(sc.build_model("secateur:resnet20").model, torch.zeros(1, 3, 32, 32))
    >>> scores = BlockScores(blocks, tuple(range(8)))
    >>> choose_blocks(scores, 2).names, choose_blocks(scores, sc.Budget(params=0.7)).names
    (('layer1.0', 'layer1.1'), ('layer1', 'layer3.1'))
    """
    blocks, measure, wanted = scores.blocks, _measure(goal), _wanted(goal, scores.blocks)
    gone: list[Block] = []
    while sum(measure(block) for block in gone) < wanted:
        room = wanted - sum(measure(block) for block in gone) if isinstance(goal, int) else float("inf")
        open_ = [
            (value / measure(block), block.name, block)
            for block, value in zip(blocks.blocks, scores.values)
            if 0 < measure(block) <= room and not any(block.holds(one) or one.holds(block) for one in gone)
        ]
        if not open_:
            left = sum(measure(block) for block in gone)
            raise PlanError(
                f"{goal} asks to leave out {wanted:,.0f}, and no more than {left:,.0f} can go; ask for less."
            )
        gone.append(min(open_, key=lambda item: item[0])[2])
        if again is not None and sum(measure(block) for block in gone) < wanted:
            scores = again(tuple(block.name for block in gone))
    return Drop(blocks, tuple(block.name for block in gone))


def _measure(goal: int | Budget) -> Callable[[Block], int]:
    if isinstance(goal, int):
        return lambda block: block.inside
    if set(goal.asked) == {"params"}:
        return lambda block: block.params
    if set(goal.asked) == {"macs"}:
        return lambda block: block.macs
    raise PlanError(f"blocks are left out for a budget of parameters or of MACs, and {goal} is of {list(goal.asked)}.")


def _wanted(goal: int | Budget, blocks: Blocks) -> float:
    """How much has to go."""
    if isinstance(goal, int):
        return goal
    ((measure, left),) = goal.asked.items()
    whole = blocks.params if measure == "params" else blocks.macs
    return whole - (left if isinstance(left, int) else int(whole * left))
