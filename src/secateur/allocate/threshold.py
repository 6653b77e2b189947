"""The magnitude below which weights go: the exact k-th smallest |w| over any number of tensors.

Nothing is concatenated and nothing is sorted. Non-negative floats are ordered like the integers with the same
bits, so the k-th smallest is found by radix select: count the values by their highest 16 bits, see in which
bucket the k-th lies, count that bucket by the next 16 bits, and so on. That is one pass over float16 and
bfloat16, two over float32 and four over float64, piece by piece.

All Ln norms of a single weight, |w|^p for p > 0, have the same order, so no p is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from secateur.errors import PlanError
from secateur.measure.latency import torch_threads

# Elements per piece: few enough for a CPU's cache, and a multiple of 8, so that pieces pack into whole bytes.
CHUNK = 1 << 18
DIGIT = 16
INTEGERS = MappingProxyType(
    {
        torch.float16: torch.int16,
        torch.bfloat16: torch.int16,
        torch.float32: torch.int32,
        torch.float64: torch.int64,
    }
)


@dataclass(frozen=True)
class Threshold:
    """The magnitude of the last weight to go, and how many others share it.

    Args:
        value: the `count`-th smallest magnitude (the smallest of all if `count` is 0).
        count: how many elements are to go.
        below: how many are smaller than `value`; these all go.
        ties: how many equal `value`; the first `count - below` of them go.
        dtype: in which magnitudes are compared, the widest of the tensors', so that none is rounded.
    """

    value: float
    count: int
    below: int
    ties: int
    dtype: torch.dtype

    @property
    def key(self) -> int:
        """`value` as `keys` has it."""
        return int(keys(torch.tensor(self.value, dtype=self.dtype), self.dtype))


def global_threshold(
    tensors: Sequence[Tensor], count: int, *, names: Sequence[str] | None = None
) -> Threshold:
    """The magnitude that parts the `count` smallest elements of all tensors from the rest, exactly.

    Takes `CHUNK` elements and a histogram of 2^16 counts in extra memory, on the device of each tensor.

    Args:
        tensors: of float16, bfloat16, float32 or float64, of any shape and layout in memory. Of mixed dtypes
            the magnitudes are compared in the one that holds them all.
        count: how many elements are to go, 0 to all.
        names: what the tensors are called, for the error messages.

    Raises:
        PlanError: no elements, a count that is more than there are, a NaN, or a dtype that is not a float.

    >>> threshold = global_threshold([torch.tensor([1.0, -3.0]), torch.tensor([[-2.0, 2.0]])], 2)
    >>> threshold.value, threshold.below, threshold.ties
    (2.0, 1, 2)
    """
    labels = [repr(name) for name in names] if names else [f"tensor {i}" for i in range(len(tensors))]
    total = sum(tensor.numel() for tensor in tensors)
    if not 0 <= count <= total or not total:
        raise PlanError(f"cannot prune {count} of {total} weights in {len(tensors)} tensors; choose fewer.")
    dtype = _common_dtype(tensors, labels)
    width = torch.iinfo(INTEGERS[dtype]).bits
    prefix = below = ties = 0
    for shift in range(width - DIGIT, -1, -DIGIT):
        counts = torch.zeros(1 << DIGIT, dtype=torch.int64)
        # Threads gain little on pieces that fit the cache, and cost much where other work keeps the cores busy.
        with torch_threads(1):
            for tensor, label in zip(tensors, labels):
                counts += _histogram(tensor, label, dtype, shift, prefix if shift < width - DIGIT else None)
        ends = below + counts.cumsum(0)
        digit = int(torch.searchsorted(ends, max(count, 1)))
        ties = int(counts[digit])
        below = int(ends[digit]) - ties
        prefix = prefix << DIGIT | digit
    value = torch.tensor(prefix, dtype=INTEGERS[dtype]).view(dtype)
    return Threshold(float(value), count, below, ties, dtype)


def keys(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers in the order of the magnitudes of `values` in `dtype`, of the same shape.

    >>> keys(torch.tensor([0.0, -1.0, 1.0, 2.0]), torch.float32).tolist()
    [0, 1065353216, 1065353216, 1073741824]
    """
    return values.to(dtype).abs().view(INTEGERS[dtype])


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor in pieces that share its memory and hold, one after the other, its elements row by row.

    All but the last have a multiple of 8 elements, at most `CHUNK`. Only a tensor that is not contiguous may
    have larger ones: it is cut into eight rows at least.

    >>> [piece.numel() for piece in chunks(torch.zeros(1000, 1000))]
    [262144, 262144, 262144, 213568]
    """
    tensor = tensor.detach()
    if tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), CHUNK)
    else:
        row = tensor[0].numel()
        yield from torch.split(tensor, max(CHUNK // row // 8 * 8, 8))


def _common_dtype(tensors: Sequence[Tensor], labels: Sequence[str]) -> torch.dtype:
    common = tensors[0].dtype
    for tensor, label in zip(tensors, labels):
        if tensor.dtype not in INTEGERS:
            known = ", ".join(str(dtype) for dtype in INTEGERS)
            raise PlanError(f"{label} is {tensor.dtype}; weights are ranked in {known}: convert it first.")
        common = torch.promote_types(common, tensor.dtype)
    return common


def _histogram(tensor: Tensor, label: str, dtype: torch.dtype, shift: int, prefix: int | None) -> Tensor:
    """How often each digit at `shift` occurs in the magnitudes that begin with `prefix`; NaN is refused."""
    counts = torch.zeros(1 << DIGIT, dtype=torch.int64, device=tensor.device)
    infinity = int(keys(torch.tensor(torch.inf, dtype=dtype), dtype))
    for piece in chunks(tensor):
        if not piece.numel():
            continue
        found = keys(piece, dtype).reshape(-1)
        if prefix is None:
            # Only NaN has a key beyond that of infinity.
            if int(found.max()) > infinity:
                raise PlanError(f"{label} holds NaN, which has no rank among weights; look at its training.")
        else:
            found = found[found >> (shift + DIGIT) == prefix]
        counts += torch.bincount(found >> shift & (1 << DIGIT) - 1, minlength=1 << DIGIT)
    return counts.cpu()
