"""Batch norm's running statistics, estimated anew: the cheapest recovery after a cut; no labels, no training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.errors import DataError
from secateur.graph.nested import Nested
from secateur.graph.rebuild import share
from secateur.graph.twin import run
from secateur.score.moments import Moments, squares


def reset_statistics(model: nn.Module, batches: Iterable[Nested], *, sequential: bool = False) -> tuple[str, ...]:
    """Set the running mean and variance of every batch norm, in place, to those of its input over all batches.

    They are the mean and the unbiased variance of all values together, as if they were one batch, whatever the batches'
    sizes (`momentum=None` of torch averages over batches, which is the same for equal means and sizes only). All else
    runs as in eval mode; weights, modes and momentum stay as they are. A layer that is called several times in a pass
    has the statistics of all its calls together; one without running statistics is passed over.

    In one pass, each layer gives on what it normalises by the batch's own statistics, as in training, so that later
    layers depend on the batches' size: with a single batch they are exact too. With `sequential`, a layer is reached
    only when those before it have their final statistics, and gives on what it will give in use: exact for any
    batches, for as many passes as there are layers, each of which stops at its layer.

    Args:
        model: on failure it is as it was.
        batches: model inputs, as `find_groups` takes them, which can be gone through again and again. No labels.
        sequential: see above.

    Returns:
        The names of the layers that were set, in the order in which they run.

    Raises:
        DataError: there is no batch, or a layer sees fewer than two values per channel.

    >>> net = nn.Sequential(nn.BatchNorm1d(1))
    >>> reset_statistics(net, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])])
    ('0',)
    >>> net[0].running_mean.item(), net[0].running_var.item()
    (3.0, 7.0)
    """
    twin = share(model).eval()
    layers = {name: module for name, module in twin.named_modules() if _has_statistics(module)}
    seen = _one_by_one(twin, layers, batches) if sequential else _together(twin, layers, batches)
    for name, moments in seen.items():
        if moments.count < 2:
            raise DataError(
                f"batch norm {name!r} sees {moments.count} value per channel in all batches together, and a variance "
                "takes two; give more inputs."
            )
    for name, moments in seen.items():
        _set(model.get_submodule(name), moments.mean, moments.scatter / (moments.count - 1))
    return tuple(seen)


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None


def _together(twin: nn.Module, layers: dict[str, nn.Module], batches: Iterable[Nested]) -> dict[str, Moments]:
    seen: dict[str, Moments] = {}

    def watching(name: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = _values(args, kwargs)
            own = Moments(squares)
            own.add(x)
            seen.setdefault(name, Moments(squares)).add(x)
            _set(module, own.mean, own.covariance)

        return watch

    handles = [m.register_forward_pre_hook(watching(name), with_kwargs=True) for name, m in layers.items()]
    try:
        _pass(twin, batches)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class _Reached(Exception):
    """The pass has come as far as it was to come."""


def _one_by_one(twin: nn.Module, layers: dict[str, nn.Module], batches: Iterable[Nested]) -> dict[str, Moments]:
    seen: dict[str, Moments] = {}
    for name, calls in _order(twin, layers, batches):
        moments, met = Moments(squares), 0

        def watch(module: nn.Module, args: Any, kwargs: Any, moments: Moments = moments, calls: int = calls) -> None:
            nonlocal met
            x = _values(args, kwargs)
            moments.add(x)
            met += 1
            if met % calls == 0:
                raise _Reached
            own = Moments(squares)
            own.add(x)
            _set(module, own.mean, own.covariance)

        handle = layers[name].register_forward_pre_hook(watch, with_kwargs=True)
        try:
            _pass(twin, batches)
        finally:
            handle.remove()
        seen[name] = moments
        if moments.count:
            _set(layers[name], moments.mean, moments.scatter / max(moments.count - 1, 1))
    return seen


def _order(twin: nn.Module, layers: dict[str, nn.Module], batches: Iterable[Nested]) -> Sequence[tuple[str, int]]:
    """The layers in the order in which they are met first, and how often a pass of the first batch calls each."""
    calls: dict[str, int] = {}

    def counting(name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            calls[name] = calls.get(name, 0) + 1

        return count

    handles = [module.register_forward_pre_hook(counting(name)) for name, module in layers.items()]
    try:
        first = next(iter(batches), None)
        _pass(twin, [] if first is None else [first])
    finally:
        for handle in handles:
            handle.remove()
    return list(calls.items())


def _pass(twin: nn.Module, batches: Iterable[Nested]) -> None:
    empty = True
    for batch in batches:
        empty = False
        with contextlib.suppress(_Reached):
            run(twin, batch)
    if empty:
        raise DataError("there are no batches to estimate statistics from; give one or more.")


def _values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The layer's input, (channels, values), in float64."""
    x: Tensor = args[0] if args else kwargs["input"]
    return x.detach().movedim(1, 0).flatten(1).double()


@torch.no_grad()
def _set(module: nn.Module, mean: Tensor, variance: Tensor) -> None:
    for buffer, value in ((module.running_mean, mean), (module.running_var, variance)):
        assert isinstance(buffer, Tensor)
        buffer.copy_(value)
