"""Tensors that are several objects on one memory: `nn.Parameter(other.data)`, or a transpose or a slice of it.

A change of the one is a change of the other, so that training keeps them alike, as it keeps tied weights.
`copy.deepcopy` gives each parameter a memory of its own; here the copies are put on one memory again.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from secateur.errors import PlanError
from secateur.graph.rebuild import Kept

ALIGNED = 16
"""Bytes: no element of any type is larger."""


def overlapping(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """The names of tensors that lie on the same memory, wholly or in part, together; others are left out.

    >>> whole = torch.zeros(2, 3)
    >>> overlapping({"a": whole, "b": whole.t(), "c": torch.zeros(2, 3)})
    (('a', 'b'),)
    >>> overlapping({"left": whole[:, :1], "right": whole[:, 1:]})
    ()
    """
    storages: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.layout is torch.strided and tensor.numel():
            storages.setdefault(tensor.untyped_storage()._cdata, []).append(name)
    found: list[list[str]] = []
    for names in storages.values():
        for near in _in_reach(tensors, names):
            found += _connected(tensors, near)
    place = {name: number for number, name in enumerate(tensors)}
    return tuple(tuple(sorted(names, key=place.__getitem__)) for names in found if len(names) > 1)


def share_cut(old: Mapping[str, Tensor], new: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """The tensors of a cut model that are not simply copied, on one memory wherever the old ones were.

    Views that are the same but for the order of their axes, or axes of size 1, can be cut together.

    Args:
        old: all tensors of the model.
        new: those that the cut changes.
        kept: tensor -> axis -> the indices that stay.

    Returns:
        `new`, and those that share memory though nothing is cut from them.

    Raises:
        PlanError: of two tensors on one memory the plan does not cut both, or not both alike.
    """
    out = dict(new)
    for names in overlapping(old):
        if any(name in new for name in names):
            _check_alike(old, names, kept)
        shared = _on_one_memory([old[name] for name in names], [new.get(name, old[name]) for name in names])
        out.update(zip(names, shared or ()))
    return out


def share_like(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`new`, on one memory wherever the tensors of these names in `old` are and the values allow it."""
    out = dict(new)
    for names in overlapping({name: tensor for name, tensor in old.items() if name in new}):
        shared = _on_one_memory([old[name] for name in names], [new[name] for name in names])
        if shared is not None and all(_equal(tensor, new[name]) for name, tensor in zip(names, shared)):
            out.update(zip(names, shared))
    return out


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte in its storage, and the one after the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    first = int(tensor.storage_offset())
    return first * tensor.itemsize, (first + last + 1) * tensor.itemsize


def _in_reach(tensors: Mapping[str, Tensor], names: Sequence[str]) -> list[list[str]]:
    """Names on one storage in lists of tensors whose spans touch."""
    out: list[list[str]] = []
    reach = 0
    for first, end, name in sorted((*_span(tensors[name]), name) for name in names):
        if not out or first >= reach:
            out.append([])
        out[-1].append(name)
        reach = max(reach, end)
    return out


def _connected(tensors: Mapping[str, Tensor], names: Sequence[str]) -> list[list[str]]:
    """Names in lists of tensors of which each overlaps with another."""
    out: list[list[str]] = []
    for name in names:
        met = [other for other in out if any(_meet(tensors[name], tensors[each]) for each in other)]
        out = [other for other in out if other not in met] + [[name, *itertools.chain(*met)]]
    return out


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on one storage have an element in common."""
    (first, end), (first_b, end_b) = _span(a), _span(b)
    if end <= first_b or end_b <= first:
        return False
    if a.dtype != b.dtype or _same_view(a, b):
        return True
    start = min(first, first_b) // a.itemsize
    taken = torch.zeros(max(end, end_b) // a.itemsize - start, dtype=torch.bool)
    mine, its = (
        taken.as_strided([n if s else 1 for n, s in zip(t.shape, t.stride())], t.stride(), t.storage_offset() - start)
        for t in (a, b)
    )
    mine.fill_(True)
    return bool(its.any())


def _axes(tensor: Tensor) -> list[int]:
    """The axes of more than one index, outermost in memory first."""
    strides = tensor.stride()
    return sorted((d for d, n in enumerate(tensor.shape) if n > 1), key=lambda d: -strides[d])


def _same_view(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on one storage are the same elements, in whatever order of the axes."""
    of_a, of_b = ([(t.shape[d], t.stride(d)) for d in _axes(t)] for t in (a, b))
    return of_a == of_b and int(a.storage_offset()) == int(b.storage_offset()) and a.dtype == b.dtype


def _check_alike(old: Mapping[str, Tensor], names: Sequence[str], kept: Kept) -> None:
    for a, b in itertools.combinations(names, 2):
        cut_a, cut_b = ([kept.get(name, {}).get(d) for d in _axes(old[name])] for name in (a, b))
        if _meet(old[a], old[b]) and not (_same_view(old[a], old[b]) and cut_a == cut_b):
            raise PlanError(
                f"{a} and {b} are two tensors on one memory, and the plan does not cut both alike. Make them one "
                f"parameter (assign the one to the other), or give {b} a memory of its own (a clone), and find the "
                "groups again."
            )


def _on_one_memory(old: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor] | None:
    """What stands for `old`, on one new memory, with the values of `new`; None where their shapes do not allow it."""
    if all(before.shape == after.shape and before.dtype == after.dtype for before, after in zip(old, new)):
        return _uncut(old, new)
    lead = next((i for i, tensor in enumerate(old) if tensor.is_contiguous()), 0)
    sizes = [[after.shape[d] for d in _axes(before)] for before, after in zip(old, new)]
    if not all(_same_view(old[lead], tensor) for tensor in old) or any(each != sizes[lead] for each in sizes):
        return None
    return [_view(old[lead], new[lead], tensor) for tensor in old]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _uncut(old: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
    """The same views on a copy of the memory."""
    spans = [_span(tensor) for tensor in old]
    first = min(start for start, _ in spans) // ALIGNED * ALIGNED
    length = max(end for _, end in spans) - first
    device = old[0].device
    held = torch.empty(0, dtype=torch.uint8, device=device)
    copy = held.set_(old[0].untyped_storage(), first, (length,), (1,)).clone()
    out = []
    for (start, _), before, after in zip(spans, old, new):
        view = torch.empty(0, dtype=before.dtype, device=device)
        view.set_(copy.untyped_storage(), (start - first) // before.itemsize, before.shape, before.stride())
        if after is not before:
            view.copy_(after)
        out.append(view)
    return out


def _view(lead: Tensor, new: Tensor, tensor: Tensor) -> Tensor:
    """The view on `new` that `tensor` is on `lead`."""
    shape, stride = [1] * tensor.ndim, [1] * tensor.ndim
    for mine, its in zip(_axes(tensor), _axes(lead)):
        shape[mine], stride[mine] = new.shape[its], new.stride(its)
    return new.as_strided(shape, stride, new.storage_offset())
