"""`simplify`: cuts that cost nothing, found on the graph and in the weights, and proven.

Pruning in one pass after training leaves channels that add nothing (all weights zero), or always the same (a batch norm
with scale zero), or what another adds already; and a model made for large images may repeat features on small ones.
All of these can go without the outputs changing. What is found is proven by construction, for every input of these
shapes, and then checked: the outputs are compared in float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.allocate.plan import Plan
from secateur.errors import CaptureError, ProofError
from secateur.graph import replay
from secateur.graph.capture import capture
from secateur.graph.nested import map_tensors
from secateur.graph.probe import settle
from secateur.graph.rebuild import rebuild, set_attributes, share, tensor_shapes
from secateur.graph.records import Groups
from secateur.graph.replay import Change
from secateur.graph.twin import tensors_of
from secateur.surgery.cut import apply
from secateur.surgery.double import Double, as_double, distance, doubled, outputs
from secateur.surgery.duplicates import Merge, find_duplicates, merge
from secateur.surgery.endings import Observation, Truths, observe
from secateur.surgery.fold_bn import find_norms, fold_norms
from secateur.surgery.idle import CONSTANT, LEFT, ZERO, Verdict, fold, judge
from secateur.surgery.replicas import find_replicas, folded
from secateur.surgery.simplification import Found, Left, Simplification
from secateur.surgery.simulate import analyse_run

TOLERANCE = 1e-9
"""Largest error accepted, as a share of the largest output, in float64."""

ROUNDS = 64
"""Rounds at most: a unit that goes can leave another without a reader, layer by layer."""

DRAWS = 2
"""Inputs that are drawn anew for the comparison, besides the example."""


def simplify(
    model: nn.Module, example_inputs: Any, *, batch_norm: bool = False, seed: int = 0
) -> tuple[nn.Module, Simplification]:
    """A smaller copy of the model that computes the same in eval mode, and the record of what went.

    What goes, until nothing more is found:

    - dead units: zero on every input, or read by nobody;
    - constant units: folded into the bias of the layer that reads them, or into the mean of the batch norm behind it;
    - duplicate units: their readers' weights are added up;
    - replicated features: a map whose pixels a pool or an upsampling repeats before a linear layer reads it flat;
    - with `batch_norm`, batch norms that directly follow a linear layer or convolution, for export.

    A group keeps one unit at least, and units under a norm over them stay, as the norm would change. Parameters that
    were views on one memory have each its own in the copy.

    Args:
        model: in train or eval mode; untouched. What the copy computes is proven for eval mode.
        example_inputs: as for `find_groups`; the promise is for inputs of these shapes.
        batch_norm: fold batch norms too. The copy cannot be trained on as before then.
        seed: for the inputs that are drawn to compare the outputs on.

    Raises:
        CaptureError: the model does not run on these inputs. ProofError: the outputs differ by more than 1e-9.

    >>> import secateur as sc
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> _ = nn.init.zeros_(net[0].weight[:3]), nn.init.ones_(net[0].bias[:2]), nn.init.zeros_(net[0].bias[2:3])
    >>> smaller, record = simplify(net, torch.randn(3, 4))
    >>> print(str(record).partition("; ")[0])
    37 of 58 parameters are left, 1.57 times fewer
    >>> record.count("dead units"), record.count("constant units"), smaller[0].out_features
    (1, 2, 5)
    """
    with Double(), torch.no_grad(), torch.random.fork_rng():
        inputs = map_tensors(as_double, example_inputs)
        whole = doubled(model)
        work = _Work(whole, inputs)
        work.reduce(batch_norm)
    smaller = _as_before(work.model, model)
    with Double(), torch.no_grad(), torch.random.fork_rng():
        errors = _compare(whole, doubled(smaller), inputs, torch.Generator().manual_seed(seed), work)
    if not errors.error <= TOLERANCE:
        raise ProofError(
            f"the simplified model is off by {errors.error:.1e} of the largest output in float64, and {TOLERANCE:.0e} "
            "is allowed. Nothing was kept of it. Please report the model; until then, leave it as it is."
        )
    return smaller, work.record(model, smaller, errors)


@dataclass(frozen=True)
class _Errors:
    """As in `Simplification`."""

    error: float
    rounding: float
    inputs: int


class _Work:
    """The model as far as it has been simplified, in float64, and the notes for the record."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs = model, inputs
        self.found: Counter[tuple[str, str]] = Counter()
        self.left: Counter[tuple[str, str]] = Counter()
        self.plans: list[Plan] = []
        self.attributes: dict[str, dict[str, int | tuple[int, ...]]] = {}
        self.replays: Mapping[str, Change] = {}
        self.identities: tuple[str, ...] = ()
        self.biases: tuple[str, ...] = ()
        self.decides = False

    def reduce(self, batch_norm: bool) -> None:
        """All that can be done, in order."""
        seen = observe(self.model, self.inputs)
        self.decides = bool(seen.analysis.trace.decisions)
        if seen.lost:
            self.left["the whole model", seen.lost] += 1
            return
        if self._unrepeat(seen):
            seen = observe(self.model, self.inputs)
        for _ in range(ROUNDS):
            if not self._cut(seen):
                break
            seen = observe(self.model, self.inputs)
        else:
            self.left["the whole model", f"more may be found: stopped after {ROUNDS} rounds"] += 1
        if batch_norm:
            self._fold_norms(seen)

    def record(self, before: nn.Module, after: nn.Module, errors: _Errors) -> Simplification:
        params = [sum(p.numel() for p in model.parameters()) for model in (before, after)]
        return Simplification(
            params[0],
            params[1],
            tuple(Found(kind, where, count) for (kind, where), count in self.found.items()),
            tuple(Left(where, count, why) for (where, why), count in self.left.items()),
            tuple(self.plans),
            self.attributes,
            self.replays,
            self.identities,
            self.biases,
            tensor_shapes(before),
            tensor_shapes(after),
            errors.error,
            errors.rounding,
            errors.inputs,
        )

    def _unrepeat(self, seen: Observation) -> bool:
        replicas, left = find_replicas(seen.wiring, self.model)
        self.left.update(left)
        tensors = tensors_of(self.model)
        for replica in replicas:
            weight = folded(replica, tensors[replica.weight])
            self.model = share(self.model, {replica.weight: weight})
            self._tell(replica.attributes)
            set_attributes(self.model, replica.attributes)
            gone = tensors[replica.weight].shape[1] - weight.shape[1]
            self.found["replicated features", replica.reader] += gone
        return bool(replicas)

    def _cut(self, seen: Observation) -> bool:
        """One round; whether any unit went."""
        verdict, tensors = judge(seen), tensors_of(self.model)
        idle = (verdict.state <= CONSTANT) & _exact(seen.analysis.groups)
        merges = find_duplicates(seen, tensors, idle)
        wanted = idle.copy()
        for item in merges:
            wanted[[item.first + unit for unit in item.gone]] = True
        groups = settle(self.model, self.inputs, capture(self.model, self.inputs)).groups if wanted.any() else None
        plan, gone = _plan(groups, seen.analysis.groups, wanted) if groups is not None else (None, wanted)
        if plan is None or not gone.any():
            self.left.update(_reasons(seen, verdict))
            return False
        new = _edited(seen, verdict, merges, gone, tensors)
        self.found.update(_kinds(seen.analysis.groups, verdict, gone))
        self.model = apply(share(self.model, new), plan).eval()
        self.plans.append(plan)
        self._tell(plan.attributes())
        self.replays = replay.merged(self.replays, plan.replays())
        return True

    def _fold_norms(self, seen: Observation) -> None:
        pairs, left = find_norms(seen.wiring, self.model)
        self.left.update(left)
        self.model = share(self.model)
        fold_norms(self.model, pairs)
        self.found.update({("batch norms", pair.norm): 1 for pair in pairs})
        self.identities = tuple(pair.norm for pair in pairs)
        self.biases = tuple(f"{pair.layer}.bias" for pair in pairs if pair.adds_bias)

    def _tell(self, attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]]) -> None:
        for module, values in attributes.items():
            self.attributes.setdefault(module, {}).update(values)


