"""How much a cut step of a recipe takes from which layer: its words as budget, limits and strategy."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from secateur.allocate.budget import WORDS, Budget
from secateur.allocate.knapsack import Knapsack
from secateur.allocate.latency_knapsack import LatencyKnapsack
from secateur.allocate.limits import Limits
from secateur.allocate.plan import Plan, Strategy, allocate
from secateur.allocate.ranking import GlobalRanking
from secateur.allocate.sensitivity import Sensitivity, SensitivityGuided, find_sensitivity
from secateur.allocate.sparsity_guided import SparsityGuided
from secateur.allocate.uniform import Uniform
from secateur.measure.accuracy import accuracy
from secateur.measure.sparsity import SparsityTable
from secateur.measure.table import LatencyTable
from secateur.recipe.schema import Cut
from secateur.report import numbers
from secateur.score.scoring import Scores
from secateur.surgery.cut import apply
from secateur.surgery.masks import find_masks


def plan_for(
    step: Cut,
    model: nn.Module,
    scores: Scores,
    table: LatencyTable | None = None,
    sensitivity: Sensitivity | None = None,
) -> Plan:
    """Which channels a cut step takes; by the table where its budget is for latency, by sensitivity if that guides."""
    limits = Limits(**step.limits.model_dump())
    if table is not None:
        return allocate(scores, LatencyKnapsack(table, share=step.latency), limits=limits)
    budget = None if step.budget is None else Budget(**step.budget.model_dump(exclude={"latency"}))
    return allocate(scores, strategy_of(step, model, sensitivity), budget=budget, limits=limits)


def strategy_of(step: Cut, model: nn.Module, sensitivity: Sensitivity | None = None) -> Strategy:
    """How a cut step shares out what goes."""
    if sensitivity is not None:
        return SensitivityGuided(sensitivity)
    table = sparsity_for(step, model)
    if table is not None:
        return SparsityGuided(table)
    if step.guide == "uniform":
        return Uniform(step.sparsity)
    return Knapsack() if step.guide == "knapsack" else GlobalRanking(per_cost=step.guide == "ranking-per-cost")


def sparsity_for(step: Cut, model: nn.Module) -> SparsityTable | None:
    """The sparsity of each layer, if that guides the step."""
    if step.guide != "sparsity" or step.sparsity is None:
        return None
    return find_masks(model, step.sparsity).table()


def sensitivity_for(
    step: Cut, model: nn.Module, scores: Scores, held_out: Iterable[tuple[Tensor, Tensor]]
) -> Sensitivity | None:
    """The loss on images held out with each group cut alone, if that guides the step."""
    if step.guide != "sensitivity":
        return None
    batches = list(held_out)
    device = batches[0][0].device
    return find_sensitivity(scores, lambda plan: accuracy(apply(model, plan), batches, device=device).loss)


def how_much(step: Cut) -> str:
    """What a cut step takes, in a few words.

    >>> how_much(Cut(sparsity=0.5)), how_much(Cut(sparsity=0.3, guide="uniform"))
    ('50 %, guided by sparsity', '30 % of each layer')
    >>> how_much(Cut(guide="knapsack", budget={"macs": 0.5, "params": 10000}))
    'to 10,000 parameters and 50 % of the MACs, by knapsack'
    """
    said = [] if step.sparsity is None else [numbers.share(step.sparsity)]
    if step.budget is not None:
        left = step.budget.model_dump(exclude_none=True).items()
        said.append("to " + " and ".join(f"{_amount(value)} {WORDS.get(name, name)}" for name, value in left))
    if step.guide == "uniform":
        return f"{said[0]} of each layer" if step.budget is None else f"{said[0]}, the same share of each layer"
    return f"{', '.join(said)}, {'guided by' if step.guide in GUIDED else 'by'} {step.guide}"


GUIDED = ("sparsity", "sensitivity")


def _amount(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{numbers.share(value)} of the"
