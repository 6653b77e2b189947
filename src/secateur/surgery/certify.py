"""`certify`: the numeric evidence that a cut model computes what the plan promises, in float64, on real inputs.

1. *permutation*: the units of all groups are shuffled, each group in all its slots alike; the output must not move. It
   proves that the slots are right and complete, through norms and attention too. Constant tensors (fresh batch norm,
   layer scale 1e-6, zero heads) would make this vacuous, so it is done on a copy with those randomised. Some models
   double a difference in every block: where the last bit of the inputs moves the output further, that is allowed for.
2. *control*: the same with one slot left out; this must be noticed, or the first check proves nothing.
3. *masked equals cut*: the uncut model with the plan's units zeroed, against the cut model's own weights.
4. *shapes*: every op of the cut model makes the shapes that were predicted from the plan, and the parameters count up.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocate.plan import Plan
from secateur.graph.analysis import Analysis, analyse
from secateur.graph.attention import headwise, see_heads
from secateur.graph.capture import Call, Recorder, Trace, Value, capture, recording, steps
from secateur.graph.compare import first_odd
from secateur.graph.nested import map_tensors
from secateur.graph.records import Groups
from secateur.graph.replay import PythonCalls
from secateur.surgery.cut import apply, check_fits
from secateur.surgery.double import Double, as_double, distance, outputs
from secateur.surgery.ends import Ends, GroupErrors, group_errors
from secateur.surgery.shuffle import Shuffle, shaken
from secateur.surgery.simulate import Zeroing, analyse_run, simulate, stays_of
from secateur.surgery.widened import in_double

TOLERANCE = 1e-9
"""Largest error accepted, as a share of the largest output: float64 rounding over a deep network stays well below."""

ROUNDING = 100
"""How much further than the last bit of the inputs another order of sums, which rounds in every layer, may move it."""

MOST = 1e-5
"""Largest error accepted of a model that blows up rounding."""

CONTROLS = 4
"""About how many slots to leave out, one at a time, until one is noticed."""


@dataclass(frozen=True)
class Certificate:
    """What was checked, on which plan, and how far off it was; errors are shares of the largest output.

    `guilty` are the groups whose shuffle alone moved the output, if any; `inexact` those under a norm. `errors` says
    for each group how far apart, where its units end in a sum, the cut model and the masked one are. A rounding is how
    far the last bit of the inputs moves the output, of the shaken or the masked model, measured if 1e-9 is exceeded.
    """

    plan: str
    permutation_error: float
    permutation_rounding: float
    control_error: float
    guilty: tuple[str, ...]
    masked_error: float
    masked_rounding: float
    masked_effect: float
    errors: GroupErrors
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
        first = [f", first at {name}" for name, off in self.errors if off > TOLERANCE][:1]
        return (
            (
                "shuffling all units leaves the output",
                _off(self.permutation_error, self.permutation_rounding)
                + (f" by {', '.join(self.guilty[:3])}" if self.guilty else ""),
                self.permutation_error < _allowed(self.permutation_rounding),
            ),
            ("a shuffle with one slot left out is noticed", _off(self.control_error), control),
            (
                f"cut model equals masked model (the cut moves the output by {self.masked_effect:.2g})",
                _off(self.masked_error, self.masked_rounding) + "".join(first),
                self.masked_error < TOLERANCE
                or (
                    self.masked_error < _allowed(self.masked_rounding)
                    and stands_clear(self.masked_effect, self.masked_error)
                ),
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
        errors = [list(row) for row in self.errors]
        return {**self.__dict__, "guilty": list(self.guilty), "errors": errors, "inexact": list(self.inexact)}


def stands_clear(control: float, permutation: float) -> bool:
    """Whether an error is more than the rounding of the shuffle that changes nothing."""
    return control > 1e3 * max(permutation, 1e-15)


def _allowed(rounding: float) -> float:
    return min(max(TOLERANCE, ROUNDING * rounding), MOST)


def _off(error: float, rounding: float = 0.0) -> str:
    return f"off by {error:.1e}" + (f" where the last bit of the inputs makes {rounding:.1e}" if rounding else "")


def certify(model: nn.Module, smaller: nn.Module, plan: Plan, example_inputs: Any, *, seed: int = 0) -> Certificate:
    """Check a cut model against the model it was cut from.

    Args:
        model, smaller: before and after `apply`, with the weights they had then; untouched.
        plan: the plan applied.
        example_inputs: real inputs; noise where values do not steer the model does as well.
        seed: for the shuffle.

    Raises:
        PlanError: the plan is not for `model`. CaptureError: `smaller` does not run.

    >>> import torch, secateur as sc
    >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    >>> plan = sc.Plan(sc.find_groups(net, x), keep=((0, 3, 5),))
    >>> certify(net, sc.apply(net, plan), plan, x).ok
    True
    """
    check_fits(model, plan)
    with Double():
        inputs = map_tensors(as_double, example_inputs)

        def look(twin: nn.Module) -> tuple[Analysis, Trace]:
            seen = analyse_run(twin, inputs, plan.groups.split)
            return seen, seen.trace

        double, twin, analysis = in_double(model, look)
        plain = outputs(twin, inputs) if any(headwise(module) for module in twin.modules()) else None
        see_heads(twin)  # as the analysis saw it; that it computes the same is part of "equals masked"
        whole = _Whole(twin, inputs, analysis, outputs(twin, inputs, analysis.decisions))
        cut = _cut_against_masked(whole, double(smaller), plan)
        seen = 0.0 if plain is None else distance(plain, whole.outputs[: len(plain)])
        moved = _shuffles(shaken(twin, seed), plan.groups, inputs, seed, bool(analysis.decisions))
    large = any(group.size > 1 for group in plan.groups.groups)
    return Certificate(
        plan=plan.hash,
        permutation_error=moved.error,
        permutation_rounding=moved.rounding,
        control_error=moved.control,
        guilty=moved.guilty,
        masked_error=max(cut.error, seen),
        masked_rounding=cut.rounding,
        masked_effect=cut.effect,
        errors=cut.errors,
        shapes=cut.shapes,
        params=sum(p.numel() for p in smaller.parameters()),
        params_predicted=plan.params_left,
        prunable_share=plan.groups.prunable_params / plan.groups.params if large and plan.groups.params else 0.0,
        inexact=tuple(group.name for group in plan.groups.groups if group.inexact),
    )


@dataclass(frozen=True)
class _Cut:
    """Cut against masked (`error`, and `errors` by group), masked against uncut (`effect`), and the first odd shape."""

    error: float
    rounding: float
    effect: float
    errors: GroupErrors
    shapes: str


@dataclass(frozen=True)
class _Whole:
    """The uncut model, to run in float64 on these inputs, and what it gave."""

    model: nn.Module
    inputs: Any
    analysis: Analysis
    outputs: Sequence[Tensor]


def _cut_against_masked(whole: _Whole, smaller: nn.Module, plan: Plan) -> _Cut:
    """The third and the fourth check.

    Groups under a norm are left whole for the third, on both sides; `smaller` is then compared with the plan's cut.
    """
    every = [tuple(range(group.size)) for group in plan.groups.groups]
    exact = Plan(plan.groups, tuple(e if g.inexact else k for g, k, e in zip(plan.groups.groups, plan.keep, every)))
    inputs, analysis, follow = whole.inputs, whole.analysis, whole.analysis.decisions
    simulation, ends = simulate(whole.model, exact, analysis), [Ends(analysis) for _ in range(3)]

    def masked_on(inputs: Any, ends: Ends) -> list[Tensor]:
        return outputs(whole.model, inputs, follow, lambda _: _both(ends, Zeroing(simulation)))

    masked = masked_on(inputs, ends[0])
    effect = distance(whole.outputs, masked)
    given, shapes = _shapes(whole, smaller, plan, ends[1])
    error, seen = distance(masked, given), ends[1]
    if exact.keep != plan.keep:
        try:
            seen = ends[2]
            error = distance(masked, outputs(apply(whole.model, exact), inputs, follow, lambda _: seen))
            error = max(error, distance(outputs(apply(whole.model, plan), inputs, follow), given))
        except Exception as failure:  # of the user's forward: it may raise whatever it likes
            error, shapes = float("inf"), shapes or _stopped(failure)
    rounding = _rounding(error, masked, inputs, lambda rounded: masked_on(rounded, Ends(analysis)))
    return _Cut(error, rounding, effect, group_errors(analysis, stays_of(exact, analysis), ends[0], seen), shapes)


@contextlib.contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


def _stopped(failure: Exception) -> str:
    first = str(failure).partition("\n")[0]
    return f"the cut model does not run: {first or type(failure).__name__}"


def _shapes(whole: _Whole, smaller: nn.Module, plan: Plan, ends: Ends) -> tuple[list[Tensor], str]:
    """What the cut model gives in float64, and its first op whose shape is not as predicted; empty if none."""
    recorder, inputs, analysis = Recorder(PythonCalls()), whole.inputs, whole.analysis
    try:
        given = outputs(smaller, inputs, analysis.decisions, lambda copy: _both(ends, recording(copy, recorder)))
    except Exception as failure:
        return [], _stopped(failure)
    odd = _first_odd(recorder.calls, recorder.values, plan, analysis)
    if odd:  # strides, which a cut changes and fake tensors may not have, can lead to other ops
        trace, before = capture(smaller, inputs), capture(whole.model, inputs)
        odd = _first_odd(trace.calls, trace.values, plan, analyse(before, whole.model, split=plan.groups.split))
    return given, odd


def _first_odd(calls: Sequence[Call], values: Sequence[Value], plan: Plan, analysis: Analysis) -> str:
    odd = first_odd(steps(analysis.trace.calls), steps(calls), analysis, values, stays_of(plan, analysis))
    return odd[1] if odd else ""


@dataclass(frozen=True)
class _Shuffles:
    """The error of the shuffle, that of one with a slot left out, and the groups that are to blame for the first."""

    error: float
    rounding: float
    control: float
    guilty: tuple[str, ...]


def _shuffles(model: nn.Module, groups: Groups, inputs: Any, seed: int, decides: bool) -> _Shuffles:
    """The first check and the second, on the shaken model; with its own decisions if there are any to follow."""
    follow = analyse_run(model, inputs).decisions if decides else {}
    before = outputs(model, inputs, follow)

    def moved() -> float:
        return distance(before, outputs(model, inputs, follow))

    def moves(only: Sequence[int]) -> float:
        with Shuffle(model, groups, seed, only):
            return moved()

    slots = [slot for group in groups.groups if group.size > 1 for slot in group.slots]
    reads = [slot for slot in slots if slot.role == "read"] or slots
    control = 0.0
    with Shuffle(model, groups, seed) as shuffle:
        error = moved()
        for left_out in reads[:: max(1, len(reads) // CONTROLS)]:  # some slots only feed what is not used
            with shuffle.without(left_out):
                control = max(control, moved())
            if stands_clear(control, error):
                break
    rounding = _rounding(error, before, inputs, lambda rounded: outputs(model, rounded, follow))
    guilty: tuple[int, ...] = ()
    if error >= _allowed(rounding):
        guilty = _guilty(range(len(groups.groups)), moves, _allowed(rounding))
    return _Shuffles(error, rounding, control, tuple(groups.groups[number].name for number in guilty))


def _rounding(error: float, given: Sequence[Tensor], inputs: Any, run: Callable[[Any], Sequence[Tensor]]) -> float:
    """How far the last bit of the inputs moves what is given, if that can be and the error makes it worth asking."""
    if error < TOLERANCE:
        return 0.0
    try:
        moved = distance(given, run(map_tensors(_rounded, inputs)))
    except Exception:  # of the user's forward: inputs just above 1 may not be allowed
        return 0.0
    return moved if math.isfinite(moved) else 0.0


def _rounded(tensor: Tensor) -> Tensor:
    """Floating values, each with another last bit."""
    return torch.nextafter(tensor, torch.full_like(tensor, torch.inf)) if tensor.is_floating_point() else tensor


def _guilty(suspects: Sequence[int], moves: Callable[[Sequence[int]], float], allowed: float) -> tuple[int, ...]:
    """The groups that move the output when they are shuffled without the others, found by halving."""
    if moves(suspects) < allowed:
        return ()
    if len(suspects) == 1:
        return tuple(suspects)
    half = len(suspects) // 2
    return (*_guilty(suspects[:half], moves, allowed), *_guilty(suspects[half:], moves, allowed))
