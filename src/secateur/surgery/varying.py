"""Which numbers of a forward pass depend on its input, and which are the same for every input of these shapes.

For every value of the trace a tensor of truths of its shape, `varies`, is computed beside it, op by op: a sum varies
if a term does, a product only if a factor varies and the other may be other than zero. So a channel whose weights are
all zero does not vary, nor does what comes of it; what it is then can be read off any run. A channel that merely was
zero on some inputs does vary. What an op makes that is not in the table varies throughout if an operand does anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from secateur.graph.axes import refs_in
from secateur.graph.capture import Call, Ref, Trace, Value, op_name
from secateur.graph.nested import map_tensors
from secateur.graph.rules import ELEMENTWISE
from secateur.surgery.wiring import BATCH_NORMS, factors, trains

Shapes = Sequence[tuple[int, ...]]
Rule = Callable[["Operation"], list[Tensor] | Tensor]


@dataclass(frozen=True)
class Operation:
    """A call about to be executed: its operands with what varies of each, and the shapes of its outputs."""

    call: Call
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[Tensor, ...]
    varying: tuple[Tensor, ...]
    shapes: Shapes

    def of(self, argument: object) -> Tensor | None:
        """What varies of an argument, given as the call's own `Ref`; None for an absent one."""
        position = self._position(argument)
        return None if position is None else self.varying[position]

    def live(self, argument: object) -> Tensor:
        """Where an argument may be other than zero."""
        position = self._position(argument)
        assert position is not None
        return self.varying[position] | (self.operands[position] != 0)

    def again(self, operands: Sequence[Tensor]) -> Any:
        """The op on other tensors."""
        left = iter(operands)
        args, kwargs = map_tensors(lambda _: next(left), (tuple(self.args), dict(self.kwargs)))
        return self.call.op(*args, **kwargs)

    def _position(self, argument: object) -> int | None:
        refs = list(refs_in((self.call.args, dict(self.call.kwargs))))
        return refs.index(argument) if isinstance(argument, Ref) else None


def anything(at: Operation) -> Tensor:
    """What no rule knows: all of it varies if anything does."""
    return torch.stack([v.any() for v in at.varying]).any()


def elementwise(at: Operation) -> Tensor:
    """Each number varies if one of those it is made of does."""
    return _either(at.varying)


def _either(parts: Sequence[Tensor]) -> Tensor:
    out = parts[0]
    for part in parts[1:]:
        out = out | part
    return out


def multiply(at: Operation) -> Tensor:
    """Zero times anything is zero."""
    if len(at.operands) == 1:
        return at.varying[0]
    a, b = (v | (x != 0) for v, x in zip(at.varying, at.operands))
    return _either(at.varying) & a & b


def copy(at: Operation) -> Tensor:
    """copy_(self, source)."""
    return at.varying[1]


def matmul(at: Operation) -> Tensor:
    """A sum of products, plus a bias."""
    sides = factors(at.call)
    assert sides is not None
    (a, _), (b, _) = sides
    moves = [at.of(ref) for ref in (a, b)]
    lives = [at.live(ref) for ref in (a, b)]
    terms = _product(moves[0], lives[1]) | _product(lives[0], moves[1])
    bias = at.of(at.call.args[0]) if op_name(at.call) in ("addmm", "baddbmm") else None
    return terms if bias is None else terms | bias


def _product(a: Tensor | None, b: Tensor | None) -> Tensor:
    assert a is not None
    assert b is not None
    return torch.matmul(a.to(torch.float32), b.to(torch.float32)) > 0.5


