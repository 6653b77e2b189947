"""A model as a list of ops, in one safetensors file with its weights: it runs without its class, and without pickle.

The metadata entry `secateur.program` is JSON (`Listing`):

    tensors   [name, kind] of each tensor in the file, kind "parameter", "fixed" (a parameter that does not train),
              "buffer" or "hidden" (a buffer that is not in the state dict)
    inputs    the arguments by name, nested as the caller gives them, with {"leaf": i} for each tensor or number
    leaves    for each its shape (a name for a size that may vary) and dtype, or the value it must have
    least     the smallest size that a varying axis may have
    steps     [op, arguments, keyword arguments]; {"ref": i} is the i-th value: tensors, then leaves, then steps
    outputs   what is returned, nested, with {"leaf": argument}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, fx, nn

from secateur.codec.ops import find_op, from_plain
from secateur.codec.state import load_state, read_metadata, save_state
from secateur.errors import ModelError, RunError

FORMAT = 1
ENTRY = "secateur.program"
KINDS = frozenset(("parameter", "fixed", "buffer", "hidden"))


@dataclass(frozen=True)
class Listing:
    """A program without its tensors, in JSON values; the module's docstring says what each field holds."""

    tensors: Sequence[Sequence[str]]
    inputs: Mapping[str, Any]
    leaves: Sequence[Mapping[str, Any]]
    least: int
    steps: Sequence[Sequence[Any]]
    outputs: Any

    def to_text(self) -> str:
        """The program as JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Listing:
        """What `to_text` gave.

        Raises:
            RunError: another format.
        """
        value = json.loads(text)
        if value.pop("format") != FORMAT:
            raise RunError("the program is of another format than this secateur reads; load it with what wrote it.")
        return cls(**value)


class Program(nn.Module):
    """A listing that runs: called as the model that it was made of, with tensors under the model's names.

    It is in eval mode for good: dropout and batch norm stay as they are, though the parameters can be trained.
    """

    def __init__(self, listing: Listing, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._listing = listing
        self._places = _hang_in(self, listing.tensors, tensors)
        self._function = (_compiled(listing),)  # in a tuple: it is no part of the module tree
        self.eval()

    @property
    def listing(self) -> Listing:
        return self._listing

    def train(self, mode: bool = True) -> Program:
        """Stays in eval mode: the ops of training mode are not in the program."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs for arguments of the shapes that the program was made for.

        Raises:
            ModelError: an argument is missing, or is of a shape or value that the program does not have.
        """
        leaves = _checked(self._listing, self._leaves(args, kwargs))
        tensors = [getattr(module, name) for module, name in self._places]
        return _nested(self._listing.outputs, iter(self._function[0](*tensors, *leaves)))

    def _leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        wanted = self._listing.inputs
        given = {**dict(zip(wanted, args)), **kwargs}
        if len(args) > len(wanted) or given.keys() != wanted.keys() or len(given) < len(args) + len(kwargs):
            raise ModelError(
                f"the program takes the arguments {', '.join(wanted)}, and was given {len(args)} without a name"
                f"{' and ' if kwargs else ''}{', '.join(kwargs)}."
            )
        leaves: dict[int, Any] = {}
        for name, structure in wanted.items():
            _collect(structure, given[name], name, leaves)
        return [leaves[number] for number in sorted(leaves)]

    def extra_repr(self) -> str:
        return f"{len(self._listing.steps)} ops, inputs: {', '.join(self._listing.inputs)}"


def save_program(path: str | os.PathLike[str], program: Program) -> None:
    """Writes the program with its tensors to the safetensors file `path`, whole or not at all.

    Raises:
        RunError: the folder is missing or may not be written, or the disk is full.
    """
    tensors = {row[0]: getattr(*place) for row, place in zip(program.listing.tensors, program._places)}
    save_state(path, tensors, {ENTRY: program.listing.to_text()})


def load_program(path: str | os.PathLike[str]) -> Program:
    """The module of a file that `export_program` wrote, on the CPU; the model's class is not needed.

    It takes the arguments that the model took, by position or by name, and its tensors bear the model's names. The
    file can do no more than compute: it holds no code and no pickle, and names ops of torch and torchvision alone.

    Raises:
        RunError: no such file, no program in it, or one that is damaged or of another format.
    """
    text = read_metadata(path).get(ENTRY)
    if text is None:
        raise RunError(f"{path} holds tensors but no program; load it into a model, or give what export_program wrote.")
    tensors = load_state(path)
    try:
        return Program(Listing.from_text(text), tensors)
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise RunError(f"the program in {path} is damaged ({error}); fetch or save the file again.") from error


def _hang_in(root: nn.Module, rows: Sequence[Sequence[str]], tensors: Mapping[str, Tensor]) -> list[Any]:
    """Registers each tensor under its dotted name, in plain modules; gives (module, name) for each."""
    if [name for name, _ in rows] != sorted(tensors, key=[name for name, _ in rows].index):
        raise ValueError("its tensors are not those of the file")
    places = []
    made: dict[int, nn.Parameter] = {}  # tied tensors are one object
    for name, kind in rows:
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of tensor")
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        tensor = tensors[name]
        if kind in ("parameter", "fixed"):
            parameter = made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=kind == "parameter"))
            module.register_parameter(last, parameter)
        else:
            module.register_buffer(last, tensor, persistent=kind == "buffer")
        places.append((module, last))
    return places


def _compiled(listing: Listing) -> fx.GraphModule:
    """The steps as a function of all tensors and leaves. Names in it are ours, and its values plain: see `ops`."""
    graph = fx.Graph()
    values: list[Any] = [graph.placeholder(f"tensor_{i}") for i in range(len(listing.tensors))]
    values += [graph.placeholder(f"input_{i}") for i in range(len(listing.leaves))]
    for op, args, kwargs in listing.steps:
        if not all(name.isidentifier() for name in kwargs):
            raise ValueError(f"{op} has arguments of odd names")
        given = {name: from_plain(value, values) for name, value in kwargs.items()}
        values.append(graph.call_function(find_op(op), tuple(from_plain(args, values)), given))
    graph.output([from_plain(leaf, values) for leaf in _leaves_of(listing.outputs)])
    return fx.GraphModule(nn.Module(), graph)


def _leaves_of(structure: Any) -> list[Any]:
    ((kind, held),) = structure.items()
    if kind == "leaf":
        return [held]
    return [leaf for item in (held.values() if kind == "dict" else held) for leaf in _leaves_of(item)]


def _nested(structure: Any, leaves: Any) -> Any:
    """The outputs in their nesting."""
    ((kind, held),) = structure.items()
    if kind == "leaf":
        return next(leaves)
    if kind == "dict":
        return {name: _nested(item, leaves) for name, item in held.items()}
    items = [_nested(item, leaves) for item in held]
    return tuple(items) if kind == "tuple" else items


def _collect(structure: Any, given: Any, where: str, leaves: dict[int, Any]) -> None:
    """Puts the leaves of an argument where the structure says, by their numbers."""
    ((kind, held),) = structure.items()
    if kind == "leaf":
        leaves[held] = given
        return
    if kind == "dict":
        fits = isinstance(given, Mapping) and given.keys() == held.keys()
        parts = [(item, given[name], f"{where}[{name!r}]") for name, item in held.items()] if fits else []
    else:
        fits = isinstance(given, list | tuple) and len(given) == len(held)
        parts = [(item, given[i], f"{where}[{i}]") for i, item in enumerate(held)] if fits else []
    if not fits:
        content = f"keys {', '.join(held)}" if kind == "dict" else f"length {len(held)}"
        raise ModelError(f"the program takes as {where} a {kind} of {content}, and was given a {type(given).__name__}.")
    for item, value, place in parts:
        _collect(item, value, place, leaves)


def _checked(listing: Listing, given: Sequence[Any]) -> Sequence[Any]:
    """The leaves, if they are what the program was made for."""
    sizes: dict[str, int] = {}
    for number, (wanted, value) in enumerate(zip(listing.leaves, given)):
        if "value" in wanted:
            if type(value) is not type(wanted["value"]) or value != wanted["value"]:
                raise ModelError(
                    f"input {number} is {value!r}, and the program was made for {wanted['value']!r}; export another."
                )
            continue
        if not isinstance(value, Tensor):
            raise ModelError(f"input {number} of the program is a tensor, and was given a {type(value).__name__}.")
        shape = wanted["shape"]
        bound = {name: size for name, size in zip(shape, value.shape) if isinstance(name, str)}
        agree = all(sizes.setdefault(name, size) == size >= listing.least for name, size in bound.items())
        if len(shape) != value.ndim or not agree or any(bound.get(n, n) != s for n, s in zip(shape, value.shape)):
            raise ModelError(
                f"input {number} has shape {tuple(value.shape)}, and the program takes "
                f"({', '.join(map(str, shape))}){_where(bound, sizes, listing.least)}; export another for other shapes."
            )
    return given


def _where(bound: Mapping[str, int], sizes: Mapping[str, int], least: int) -> str:
    told = [f"{name} = {sizes[name]} by another input" for name, size in bound.items() if sizes[name] != size]
    told += [f"{name} at least {least}" for name, size in bound.items() if size < least]
    return f" with {', '.join(told)}" if told else ""


