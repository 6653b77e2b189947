"""`apply`: cut a plan's units out of a copy of the model, and of what training keeps beside it; shapes change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.allocate.plan import Plan
from secateur.errors import PlanError
from secateur.graph.rebuild import Kept, narrow, rebuild, tensor_shapes
from secateur.graph.sharing import share_cut
from secateur.graph.twin import tensors_of
from secateur.surgery.carry import carry_optimizer, check_optimizer, find_copies

Model = TypeVar("Model", bound=nn.Module)
Trainer = TypeVar("Trainer", bound=Optimizer | None)
Average = TypeVar("Average", bound=nn.Module | None)
GivenTrainer = TypeVar("GivenTrainer", bound=Optimizer)
GivenAverage = TypeVar("GivenAverage", bound=nn.Module)


@dataclass(frozen=True)
class Cut(Generic[Model, Trainer, Average]):
    """A cut model and what training goes on with; None for what was not given."""

    model: Model
    optimizer: Trainer
    ema: Average


@overload
def apply(model: Model, plan: Plan) -> Model: ...


@overload
def apply(model: Model, plan: Plan, *, optimizer: GivenTrainer) -> Cut[Model, GivenTrainer, None]: ...


@overload
def apply(model: Model, plan: Plan, *, ema: GivenAverage) -> Cut[Model, None, GivenAverage]: ...


@overload
def apply(
    model: Model, plan: Plan, *, optimizer: GivenTrainer, ema: GivenAverage
) -> Cut[Model, GivenTrainer, GivenAverage]: ...


def apply(model: nn.Module, plan: Plan, *, optimizer: Optimizer | None = None, ema: nn.Module | None = None) -> Any:
    """A smaller copy of `model`, of the same classes, with only the units that the plan keeps.

    Hooks, parametrizations, tied weights, dtype, device, requires_grad and memory format come along; gradients do not.
    Parameters that are views on one memory (`nn.Parameter(other.data.t())`) are so again, if the plan cuts them alike.

    With `optimizer` or `ema` the result is a `Cut`: the smaller model, and copies of these for it, so that training
    goes on as if the model had always had this size. State with one number per weight (momentum, Adam's moments) is
    cut as the weight is; options, hooks and step counts stay. To go on with a learning-rate scheduler, copy it with
    the new optimizer put in the old one's place: `copy.deepcopy(scheduler, {id(optimizer): cut.optimizer})`.

    Args:
        model: the model that the plan's groups were found on; untouched.
        plan: from `allocate`, or made by hand.
        optimizer: over parameters of the model, all or some; untouched. Any `torch.optim.Optimizer`, also one that
            holds another, if its state is by weight.
        ema: a module in which an averaged copy of the model lies: a deep copy, `AveragedModel`, timm's `ModelEmaV3`;
            found by the names and shapes of its tensors; untouched. All else in it (`n_averaged`) stays.

    Raises:
        PlanError: the plan was made for another model; the optimizer has parameters that are not the model's, or state
            that is not by weight (LBFGS, factored moments); the ema is of another model; parameters on one memory
            are not cut alike. Nothing has been done then.

    >>> import torch, secateur as sc
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> plan = sc.Plan(sc.find_groups(net, torch.zeros(1, 4)), keep=((0, 3, 5),))
    >>> print(apply(net, plan))
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
    )
    >>> adam = torch.optim.Adam(net.parameters())
    >>> net(torch.ones(1, 4)).sum().backward()
    >>> adam.step()
    >>> cut = apply(net, plan, optimizer=adam)
    >>> cut.optimizer.state[cut.model[0].weight]["exp_avg"].shape
    torch.Size([3, 4])
    """
    check_fits(model, plan)
    kept = plan.groups.kept(plan.keep)
    if optimizer is not None:
        check_optimizer(optimizer, model, kept)
    parts, copies = {"model": model}, ["model"]
    if ema is not None:
        copies += [_join("ema", path) for path in find_copies(ema, model, shapes_before(plan))]
        parts["ema"] = ema
    # Copied as one, what the parts share is shared by their copies too.
    whole = nn.ModuleDict(parts)
    twin = rebuild(
        whole,
        {_join(path, name): t for path in copies for name, t in _narrowed(whole.get_submodule(path), kept).items()},
        {_join(path, name): values for path in copies for name, values in plan.attributes().items()},
        {_join(path, name): change for path in copies for name, change in plan.replays().items()},
    )
    smaller = twin.get_submodule("model")
    if optimizer is None and ema is None:
        return smaller
    trainer = None if optimizer is None else carry_optimizer(optimizer, model, smaller, kept)
    return Cut(smaller, trainer, None if ema is None else twin.get_submodule("ema"))


def check_fits(model: nn.Module, plan: Plan) -> None:
    """PlanError unless the model has exactly the tensors, by name and shape, that the plan was made for."""
    have, want = tensor_shapes(model), shapes_before(plan)
    if have == want:
        return
    odd = [n for n in [*want, *have] if have.get(n) != want.get(n)]
    first = odd[0]
    raise PlanError(
        f"the plan was made for another model: {first} is {have.get(first, 'missing')} here and "
        f"{want.get(first, 'missing')} in the plan ({len(set(odd))} tensors differ). "
        "Find the groups of this model and make its plan anew."
    )


def shapes_before(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model that the plan was made for."""
    return {info.name: info.shape for info in plan.groups.tensors}


def _narrowed(model: nn.Module, kept: Kept) -> dict[str, Tensor]:
    """The tensors that the copy gets: those that the plan cuts, and those that share memory."""
    return share_cut(tensors_of(model), narrow(model, kept), kept)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if name else path
