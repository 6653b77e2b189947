"""Fake tensors on which the commonest ops take no time.

torch's `FakeTensorMode` knows the shapes that any op makes, and spends most of its time on what is rare: other devices,
constants, symbols, layouts. Here an op of the table is done at once where all is plain: a formula gives its shapes, or
its own kernel for shapes runs. What is not plain, or does not fit, goes to torch, which raises the errors as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

Shape = Sequence[int]
Formula = Callable[..., tuple[Shape, ...] | None]
"""Arguments of an op -> its outputs' shapes, contiguous and of the operands' dtype; None where it does not fit."""

ATEN = torch.ops.aten


class QuickFakes(FakeTensorMode):
    """The mode that runs what is within it on shapes alone.

    >>> with QuickFakes():
    ...     torch.nn.functional.conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3)).shape
    torch.Size([1, 4, 6, 6])
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._patterns: dict[torch.device, FakeTensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = self.quickly(func, args, kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs or {}) if made is None else made

    def new(self, shape: Shape, dtype: torch.dtype, device: torch.device, like: Tensor | None = None) -> Tensor:
        """A contiguous fake tensor; a parameter, if it is to be `like` one.

        What `FakeTensor` does besides takes longer than all the rest; it does it once, and what it notes is copied.
        """
        with torch._C._DisableTorchDispatch():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            pattern = self._patterns.get(device)
            if pattern is None:
                pattern = self._patterns[device] = FakeTensor(self, empty.detach(), device)
            own = pattern.fake_device
            made = Tensor._make_subclass(FakeTensor, empty, False, dispatch_device=True, device_for_backend_keys=own)
            vars(made).update(vars(pattern))
            if like is not None:
                made.requires_grad_(like.requires_grad)._is_param = True
            return made

    def quickly(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the op makes; None if that takes torch itself."""
        if func is DEVICE:
            return args[0].fake_device if type(args[0]) is FakeTensor and not self.in_kernel_invocation else None
        if func is ATEN.empty.memory_format:
            return self._empty(*args, **kwargs)
        formula = FORMULAS.get(func)
        if formula is None and func not in KERNELS:
            return None
        tensors = _tensors(args)
        if not tensors or not all(self._plain(tensor, tensors[0]) for tensor in tensors):
            return None
        if formula is None:
            return self._by_kernel(func, args, kwargs, tensors[0].fake_device)
        x = tensors[0]
        if not x.dtype.is_floating_point or not all(t.dtype is x.dtype and _orderly(func, t) for t in tensors):
            return None
        shapes = formula(*args, **kwargs)
        if shapes is None:
            return None
        if func in IN_PLACE:
            return x if shapes[0] == x.shape else None
        made = tuple(self.new(shape, x.dtype, x.fake_device) for shape in shapes)
        return made if len(made) > 1 else made[0]

    def _plain(self, tensor: Any, other: Any) -> bool:
        return (
            type(tensor) is FakeTensor
            and tensor.constant is None
            and tensor.fake_mode is self
            and tensor.fake_device == other.fake_device
        )

    def _empty(self, shape: Shape, dtype: Any = None, layout: Any = None, device: Any = None, **other: Any) -> Any:
        if dtype is None or device is None or any(other.values()) or layout not in (None, torch.strided):
            return None
        return self.new(shape, dtype, torch.device(device))

    def _by_kernel(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> Any:
        try:
            with in_kernel_invocation_manager(self):
                made = func(*args, **kwargs)
                wrapped = [FakeTensor(self, t, device) for t in (made if isinstance(made, tuple | list) else [made])]
        except RuntimeError:  # torch says it in its own words
            return None
        return type(made)(wrapped) if isinstance(made, tuple | list) else wrapped[0]


def _tensors(args: Sequence[Any]) -> list[Any]:
    return [t for arg in args for t in (arg if isinstance(arg, tuple | list) else (arg,)) if isinstance(t, Tensor)]


def _orderly(func: Any, tensor: Tensor) -> bool:
    return tensor.is_contiguous() or func is ATEN.addmm.default


def same(x: Tensor, *numbers: Any, **_: Any) -> tuple[Shape, ...] | None:
    """Elementwise, of one tensor."""
    return None if complex in map(type, numbers) else (x.shape,)


def broadcast(a: Tensor, b: Any, **_: Any) -> tuple[Shape, ...] | None:
    """Elementwise, of two tensors, or of one and a number."""
    if isinstance(b, int | float) or a.shape == b.shape:
        return (a.shape,)
    rank = max(a.ndim, b.ndim)
    left, right = ((1,) * (rank - t.ndim) + tuple(t.shape) for t in (a, b))
    if any(m != n and 1 not in (m, n) for m, n in zip(left, right)):
        return None
    return (tuple(n if m == 1 else m for m, n in zip(left, right)),)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    transposed: bool,
    _: Shape,
    groups: int,
) -> tuple[Shape, ...] | None:
    """(n, i, ...), (o, i / groups, ...), (o) -> (n, o, ...)."""
    rank = len(stride)
    fits = x.ndim == weight.ndim == rank + 2 and len(padding) == len(dilation) == rank
    if transposed or not fits or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    steps = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    space = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in steps]
    out = (x.shape[0], weight.shape[0], *space)
    return (out,) if min(*out, *x.shape) > 0 and _each((bias,), weight.shape[:1]) else None


def batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *_: Any
) -> tuple[Shape, ...] | None:
    """(n, c, ...), and four of (c) -> the same, and in training the statistics of the batch."""
    fits = x.ndim > 1 and _each((weight, bias, mean, variance), x.shape[1:2])
    if not fits or x.device.type != "cpu" or not x.numel() or (not training and (mean is None or variance is None)):
        return None
    saved = x.shape[1:2] if training else (0,)
    return x.shape, saved, saved


def layer_norm(x: Tensor, size: Shape, weight: Any, bias: Any, _: float) -> tuple[Shape, ...] | None:
    """(..., size), and two of (size) -> the same, and the statistics of (..., 1)."""
    first = x.ndim - len(size)
    if tuple(x.shape[first:]) != tuple(size) or not _each((weight, bias), size) or x.device.type != "cpu":
        return None
    saved = (*x.shape[:first], *[1] * len(size))
    return x.shape, saved, saved


def addmm(bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> tuple[Shape, ...] | None:
    """(n), (m, k), (k, n) -> (m, n)."""
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] and bias.shape == b.shape[1:]
    return ((a.shape[0], b.shape[1]),) if fits else None


def mean(x: Tensor, dims: Any, keepdim: bool = False, dtype: Any = None) -> tuple[Shape, ...] | None:
    """The axes `dims` become 1 long, or go."""
    if dtype or not dims or not all(-x.ndim <= d < x.ndim for d in dims) or len({d % x.ndim for d in dims}) < len(dims):
        return None
    over = {d % x.ndim for d in dims}
    if keepdim:
        return (tuple(1 if d in over else n for d, n in enumerate(x.shape)),)
    return (tuple(n for d, n in enumerate(x.shape) if d not in over),)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> tuple[Shape, ...] | None:
    """All alike but along `dim`."""
    rank = tensors[0].ndim
    if not -rank <= dim < rank:
        return None
    shapes = [list(t.shape) for t in tensors]
    long = sum(shape.pop(dim) for shape in shapes if len(shape) == rank)
    whole = list(tensors[0].shape)
    whole[dim] = long
    return (whole,) if all(shape == shapes[0] for shape in shapes) else None


def _each(tensors: Sequence[Tensor | None], shape: Shape) -> bool:
    return all(tensor is None or tuple(tensor.shape) == tuple(shape) for tensor in tensors)


def _ops(names: str) -> list[Any]:
    """ATen ops by name; their usual overload, or the one named."""
    found = (name.partition(".") for name in names.split())
    return [getattr(getattr(ATEN, name), overload or "default") for name, _, overload in found]


DEVICE = torch.ops.prim.device.default

_SAME = """
    relu sigmoid hardsigmoid hardswish silu gelu tanh elu leaky_relu exp rsqrt sqrt softplus hardtanh
    relu_ sigmoid_ hardsigmoid_ hardswish_ silu_ gelu_ tanh_ elu_ leaky_relu_ hardtanh_ pow.Tensor_Scalar
"""
_BROADCAST = "add.Tensor sub.Tensor mul.Tensor div.Tensor add_.Tensor sub_.Tensor mul_.Tensor div_.Tensor"

_TABLE: tuple[tuple[str, Formula], ...] = (
    (_SAME, same),
    (_BROADCAST, broadcast),
    ("convolution", convolution),
    ("native_batch_norm", batch_norm),
    ("native_layer_norm", layer_norm),
    ("addmm", addmm),
    ("mean.dim", mean),
    ("cat", cat),
)
FORMULAS: Mapping[Any, Formula] = MappingProxyType(
    {op: formula for names, formula in _TABLE for op in _ops(names)}
)

IN_PLACE = frozenset(func for func in FORMULAS if func.overloadpacket.__name__.endswith("_"))

KERNELS = frozenset(
    _ops(
        """
        view _unsafe_view permute t transpose.int slice.Tensor select.int unsqueeze squeeze.dim squeeze.dims expand
        unbind.int split.Tensor split_with_sizes clone detach alias mm bmm _softmax max_pool2d_with_indices avg_pool2d
        _adaptive_avg_pool2d constant_pad_nd
        """
    )
)
"""Ops whose kernel for shapes is quick."""