def convolution(at: Operation) -> Tensor:
    """Channel by channel: all positions of a channel are taken together."""
    x, weight, bias = at.call.args[:3]
    transposed, groups = at.call.args[6], at.call.args[8]
    rank = len(at.shapes[0]) - 2
    moves = [_over(v, range(2, 2 + rank)) for v in (at.of(x), at.of(weight)) if v is not None]
    lives = [_over(v, range(2, 2 + rank)) for v in (at.live(x), at.live(weight))]

    def mixed(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.to(torch.float32), b.to(torch.float32)
        one, none = [1] * rank, [0] * rank
        return torch.convolution(a, b, None, one, none, one, transposed, none, groups) > 0.5

    out = mixed(moves[0], lives[1]) | mixed(lives[0], moves[1])
    offset = at.of(bias)
    return out if offset is None else out | _along(offset, 1, rank + 2)


def _over(varies: Tensor, dims: Sequence[int] | range) -> Tensor:
    """Whether anything varies along these axes, which are kept with size 1."""
    return varies.any(dim=tuple(dims), keepdim=True) if len(dims) else varies


def _along(vector: Tensor, dim: int, rank: int) -> Tensor:
    """A vector along axis `dim` of `rank`."""
    shape = [1] * rank
    shape[dim] = -1
    return vector.reshape(shape)


def batch_norm(at: Operation) -> Tensor:
    """Each channel by itself; where the batch gives the statistics, all that a channel holds is taken together."""
    x, rank = at.varying[0], len(at.shapes[0])
    if trains(at.call):
        x = _over(x, [0, *range(2, rank)])
    given = [at.of(ref) for ref in at.call.args[3:5]]
    return _scaled(at, _either([x, *(_along(v, 1, rank) for v in given if v is not None)]), 1)


def _scaled(at: Operation, x: Tensor, dim: int) -> Tensor:
    """After a scale and an offset along one axis; a scale of zero stops all."""
    rank = len(at.shapes[0])
    for position in (1, 2):
        ref = at.call.args[position]
        varies = at.of(ref)
        if varies is not None and position == 1:
            x = (x | _along(varies, dim, rank)) & _along(at.live(ref), dim, rank)
        elif varies is not None:
            x = x | _along(varies, dim, rank)
    return x


def layer_norm(at: Operation) -> Tensor:
    """(x, normalized_shape, weight, bias): the normalised axes are taken together."""
    x, rank, count = at.varying[0], len(at.shapes[0]), len(at.call.args[1])
    x = _over(x, range(rank - count, rank))
    weight, bias = (at.call.args[i] if i < len(at.call.args) else None for i in (2, 3))
    if isinstance(weight, Ref):
        x = (x | _known(at.of(weight))) & at.live(weight)
    return x | _known(at.of(bias)) if isinstance(bias, Ref) else x


def _known(varies: Tensor | None) -> Tensor:
    assert varies is not None
    return varies


def group_norm(at: Operation) -> Tensor:
    """(x, weight, bias, n, c, positions, groups): each norm group is taken together."""
    x, shape, groups = at.varying[0], at.shapes[0], at.call.args[6]
    mixed = x.reshape(shape[0], groups, -1).any(-1).repeat_interleave(shape[1] // groups, 1)
    return _scaled(at, mixed.reshape(*shape[:2], *([1] * (len(shape) - 2))), 1)


def along_axis(at: Operation) -> Tensor:
    """softmax, cumsum and their like: the axis is taken together."""
    return _over(at.varying[0], [at.call.args[1]])


def reduction(at: Operation) -> list[Tensor]:
    """sum, mean, amax, ...: (x, dims, keepdim)."""
    x, args = at.varying[0], at.call.args
    wanted = args[1] if len(args) > 1 else at.call.kwargs.get("dim")
    dims = range(x.ndim) if wanted in (None, []) else [wanted] if isinstance(wanted, int) else wanted
    return [_over(x, dims).reshape(shape) for shape in at.shapes]


def spatial(count: int) -> Rule:
    """Pooling, interpolation and padding of the last `count` axes: all positions are taken together."""

    def rule(at: Operation) -> list[Tensor]:
        whole = _over(at.varying[0], range(-count, 0))
        return [whole for _ in at.shapes]

    return rule


def attention(at: Operation) -> Tensor:
    """Fused attention: a mean of values, so zero where they all are."""
    if not any(bool(v.any()) for v in at.varying):
        return at.varying[0].any()
    return _over(at.live(at.call.args[2]), [-2])


def embedding(at: Operation) -> Tensor:
    """(weight, indices): a column varies with the index unless it is the same for all."""
    weight, varies = at.operands[0], at.of(at.call.args[0])
    column = _known(varies).any(0)
    if bool(at.varying[1].any()):
        column = column | (weight != weight[:1]).any(0)
    return column


def moved(at: Operation) -> list[Tensor]:
    """A view: the op itself, on the truths, so that what is written into it later is seen in the whole."""
    if op_name(at.call) in ("view", "unsafe_view", "reshape", "reshape_alias"):
        return [at.varying[0].reshape(at.shapes[0])]
    if op_name(at.call) in ("alias", "detach", "lift_fresh"):
        return [at.varying[0]]
    out = at.again(at.varying)
    return list(out) if isinstance(out, tuple | list) else [out]


def rearranged(at: Operation) -> Tensor:
    """A copy in another order: the op itself, on ones and zeros."""
    out: Tensor = at.again([v.to(torch.float32) for v in at.varying])
    return out > 0.5


def pad(at: Operation) -> Tensor:
    """constant_pad_nd: what is padded on is a constant."""
    x: Tensor = torch.ops.aten.constant_pad_nd(at.varying[0].to(torch.float32), at.call.args[1], 0.0)
    return x > 0.5


RULES: Mapping[str, Rule] = MappingProxyType(
    dict.fromkeys(ELEMENTWISE | {"to_copy", "clone", "contiguous"}, elementwise)
    | {"mul": multiply, "copy": copy, "convolution": convolution, "embedding": embedding, "constant_pad_nd": pad}
    | dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), matmul)
    | dict.fromkeys((*BATCH_NORMS, "native_batch_norm_legit"), batch_norm)
    | {"native_layer_norm": layer_norm, "native_group_norm": group_norm}
    | dict.fromkeys(("softmax", "log_softmax", "safe_softmax", "cumsum"), along_axis)
    | dict.fromkeys(("sum", "mean", "amax", "amin", "var", "std", "var_mean", "logsumexp"), reduction)
    | {f"{name}{n}d": spatial(n) for n in (1, 2, 3) for name in ("avg_pool", "adaptive_avg_pool", "upsample_nearest")}
    | {f"max_pool{n}d_with_indices": spatial(n) for n in (1, 2, 3)}
    | {f"{name}_pad{n}d": spatial(n) for n in (1, 2, 3) for name in ("reflection", "replication")}
    | dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest_exact2d"), spatial(2))
    | dict.fromkeys(
        (
            "scaled_dot_product_flash_attention_for_cpu",
            "scaled_dot_product_flash_attention",
            "scaled_dot_product_efficient_attention",
            "scaled_dot_product_cudnn_attention",
        ),
        attention,
    )
    | dict.fromkeys(
        """
        view unsafe_view reshape reshape_alias t transpose permute unsqueeze squeeze expand slice select unbind split
        split_with_sizes unsafe_split chunk detach alias lift_fresh
        """.split(),
        moved,
    )
    | dict.fromkeys(("cat", "stack", "repeat", "flip", "roll", "pixel_shuffle", "pixel_unshuffle"), rearranged)
)


