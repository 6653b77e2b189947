"""Running a model without leaving a trace in it: on a copy, in eval mode, without gradients and without caches."""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import gc
import logging
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.attention import see_heads
from secateur.graph.nested import Example, Nested, as_arguments, map_tensors, tensors_in
from secateur.graph.shapes import QuickFakes

ATOMS = frozenset((int, float, bool, str, type(None)))
"""Types whose values need no copy."""

KEPT_CACHES = frozenset(("torch", "numpy", *sys.stdlib_module_names))
"""Packages whose cached functions hold no results of a model."""

_CACHES: ContextVar[tuple[Any, ...] | None] = ContextVar("_CACHES", default=None)


def detached(modules: Sequence[nn.Module]) -> dict[int, Any]:
    """A memo for `copy.deepcopy`: copies of the tensors that modules hold as plain attributes, which it refuses.

    Such are the result of a weight norm before the forward pass, and activations kept from the last one, also in lists.
    """
    own = ("_parameters", "_buffers", "_modules")
    items = [item for module in modules for item in vars(module).items() if type(item[1]) not in ATOMS]
    values = [value for name, value in items if name not in own]
    kept = [v for v in values if isinstance(v, Tensor) or (isinstance(v, list | tuple | Mapping) and v)]
    held = list(tensors_in(kept))
    return {id(tensor): tensor.detach().clone() for tensor in held if not isinstance(tensor, nn.Parameter)}


def duplicate(model: nn.Module, tensors: Mapping[int, Any] = MappingProxyType({})) -> nn.Module:
    """A deep copy, of a model that holds such tensors as well.

    `copy.deepcopy` asks its memo before it copies anything; so it gets the modules there, with their dicts copied here
    (it is slow on the many that are empty), and never copies the memory of a tensor that `tensors` replaces.

    Args:
        tensors: id of a parameter or buffer -> what stands in its place.
    """
    modules = list(model.modules())
    memo = detached(modules) | dict(tensors)
    kinds = {kind: _is_plain(kind) for kind in set(map(type, modules))}
    plain = [module for module in modules if kinds[type(module)]]
    memo |= {id(module): type(module).__new__(type(module)) for module in plain}
    for module in plain:
        state = {name: _copied(value, memo) for name, value in module.__getstate__().items()}
        memo[id(module)].__setstate__(state)
    return copy.deepcopy(model, memo)


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether `copy.deepcopy` makes such a module anew without arguments and gives it a copy of its `__dict__`."""
    usual = ("__getattr__", "__getstate__", "__reduce__", "__reduce_ex__")
    own = ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__")
    return (
        all(getattr(kind, name) is getattr(nn.Module, name) for name in usual)
        and not any(hasattr(kind, name) for name in own)
        and kind not in copyreg.dispatch_table
    )


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy(value, memo)`."""
    kind, key = type(value), id(value)
    if kind in ATOMS or (kind is tuple and ATOMS.issuperset(map(type, value))):
        return value
    if key in memo:
        return memo[key]
    if kind is set and ATOMS.issuperset(map(type, value)):
        memo[key] = set(value)
    elif kind is dict or (kind is OrderedDict and not vars(value)):
        new = memo[key] = kind()
        for name, item in value.items():
            new[_copied(name, memo)] = _copied(item, memo)
    else:
        return copy.deepcopy(value, memo)
    return memo[key]


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
    mode = QuickFakes()

    def stand_in(name: str, tensor: Tensor) -> Tensor:
        shape = shapes.get(name, tensor.shape)
        if shape == tensor.shape and not (tensor.is_contiguous() and type(tensor) in (Tensor, nn.Parameter)):
            return mode.from_tensor(tensor)  # takes longer
        return mode.new(shape, tensor.dtype, tensor.device, tensor if isinstance(tensor, nn.Parameter) else None)

    named = [*model.named_parameters(), *model.named_buffers()]
    twin = see_heads(duplicate(model, {id(tensor): stand_in(name, tensor) for name, tensor in named}).eval())
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
