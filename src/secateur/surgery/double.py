"""Models run in float64, and how far apart what they give is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.graph.decisions import Decision, Following
from secateur.graph.nested import map_tensors, tensors_in
from secateur.graph.rebuild import share
from secateur.graph.twin import as_kind, duplicate, run, tensors_of

MAKERS = frozenset((torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn))
DRAWS = frozenset("bernoulli uniform normal exponential rand randn rand_like randn_like".split())
LOW = frozenset((torch.float32, torch.float16, torch.bfloat16))

Decisions = Mapping[tuple[str, int], Decision | None]


class Double(TorchFunctionMode):
    """A model that makes or casts to less than float64 inside gets float64 there as well."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        if func in MAKERS:
            kwargs = {"dtype": torch.float64, **(kwargs or {})}
        args = tuple(_doubled(arg) for arg in args)
        kwargs = {name: _doubled(arg) for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _doubled(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in LOW else argument


class Still(TorchDispatchMode):
    """Every random draw of independent numbers gives the same one, so that models of two sizes draw alike.

    A cut model draws fewer numbers, so none of them would be that of the whole model. As they are independent, units
    that stay draw from the distribution they drew from before; all else is compared.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.strip("_")
        if name in DRAWS:
            return given.fill_(1.0 if name == "bernoulli" else 0.7)
        return (args[0].clone(), torch.ones_like(given[1])) if name == "native_dropout" else given


def doubled(model: nn.Module) -> nn.Module:
    """A copy of the model in float64 and eval mode, to be changed; to run one, `widened` takes less memory."""
    # Not first copied as they are, which would take half as much memory again.
    wide = {id(tensor): as_kind(tensor.detach().double(), tensor) for tensor in low_tensors(model)}
    return duplicate(model, wide).double().eval()


def low_tensors(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers that are less precise than float64, and of no special kind."""
    return [t for t in tensors_of(model).values() if t.dtype in LOW and type(t) in (Tensor, nn.Parameter)]


def as_double(tensor: Tensor) -> Tensor:
    """Floating tensors in float64, others as they are."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.to(torch.complex128).resolve_conj())
    return tensor.double() if tensor.is_floating_point() else tensor


def outputs(
    model: nn.Module,
    inputs: Any,
    follow: Decisions = MappingProxyType({}),
    within: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
) -> list[Tensor]:
    """The tensors that the model gives, with the same random numbers in every run, and what led to its decisions.

    Where units draw numbers of their own, these stand still (see `Still`). A copy is run, so that what a model caches
    or counts in one run is not there in the next.

    Args:
        follow: decisions of another run, to be taken here as well.
        within: of the copy that runs, a context for the run.
    """
    twin, inputs = share(model), map_tensors(torch.clone, inputs)
    with torch.random.fork_rng(), Still(), Following(follow) as following, within(twin):
        torch.manual_seed(0)
        given = list(tensors_in(run(twin, inputs)))
    return [as_double(tensor) for tensor in (*given, *following.led)]


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest difference over all tensors, as a share of the largest value of each; inf if shapes differ."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    shares = [_share(x, y) for x, y in zip(a, b) if x.is_floating_point() and x.numel()]
    return max(shares, default=0.0)


def _share(x: Tensor, y: Tensor) -> float:
    scale = float(x.abs().nan_to_num(posinf=0.0).max()) or 1.0
    off = float((x - y).abs().masked_fill(x == y, 0.0).max()) / scale  # infinity less infinity is not a number
    return off if np.isfinite(off) else float("inf")
