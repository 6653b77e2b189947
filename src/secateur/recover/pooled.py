"""What a model does with a whole batch, done across the slices that several processes have of it.

Two things in a model's forward pass look beyond one image: batch norm, whose statistics are the batch's, and random
draws, such as dropout's, of which one process makes those of the whole batch at once. `Pooled` finds their functions
wherever a model calls them, so that the model itself stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from secateur.errors import TrainingError


class Slice:
    """The rows of a batch that are this process's.

    A batch with fewer images than processes is not parted: each process computes all of it.

    >>> part = Slice()
    >>> part.of(7, 1, 2)
    >>> part.rows, part.count, part.even
    (slice(3, 7, None), 4, False)
    """

    def __init__(self) -> None:
        self.rows = slice(None)
        self.images, self.count, self.size, self.parted = 0, 0, 1, False

    def of(self, images: int, rank: int, size: int) -> None:
        """The slice of process `rank` of `size`, of a batch of so many images."""
        self.parted = images >= size
        start, stop = (rank * images // size, (rank + 1) * images // size) if self.parted else (0, images)
        self.rows, self.images, self.count, self.size = slice(start, stop), images, stop - start, size

    @property
    def even(self) -> bool:
        """Whether all processes have as many rows."""
        return not self.parted or self.images % self.size == 0

    def times(self, tensor: Tensor) -> int:
        """How many rows of the tensor are one image's; 0 if its first axis is not the images'."""
        return len(tensor) // self.count if tensor.ndim and not len(tensor) % self.count else 0


class Pooled(TorchFunctionMode):
    """Within it, what looks at a whole batch takes the slices of all processes for it."""

    def __init__(self, slice: Slice) -> None:
        super().__init__()
        self.slice = slice

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        own = POOLED.get(func) if self.slice.parted else None
        if own is not None:
            return own(func, self.slice, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def in_modules(self) -> Iterator[None]:
        """In force while a module runs: for checkpointed ones, which the backward pass runs again."""
        depth = 0

        def enter(module: nn.Module, args: Any) -> None:
            nonlocal depth
            if not depth:
                self.__enter__()  # type: ignore[no-untyped-call]
            depth += 1

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal depth
            depth -= 1
            if not depth:
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def whole(value: Any, part: Slice) -> Any:
    """What the slices of all processes gave, in the order of the images; what is no tensor is left as it is.

    Args:
        value: (k * count, ...), k rows for each image of this process's slice.
        part: whose slice it is.

    Returns:
        (k * images, ...), float32 at least. Every process goes on with all of it alike, and only its own slice's
        gradient comes back, times the number of processes, for the gradients of parameters are averaged.

    Raises:
        TrainingError: the first axis is not that of the images.
    """
    if not isinstance(value, Tensor) or not part.parted:
        return value
    if not part.times(value):
        raise TrainingError(
            f"there is an output {tuple(value.shape)} for {part.count} images; in several processes, what a model or a "
            "matched layer gives needs its images along the first axis."
        )
    out: Tensor = _Whole.apply(value.float() if value.dtype in (torch.bfloat16, torch.float16) else value, part)
    return out


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, part: Slice) -> Tensor:
        times = part.times(value)
        ctx.rows = slice(times * part.rows.start, times * part.rows.stop)
        ctx.size = part.size
        out = value.new_zeros((times * part.images, *value.shape[1:]))
        out[ctx.rows] = value
        distributed.all_reduce(out)  # zeros from all but one: exact
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope[ctx.rows] * ctx.size, None


def _batch_norm(
    func: Callable[..., Tensor],
    part: Slice,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `functional.batch_norm`, with the statistics of all slices."""
    if not training or not part.times(input):
        return func(input, running_mean, running_var, weight, bias, training, momentum, eps)
    mean, var, count = _statistics(input.detach(), part.size)
    with torch.no_grad():
        for running, now in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
            if running is not None:
                running.mul_(1 - momentum).add_(now.to(running.dtype), alpha=momentum)
    out: Tensor = _Normalised.apply(input, weight, bias, mean, var, count, eps)
    return out


