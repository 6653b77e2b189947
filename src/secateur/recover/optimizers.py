"""The optimizer of a run: made by the caller's function or taken as it is, and its state to tensors and back.

Learning rates are the schedule's. Where parameter groups have different rates, that is the rate of the highest, and the
others keep their ratio to it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import TrainingError

Make = Callable[[list[nn.Parameter]], Optimizer]
"""Parameters -> an optimizer over them, such as `lambda parameters: torch.optim.AdamW(parameters, weight_decay=0.05)`.
"""


def sgd(momentum: float, weight_decay: float, nesterov: bool) -> Make:
    """`torch.optim.SGD` with these options; its steps are over all parameters at once."""

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        return torch.optim.SGD(
            parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, foreach=True
        )

    return make


def optimizer_for(given: Optimizer | Make, model: nn.Module) -> Optimizer:
    """The optimizer over parameters of `model` that need a gradient: made by `given`, or `given` itself.

    One that was made before, with a state, has that where its parameters are now.

    Raises:
        TrainingError: no parameter needs a gradient, it is no optimizer, or it is over others than the model's.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise TrainingError("no parameter of the model needs a gradient; set requires_grad on some.")
    optimizer = given if isinstance(given, Optimizer) else given(trainable)
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        raise TrainingError(f"optimizer gave a {kind}; give a torch.optim.Optimizer, or a function that makes one.")
    _check_own(optimizer, model)
    if any(
        value.ndim and value.device != parameter.device
        for parameter, held in optimizer.state.items()
        for value in held.values()
        if isinstance(value, Tensor)
    ):
        optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


def trained_by(
    given: Optimizer | Make, model: nn.Module, only: Callable[[str], bool] | None
) -> Callable[[str], bool] | None:
    """Which parameters are trained: `only` some, and of an optimizer that was made before those that it has.

    Raises:
        TrainingError: it has others than the model's.
    """
    if not isinstance(given, Optimizer):
        return only
    _check_own(given, model)
    held = {id(parameter) for group in given.param_groups for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in held}
    return lambda name: name in names and (only is None or only(name))


@dataclass(frozen=True)
class Rates:
    """How the learning rate is shared out: the ratio of each parameter group's rate to the highest."""

    optimizer: Optimizer
    ratios: tuple[float, ...]

    @classmethod
    def of(cls, optimizer: Optimizer) -> Rates:
        """The ratios as the optimizer was made; `initial_lr` is what a torch scheduler has noted of that.

        >>> one, other = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        >>> made = torch.optim.SGD([{"params": [one]}, {"params": [other], "lr": 0.25}], lr=0.5)
        >>> Rates.of(made).ratios
        (1.0, 0.5)
        """
        own = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        return cls(optimizer, tuple(rate / max(own) if max(own) else 1.0 for rate in own))

    def set(self, lr: float) -> None:
        """Gives each group its share of `lr`."""
        for group, ratio in zip(self.optimizer.param_groups, self.ratios):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * ratio)
            else:
                group["lr"] = lr * ratio

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """The groups' own rates come back afterwards, for those who use the optimizer again."""
        own = [float(group["lr"]) for group in self.optimizer.param_groups]
        try:
            yield
        finally:
            Rates(self.optimizer, tuple(own)).set(1.0)


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What each parameter group was asked for, but for the learning rate, as JSON values."""
    return [
        {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr") and _plain(value)}
        for group in optimizer.param_groups
    ]


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors by `key/parameter`, and as JSON values what of it are plain values.

    Raises:
        TrainingError: state that is neither.

    >>> model = nn.Linear(2, 1)
    >>> adam = torch.optim.Adam(model.parameters())
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> adam.step()
    >>> list(optimizer_state(adam, model)[0])[:3]
    ['step/weight', 'exp_avg/weight', 'exp_avg_sq/weight']
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = value
            elif _plain(value):
                values[f"{key}/{name}"] = value
            else:
                raise TrainingError(
                    f"the optimizer {type(optimizer).__name__} keeps {key!r}, a {type(value).__name__}, which a "
                    "checkpoint cannot hold; train without a checkpoint, or with an optimizer of tensors and numbers."
                )
    return tensors, {"groups": options_of(optimizer), "values": values}


def set_optimizer_state(
    optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Puts the optimizer into the state that `optimizer_state` gave."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held: dict[str, dict[str, Any]] = {}
    for place, value in [*tensors.items(), *values.get("values", {}).items()]:
        key, _, name = place.partition("/")
        held.setdefault(name, {})[key] = value
    state = optimizer.state_dict()
    state["state"] = {}
    for own, group, options in zip(optimizer.param_groups, state["param_groups"], values["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in options.items()})
        for index, parameter in zip(group["params"], own["params"], strict=True):
            if names[id(parameter)] in held:
                state["state"][index] = held[names[id(parameter)]]
    optimizer.load_state_dict(state)
    for parameter, kept in optimizer.state.items():
        for key, value in kept.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                # In the parameter's own strides, as the optimizer makes it.
                kept[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _check_own(optimizer: Optimizer, model: nn.Module) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in own:
                raise TrainingError(
                    f"the {type(optimizer).__name__} has a parameter of shape {tuple(parameter.shape)} that is not the "
                    "model's; after a cut, take the one that apply(model, plan, optimizer=...) gives."
                )


def _plain(value: object) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == (list(value) if isinstance(value, tuple) else value))
    except (TypeError, ValueError):
        return False
