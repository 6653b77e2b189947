"""What training keeps beside the model follows a cut: the optimizer's state, and averaged copies of the model.

An optimizer is copied as it stands, without its constructor: same class, options and hooks, with the new parameters in
place of the old. A tensor of its state that has one number per weight is cut as its parameter is; single numbers, such
as Adam's step, are copied; anything else is refused before anything is done.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from secateur.errors import PlanError
from secateur.graph.nested import tensors_in
from secateur.graph.rebuild import Kept, Shapes, tensor_shapes

Trainer = TypeVar("Trainer", bound=Optimizer)


def check_optimizer(optimizer: Optimizer, model: nn.Module, kept: Kept) -> None:
    """PlanError unless all that the optimizer keeps can be cut along with the model's parameters."""
    if not isinstance(optimizer, Optimizer):
        raise PlanError(f"{type(optimizer).__name__} is no torch.optim.Optimizer; give the one that it wraps.")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    family = _family(optimizer)
    for one in family:
        kind = type(one).__name__
        if isinstance(one, torch.optim.LBFGS):
            raise PlanError(
                f"{kind} keeps the history of all parameters in one flat vector, which cannot be cut along with them. "
                f"Cut the model alone, and give the smaller one a new {kind}."
            )
        if "step" in vars(one) and not hasattr(one.step, "_wrapped_by_lr_sched"):
            raise PlanError(
                f"the method step of the optimizer {kind} was replaced on the object, so that a copy would step the "
                "original. Give the optimizer without that wrapper."
            )
        _check_parameters(one, names)
        for name, value in _aside(one):
            for tensor in tensors_in(value, tuple(family)):
                if tensor.ndim and id(tensor) not in names:
                    raise PlanError(
                        f"the optimizer {kind} keeps a tensor of shape {tuple(tensor.shape)} in {name}, and nothing "
                        f"says which weights it is for. Cut the model alone, and make a new {kind} over the cut one."
                    )
        _check_state(one, names, kept)


def carry_optimizer(optimizer: Trainer, model: nn.Module, smaller: nn.Module, kept: Kept) -> Trainer:
    """A copy of the optimizer over the parameters of `smaller`, its state cut as they were; `optimizer` is untouched.

    Args:
        optimizer: one that `check_optimizer` passed.
        model: the model that it trains.
        smaller: the cut copy of that model.
        kept: what stayed of each tensor.
    """
    memo: dict[int, Any] = {id(old): new for old, new in zip(model.modules(), smaller.modules(), strict=True)}
    new = dict(smaller.named_parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    memo |= {key: new[name] for key, name in names.items()}
    family = _family(optimizer)
    for one in family:
        memo[id(one)] = _shell(one)
        memo |= {id(hook): hook for hook in _hooks(one) if getattr(hook, "__self__", None) is not one}
        for parameter, held in one.state.items():
            name = names.get(id(parameter), "")
            for value in held.values() if isinstance(held, dict) else [held]:
                if name in kept and isinstance(value, Tensor) and value.shape == parameter.shape:
                    memo[id(value)] = _cut(value, kept[name], new[name])
        for tensor in tensors_in([dict(one.state), one.param_groups]):
            memo.setdefault(id(tensor), tensor.detach().clone())
    for one in family:
        vars(memo[id(one)]).update(copy.deepcopy({n: v for n, v in vars(one).items() if n != "step"}, memo))
    twin: Trainer = memo[id(optimizer)]
    return twin


def find_copies(ema: nn.Module, model: nn.Module, shapes: Shapes) -> tuple[str, ...]:
    """The paths in `ema` at which copies of the model lie: modules that have its tensors, by name and shape.

    Raises:
        PlanError: there is none.
    """
    modules = ema.named_modules() if isinstance(ema, nn.Module) else ()
    paths = tuple(path for path, module in modules if module is not model and tensor_shapes(module) == shapes)
    if not paths:
        raise PlanError(
            f"the ema given ({type(ema).__name__}) holds no copy of the model: no module in it has all of the tensors, "
            "by name and shape, that the plan was made for. Give an averaged nn.Module of this model as it is now: "
            "torch's AveragedModel, timm's ModelEmaV3 or a deep copy."
        )
    return paths


def _family(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer and those that it holds as attributes, such as the one inside a Lookahead."""
    found = [optimizer]
    for one in found:
        for value in vars(one).values():
            for item in value if isinstance(value, list | tuple) else [value]:
                if isinstance(item, Optimizer) and not any(item is other for other in found):
                    found.append(item)
    return found


def _shell(optimizer: Optimizer) -> Optimizer:
    """An empty optimizer of the same class, but for the mark that a scheduler leaves on its step and later asks for."""
    shell: Optimizer = object.__new__(type(optimizer))
    if "step" in vars(optimizer):
        shell.param_groups = []
        LambdaLR(shell, lambda _: 1.0)
    return shell


def _hooks(optimizer: Optimizer) -> Iterator[Any]:
    for name, value in vars(optimizer).items():
        if _is_hooks(name):
            yield from value.values()


def _is_hooks(name: str) -> bool:
    return name.startswith("_optimizer_") and name.endswith("_hooks")


def _aside(optimizer: Optimizer) -> list[tuple[str, Any]]:
    """What an optimizer keeps beside its state, its options and its hooks."""
    usual = ("state", "param_groups", "defaults", "step")
    return [(name, value) for name, value in vars(optimizer).items() if name not in usual and not _is_hooks(name)]


def _check_parameters(optimizer: Optimizer, names: Mapping[int, str]) -> None:
    stepped = [(f"group {i}", p) for i, group in enumerate(optimizer.param_groups) for p in group["params"]]
    for where, parameter in [*stepped, *(("its state", key) for key in optimizer.state)]:
        if isinstance(parameter, Tensor) and id(parameter) not in names:
            raise PlanError(
                f"the optimizer {type(optimizer).__name__} has, in {where}, a parameter of shape "
                f"{tuple(parameter.shape)} that is not the model's. Give the model that it trains; "
                "parameters outside of that model need an optimizer of their own."
            )


def _check_state(optimizer: Optimizer, names: Mapping[int, str], kept: Kept) -> None:
    """Refuse state that is neither one number nor one number per weight.

    A matrix that only happens to have a square weight's shape is no such state: under its key, all must fit.
    """
    rows = [
        (names.get(id(key), ""), tuple(key.shape) if isinstance(key, Tensor) else (), what, value)
        for key, held in optimizer.state.items()
        for what, value in (held.items() if isinstance(held, dict) else [(str(key), held)])
    ]
    odd = {what for _, shape, what, value in rows if not isinstance(value, Tensor) or tuple(value.shape) != shape}
    for name, shape, what, value in rows:
        if name and name not in kept:
            continue
        for tensor in tensors_in(value):
            if tensor.ndim and (what in odd or not name):
                kind = type(optimizer).__name__
                raise PlanError(
                    f"the optimizer {kind} keeps {what!r} of shape {tuple(tensor.shape)} for "
                    f"{f'{name} of shape {shape}' if name else 'all parameters'}; what is not kept for each weight on "
                    f"its own cannot be cut. Cut the model alone, and make a new {kind} over the cut one."
                )


def _cut(value: Tensor, dims: Mapping[int, list[int]], like: Tensor) -> Tensor:
    """What stays of a state tensor, in the parameter's own strides, as an optimizer makes it."""
    value = value.detach()
    for dim, indices in dims.items():
        value = value.index_select(dim, torch.tensor(indices, device=value.device))
    return torch.empty_like(like, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)
