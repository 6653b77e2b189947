"""Running a model without leaving a trace in it: on a copy, in eval mode, without gradients and without caches."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import logging
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from secateur.graph.attention import see_heads
from secateur.graph.nested import Example, Nested, as_arguments, map_tensors, tensors_in

KEPT_CACHES = frozenset(("torch", "numpy", *sys.stdlib_module_names))
"""Packages whose cached functions hold no results of a model."""

_CACHES: ContextVar[tuple[Any, ...] | None] = ContextVar("_CACHES", default=None)


def detached(model: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy`: copies of the tensors that modules hold as plain attributes, which it refuses.

    Such are the result of a weight norm before the forward pass, and activations kept from the last one, also in lists.
    """
    own = ("_parameters", "_buffers", "_modules")
    values = [value for module in model.modules() for name, value in vars(module).items() if name not in own]
    held = list(tensors_in([v for v in values if isinstance(v, Tensor | list | tuple | Mapping)]))
    return {id(tensor): tensor.detach().clone() for tensor in held if not isinstance(tensor, nn.Parameter)}


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy, of a model that holds such tensors as well."""
    return copy.deepcopy(model, detached(model))


def as_kind(new: Tensor, old: Tensor) -> Tensor:
    """`new` as what `old` is: a parameter that does or does not want gradients, or a plain buffer."""
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new


@contextlib.contextmanager
def fake_copy(
    model: nn.Module, example_inputs: Nested, shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({})
) -> Iterator[tuple[nn.Module, Nested]]:
    """A copy of the model in eval mode and of its inputs, with shapes but no memory and no arithmetic.

    Args:
        shapes: parameter or buffer name -> another shape for it.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def stand_in(name: str, tensor: Tensor) -> Tensor:
        shape = shapes.get(name, tensor.shape)
        if shape == tensor.shape and not (tensor.is_contiguous() and type(tensor) in (Tensor, nn.Parameter)):
            return mode.from_tensor(tensor)  # takes longer
        return as_kind(torch.empty(shape, dtype=tensor.dtype, device=tensor.device), tensor)

    named = [*model.named_parameters(), *model.named_buffers()]
    # deepcopy asks its memo first: given the fake twin there, it never copies a tensor's memory.
    memo: dict[int, Any] = detached(model)
    with mode:
        memo |= {id(tensor): stand_in(name, tensor) for name, tensor in named}
    twin = see_heads(copy.deepcopy(model, memo).eval())
    inputs = map_tensors(mode.from_tensor, example_inputs)
    with mode, _quiet():
        yield twin, inputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch logs what fails on fake tensors with a traceback; to us a failure is an answer."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def run(model: nn.Module, example_inputs: Nested) -> Any:
    """One forward pass of `model`, without gradients, on inputs given as `as_arguments` reads them."""
    args, kwargs = as_arguments(example_inputs)
    with torch.inference_mode(False), torch.no_grad(), slow_attention(), empty_caches():
        given = model(*args, **kwargs)
        return example_inputs.outputs(given) if isinstance(example_inputs, Example) else given


@contextlib.contextmanager
def empty_caches() -> Iterator[None]:
    """Functions that cache their results hold none of ours afterwards, and none of an earlier run's meanwhile.

    They are looked for once; whoever runs a model several times does so within it.
    """
    known = _CACHES.get()
    caches = _find_caches() if known is None else known
    modules = len(sys.modules)
    token = _CACHES.set(caches)
    try:
        for cache in caches:
            cache.cache_clear()
        yield
    finally:
        _CACHES.reset(token)
        if known is None and len(sys.modules) != modules:  # the model has imported some
            caches = _find_caches()
        for cache in caches:
            cache.cache_clear()


def _find_caches() -> tuple[Any, ...]:
    kind = functools._lru_cache_wrapper
    found = [item for item in gc.get_referrers(kind) if type(item) is kind]
    return tuple(item for item in found if str(item.__module__).partition(".")[0] not in KEPT_CACHES)


@contextlib.contextmanager
def slow_attention() -> Iterator[None]:
    """`nn.MultiheadAttention` has a fused path that hides its ops; off while we look, then as it was."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
