"""Where units end in a sum, and what each adds to it on any input: nothing, always the same, or what varies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import ProofError
from secateur.graph.analysis import Analysis
from secateur.graph.attention import see_heads
from secateur.graph.axes import Contraction, refs_in
from secateur.graph.capture import Ref, op_name
from secateur.graph.nested import map_tensors, tensors_in
from secateur.graph.rebuild import share
from secateur.graph.twin import run
from secateur.graph.units import Ids, UnitBlock
from secateur.surgery.simulate import analyse_run
from secateur.surgery.varying import Operation, Varying
from secateur.surgery.wiring import Wiring, factors, is_random, wire

Truths = NDArray[np.bool_]


@dataclass(frozen=True)
class Ending:
    """The units along some axes of an operand that call number `call` sums over, one entry for each index.

    `empty`: adds nothing, as the operand or what it is multiplied with is zero there on every input.
    `known`: the operand is there the same on every input; `steady`: and at all positions, namely `value`.
    `columns` is what it is multiplied with, (outputs, indices), a kernel's positions summed; None where nobody asks.
    `partner` is that other factor, if the call is a product.
    """

    call: int
    units: Ids
    empty: Truths
    known: Truths
    steady: Truths
    value: NDArray[np.float64]
    columns: Tensor | None
    partner: Ref | None


@dataclass(frozen=True)
class Observation:
    """A real run: its analysis and wiring, where units end; `lost` says why it says nothing of other inputs."""

    analysis: Analysis
    wiring: Wiring
    endings: tuple[Ending, ...]
    lost: str


def observe(model: nn.Module, inputs: Any) -> Observation:
    """Run the model, in eval mode, and find what its units add on any input of these shapes.

    Raises:
        ProofError: two runs on the same inputs are not of the same ops.
    """
    analysis = analyse_run(model, inputs)
    wiring = wire(analysis.trace)
    watch = _Watching(analysis, wiring)
    twin, again = see_heads(share(model).eval()), map_tensors(torch.clone, inputs)
    with watch:
        run(twin, again)
    return Observation(analysis, wiring, tuple(watch.endings), watch.varying.lost)


class _Watching(TorchDispatchMode):
    """Follows the trace with what varies, and notes the endings as they come."""

    def __init__(self, analysis: Analysis, wiring: Wiring) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace, self._index, self._held = analysis.trace, 0, wiring.root
        self._at: dict[int, list[tuple[Contraction, UnitBlock]]] = {}
        for contraction, block in analysis.contractions:
            self._at.setdefault(contraction.call, []).append((contraction, block))
        self.varying = Varying(analysis.trace, wiring.written)
        self.endings: list[Ending] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "prim":
            return func(*args, **kwargs)
        index, self._index = self._index, self._index + 1
        call = self._trace.calls[index] if index < len(self._trace.calls) else None
        if call is None or call.op is not func:
            raise ProofError(
                f"the model ran {func} as op number {index} where it ran {call.op if call else 'no more'} before, on "
                "the same inputs: what it computes is not the same twice, so nothing can be proven about it."
            )
        at = self.varying.operation(call, args, kwargs, list(tensors_in((tuple(args), kwargs))))
        found = self.varying.infer(at, is_random(call))
        refs = list(refs_in((call.args, dict(call.kwargs))))
        for contraction, block in self._at.get(index, []):
            ending = _ending(at, contraction, block, refs[contraction.operand].id in self._held)
            self.endings += [ending] if ending is not None else []
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, tuple | list) else (result,)
        self.varying.note(at, found, outputs)
        return result


def _ending(at: Operation, contraction: Contraction, block: UnitBlock, held: bool) -> Ending | None:
    """What a call does with the units that end in it; None where they go on, in a grouped convolution.

    `held`: the operand is a parameter or buffer.
    """
    refs = list(refs_in((at.call.args, dict(at.call.kwargs))))
    ref = refs[contraction.operand]
    sides = factors(at.call)
    if sides is None and op_name(at.call) == "convolution":
        return None
    tensor, varies = at.operands[contraction.operand], at.varying[contraction.operand]
    empty = ~_any(varies | (tensor != 0), block.dims)
    known = ~_any(varies, block.dims)
    if sides is None and held:  # a weight within an op, such as an LSTM's from step to step: it says nothing of them
        known = torch.zeros_like(known)
    first = _first(tensor, block.dims)
    spread = tensor != first.reshape([n if d in block.dims else 1 for d, n in enumerate(tensor.shape)])
    partner, columns, even = None, None, ~_any(spread, block.dims)
    for (own, axis), (other, across) in (sides, sides[::-1]) if sides is not None else ():
        if own == ref and block.dims == (axis % tensor.ndim,) and partner is None:
            partner = other
            factor, moves = at.live(other), at.varying[refs.index(other)]
            empty = empty | ~_any(factor, (across % factor.ndim,))
            known = known & ~_any(moves, (across % factor.ndim,))
            if bool((known & even & ~empty).any()) and not bool(moves.any()):
                columns = _columns(at.operands[refs.index(other)], across)
    return Ending(
        contraction.call,
        block.units,
        _numpy(empty),
        _numpy(known),
        _numpy(known & even),
        _numpy(first).astype(np.float64),
        columns,
        partner,
    )


def _any(truths: Tensor, dims: Sequence[int]) -> Tensor:
    """Whether any is true, for each index along `dims`."""
    others = tuple(d for d in range(truths.ndim) if d not in dims)
    return truths.any(dim=others) if others else truths


def _first(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """The values along `dims` at the first index of all other axes."""
    return tensor[tuple(slice(None) if d in dims else 0 for d in range(tensor.ndim))]


def _columns(factor: Tensor, axis: int) -> Tensor | None:
    """A weight as (outputs, indices along `axis`), kernel positions summed; None for a batch of matrices."""
    if factor.ndim == 2:
        return factor.t().clone() if axis % 2 == 0 else factor.clone()
    if axis == 1 and factor.ndim > 2:
        return factor.flatten(2).sum(2)
    return None


def _numpy(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()
