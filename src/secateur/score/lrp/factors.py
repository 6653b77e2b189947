"""Products of two activations: how much of the relevance each factor takes.

Each factor alone accounts for all of a product, so what they take must be shared out. Two signals, such as queries and
keys, take half each (Achtibat et al. 2024, "AttnLRP"). A factor that weighs the other, a gate, takes a
share of the caller's choice: half as well, or none, as Ali et al. 2022 ("XAI for Transformers") have it for attention
weights and Arras et al. 2017 for the gates of an LSTM. One that only normalises it, a statistic, takes none.

The weights of attention and of squeeze-and-excitation are recognised by the op that makes them, and followed through
what moves or scales them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from secateur.graph.axes import refs_in
from secateur.graph.capture import Call, Ref, op_name
from secateur.score.lrp.tape import Tape, operands

PASSED = frozenset(
    """
    alias celu clamp clamp_max clamp_min clone contiguous detach elu gelu hardshrink hardsigmoid hardswish
    hardtanh leaky_relu lift_fresh mish pow prelu_kernel relu relu6 rrelu_with_noise selu sigmoid silu sin softshrink
    sqrt tan tanh threshold to_copy
    """.split()
)

MOVED = frozenset(
    """
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax amin as_strided cat channel_shuffle chunk
    constant_pad_nd copy diagonal expand flip fmax fmin fractional_max_pool2d gather im2col index index_select
    masked_fill max max_pool2d_with_indices max_pool3d_with_indices maximum min minimum native_channel_shuffle permute
    pixel_shuffle
    pixel_unshuffle reflection_pad1d reflection_pad2d reflection_pad3d repeat replication_pad1d replication_pad2d
    replication_pad3d reshape reshape_alias roll select slice sort split split_with_sizes squeeze stack t topk transpose
    tril triu unbind unfold unsafe_split unsafe_view unsqueeze upsample_nearest1d upsample_nearest2d upsample_nearest3d
    view where
    """.split()
)

DIVIDED = frozenset(("div", "true_divide"))

GATES = frozenset("sigmoid hardsigmoid softmax safe_softmax".split())

CARRIED = frozenset((*MOVED, *PASSED, *DIVIDED, "add", "mul", "sub", "rsub"))

PAIRS: Mapping[str, tuple[int, int]] = MappingProxyType(
    dict.fromkeys(("mul", "mm", "bmm", "mv", "dot", "convolution"), (0, 1))
    | dict.fromkeys(("addmm", "baddbmm", "addmv", "addcmul"), (1, 2))
)
"""Which arguments of an op are multiplied."""


def is_inverse(tape: Tape, call: Call) -> bool:
    """Whether a call computes 1 / x of an activation, or 1 / sqrt(x), and the like."""
    name = op_name(call)
    if name == "pow":
        return isinstance(call.args[1], int | float) and call.args[1] < 0
    divides = name in DIVIDED and not (isinstance(call.args[0], Ref) and tape.is_live(call.args[0]))
    return divides or name in ("rsqrt", "reciprocal")


@dataclass(frozen=True)
class Factors:
    """`taken[ref]` is the share that a gate or a statistic takes in a product with another activation."""

    tape: Tape
    taken: Mapping[int, float]

    def shares(self, call: Call) -> dict[int, float]:
        """For each operand of a product of two activations, by its number, its share; empty for any other op."""
        first, second = PAIRS.get(op_name(call), (0, 0))
        if first == second or not all(self._is_live(call.args[i]) for i in (first, second)):
            return {}
        left, right = (len(list(refs_in(call.args[:i]))) for i in (first, second))
        one, other = (self.taken.get(call.args[i].id) for i in (first, second))
        if (one is None) == (other is None):
            return {left: 0.5, right: 0.5}
        share = other if one is None else 1 - one
        assert share is not None
        return {left: 1 - share, right: share}

    def _is_live(self, argument: object) -> bool:
        return isinstance(argument, Ref) and self.tape.is_live(argument)


def find_factors(tape: Tape, gates: float) -> Factors:
    """Which values are gates, which take the share `gates`, and which are statistics."""
    taken: dict[int, float] = {}
    for call in tape.trace.calls:
        live = [ref.id for ref in operands(call) if tape.is_live(ref)]
        if not live:
            continue
        if is_inverse(tape, call):
            share = 0.0
        elif op_name(call) in GATES:
            share = gates
        elif op_name(call) in CARRIED and all(ref in taken for ref in live):
            share = min(taken[ref] for ref in live)
        else:
            continue
        taken.update((ref.id, share) for ref in call.outputs if ref is not None)
    return Factors(tape, taken)
