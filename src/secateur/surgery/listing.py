"""What `torch.export` traced, as a `Listing`: every op by name, tensors and inputs by number."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind
from torch.utils import _pytree as pytree

from secateur.codec.ops import op_name, to_plain
from secateur.codec.program import Listing
from secateur.errors import CaptureError, ModelError

TENSORS = frozenset((InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR))


def list_ops(traced: ExportedProgram, model: nn.Module, least: int) -> tuple[Listing, dict[str, Tensor]]:
    """The listing of a program and its tensors.

    Args:
        traced: from `torch.export.export`, of `model`.
        model: says the names of the arguments.
        least: the smallest size of an axis that may vary.

    Raises:
        ModelError: the model returns or takes objects that are not tuples, lists or dicts, or uses other ops.
        CaptureError: the model changes its inputs or its buffers, or has branches that depend on values.
    """
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in traced.graph_signature.output_specs):
        raise CaptureError("the model changes its inputs or buffers while it runs, which a program cannot do.")
    specs = traced.graph_signature.input_specs
    tensors = _tensors(traced)
    names = {name: number for number, name in enumerate(tensors)}
    leaves: list[dict[str, Any]] = []
    given: list[Any] = []
    for spec, node in zip(specs, traced.graph.find_nodes(op="placeholder")):
        if spec.kind in TENSORS:
            given.append({"ref": names[str(spec.target)]})
        elif spec.kind is InputKind.USER_INPUT:
            given.append({"ref": len(tensors) + len(leaves)})
            leaves.append(_leaf(spec, node))
        else:
            raise ModelError(f"a program holds tensors and numbers alone, and this model has a {spec.kind.name}.")
    writer = _Writer(len(tensors) + len(leaves))
    results = writer.write(traced.graph_module, given)
    kinds = [(name, _kind(name, tensor, traced)) for name, tensor in tensors.items()]
    listing = Listing(kinds, _inputs(traced, model), leaves, least, writer.steps, _outputs(traced, results))
    return listing, tensors


def _tensors(traced: ExportedProgram) -> dict[str, Tensor]:
    """Those of the state dict, in its order, and the hidden buffers and constants that the ops use."""
    used = {str(spec.target) for spec in traced.graph_signature.input_specs if spec.kind in TENSORS}
    held = {name: value for name, value in traced.constants.items() if name in used and isinstance(value, Tensor)}
    return {**traced.state_dict, **held}


def _kind(name: str, tensor: Tensor, traced: ExportedProgram) -> str:
    if isinstance(tensor, nn.Parameter):
        return "parameter" if tensor.requires_grad else "fixed"
    return "buffer" if name in traced.state_dict else "hidden"


def _leaf(spec: InputSpec, node: fx.Node) -> dict[str, Any]:
    if isinstance(spec.arg, ConstantArgument):
        return {"value": to_plain(spec.arg.value, _refuse)}
    value = node.meta["val"]
    shape = [size if isinstance(size, int) else "batch" for size in value.shape]
    return {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}


def _refuse(value: Any) -> Any:
    raise ModelError(f"a program takes and gives tensors and numbers alone, and this model has a {type(value)}.")


def _inputs(traced: ExportedProgram, model: nn.Module) -> dict[str, Any]:
    """The arguments by the names that the model's forward has for them, each leaf with its number."""
    spec = traced.call_spec.in_spec
    args, kwargs = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    names = [f"input_{number}" for number in range(len(args))]
    for number, parameter in enumerate(inspect.signature(model.forward).parameters.values()):
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD) or number == len(args):
            break
        names[number] = parameter.name
    return {name: _structure(value, lambda leaf: leaf) for name, value in {**dict(zip(names, args)), **kwargs}.items()}


def _outputs(traced: ExportedProgram, results: Sequence[Any]) -> Any:
    spec = traced.call_spec.out_spec
    return _structure(pytree.tree_unflatten(list(range(spec.num_leaves)), spec), lambda leaf: results[leaf])


def _structure(nested: Any, leaf: Any) -> dict[str, Any]:
    """A nesting in JSON values; a named tuple becomes a tuple, and any mapping a dict."""
    if isinstance(nested, int):
        return {"leaf": leaf(nested)}
    if isinstance(nested, Mapping) and all(isinstance(name, str) for name in nested):
        return {"dict": {name: _structure(item, leaf) for name, item in nested.items()}}
    if isinstance(nested, list | tuple):
        return {"tuple" if isinstance(nested, tuple) else "list": [_structure(item, leaf) for item in nested]}
    raise ModelError(
        f"a program takes and gives tuples, lists and dicts with names, and this model has a {type(nested).__name__}; "
        "put a module around it that takes it apart."
    )


class _Writer:
    """Writes graphs down as steps; the values before the first step have the numbers up to `first`."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.steps: list[tuple[str, list[Any], dict[str, Any]]] = []

    def write(self, module: fx.GraphModule, given: Sequence[Any]) -> list[Any]:
        """The steps of one graph, whose inputs are `given`; its outputs. All are arguments in JSON values."""
        held: dict[fx.Node, Any] = {}
        inputs = iter(given)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                held[node] = next(inputs)
            elif node.op == "get_attr":
                held[node] = getattr(module, node.target)
            elif node.op == "call_function":
                held[node] = self._call(node, held)
        (output,) = module.graph.output_node().args
        results: list[Any] = to_plain(output, held.__getitem__)
        return results

    def _call(self, node: fx.Node, held: Mapping[fx.Node, Any]) -> Any:
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and isinstance(held[source], tuple):  # what a block gave
            return held[source][node.args[1]]
        block = next((a for a in node.args if isinstance(a, fx.Node) and isinstance(held[a], fx.GraphModule)), None)
        if block is not None:
            return self._block(node, block, held)
        args = to_plain(list(node.args), held.__getitem__)
        kwargs = {name: to_plain(value, held.__getitem__) for name, value in node.kwargs.items()}
        self.steps.append((op_name(node.target), args, kwargs))
        return {"ref": self.first + len(self.steps) - 1}

    def _block(self, node: fx.Node, block: fx.Node, held: Mapping[fx.Node, Any]) -> tuple[Any, ...]:
        """A block in which gradients are switched, or autocast is off, is as good as without; others are not."""
        before, after = node.args[: node.args.index(block)], node.args[node.args.index(block) + 1 :]
        name = getattr(node.target, "__name__", str(node.target))
        if name == "wrap_with_set_grad_enabled" or (name == "wrap_with_autocast" and before[2] is False):
            return tuple(self.write(held[block], [to_plain(item, held.__getitem__) for item in after]))
        raise CaptureError(
            f"a program is a list of ops, and this model has a block that is not ({name}); "
            "save the model with its source instead (save)."
        )
