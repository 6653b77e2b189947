"""Simulate a plan in place: wherever units end in a sum, those that the plan cuts are zeroed first.

Zeroing the operand of the sum, and not a weight, is right for every op: it holds when two activations are multiplied
(attention), and whatever batch norm or an activation function makes of a zero on the way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.allocate.plan import Plan
from secateur.errors import ProofError
from secateur.graph.analysis import Analysis, analyse
from secateur.graph.attention import see_heads
from secateur.graph.axes import refs_in
from secateur.graph.capture import Trace, record
from secateur.graph.compare import Stays
from secateur.graph.nested import map_tensors
from secateur.graph.rebuild import share
from secateur.graph.twin import run
from secateur.graph.units import Split
from secateur.surgery.cut import check_fits
from secateur.surgery.widened import widest


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
    check_fits(model, plan)
    simulation = simulate(model, plan, analyse_run(model, example_inputs, plan.groups.split))
    classes = [(module, type(module)) for module in model.modules()]
    modes = [(module, module.training) for module in model.modules()]
    see_heads(model.eval())
    try:
        yield lambda inputs: run_masked(model, inputs, simulation)
    finally:
        for module, training in modes:
            module.training = training
        for module, kind in classes:
            module.__class__ = kind


@dataclass(frozen=True)
class Simulation:
    """The trace of a run on real tensors, and what its operands are multiplied with, by (call, operand)."""

    trace: Trace
    zeroed: Mapping[tuple[int, int], Tensor]


def analyse_run(model: nn.Module, inputs: Any, split: Split = "outer") -> Analysis:
    """The analysis of a run on real tensors: on fake ones, whose strides may differ, an op can take another path."""
    twin = see_heads(share(model).eval())
    return analyse(record(twin, map_tensors(torch.clone, inputs), fake=False), model, split=split)


def simulate(model: nn.Module, plan: Plan, analysis: Analysis) -> Simulation:
    """How to run the uncut model as the plan's cut, on inputs like those of the run that was analysed."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Simulation(analysis.trace, _zeroes(analysis, stays_of(plan, analysis), device))


def stays_of(plan: Plan, analysis: Analysis) -> Stays:
    """Which units of another analysis of the model stay; they are found again by their places in the tensors."""
    return plan.groups.stays_in(analysis.groups, plan.keep)


def _zeroes(analysis: Analysis, stays: Stays, device: torch.device) -> dict[tuple[int, int], Tensor]:
    """For each operand in which units end, where they stay."""
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


def run_masked(model: nn.Module, inputs: Any, simulation: Simulation) -> Any:
    """One forward pass with the operands zeroed; ProofError if the ops are not those of the simulation's trace."""
    with Zeroing(simulation):
        return run(model, inputs)


class Zeroing(TorchDispatchMode):
    def __init__(self, simulation: Simulation) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace, self._zeroed, self._index = simulation.trace, simulation.zeroed, 0

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
            if factor is None:
                return tensor
            # `masked_fill` would give other strides, on which the path of what follows may depend.
            with torch._C._DisableTorchDispatch():  # no op of the model's: nobody else is to see it
                return widest(tensor).clone(memory_format=torch.preserve_format).masked_fill_(~factor, 0)

        args, kwargs = map_tensors(change, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)
