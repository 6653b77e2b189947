"""`certify`: the numeric evidence that a cut model computes what the plan promises, in float64, on real inputs.

1. *permutation*: the units of all groups are shuffled, each group in all its slots alike; the output must not move. It
   proves that the slots are right and complete, through norms and attention too. Constant tensors (fresh batch norm,
   layer scale 1e-6, zero heads) would make this vacuous, so it is done on a copy with those randomised.
2. *control*: the same with one slot left out; this must be noticed, or the first check proves nothing.
3. *masked equals cut*: the uncut model with the plan's units zeroed, against the cut model's own weights.
4. *shapes*: every op of the cut model makes the shapes that were predicted from the plan, and the parameters count up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.allocate.plan import Plan
from secateur.errors import CaptureError
from secateur.graph.analysis import Analysis
from secateur.graph.attention import see_heads
from secateur.graph.capture import capture, duplicate, map_tensors, run, steps, tensors_in
from secateur.graph.probe import first_odd_output, survivors
from secateur.graph.rebuild import rebuild
from secateur.graph.records import Group, Groups, Slot
from secateur.score.scoring import tensors_of
from secateur.surgery.cut import apply
from secateur.surgery.simulate import analysis_of, run_masked, simulate

TOLERANCE = 1e-9
"""Largest error accepted, as a share of the largest output: float64 rounding over a deep network stays well below."""

MAKERS = frozenset((torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn))
LOW = frozenset((torch.float32, torch.float16, torch.bfloat16))
CONTROLS = 4
"""About how many slots to leave out, one at a time, until one is noticed."""


@dataclass(frozen=True)
class Certificate:
    """What was checked, on which plan, and how far off it was; errors are shares of the largest output."""

    plan: str
    permutation_error: float
    control_error: float
    masked_error: float
    masked_effect: float
    shapes: str
    params: int
    params_predicted: int
    prunable_share: float
    inexact: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(passed for _, _, passed in self.rows())

    def rows(self) -> tuple[tuple[str, str, bool], ...]:
        """(check, value, passed)."""
        control = stands_clear(self.control_error, self.permutation_error) or self.prunable_share == 0
        return (
            ("shuffling all units leaves the output", _off(self.permutation_error), self.permutation_error < TOLERANCE),
            ("a shuffle with one slot left out is noticed", _off(self.control_error), control),
            (
                f"cut model equals masked model (the cut moves the output by {self.masked_effect:.2g})",
                _off(self.masked_error),
                self.masked_error < TOLERANCE,
            ),
            ("every op has the predicted shape", self.shapes or "all", not self.shapes),
            (
                "parameters as predicted",
                f"{self.params:,} of {self.params_predicted:,}",
                self.params == self.params_predicted,
            ),
        )

    @property
    def sentence(self) -> str:
        """The outcome in one sentence."""
        failed = [f"{check} ({value})" for check, value, passed in self.rows() if not passed]
        if failed:
            return (
                f"the cut model is not what the plan promises: failed {'; '.join(failed)}. Nothing was kept of it. "
                "Please report the model; until then, keep its layers out of the plan."
            )
        share = f"{100 * self.prunable_share:.1f} % of the parameters could be cut"
        inexact = f"; {len(self.inexact)} groups lie under a norm and are inexact" if self.inexact else ""
        return f"certified: cut equals masked to {self.masked_error:.1e} in float64; {share}{inexact}."

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.__dict__, "inexact": list(self.inexact)}


class _Double(TorchFunctionMode):
    """A model that makes or casts to less than float64 inside gets float64 there as well."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        if func in MAKERS:
            kwargs = {"dtype": torch.float64, **(kwargs or {})}
        args = tuple(_doubled(arg) for arg in args)
        kwargs = {name: _doubled(arg) for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _doubled(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in LOW else argument


def stands_clear(control: float, permutation: float) -> bool:
    """Whether an error is more than the rounding of the shuffle that changes nothing."""
    return control > 1e3 * max(permutation, 1e-15)


def _off(error: float) -> str:
    return f"off by {error:.1e}"


def certify(model: nn.Module, smaller: nn.Module, plan: Plan, example_inputs: Any, *, seed: int = 0) -> Certificate:
    """Check a cut model against the model it was cut from.

    Args:
        model, smaller: before and after `apply`, with the weights they had then; untouched.
        plan: the plan applied.
        example_inputs: real inputs; noise where values do not steer the model does as well.
        seed: for the shuffle.

    Raises:
        PlanError: the plan is not for `model`. CaptureError: `smaller` does not run.

    >>> import secateur as sc
    >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    >>> plan = sc.Plan(sc.find_groups(net, x), keep=((0, 3, 5),))
    >>> certify(net, sc.apply(net, plan), plan, x).ok
    True
    """
    with _Double():
        return _certificate(model, duplicate(smaller).double(), plan, map_tensors(as_double, example_inputs), seed)


def _certificate(model: nn.Module, smaller: nn.Module, plan: Plan, inputs: Any, seed: int) -> Certificate:
    twin = duplicate(model).double().eval()
    plain = _outputs(twin, inputs)
    see_heads(twin)  # as the analysis saw it; that it computes the same is part of "equals masked"
    analysis = analysis_of(twin, plan, inputs)
    shaken = _shake(twin, seed)
    before = _outputs(shaken, inputs)
    groups = analysis.groups
    masked_error, effect = _masked_against_cut(twin, smaller, plan, inputs)
    permutation_error = _distance(before, _outputs(_shuffled(shaken, groups, seed), inputs))
    large = [group for group in groups.groups if group.size > 1]
    return Certificate(
        plan=plan.hash,
        permutation_error=permutation_error,
        control_error=_control(shaken, groups, seed, inputs, before, permutation_error),
        masked_error=max(masked_error, _distance(plain, _outputs(twin, inputs))),
        masked_effect=effect,
        shapes=_first_odd_shape(smaller, plan, analysis, inputs),
        params=sum(p.numel() for p in smaller.parameters()),
        params_predicted=plan.params_left,
        prunable_share=groups.prunable_params / groups.params if large and groups.params else 0.0,
        inexact=tuple(group.name for group in groups.groups if group.inexact),
    )


def as_double(tensor: Tensor) -> Tensor:
    """Floating tensors in float64, others as they are."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.to(torch.complex128).resolve_conj())
    return tensor.double() if tensor.is_floating_point() else tensor


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The outputs of a copy, so that what a model caches or counts in one run is not there in the next."""
    return _run(lambda: run(duplicate(model), map_tensors(torch.clone, inputs)))


def _run(function: Callable[[], Any]) -> list[Tensor]:
    """The tensors that a run gives, with the same random numbers in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [as_double(tensor) for tensor in tensors_in(function())]


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest difference over all outputs, as a share of the largest value of that output; inf if shapes differ."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    shares = [_share(x, y) for x, y in zip(a, b) if x.is_floating_point() and x.numel()]
    return max(shares, default=0.0)


def _share(x: Tensor, y: Tensor) -> float:
    scale = float(x.abs().nan_to_num(posinf=0.0).max()) or 1.0
    off = float((x - y).abs().masked_fill(x == y, 0.0).max()) / scale  # infinity less infinity is not a number
    return off if np.isfinite(off) else float("inf")


def _shake(model: nn.Module, seed: int) -> nn.Module:
    """A copy in which tensors that are constant or nearly zero have random values, so that no check is vacuous."""
    random = torch.Generator().manual_seed(seed)
    new = {}
    for name, tensor in tensors_of(model).items():
        flat = tensor.detach().flatten()
        if tensor.is_floating_point() and flat.numel() and (flat.max() == flat.min() or flat.abs().max() < 1e-3):
            noise = torch.rand(tensor.shape, generator=random, dtype=torch.float64).to(tensor.device)
            new[name] = (tensor.detach() if flat.abs().max() >= 1e-3 else 0.5) + noise
    return rebuild(model, new)


def _control(
    shaken: nn.Module, groups: Groups, seed: int, inputs: Any, before: Sequence[Tensor], permutation: float
) -> float:
    """The error of a shuffle with one slot left out: the first that matters, as some only feed what is not used."""
    slots = [slot for group in groups.groups if group.size > 1 for slot in group.slots]
    reads = [slot for slot in slots if slot.role == "read"] or slots
    error = 0.0
    for left_out in reads[:: max(1, len(reads) // CONTROLS)]:
        error = max(error, _distance(before, _outputs(_shuffled(shaken, groups, seed, left_out), inputs)))
        if stands_clear(error, permutation):
            break
    return error


def _shuffled(model: nn.Module, groups: Groups, seed: int, left_out: Slot | None = None) -> nn.Module:
    """A copy with the units of every group in another order; the slot `left_out` keeps the old order."""
    random = np.random.default_rng(seed)
    tensors = {name: tensor.detach() for name, tensor in tensors_of(model).items()}
    new: dict[str, Tensor] = {}
    for group in groups.groups:
        order = np.roll(np.arange(group.size), 1) if group.size < 3 else random.permutation(group.size)
        for slot in group.slots:
            if slot is left_out:
                continue
            tensor = new.get(slot.tensor, tensors[slot.tensor])
            new[slot.tensor] = tensor.index_select(slot.dim, _moved(group, slot.index, order, tensor, slot.dim))
    return rebuild(model, new)


def _moved(group: Group, index: Any, order: Any, tensor: Tensor, dim: int) -> Tensor:
    places = np.asarray(index)
    moved = np.arange(tensor.shape[dim])
    moved[places.ravel()] = places[order].ravel()
    return torch.from_numpy(moved).to(tensor.device)


def _masked_against_cut(
    twin: nn.Module, smaller: nn.Module, plan: Plan, inputs: Any
) -> tuple[float, float]:
    """(error, effect): cut against masked, and masked against uncut so that an empty plan shows.

    Groups under a norm are left whole for this check, on both sides; `smaller` is then compared with the plan's cut.
    """
    whole = [tuple(range(group.size)) for group in plan.groups.groups]
    exact = Plan(plan.groups, tuple(w if g.inexact else k for g, k, w in zip(plan.groups.groups, plan.keep, whole)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        simulation = simulate(twin, exact, inputs)
    masked = _run(lambda: run_masked(duplicate(twin), map_tensors(torch.clone, inputs), simulation))
    given = _outputs(duplicate(smaller).eval(), inputs)
    effect = _distance(_outputs(twin, inputs), masked)
    if exact.keep == plan.keep:
        return _distance(masked, given), effect
    whole_error = _distance(masked, _outputs(apply(twin, exact), inputs))
    return max(whole_error, _distance(_outputs(apply(twin, plan), inputs), given)), effect


def _first_odd_shape(smaller: nn.Module, plan: Plan, analysis: Analysis, example_inputs: Any) -> str:
    """The first op of the cut model whose output has another shape than predicted; empty if none."""
    try:
        trace = capture(smaller, example_inputs)
    except CaptureError as error:
        return str(error)
    stays = survivors(plan.groups, plan.keep)
    wanted, made = steps(analysis.trace.calls), steps(trace.calls)
    if [name for name, _ in wanted] != [name for name, _ in made]:
        return f"other ops than before the cut ({len(made)} instead of {len(wanted)})"
    odd = (first_odd_output(a, b, analysis, trace.values, stays) for (_, a), (_, b) in zip(wanted, made))
    return next((text for text in odd if text), "")
