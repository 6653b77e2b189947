"""`export_program`: a cut model as ops and weights in one file, for where its class is not at hand.

The model is run once by `torch.export`, with its hooks in force: sizes that they replay are in the ops from then on.
torch's own archive (`torch.export.save`, .pt2) is not used. Its weights are raw bytes, but reading it unpickles the
example inputs, and whatever else is marked so, without a guard, evaluates expressions that are kept as text, and
looks functions up anywhere in torch. The file here has none of these: see `codec.program`.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from secateur.codec.program import Program, save_program
from secateur.errors import CaptureError, ProofError
from secateur.graph.nested import as_arguments, map_tensors, tensors_in
from secateur.graph.twin import duplicate, run, slow_attention
from secateur.surgery.listing import list_ops


@dataclass(frozen=True)
class Exported:
    """A program on disk: where, and the one batch size that it takes, None for any that is at least `least`.

    `note` says why the batch size is fixed though it was asked to vary; empty if it is not.
    """

    path: Path
    batch: int | None
    least: int
    note: str

    @property
    def sentence(self) -> str:
        """What was written, in a sentence."""
        sizes = f"batches of {self.batch} alone" if self.batch else f"batches of {self.least} or more"
        return f"{self.path} takes {sizes}{f': {self.note}' if self.note else ''}."


def export_program(
    model: nn.Module, example_inputs: Any, path: str | os.PathLike[str], *, dynamic_batch: bool = True
) -> Exported:
    """Writes what `model` computes, in eval mode, with its weights to the safetensors file `path`.

    `load_program` reads it back without the model's class. Before it is written, the program is run beside the model:
    on the example inputs, and with `dynamic_batch` on batches of one and of one more than the example.

    All inputs with as many rows as the first (the size of axis 0) vary together; their other sizes are fixed. Numbers
    among the inputs are fixed as well, and so are the devices on which the model makes tensors.

    Args:
        model: a cut model, or any other; untouched.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        path: the file; its folder must exist.
        dynamic_batch: the batch size may vary. Where the model does not allow it, the file is made for the batch size
            of the example, and `note` says why.

    Raises:
        CaptureError: the model does not run on the inputs, or decides by values which ops it runs.
        ModelError: it uses ops of other libraries, or takes or returns other objects than tuples, lists and dicts.
        ProofError: the program computes something else; nothing was written.
        RunError: the folder is missing or may not be written, or the disk is full.

    >>> import torch, secateur as sc
    >>> from secateur.codec.program import load_program
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> smaller = sc.apply(net, sc.Plan(sc.find_groups(net, torch.zeros(2, 4)), keep=((0, 3, 5),)))
    >>> print(export_program(smaller, torch.zeros(2, 4), "net.safetensors").sentence)
    net.safetensors takes batches of 1 or more.
    >>> x = torch.randn(7, 4)
    >>> torch.equal(load_program("net.safetensors")(x), smaller(x))
    True
    >>> Path("net.safetensors").unlink()
    """
    _reference(model, example_inputs)
    rows = _rows(example_inputs)
    program, note = None, ""
    if dynamic_batch and rows:
        program, note = _for_any_batch(model, example_inputs, rows)
    least = program.listing.least if program is not None else 1
    fixed = None if program is not None else rows
    if program is None:
        program = _program(_traced(model, example_inputs, None), model, 1)
        _prove(program, model, example_inputs)
    save_program(path, program)
    return Exported(Path(path), fixed, least, note)


def _for_any_batch(model: nn.Module, example_inputs: Any, rows: int) -> tuple[Program | None, str]:
    """The program for any batch size, or why there is none."""
    more = rows + 1
    try:
        _reference(model, _resized(example_inputs, rows, more))
    except CaptureError as error:
        return None, f"the model itself does not run on a batch of {more} ({_reason(error.__cause__ or error)})"
    # torch.export takes an axis of size 1 for one that is always 1.
    size = max(rows, 2)
    try:
        program = _program(_traced(model, _resized(example_inputs, rows, size), size), model, 1)
        _prove(program, model, _resized(example_inputs, rows, more))
        _prove(program, model, example_inputs)
    except (CaptureError, ProofError) as error:
        return None, f"torch.export could not let the batch size vary ({_reason(error.__cause__ or error)})"
    try:
        _prove(program, model, _resized(example_inputs, rows, 1))
    except (CaptureError, ProofError):
        tensors = {**dict(program.named_parameters(remove_duplicate=False)), **dict(program.named_buffers())}
        return Program(replace(program.listing, least=2), tensors), ""
    return program, ""


def _traced(model: nn.Module, example_inputs: Any, rows: int | None) -> ExportedProgram:
    """What torch.export makes of a copy of the model; axes of `rows` at the front vary, all alike."""
    twin = duplicate(model).eval()
    args, kwargs = as_arguments(map_tensors(torch.clone, example_inputs))
    batch = Dim("batch")

    def sizes(leaf: Any) -> Any:
        return {0: batch} if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows else None

    bound = inspect.signature(twin.forward).bind(*args, **kwargs).arguments
    shapes = pytree.tree_map(sizes, dict(bound)) if rows is not None else None
    try:
        with torch.no_grad(), slow_attention(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they fear for, the proof looks at
            return torch.export.export(twin, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # tracing runs the user's code, and torch raises many kinds
        raise CaptureError(
            f"torch.export cannot follow the model: {_reason(error)}. Save it with its source instead (save)."
        ) from error


def _program(traced: ExportedProgram, model: nn.Module, least: int) -> Program:
    listing, tensors = list_ops(traced, model, least)
    return Program(type(listing).from_text(listing.to_text()), {n: t.detach() for n, t in tensors.items()})


def _prove(program: Program, model: nn.Module, inputs: Any) -> None:
    """Runs both on the same inputs and the same random numbers.

    Raises:
        ProofError: their outputs differ by more than rounding.
    """
    wanted = _reference(model, inputs)
    try:
        with _seeded():
            made = list(tensors_in(run(program, map_tensors(torch.clone, inputs))))
        torch.testing.assert_close(made, wanted, equal_nan=True)
    except (AssertionError, RuntimeError) as error:
        raise ProofError(f"the exported program does not compute what the model does: {_reason(error)}.") from error


def _reference(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors that the model returns; CaptureError if it does not run."""
    try:
        with _seeded():
            return list(tensors_in(run(duplicate(model).eval(), map_tensors(torch.clone, inputs))))
    except Exception as error:  # the user's code may raise whatever it likes
        raise CaptureError(f"the model did not run on the inputs: {_reason(error)}. Check their shapes.") from error


def _rows(inputs: Any) -> int | None:
    """The size of axis 0 of the first tensor that has axes."""
    return next((len(tensor) for tensor in tensors_in(inputs) if tensor.ndim), None)


def _resized(inputs: Any, rows: int, size: int) -> Any:
    """The inputs with `size` rows, repeated in a circle, in place of `rows`."""

    def taken(tensor: Tensor) -> Tensor:
        if not tensor.ndim or len(tensor) != rows or not rows:
            return tensor
        return tensor[torch.arange(size, device=tensor.device) % rows]

    return map_tensors(taken, inputs)


def _reason(error: BaseException) -> str:
    """The line of an error that says why: torch.export explains itself in points under a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line.removeprefix("- ") for line in lines if line.startswith("- ")), lines[0]).rstrip(".")


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The same random numbers each time; the caller's random state is as it was afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield
