"""`compress`: score, allocate, cut and prove as one call.

It goes down to a budget, or to the smallest model above an accuracy floor; in one go, or in several cuts with recovery
in between.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from secateur.allocate.budget import Budget, Target
from secateur.allocate.limits import Limits
from secateur.allocate.plan import Plan, Strategy, allocate
from secateur.allocate.ranking import GlobalRanking
from secateur.codec.files import locked, read_json, write_json
from secateur.codec.state import load_state, save_state
from secateur.errors import PlanError, ProofError
from secateur.graph.groups import find_groups
from secateur.graph.records import Groups
from secateur.score.magnitude import Magnitude
from secateur.score.scaling import Scale, none
from secateur.score.scoring import Criterion, Scores, score
from secateur.search.floor import Floor, Search, find_floor
from secateur.search.schedule import Schedule, one_shot
from secateur.surgery.certify import Certificate, certify
from secateur.surgery.cut import Cut, apply

Recover = Callable[[Cut[Any, Any, Any]], None]
"""What is done after each cut, in place: to `cut.model`, with `cut.optimizer` and `cut.ema`, if there are any."""

TRIALS, BEST = "trials.jsonl", "best.json"


@dataclass(frozen=True)
class Compressed:
    """A smaller model, and what made it.

    Attributes:
        model: a copy of the class that was given.
        plans: one for each cut, in order: what `save(plan=...)` takes.
        certificates: the proof of each cut, before recovery; none for a model that was read from a floor's folder.
        optimizer, ema: what was given, for the smaller model; None if nothing was.
        search: what was tried on the way to a floor; None for a budget.
    """

    model: nn.Module
    plans: tuple[Plan, ...]
    certificates: tuple[Certificate, ...]
    optimizer: Optimizer | None = None
    ema: nn.Module | None = None
    search: Search | None = None


@dataclass(frozen=True)
class _How:
    """What `compress` is given besides the model and what is to be reached."""

    example_inputs: Any
    criterion: Criterion
    strategy: Strategy
    scale: Scale
    limits: Limits
    schedule: Schedule
    at_a_time: int | None
    recover: Recover | None
    optimizer: Optimizer | None
    ema: nn.Module | None


def compress(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget | Floor,
    *,
    criterion: Criterion | None = None,
    strategy: Strategy | None = None,
    scale: Scale = none,
    limits: Limits | None = None,
    schedule: Schedule = one_shot,
    at_a_time: int | None = None,
    recover: Recover | None = None,
    optimizer: Optimizer | None = None,
    ema: nn.Module | None = None,
) -> Compressed:
    """Cut a copy of the model down to a budget, or as far as an accuracy floor allows, and prove each cut.

    With a schedule of several cuts, or `at_a_time`, the units that are left are scored anew before each cut, and
    `recover` is called after each: pruning and training by turns (Han et al. 2015, Learning both Weights and
    Connections; Li et al. 2017, Pruning Filters for Efficient ConvNets, section 3.4; Molchanov et al. 2017).

    Args:
        model: untouched.
        example_inputs: as `find_groups` takes them.
        budget: what may be left of the model as it is given, after the last cut; or a `Floor`.
        criterion: `Magnitude(1)` if left out.
        strategy: `GlobalRanking()` if left out; one that can meet a budget.
        scale: makes the scores of different layers comparable.
        limits: of the model as it is given, after all cuts together.
        schedule: `one_shot`, `linear(n)`, `geometric(n)`, `cubic(n)`, or a function of yours.
        at_a_time: so many units a cut at most, of all groups together, for as many cuts as it takes; in place of a
            schedule.
        recover: called after each cut, and proof, with the smaller model and what trains it.
        optimizer, ema: carried across each cut, as by `apply`.

    Raises:
        PlanError: the budget cannot be met within the limits; a schedule that rises or does not end at the budget; no
            model was above the floor: says which came nearest.
        ProofError: a cut model does not compute what it should; the sentence of its certificate.
        RunError: a floor's folder is of another search, or cannot be written.

    >>> import torch, secateur as sc
    >>> net, x = sc.build_model("secateur:resnet20").model.eval(), torch.randn(2, 3, 32, 32)
    >>> small = compress(net, x, sc.Budget(macs=0.5), schedule=sc.geometric(2))
    >>> [round(plan.macs_left / sc.find_groups(net, x).macs, 2) for plan in small.plans]
    [0.71, 0.5]
    >>> all(certificate.ok for certificate in small.certificates)
    True
    """
    if at_a_time is not None and (at_a_time < 1 or schedule is not one_shot):
        raise PlanError("at_a_time is a number of units, 1 or more, and takes the place of a schedule; give one.")
    how = _How(
        example_inputs, criterion or Magnitude(1.0), strategy or GlobalRanking(), scale, limits or Limits(), schedule,
        at_a_time, recover, optimizer, ema,
    )  # fmt: skip
    scores = score(model, find_groups(model, example_inputs), how.criterion, scale)
    return _to_floor(model, budget, how, scores) if isinstance(budget, Floor) else _to(model, budget, how, scores)


def _to(model: nn.Module, budget: Budget, how: _How, scores: Scores) -> Compressed:
    """Down to a budget; `scores` are those of the whole model."""
    groups, limits = scores.groups, how.limits
    targets = budget.targets(groups)
    shares = _shares(how.schedule, targets)
    bounds = {g.name: bound for g, bound in zip(groups.groups, limits.bounds(groups.groups))}
    done = Compressed(model, (), (), how.optimizer, how.ema)
    while True:
        left = shares[min(len(done.plans), len(shares) - 1)]
        aims = {target.measure: _aim(target, share) for target, share in zip(targets, left)}
        plan = allocate(scores, how.strategy, budget=Budget(**aims), limits=limits)
        fewer = _fewer(plan, scores, how.strategy, limits, how.at_a_time)
        done = _cut(done, fewer, how)
        if fewer is plan and len(done.plans) >= len(shares):
            return done
        groups = find_groups(done.model, how.example_inputs)
        limits = _later(how.limits, bounds, groups)
        scores = score(done.model, groups, how.criterion, how.scale)


def _shares(schedule: Schedule, targets: tuple[Target, ...]) -> list[tuple[float, ...]]:
    """For each cut, the share of each measure that is left after it."""
    columns = []
    for target in targets:
        left = min(target.most / max(target.whole, 1), 1.0)
        shares = list(schedule(left))
        if not shares or shares != sorted(shares, reverse=True) or shares[-1] != left:
            raise PlanError(
                f"the schedule leaves {', '.join(f'{share:.4g}' for share in shares[:6]) or 'nothing'}; the shares "
                f"must fall, and end at the {left:.4g} that it was given."
            )
        columns.append(shares)
    return list(zip(*columns, strict=True))


def _aim(target: Target, left: float) -> int:
    last = left == min(target.most / max(target.whole, 1), 1.0)
    return max(target.most if last else round(left * target.whole), 1)


def _fewer(plan: Plan, scores: Scores, strategy: Strategy, limits: Limits, at_a_time: int | None) -> Plan:
    """The plan itself, or one for the same scores if it takes too many units at a time."""
    whole = sum(group.size for group in plan.groups.groups)
    if at_a_time is None or whole - sum(map(len, plan.keep)) <= at_a_time:
        return plan
    fewer = allocate(scores, strategy, budget=Budget(units=whole - at_a_time), limits=limits)
    if whole - sum(map(len, fewer.keep)) > at_a_time:
        raise PlanError(f"within the limits no cut takes {at_a_time} units; raise at_a_time, or ease the limits.")
    return fewer


def _later(limits: Limits, bounds: dict[str, tuple[int, int]], groups: Groups) -> Limits:
    """The limits of the model as it was given, for one that has been cut since: a cap is of the first sizes."""
    known = [(group, *bounds[group.name]) for group in groups.groups if group.name in bounds]
    return replace(
        limits,
        least={glob.escape(group.name): min(least, group.size) for group, least, _ in known},
        multiple={glob.escape(group.name): multiple for group, _, multiple in known},
        cap=1.0,
    )


def _cut(done: Compressed, plan: Plan, how: _How) -> Compressed:
    """Cut, proven and recovered."""
    if done.optimizer is None and done.ema is None:
        cut: Cut[Any, Any, Any] = Cut(apply(done.model, plan), None, None)
    else:
        cut = apply(done.model, plan, optimizer=done.optimizer, ema=done.ema)
    certificate = certify(done.model, cut.model, plan, how.example_inputs)
    if not certificate.ok:
        raise ProofError(certificate.sentence)
    if how.recover is not None:
        how.recover(cut)
    plans, certificates = (*done.plans, plan), (*done.certificates, certificate)
    return Compressed(cut.model, plans, certificates, cut.optimizer, cut.ema)


def _to_floor(model: nn.Module, floor: Floor, how: _How, scores: Scores) -> Compressed:
    """The smallest above a floor; the scores of the whole model serve every trial."""
    if floor.folder is None:
        return _search(model, floor, how, scores, None)
    with locked(floor.folder):
        return _search(model, floor, how, scores, Path(floor.folder))


def _search(model: nn.Module, floor: Floor, how: _How, scores: Scores, folder: Path | None) -> Compressed:
    whole = float(floor.evaluate(model))
    least = whole + floor.accuracy if floor.accuracy < 0 else floor.accuracy
    above: dict[float, Compressed] = {}

    def attempt(share: float) -> float:
        made = _to(model, Budget(**{floor.measure: share}), how, scores)
        accuracy = float(floor.evaluate(made.model))
        if accuracy >= least and share < min(above, default=1.0):
            above.clear()
            above[share] = made
            if folder is not None:
                _write_best(folder, share, made)
        return accuracy

    journal = None if folder is None else folder / TRIALS
    search = find_floor(attempt, whole, floor.accuracy, tries=floor.tries, width=floor.width, journal=journal)
    if search.best is None:
        raise PlanError(search.sentence)
    if search.best.share in above:
        return replace(above[search.best.share], search=search)
    assert folder is not None  # what this call did not make, an earlier one did
    return replace(_read_best(folder, model), search=search)


def _write_best(folder: Path, share: float, made: Compressed) -> None:
    """First the weights, then what says which file they are in, then the old ones go."""
    weights = folder / f"best-{share:.6f}.safetensors"
    save_state(weights, made.model.state_dict())
    write_json(folder / BEST, {"weights": weights.name, "plans": [plan.to_json() for plan in made.plans]})
    for old in folder.glob("best-*.safetensors"):
        if old != weights:
            old.unlink()


def _read_best(folder: Path, model: nn.Module) -> Compressed:
    """What an earlier call left; optimizer and averages are not kept."""
    value = read_json(folder / BEST)
    plans = tuple(Plan.from_json(plan) for plan in value["plans"])
    for plan in plans:
        model = apply(model, plan)
    model.load_state_dict(load_state(folder / value["weights"]))
    return Compressed(model, plans, ())