def _exact(groups: Groups) -> Truths:
    """For each unit, whether no norm runs over it."""
    return np.array([not group.inexact for group in groups.groups for _ in range(group.size)], bool)


def _plan(groups: Groups, seen: Groups, wanted: Truths) -> tuple[Plan, Truths]:
    """The cut of the wanted units of the observed run, found again by their places; and which of them it cuts.

    A group keeps one unit. A unit that the probe has frozen, or that is more than one here, stays.
    """
    at: dict[tuple[str, int, int], int] = {}
    sizes: Counter[int] = Counter()
    for group, first in zip(seen.groups, seen.offsets):
        for slot in group.slots:
            for unit, places in enumerate(slot.index):
                at.update({(slot.tensor, slot.dim, place): first + unit for place in places})
                sizes[first + unit] += len(places)
    gone = np.zeros_like(wanted)
    keep: list[tuple[int, ...]] = []
    for group in groups.groups:
        stays: list[int] = []
        for unit in range(group.size - 1, -1, -1):
            spots = [(s.tensor, s.dim, place) for s in group.slots for place in s.index[unit]]
            same = {at.get(spot, -1) for spot in spots}
            number = same.pop()
            cut = not group.inexact and not same and number >= 0 and sizes[number] == len(spots) and wanted[number]
            if cut and (unit or stays):
                gone[number] = True
            else:
                stays.append(unit)
        keep.append(tuple(reversed(stays)))
    return Plan(groups, tuple(keep)), gone


