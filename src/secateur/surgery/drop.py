"""`drop_blocks`: a copy of a model without some of its residual blocks; and the proof that it is what was promised."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.allocate.depth import Drop
from secateur.errors import PlanError, ProofError
from secateur.graph.attention import see_heads
from secateur.graph.blocks import Blocks
from secateur.graph.capture import Trace
from secateur.graph.nested import map_tensors, tensors_in
from secateur.graph.passing import leave_out
from secateur.graph.rebuild import rebuild, share, tensor_shapes
from secateur.graph.residual import Found, find_in
from secateur.graph.runs import watch_twin
from secateur.surgery.certify import CONTROLS, TOLERANCE, stands_clear
from secateur.surgery.double import Double, as_double, distance, outputs
from secateur.surgery.shuffle import shaken
from secateur.surgery.widened import in_double


def drop_blocks(model: nn.Module, blocks: Blocks, names: Sequence[str]) -> nn.Module:
    """A copy of `model` in which these blocks are replaced by what passes the stream on (`graph.passing.Passing`).

    Their parameters are gone, all others keep their names. What the replacement is given besides is ignored, and it
    gives tuples, lists and dicts as the block did. The copy can be cut, and lose blocks again.

    Args:
        model: the model that the blocks were found on; untouched. Hooks, tied weights, modes and dtypes come along.
        blocks: from `find_blocks`.
        names: of blocks, none of which lies in another.

    Raises:
        UnknownName: there is no such block. PlanError: one cannot be left out, or lies in another; or the blocks are
            another model's.

    >>> import secateur as sc
    >>> from secateur.graph.residual import find_blocks
    >>> net, x = sc.build_model("secateur:resnet20").model, torch.randn(1, 3, 32, 32)
    >>> smaller = drop_blocks(net, find_blocks(net, x), ["layer1.1", "layer3.2"])
    >>> smaller.layer1[1], sum(p.numel() for p in smaller.parameters())
    (Passing(x), 191066)
    """
    drop = Drop(blocks, tuple(names))
    _check_fits(model, blocks)
    twin = share(model)
    leave_out(twin, drop.forms, drop.renumbered)
    return rebuild(twin, {})


@dataclass(frozen=True)
class DropCertificate:
    """What was checked of a model without blocks, and how far off it was; errors are shares of the largest output.

    `error` is between the model with what the blocks add taken as 0 and the model without them, `effect` between the
    former and the whole model. `shaken_error` is the error on weights that are shaken, and `control` what would be
    found there if the branches were left in: the least over some blocks, each dropped alone. `assumed` are activations
    that went because the trace shows that they change nothing, `odd` blocks that the real run shows otherwise.
    """

    names: tuple[str, ...]
    error: float
    effect: float
    shaken_error: float
    control: float
    params: int
    params_predicted: int
    assumed: tuple[str, ...]
    odd: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(passed for _, _, passed in self.rows())

    def rows(self) -> tuple[tuple[str, str, bool], ...]:
        """(check, value, passed)."""
        worst = max(self.error, self.shaken_error)
        noticed = not self.names or stands_clear(self.control, self.shaken_error)
        return (
            (
                f"equals the model with branches at 0 (dropping moves the output by {self.effect:.2g})",
                f"off by {worst:.1e}",
                worst < TOLERANCE,
            ),
            ("branches that are left in are noticed", f"off by {self.control:.1e}", noticed),
            ("the run shows the same blocks", ", ".join(self.odd) or "all", not self.odd),
            ("parameters as predicted", f"{self.params:,} of {self.params_predicted:,}",
             self.params == self.params_predicted),
        )  # fmt: skip

    @property
    def sentence(self) -> str:
        """The outcome in one sentence."""
        failed = [f"{check} ({value})" for check, value, passed in self.rows() if not passed]
        if failed:
            return f"the model without the blocks is not what was promised: failed {'; '.join(failed)}."
        return (
            f"certified: without {len(self.names)} blocks it equals the model with their branches at 0 to "
            f"{max(self.error, self.shaken_error):.1e} in float64."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.__dict__, "names": list(self.names), "assumed": list(self.assumed), "odd": list(self.odd)}


def certify_drop(
    model: nn.Module, smaller: nn.Module, drop: Drop, example_inputs: Any, *, seed: int = 0
) -> DropCertificate:
    """Check a model without blocks against the model it was made from, in float64.

    The model is run on real tensors, and at each addition on the way through a dropped block the branch is set to zero.

    Args:
        model, smaller: before and after `drop_blocks`, with the weights they had then; untouched.
        drop: the blocks that were left out.
        example_inputs: real inputs.
        seed: for weights that are drawn anew where they are constant, as in a fresh batch norm.

    Raises:
        PlanError: the blocks are another model's. CaptureError: the model does not run. ProofError: it runs other ops
            each time.

    >>> import secateur as sc
    >>> from secateur.graph.residual import find_blocks
    >>> net, x = sc.build_model("secateur:resnet20").model, torch.randn(2, 3, 32, 32)
    >>> drop = Drop(find_blocks(net, x), ("layer1.1", "layer3.2"))
    >>> certify_drop(net, drop_blocks(net, drop.blocks, drop.names), drop, x).ok
    True
    """
    _check_fits(model, drop.blocks)
    with Double():
        inputs = map_tensors(as_double, example_inputs)

        def look(twin: nn.Module) -> tuple[Found, Trace]:
            run = watch_twin(share(see_heads(twin)), map_tensors(torch.clone, inputs), fake=False)
            return find_in(run, twin), run.trace

        double, twin, found = in_double(model, look)
        forms = {block.name: block.form for block in found.blocks.blocks}
        odd = tuple(name for name, form in drop.forms.items() if forms.get(name) != form)
        if odd:  # there is nothing to compare with
            error, effect, moved, control = float("inf"), 0.0, float("inf"), 0.0
        else:
            simulated = _without_branches(twin, inputs, found, drop.names)
            error = distance(simulated, outputs(double(smaller), inputs))
            effect = distance(outputs(twin, inputs), simulated)
            moved, control = _control(shaken(twin, seed), inputs, found, drop)
    return DropCertificate(
        names=drop.names,
        error=error,
        effect=effect,
        shaken_error=moved,
        control=control,
        params=sum(p.numel() for p in smaller.parameters()),
        params_predicted=drop.params_left,
        assumed=drop.assumed,
        odd=odd,
    )


def _control(twin: nn.Module, inputs: Any, found: Found, drop: Drop) -> tuple[float, float]:
    """The error with all branches at zero, and the least of one block alone that is compared with the whole model."""
    given = outputs(drop_blocks(twin, drop.blocks, drop.names), inputs)
    error, whole = distance(_without_branches(twin, inputs, found, drop.names), given), outputs(twin, inputs)
    some = drop.names[:: max(1, len(drop.names) // CONTROLS)]
    moved = (distance(whole, outputs(drop_blocks(twin, drop.blocks, [name]), inputs)) for name in some)
    return error, min(moved, default=0.0)


def _without_branches(twin: nn.Module, inputs: Any, found: Found, names: Collection[str]) -> list[Tensor]:
    branches = frozenset(pair for name in names for pair in found.branches[name])
    return outputs(twin, inputs, within=lambda _: Branchless(found.watched.trace, branches))


class Branchless(TorchDispatchMode):
    """Runs the model of a trace with operands of additions, as (call, operand), set to zero."""

    def __init__(self, trace: Trace, branches: Collection[tuple[int, int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace, self._branches, self._index = trace, dict(branches), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        index, self._index = self._index, self._index + 1
        expected = self._trace.calls[index].op if index < len(self._trace.calls) else None
        if expected is None or expected is not func:
            raise ProofError(
                f"the model ran {func} as op number {index} where it ran {expected or 'no more'} before: its path "
                "depends on the values, so what it computes without blocks cannot be simulated on these inputs."
            )
        if index in self._branches:
            branch = list(tensors_in((args, kwargs)))[self._branches[index]]
            with torch._C._DisableTorchDispatch():  # no op of the model's: nobody else is to see it
                if expected._schema.is_mutable and branch is args[0]:
                    branch.zero_()  # it is overwritten anyway
                else:
                    zero = torch.zeros_like(branch)
                    args = tuple(zero if item is branch else item for item in args)
        return expected(*args, **(kwargs or {}))


def _check_fits(model: nn.Module, blocks: Blocks) -> None:
    have, want = tensor_shapes(model), blocks.shapes
    if have != dict(want):
        odd = next(name for name in [*want, *have] if have.get(name) != want.get(name))
        raise PlanError(
            f"the blocks are those of another model: {odd} is {have.get(odd, 'missing')} here and "
            f"{want.get(odd, 'missing')} there. Find the blocks of this model."
        )