class Varying:
    """What varies of each value of a trace, as far as its calls have been executed.

    `lost` says why nothing more is known; empty as long as all is.
    """

    def __init__(self, trace: Trace, changing: Collection[str]) -> None:
        self._values, self._changing = trace.values, changing
        self._known: dict[int, Tensor] = {}
        self._loose: set[int] = set()
        self.lost = ""

    def of(self, ref: Ref, tensor: Tensor) -> Tensor:
        """What varies of a value: of an input everything, of a parameter nothing."""
        if ref.id not in self._known:
            varies = _starts(self._values[ref.id], self._changing)
            self._known[ref.id] = torch.full(tensor.shape, varies, dtype=torch.bool, device=tensor.device)
        return self._known[ref.id]

    def operation(self, call: Call, args: Any, kwargs: Any, operands: Sequence[Tensor]) -> Operation:
        """The call as the rules see it."""
        refs = list(refs_in((call.args, dict(call.kwargs))))
        varying = tuple(self.of(ref, tensor) for ref, tensor in zip(refs, operands, strict=True))
        shapes = [self._values[ref.id].shape for ref in call.outputs if ref is not None]
        return Operation(call, args, kwargs, tuple(operands), varying, shapes)

    def infer(self, at: Operation, random: bool) -> list[Tensor]:
        """What varies of the outputs, found before the call is executed."""
        count = len(at.shapes)
        steers = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(at.call.op.tags)
        moves = any(bool(v.any()) for v in at.varying)
        if moves and (steers or not count or _picks_by_truth(at)):
            self.lost = self.lost or f"Python reads values that depend on the input ({at.call.where})"
        rule = RULES.get(op_name(at.call), anything)
        if random:
            return [torch.tensor(True)] * count
        if rule is moved or moves:
            made = rule(at)
            return made if isinstance(made, list) else [made, *[torch.tensor(True)] * count][:count]
        return [torch.tensor(False)] * count

    def note(self, at: Operation, found: Sequence[Tensor], outputs: Sequence[Any]) -> None:
        """Keep what was found of the outputs; a write in place reaches all views of what it is written to."""
        refs = list(refs_in((at.call.args, dict(at.call.kwargs))))
        tensors = [item for item in outputs if isinstance(item, Tensor)]
        shares = any(item.alias_info is not None for item in at.call.op._schema.returns)
        for ref, tensor, varies in zip([r for r in at.call.outputs if r is not None], tensors, found, strict=True):
            varies = varies.to(tensor.device)
            into = next((i for i, operand in enumerate(at.operands) if operand is tensor), None)
            if into is not None and at.call.op._schema.is_mutable:
                if refs[into].id in self._loose:
                    self.lost = self.lost or f"a view is written to in a way that no rule knows ({at.call.where})"
                held = at.varying[into]
                self._known[ref.id] = held.copy_(varies.expand(held.shape))
                continue
            if not shares:
                varies = torch.empty_like(tensor, dtype=torch.bool).copy_(varies.expand(tensor.shape))
            elif not any(_same_memory(varies, v) for v in at.varying):
                self._loose.add(ref.id)
                varies = varies.expand(tensor.shape).clone()
            self._known[ref.id] = varies


def _picks_by_truth(at: Operation) -> bool:
    return op_name(at.call) == "index" and any(t.dtype is torch.bool for t in at.operands[1:])


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _starts(value: Value, changing: Collection[str]) -> bool:
    """Whether a value that no op made varies: inputs, what a run changes, what a module keeps beside its tensors."""
    if value.origin in ("parameter", "buffer"):
        return value.name in changing
    return value.origin != "constant" or bool(value.shape)
