"""How much residual blocks matter: what they add to the stream, or what the model loses without them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import PlanError
from secateur.graph.blocks import Block, Blocks, Form, Pass
from secateur.graph.nested import Nested
from secateur.graph.passing import Passing, leave_out
from secateur.graph.rebuild import share, tensor_shapes
from secateur.graph.twin import run
from secateur.score.gates import Batches, Loss, cross_entropy


@dataclass(frozen=True)
class Depth:
    """A model and its blocks, of which those in `gone` are left out already."""

    model: nn.Module
    blocks: Blocks
    gone: tuple[str, ...] = ()

    @property
    def wanted(self) -> tuple[Block, ...]:
        """The blocks that neither are gone, nor lie in one that is, nor hold one."""
        gone = self.blocks.chosen(self.gone)
        return tuple(b for b in self.blocks.blocks if not any(one.holds(b) or b.holds(one) for one in gone))

    def without(self, *names: str) -> nn.Module:
        """A copy in eval mode without these and those that are gone; it shares the model's parameters."""
        twin, names = share(self.model).eval(), (*self.gone, *names)
        leave_out(twin, {b.name: b.form for b in self.blocks.chosen(names)}, self.blocks.renumbered(names))
        return twin


BlockCriterion = Callable[[Depth, Any], Sequence[float]]
"""`by(depth, batches)` -> a number for each of `depth.wanted`, less for those that matter less."""


@dataclass(frozen=True)
class BlockScores:
    """`values[i]` is the score of `blocks.blocks[i]`, less for one that matters less; NaN for one that is gone."""

    blocks: Blocks
    values: tuple[float, ...]

    def __str__(self) -> str:
        rows = sorted(zip(self.values, self.blocks.blocks), key=lambda row: (math.isnan(row[0]), row[0]))
        lines = [f"{value:>12.4g} {b.params:>14,} {b.macs:>16,}  {b.name}" for value, b in rows]
        return "\n".join([f"{'score':>12} {'params':>14} {'MACs':>16}  block", *lines])


def score_blocks(
    model: nn.Module, blocks: Blocks, batches: Any, by: BlockCriterion | None = None, *, gone: Sequence[str] = ()
) -> BlockScores:
    """Score every block; lowest means that the model misses it least.

    Args:
        model: left as found; copies that share its parameters are run, in eval mode.
        blocks: from `find_blocks`.
        batches: model inputs as `find_blocks` takes them, for `added_energy` and `turning`; (inputs, targets) for
            `damage`. They are gone through again and again.
        by: `added_energy`, which is the default, `turning`, `damage`, or a function of yours; with other options by
            `functools.partial(damage, loss=...)`.
        gone: blocks that are left out already; they, and what lies in them, get NaN.

    Raises:
        PlanError: the blocks are another model's, there is no batch, or a score is not a number.

    >>> import torch, secateur as sc
    >>> from secateur.graph.residual import find_blocks
    >>> net, x = sc.build_model("secateur:resnet20").model, torch.randn(4, 3, 32, 32)
    >>> blocks = find_blocks(net, x)
    >>> scores = score_blocks(net, blocks, [x])
    >>> len(scores.values), 0 < min(scores.values) < max(scores.values)
    (8, True)
    """
    if tensor_shapes(model) != dict(blocks.shapes):
        raise PlanError("the blocks are those of another model; find the blocks of this one.")
    depth = Depth(model, blocks, tuple(gone))
    with torch.no_grad():
        found = (by or added_energy)(depth, batches)
    values = {block.name: float(value) for block, value in zip(depth.wanted, found, strict=True)}
    odd = next((name for name, value in values.items() if not math.isfinite(value)), None)
    if odd is not None:
        raise PlanError(f"the score of {odd} is {values[odd]}; check the model's outputs on these batches.")
    return BlockScores(blocks, tuple(values.get(block.name, math.nan) for block in blocks.blocks))


