"""Simulate a plan in place: wherever units end in a sum, those that the plan cuts are zeroed first.

Zeroing the operand of the sum, and not a weight, is right for every op: it holds when two activations are multiplied
(attention), and whatever batch norm or an activation function makes of a zero on the way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.allocate.plan import Plan
from secateur.errors import PlanError, ProofError
from secateur.graph.analysis import Analysis
from secateur.graph.attention import see_heads
from secateur.graph.axes import refs_in
from secateur.graph.capture import Trace, capture, map_tensors, run
from secateur.graph.probe import settle, survivors
from secateur.surgery.cut import check_fits

Zeroed = Mapping[tuple[int, int], Tensor]
"""(call, operand) -> what that operand is multiplied with: ones, and zeros where a unit is cut."""


@contextlib.contextmanager
def mask(model: nn.Module, plan: Plan, example_inputs: Any) -> Iterator[Callable[[Any], Any]]:
    """A function that computes what the cut model will, on the uncut model, while the context lasts.

    Args:
        model: run in eval mode meanwhile; left as found.
        plan: for this model.
        example_inputs: as for `find_groups`; the function takes inputs of the same shapes, given the same way.

    Raises:
        PlanError: the plan is not for this model. ProofError: on these inputs the model runs other ops.

    >>> import secateur as sc
    >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(3, 4)
    >>> plan = sc.Plan(sc.find_groups(net, x), keep=((0, 3, 5),))
    >>> with mask(net, plan, x) as masked:
    ...     bool(torch.allclose(masked(x), sc.apply(net, plan)(x), atol=1e-6))
    True
    """
    analysis = analysis_of(model, plan, example_inputs)
    classes = [(module, type(module)) for module in model.modules()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    zeroed = zeroes(analysis, plan, device)
    modes = [(module, module.training) for module in model.modules()]
    see_heads(model.eval())
    try:
        yield lambda inputs: run_masked(model, inputs, analysis.trace, zeroed)
    finally:
        for module, training in modes:
            module.training = training
        for module, kind in classes:
            module.__class__ = kind


def analysis_of(model: nn.Module, plan: Plan, example_inputs: Any) -> Analysis:
    """The analysis whose groups the plan is about; PlanError if this model on these inputs has others."""
    check_fits(model, plan)
    analysis = settle(model, example_inputs, capture(model, example_inputs))
    if analysis.groups.groups != plan.groups.groups:
        raise PlanError(
            "the plan's groups are not those that the model has on these inputs. "
            "Give the example inputs that the groups were found with, or find them anew."
        )
    return analysis


def zeroes(analysis: Analysis, plan: Plan, device: torch.device | str) -> Zeroed:
    """The masks of a plan, for each operand in which units end."""
    stays = survivors(plan.groups, plan.keep)
    out: dict[tuple[int, int], Tensor] = {}
    for contraction, block in analysis.contractions:
        left = stays[block.units]
        if left.all():
            continue
        operand = list(_refs(analysis.trace, contraction.call))[contraction.operand]
        rank = len(analysis.trace.values[operand].shape)
        shape = [1] * rank
        for axis, dim in enumerate(block.dims):
            shape[dim] = left.shape[axis]
        key = (contraction.call, contraction.operand)
        factor = torch.from_numpy(left).to(device).reshape(shape)
        out[key] = out[key] & factor if key in out else factor
    return out


def _refs(trace: Trace, call: int) -> Iterator[int]:
    return (ref.id for ref in refs_in((trace.calls[call].args, trace.calls[call].kwargs)))


def run_masked(model: nn.Module, inputs: Any, trace: Trace, zeroed: Zeroed) -> Any:
    """One forward pass with the operands in `zeroed` multiplied; ProofError if the ops are not those of `trace`."""
    with _Zeroing(trace, zeroed):
        return run(model, inputs)


class _Zeroing(TorchDispatchMode):
    def __init__(self, trace: Trace, zeroed: Zeroed) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace, self._zeroed, self._index = trace, zeroed, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        index, self._index = self._index, self._index + 1
        expected = self._trace.calls[index] if index < len(self._trace.calls) else None
        if expected is None or expected.op is not func:
            raise ProofError(
                f"the model ran {func} as op number {index} where it ran {expected.op if expected else 'no more'} "
                "before: its path depends on the values, so a plan cannot be simulated on these inputs."
            )
        position = -1

        def change(tensor: Tensor) -> Tensor:
            nonlocal position
            position += 1
            factor = self._zeroed.get((index, position))
            return tensor if factor is None else tensor.masked_fill(~factor, 0)

        args, kwargs = map_tensors(change, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)