def _statistics(input: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of each channel over all slices, (channels,), and the values that were averaged; float64.

    Each process's mean and variance go to all of them, and are combined as by Chan et al. 1979 (Updating formulae and
    a pairwise algorithm for computing sample variances, eq. 2.1): a sum of squares would lose small variances.
    """
    axes = [axis for axis in range(input.ndim) if axis != 1]
    var, mean = torch.var_mean(_wide(input), axes, correction=0)
    channels = len(mean)
    rows = torch.zeros(size, 2 * channels + 1, dtype=torch.float64, device=input.device)
    own = rows[distributed.get_rank()]
    own[:channels], own[channels:-1], own[-1] = mean, var, input.numel() // channels
    distributed.all_reduce(rows)
    means, variances, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
    shares = counts / counts.sum()
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean).square())).sum(0), counts.sum()


class _Normalised(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, where mean and var are those of all slices of x.

    The gradient is that of batch norm (Ioffe and Szegedy 2015, Batch Normalization, section 3), its two sums over the
    batch taken over all slices.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        mean, var = mean.to(_wide(input).dtype), var.to(_wide(input).dtype)
        ctx.save_for_backward(input, weight, mean, (var + eps).rsqrt(), count)
        return functional.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, scale, count = ctx.saved_tensors
        shape = [1, -1, *[1] * (input.ndim - 2)]
        axes = [axis for axis in range(input.ndim) if axis != 1]
        slope, centred = _wide(slope), _wide(input) - mean.view(shape)
        sums = torch.stack([slope.sum(axes), (slope * centred).sum(axes) * scale])
        own = sums.clone()
        distributed.all_reduce(sums)
        factor = scale if weight is None else scale * weight.to(scale.dtype)
        along, across = (-(factor * each / count).to(factor.dtype) for each in sums)
        out = centred.mul_((across * scale).view(shape)).add_(along.view(shape)).addcmul_(slope, factor.view(shape))
        needs = ctx.needs_input_grad
        return (
            out.to(input.dtype),
            own[1].to(weight.dtype) if needs[1] else None,
            own[0].to(weight.dtype) if needs[2] else None,
            *[None] * 4,
        )


def _noise(
    func: Callable[..., Tensor],
    part: Slice,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    """As a dropout that multiplies, of which the whole batch's noise is drawn in each process."""
    if not training or not part.times(input):
        return func(input, p, training, inplace)
    return input * func(_like_whole(input, part).fill_(1.0), p, True, False)[_rows(input, part)]


def _bernoulli(func: Callable[..., Tensor], part: Slice, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As `Tensor.bernoulli_` with one probability for all."""
    share = args[0] if args else kwargs.get("p", 0.5)
    if isinstance(share, Tensor) or not part.times(input):
        return func(input, *args, **kwargs)
    return input.copy_(func(_like_whole(input, part), *args, **kwargs)[_rows(input, part)])


def _like_whole(input: Tensor, part: Slice) -> Tensor:
    """Memory for the whole batch of what `input` is the slice of, in the same order of axes: draws fill it in that."""
    strides = input.stride()
    order = sorted(range(input.ndim), key=lambda axis: (-strides[axis], axis))
    shape = (part.times(input) * part.images, *input.shape[1:])
    return torch.empty_permuted(shape, order, dtype=input.dtype, device=input.device)


def _rows(input: Tensor, part: Slice) -> slice:
    times = part.times(input)
    return slice(times * part.rows.start, times * part.rows.stop)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


POOLED: Mapping[Any, Callable[..., Tensor]] = MappingProxyType(
    {
        functional.batch_norm: _batch_norm,
        functional.dropout: _noise,
        functional.dropout1d: _noise,
        functional.dropout2d: _noise,
        functional.dropout3d: _noise,
        Tensor.bernoulli_: _bernoulli,
    }
)
"""torch's function -> what does it for all slices; drop path (timm, torchvision) draws by `bernoulli_`."""