def _edited(
    seen: Observation, verdict: Verdict, merges: Sequence[Merge], gone: Truths, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors, in their old shapes, that take up what the units that go added."""
    out: dict[str, Tensor] = {}
    more = fold(seen, verdict, np.append(gone & (verdict.state == CONSTANT), False))
    for name, value in more.items():
        out[name] = tensors[name].detach() + value
    for item in merges:
        left = tuple(unit for unit in item.gone if gone[item.first + unit])
        for slot in item.reads:
            out.setdefault(slot.tensor, tensors[slot.tensor].detach().clone())
        merge(Merge(item.first, item.stays, left, item.reads), out)
    return out


def _kinds(groups: Groups, verdict: Verdict, gone: Truths) -> Counter[tuple[str, str]]:
    """How many units of each kind went, by group."""
    out: Counter[tuple[str, str]] = Counter()
    for group, first in zip(groups.groups, groups.offsets):
        for unit in range(first, first + group.size):
            if gone[unit]:
                state = verdict.state[unit]
                kind = "dead" if state == ZERO else "constant" if state == CONSTANT else "duplicate"
                out[f"{kind} units", group.name] += 1
    return out


def _reasons(seen: Observation, verdict: Verdict) -> Counter[tuple[str, str]]:
    """Units that add nothing that varies and stay, by group and reason."""
    out: Counter[tuple[str, str]] = Counter()
    groups = seen.analysis.groups
    for group, first in zip(groups.groups, groups.offsets):
        for unit in range(first, first + group.size):
            if verdict.state[unit] == LEFT:
                out[group.name, verdict.why[unit]] += 1
            elif verdict.state[unit] <= CONSTANT and group.inexact:
                out[group.name, group.inexact] += 1
    return out


def _as_before(model: nn.Module, original: nn.Module) -> nn.Module:
    """A copy with the types of the original's tensors and the modes of its modules."""
    types = {name: tensor.dtype for name, tensor in tensors_of(original).items()}
    new = {
        name: tensor.detach().to(types.get(name) or types[f"{name.rpartition('.')[0]}.weight"])
        for name, tensor in tensors_of(model).items()
    }
    twin = rebuild(model, new)
    modes = {name: module.training for name, module in original.named_modules()}
    for name, module in twin.named_modules():
        module.training = modes.get(name, original.training)
    return twin


def _compare(whole: nn.Module, smaller: nn.Module, inputs: Any, random: torch.Generator, work: _Work) -> _Errors:
    """Compare with the model as simplified on the example and on inputs drawn anew, if anything was; `smaller` is that
    with its weights rounded.
    """
    error = rounding = 0.0
    count = 0
    for number in range(1 + DRAWS if work.found else 1):
        each = map_tensors(lambda tensor: _redrawn(tensor, random), inputs) if number else inputs
        try:
            follow = analyse_run(whole, each).decisions if work.decides else {}
            before = outputs(whole, each, follow)
        except (RuntimeError, ValueError, IndexError, CaptureError):
            continue  # whole numbers in another order need not make sense
        if any(bool(tensor.isnan().any()) for tensor in before):
            if number:
                continue
            raise ProofError("the model's own outputs on the example inputs are not numbers, so nothing can be proven.")
        error = max(error, distance(before, outputs(work.model, each, follow)))
        rounding = distance(before, outputs(smaller, each, follow)) if number == 0 else rounding
        count += 1
    return _Errors(error, rounding, count)


def _redrawn(tensor: Tensor, random: torch.Generator) -> Tensor:
    """Noise of the same mean and spread; whole numbers and truths in another order."""
    if not tensor.is_floating_point():
        order = torch.randperm(tensor.numel(), generator=random).to(tensor.device)
        return tensor.flatten()[order].reshape(tensor.shape)
    noise = torch.randn(tensor.shape, generator=random, dtype=tensor.dtype).to(tensor.device)
    spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
    return noise * (spread or 1.0) + tensor.mean()
