"""One convolution or matrix product as an ONNX graph, written directly: the exporter takes a second for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from secateur.measure.layers import Alone, Hole

OPSET = 18


def layer_graph(layer: Alone, moving: Sequence[Tensor]) -> bytes:
    """A serialized model: weights are constants, the other operands inputs.

    Args:
        layer: a call of one of `NODES`.
        moving: its inputs, on the CPU.
    """
    from onnx import helper, numpy_helper

    op, attributes = NODES[layer.op.overloadpacket.__name__](layer.args)
    holes = [item for item in layer.args if isinstance(item, Hole)]
    order = holes if op.startswith("Conv") else [*holes[-2:], *holes[:-2]]  # torch adds first what ONNX adds last
    tensors = layer.operands(moving)
    names = [f"x{hole.operand}" for hole in order]
    constants, inputs = [], []
    for i, tensor in enumerate(tensors):
        array = tensor.contiguous().numpy()
        if layer.static[i] is None:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            inputs.append(helper.make_tensor_value_info(f"x{i}", kind, array.shape))
        else:
            constants.append(numpy_helper.from_array(array, f"x{i}"))
    kind = helper.np_dtype_to_tensor_dtype(tensors[0].numpy().dtype)
    output = helper.make_tensor_value_info("y", kind, None)
    node = helper.make_node(op, names, ["y"], **attributes)
    graph = helper.make_graph([node], "layer", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    return bytes(model.SerializeToString())


def _convolution(args: Sequence[Any]) -> tuple[str, dict[str, Any]]:
    stride, padding, dilation, transposed, extra, groups = args[3:9]
    shared = {"strides": list(stride), "dilations": list(dilation), "group": groups, "pads": [*padding, *padding]}
    return ("ConvTranspose", {**shared, "output_padding": list(extra)}) if transposed else ("Conv", shared)


def _product(args: Sequence[Any]) -> tuple[str, dict[str, Any]]:
    return "MatMul", {}


def _sum(args: Sequence[Any]) -> tuple[str, dict[str, Any]]:
    return "Gemm", {}


def _relu(args: Sequence[Any]) -> tuple[str, dict[str, Any]]:
    return "Relu", {}


NODES: Mapping[str, Callable[[Sequence[Any]], tuple[str, dict[str, Any]]]] = MappingProxyType(
    {"convolution": _convolution, "mm": _product, "bmm": _product, "addmm": _sum, "relu": _relu}
)
"""ATen op -> its arguments -> the ONNX op and its attributes."""