def added_energy(depth: Depth, batches: Iterable[Nested]) -> list[float]:
    """E||y - x||^2 / E||y||^2: the share of what the block gives, y, that it has added to what goes on without it, x.

    The means are over all batches and calls; x is after the norm, where one stays. No labels.
    """
    sums = {block.name: [0.0, 0.0] for block in depth.wanted}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        sums[name][0] += float((y - x).square().sum())
        sums[name][1] += float(y.square().sum())

    _watch(depth, batches, see)
    return [added / whole if whole else 0.0 for added, whole in sums.values()]


def turning(depth: Depth, batches: Iterable[Nested], *, axis: int | None = None) -> list[float]:
    """1 - cos(x, y), the mean: block influence (Men et al. 2024, ShortGPT, equation 1). No labels.

    Args:
        axis: that of the features, the last for tokens as in the paper and 1 for channels first; None takes each
            example as one vector.
    """
    sums = {block.name: [0.0, 0.0] for block in depth.wanted}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        one, other = (x.flatten(1), y.flatten(1)) if axis is None else (x, y)
        cosines = F.cosine_similarity(one, other, dim=1 if axis is None else axis)
        sums[name][0] += float((1 - cosines).sum())
        sums[name][1] += cosines.numel()

    _watch(depth, batches, see)
    return [total / count if count else 0.0 for total, count in sums.values()]


def damage(depth: Depth, batches: Batches, *, loss: Loss = cross_entropy) -> list[float]:
    """How much the mean loss over (inputs, targets) rises without the block, each alone.

    Args:
        loss: `loss(outputs, targets)`, a number for a batch, lower is better; `wrong` counts wrong answers. Batches
            weigh as many as they have targets.
    """
    whole = _mean_loss(depth.without(), batches, loss)
    return [_mean_loss(depth.without(block.name), batches, loss) - whole for block in depth.wanted]


def wrong(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of wrong answers: a loss for `damage`, one minus the accuracy.

    >>> wrong(torch.eye(2), torch.tensor([0, 0])).item()
    0.5
    """
    return (outputs.argmax(1) != targets).double().mean()


def _mean_loss(model: nn.Module, batches: Batches, loss: Loss) -> float:
    total = count = 0.0
    for inputs, targets in batches:
        weight = len(targets) if isinstance(targets, Tensor) and targets.ndim else 1
        total += weight * float(loss(run(model, inputs), targets))
        count += weight
    if not count:
        raise PlanError("there are no batches to measure the loss on; give one or more.")
    return total / count


def _watch(depth: Depth, batches: Iterable[Nested], see: Callable[[str, Tensor, Tensor], None]) -> None:
    """Call `see(block, x, y)`, in float64, at each call of a block and for each tensor that goes on."""
    twin = depth.without()
    for block in depth.wanted:
        watcher = _Watcher(block, twin.get_submodule(block.name), see)
        twin.get_submodule(block.name).register_forward_pre_hook(watcher.enter, with_kwargs=True)
        twin.get_submodule(block.name).register_forward_hook(watcher.leave)
    empty = True
    for batch in batches:
        empty = False
        run(twin, batch)
    if empty:
        raise PlanError("there are no batches to score the blocks by; give one or more.")


class _Watcher:
    """What a block gives, and what would be given in its place."""

    def __init__(self, block: Block, module: nn.Module, see: Callable[[str, Tensor, Tensor], None]) -> None:
        self._block, self._see, self._passing = block, see, Passing(module, block.form)
        self._given: list[list[Tensor]] = []

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        goes_on = self._passing(*args, **kwargs)
        # The block may write into what it is given.
        self._given.append([x.clone() for x in _tensors(self._block.form, goes_on)])

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        for x, y in zip(self._given.pop(), _tensors(self._block.form, output), strict=True):
            self._see(self._block.name, x.double(), y.double())


def _tensors(form: Form, given: Any) -> Iterator[Tensor]:
    """What stands in `given` where the form has a `Pass`."""
    if isinstance(form, Pass):
        yield given
    elif isinstance(form, tuple | list | dict):
        for key in form if isinstance(form, dict) else range(len(form)):
            yield from _tensors(form[key], given[key])
