"""Weights that are float64 to whoever reads them, and take up no more memory than they did.

A proof in float64 needs each weight so only while an op reads it, while a copy of all of them would be twice a model.
Shuffled or cut, they are read in another order, or in part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import CaptureError
from secateur.graph.axes import refs_in
from secateur.graph.capture import Trace
from secateur.graph.nested import map_tensors
from secateur.graph.rebuild import select
from secateur.graph.twin import as_kind, duplicate
from secateur.graph.units import Ids
from secateur.surgery.double import doubled, low_tensors

Seen = TypeVar("Seen")

Places = Mapping[int, Ids]
"""Axis -> where each index along it is read from; along other axes all are read as they are."""


class Widened(Tensor):
    """A tensor of float64 that is kept as one of another dtype. What is written to it is kept in float64.

    Args:
        kept: its values, which are never written to.
        places: what of them it has, and in which order.
    """

    kept: Tensor
    places: Places

    @staticmethod
    def __new__(cls, kept: Tensor, places: Places = MappingProxyType({})) -> Widened:
        shape = [len(places[dim]) if dim in places else size for dim, size in enumerate(kept.shape)]
        strides = None if places else torch.empty_like(kept, device="meta").stride()  # as `double` lays it out
        made: Widened = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=torch.float64, device=kept.device
        )
        torch._C._set_throw_on_mutable_data_ptr(made)  # an error to who asks for its memory, and not address 0
        made.kept, made.places = kept.resolve_neg(), places
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made = memo[id(self)] = as_kind(type(self)(self.kept, self.places), self)
        return made

    @property
    def data(self) -> Tensor:
        """As of any tensor; what is assigned to it is no op that could be seen."""
        return Tensor.data.__get__(self)  # type: ignore[attr-defined,no-any-return]

    @data.setter
    def data(self, value: Tensor) -> None:
        if value is self:
            return
        if value.shape != self.shape:
            raise RuntimeError(f"a weight of shape {tuple(self.shape)} cannot become one of {tuple(value.shape)}")
        given = value if isinstance(value, Widened) else Widened(value.detach())
        self.kept, self.places = given.kept, given.places

    def reorder(self, dim: int, places: Ids) -> None:
        """From now on index i along `dim` is what was at `places[i]`, a permutation."""
        self.places = self.at(dim, places)

    def at(self, dim: int, places: Ids) -> Places:
        """The places of these indices along `dim`."""
        found = self.places[dim][places] if dim in self.places else places
        whole = len(found) == self.kept.shape[dim] and bool((found == np.arange(len(found))).all())
        return {**{d: p for d, p in self.places.items() if d != dim}, **({} if whole else {dim: found})}

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:  # as a parameter is made
            return cls(args[0].kept, args[0].places)
        read: dict[int, tuple[Widened, Tensor]] = {}

        def widen(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, cls):
                return tensor
            if id(tensor) not in read:
                read[id(tensor)] = tensor, widest(tensor)
            return read[id(tensor)][1]

        args, kwargs = map_tensors(widen, (tuple(args), dict(kwargs or {})))
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            for held, wide in read.values():
                held.kept, held.places = wide, {}
        return result


@select.register
def _(tensor: Widened, dim: int, indices: Tensor) -> Tensor:
    return Widened(tensor.kept, tensor.at(dim, indices.cpu().numpy()))


def widest(tensor: Tensor) -> Tensor:
    """The values of a `Widened`; any other tensor as it is."""
    if not isinstance(tensor, Widened):
        return tensor
    values = tensor.kept
    for dim, places in tensor.places.items():
        values = values.index_select(dim, torch.from_numpy(places).to(values.device))
    return values.double() if values.dtype != torch.float64 else values.clone()


def widened(model: nn.Module) -> nn.Module:
    """A copy of the model in float64 and eval mode: parameters `Widened`, on the model's memory; buffers copied."""
    low = low_tensors(model)
    made = [Widened(t.detach()) if isinstance(t, nn.Parameter) else t.detach().double() for t in low]
    wide = {id(old): as_kind(new, old) for old, new in zip(low, made)}
    return duplicate(model, wide).double().eval()


def in_double(
    model: nn.Module, look: Callable[[nn.Module], tuple[Seen, Trace]]
) -> tuple[Callable[[nn.Module], nn.Module], nn.Module, Seen]:
    """How a model is copied to run in float64, such a copy, and what was seen of a run of it.

    It is `widened`, unless the model writes to its weights, which that might lose, or goes round torch to their memory.

    Args:
        look: runs the copy under a recorder; gives what it saw and the trace.
    """
    with contextlib.suppress(CaptureError):
        seen, trace = look(twin := widened(model))
        if not _writes_to_weights(trace):
            return widened, twin, seen
    seen, _ = look(twin := doubled(model))
    return doubled, twin, seen


def _writes_to_weights(trace: Trace) -> bool:
    """Whether a run writes into a parameter, also by a view of it."""
    held = {number for number, value in enumerate(trace.values) if value.origin == "parameter"}
    for call in trace.calls:
        arguments = call.op._schema.arguments
        given = {**dict(zip((argument.name for argument in arguments), call.args)), **call.kwargs}
        for name, alias in ((argument.name, argument.alias_info) for argument in arguments):
            if alias is not None and held.intersection(ref.id for ref in refs_in(given.get(name))):
                if alias.is_write:
                    return True
                held |= {ref.id for ref in call.outputs if ref is not None}
    return False
