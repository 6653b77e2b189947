"""How many multiply-accumulates (MACs) one forward pass takes, and which ops that count leaves out.

One fused multiply-add is one MAC. The ops are those that the model really executes, recorded on tensors
without values (`secateur.graph.capture`), so even a large model is counted in seconds. The formulas are those
of `torch.utils.flop_counter`, halved, for it counts a multiplication and an addition as two; a few that it
lacks, in some version, stand in `FORMULAS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from secateur.errors import CaptureError
from secateur.graph.capture import Call, Ref, Trace, capture
from secateur.graph.nested import tensors_in

aten = torch.ops.aten


def _vector_macs(matrix: Tensor, vector: Tensor) -> int:
    return matrix.numel()


def _added_vector_macs(bias: Tensor, matrix: Tensor, vector: Tensor, **_: Any) -> int:
    return matrix.numel()


def _recurrent_macs(inputs: Tensor, to_gates: Tensor, between_gates: Tensor, *_: Any) -> int:
    steps = prod(inputs.shape[:-1])
    return steps * (to_gates.numel() + between_gates.numel())


def _experts_macs(rows: Tensor, experts: Tensor, *_: Any, **__: Any) -> int:
    """Each row meets one expert's matrix."""
    return rows.shape[0] * rows.shape[1] * experts.shape[-1]


def _attention_macs(queries: Tensor, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> int:
    """(..., i, k), (..., j, k), (..., j, d)."""
    return prod(queries.shape[:-1]) * keys.shape[-2] * (keys.shape[-1] + values.shape[-1])


def _deformed_macs(images: Tensor, weight: Tensor, offset: Tensor, *_: Any) -> int:
    return images.shape[0] * prod(offset.shape[2:]) * weight.numel()


FORMULAS: Mapping[Any, Callable[..., int]] = MappingProxyType(
    {
        aten.mv: _vector_macs,
        aten.dot: _vector_macs,
        aten.addmv: _added_vector_macs,
        aten.mkldnn_rnn_layer: _recurrent_macs,
        aten._grouped_mm: _experts_macs,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_macs,
    }
)

# Ops that make, move or compare values and do no arithmetic on them; torch knows by itself which are views.
# In-place variants, which end in an underscore, go by the plain name.
MOVES = frozenset(
    {
        "_local_scalar_dense", "_reshape_copy", "_to_copy", "_unsafe_view", "arange", "argmax", "argmin",
        "argsort", "as_strided", "bitwise_and", "bitwise_not", "bitwise_or", "cat", "channel_shuffle",
        "clone", "constant_pad_nd", "copy", "detach", "device", "embedding", "empty", "empty_like",
        "empty_strided", "eq", "fill", "flip", "full", "full_like", "gather", "ge", "gt", "index",
        "index_put", "index_select", "isfinite", "isinf", "isnan", "item", "le", "lift_fresh", "linspace",
        "logical_and", "logical_not", "logical_or", "lt", "masked_fill", "masked_select",
        "native_channel_shuffle", "ne", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros",
        "nonzero", "ones", "ones_like", "pixel_shuffle", "pixel_unshuffle", "reflection_pad1d",
        "reflection_pad2d", "reflection_pad3d", "repeat", "repeat_interleave", "replication_pad1d",
        "replication_pad2d", "replication_pad3d", "resize", "roll", "scalar_tensor", "scatter",
        "select_scatter", "slice_scatter", "sort", "split", "split_with_sizes", "squeeze", "stack", "t",
        "topk", "transpose", "tril", "triu", "unsafe_split", "unsafe_split_with_sizes", "unsqueeze", "where",
        "zero", "zeros", "zeros_like",
    }
)


@dataclass(frozen=True)
class Macs:
    """MACs of one forward pass of `batch` examples.

    Args:
        total: all MACs that were counted.
        by_module: (dotted name, MACs) of the ops that ran in a module itself and not in one within it, so
            that they add up to `total`; in the order in which they first ran. "" is the model itself.
        uncounted: (op, calls) of ops that do arithmetic but have no formula (norms, pooling, activations),
            the most frequent first.
        batch: the examples in that pass.
    """

    total: int
    by_module: tuple[tuple[str, int], ...]
    uncounted: tuple[tuple[str, int], ...]
    batch: int

    @property
    def per_image(self) -> float:
        return self.total / self.batch

    def to_json(self) -> dict[str, Any]:
        return {
            "total": self.total,
            "by_module": [list(row) for row in self.by_module],
            "uncounted": [list(row) for row in self.uncounted],
            "batch": self.batch,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        by_module = tuple((name, macs) for name, macs in value["by_module"])
        uncounted = tuple((op, calls) for op, calls in value["uncounted"])
        return cls(value["total"], by_module, uncounted, value["batch"])


def count_macs(model: nn.Module, example_inputs: Any) -> Macs:
    """Counts the MACs of one forward pass in eval mode, on a copy without values where the model allows it.

    Convolutions, matrix products, attention and LSTM layers are counted, each as dense: zeros in the weights,
    padding and masked-out attention are not taken off. A bias adds no MAC.

    Args:
        model: left as found.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        CaptureError: the model does not run on these inputs.

    >>> macs = count_macs(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.zeros(2, 3, 6, 6))
    >>> macs.total == 2 * (8 * 3 * 3 * 3) * (4 * 4), macs.by_module, macs.uncounted
    (True, (('0', 6912),), (('aten.relu', 1),))
    """
    trace = capture(model, example_inputs)
    by_module: Counter[str] = Counter()
    uncounted: Counter[str] = Counter()
    for call in trace.calls:
        macs = _call_macs(call, trace)
        if macs is not None:
            by_module[call.module] += macs
        elif not call.op.is_view and call.op._overloadpacket.__name__.rstrip("_") not in MOVES:
            uncounted[str(call.op._overloadpacket)] += 1
    rows = tuple(by_module.items())
    return Macs(by_module.total(), rows, tuple(uncounted.most_common()), batch_size(example_inputs))


def batch_size(example_inputs: Any) -> int:
    """The length of the first dimension of the first tensor among the inputs.

    >>> batch_size({"pixels": torch.zeros(4, 3, 8, 8)})
    4
    """
    for tensor in tensors_in(example_inputs):
        if tensor.ndim and len(tensor):
            return len(tensor)
        raise CaptureError(
            f"the first example input has shape {tuple(tensor.shape)}; give a batch of at least one example."
        )
    raise CaptureError(f"the example inputs are {example_inputs!r:.80} and hold no tensor; give a batch.")


def _call_macs(call: Call, trace: Trace) -> int | None:
    """The MACs of one op by its formula, on tensors without values; None where there is no formula."""

    def stand_in(item: Any) -> Any:
        if isinstance(item, Ref):
            value = trace.values[item.id]
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        if isinstance(item, tuple | list):
            return type(item)(stand_in(part) for part in item)
        return item

    packet = call.op._overloadpacket
    formula = _deformed_macs if str(packet) == "torchvision.deform_conv2d" else FORMULAS.get(packet)
    if formula is None and packet not in flop_registry:
        return None
    args = stand_in(call.args)
    kwargs = {key: stand_in(item) for key, item in call.kwargs.items()}
    if formula is not None:
        return formula(*args, **kwargs)
    outputs = stand_in(call.outputs)
    output = outputs[0] if len(outputs) == 1 else outputs
    return int(flop_registry[packet](*args, **kwargs, out_val=output)) // 2
