"""Running a model without leaving a trace in it: on a copy, in eval mode, without gradients and without caches."""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import gc
import logging
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.graph.attention import see_heads
from secateur.graph.nested import Example, Nested, as_arguments, map_tensors, tensors_in
from secateur.graph.shapes import QuickFakes

ATOMS = frozenset((int, float, bool, str, type(None)))
"""Types whose values need no copy."""

EMPTIES = frozenset((dict, OrderedDict, set, list))
"""Types that every module has many empty ones of."""

KEPT_CACHES = frozenset(("secateur", "torch", "numpy", *sys.stdlib_module_names))
"""Packages whose cached functions hold no results of a model."""


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, then buffers; one that is held in several places stands under its first name.

    >>> list(tensors_of(nn.BatchNorm1d(2)))
    ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    found: tuple[dict[str, Tensor], ...] = ({}, {})
    seen: tuple[set[int], ...] = (set(), set())
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for kind, held in enumerate((module._parameters, module._buffers)):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in seen[kind]:
                    seen[kind].add(id(tensor))
                    found[kind][prefix + name] = tensor
    return {**found[0], **found[1]}


def detached(modules: Sequence[nn.Module]) -> dict[int, Any]:
    """A memo for `copy.deepcopy`: copies of the tensors that modules hold as plain attributes, which it refuses.

    Such are the result of a weight norm before the forward pass, and activations kept from the last one, also in lists.
    """
    own = ("_parameters", "_buffers", "_modules")
    items = [item for module in modules for item in vars(module).items() if not _is_bare(item[1])]
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


def _is_bare(value: Any) -> bool:
    """Whether there can be no tensor in it, as in most attributes of a module."""
    kind = type(value)
    return kind in ATOMS or (kind in EMPTIES and not value)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy(value, memo)`."""
    kind, key = type(value), id(value)
    if kind in ATOMS or (kind is tuple and ATOMS.issuperset(map(type, value))):
        return value
    if key in memo:
        return memo[key]
    if kind in EMPTIES and not value and (kind is not OrderedDict or not vars(value)):
        made = memo[key] = kind()
        return made
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

    named = tensors_of(model)
    twin = see_heads(duplicate(model, {id(tensor): stand_in(name, tensor) for name, tensor in named.items()}).eval())
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


class Writing(BaseException):
    """A run was about to write where it may not; no error that a model would catch."""


class Untouched(TorchDispatchMode):
    """Within it nothing is written into the memory of these tensors: `Writing` is raised instead."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = frozenset(map(_memory_of, tensors))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            given = {**dict(zip((argument.name for argument in func._schema.arguments), args)), **kwargs}
            written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            if any(_memory_of(tensor) in self._memory for name in written for tensor in tensors_in(given.get(name))):
                raise Writing
        return func(*args, **kwargs)


def _memory_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else id(tensor)


def run(model: nn.Module, example_inputs: Nested) -> Any:
    """One forward pass of `model`, without gradients, on inputs given as `as_arguments` reads them."""
    args, kwargs = as_arguments(example_inputs)
    with torch.inference_mode(False), torch.no_grad(), slow_attention(), empty_caches():
        given = model(*args, **kwargs)
        return example_inputs.outputs(given) if isinstance(example_inputs, Example) else given


@contextlib.contextmanager
def empty_caches() -> Iterator[None]:
    """Functions that cache their results hold none of ours afterwards, and none of an earlier run's meanwhile."""
    try:
        for cache in _find_caches():
            cache.cache_clear()
        yield
    finally:
        for cache in _find_caches():
            cache.cache_clear()


def _find_caches() -> tuple[Any, ...]:
    """All of them. Each refers to its type, so that a count of these references tells whether there are new ones."""
    count = sys.getrefcount(functools._lru_cache_wrapper)
    found = [held() for held in _scan(count)]
    if None in found:  # another one may have come in its place
        _scan.cache_clear()
        found = [held() for held in _scan(count)]
    return tuple(found)


@functools.lru_cache(maxsize=1)
def _scan(count: int) -> tuple[weakref.ref[Any], ...]:
    """Goes through all objects that Python has, which takes long."""
    kind = functools._lru_cache_wrapper
    found = [item for item in gc.get_referrers(kind) if type(item) is kind]
    kept = (item for item in found if str(item.__module__).partition(".")[0] not in KEPT_CACHES)
    return tuple(map(weakref.ref, kept))


@contextlib.contextmanager
def slow_attention() -> Iterator[None]:
    """`nn.MultiheadAttention` has a fused path that hides its ops; off while we look, then as it was."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
