"""The relevance of a model's inputs, and of what its layers make: for heat maps, and to check rules by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.graph.nested import Nested
from secateur.score.lrp.composites import Composite, EpsilonPlus
from secateur.score.lrp.propagate import Flow, propagate
from secateur.score.lrp.rules import STABILIZER
from secateur.score.lrp.starts import Start, logit, starting
from secateur.score.lrp.tape import Tape, operands, take


@dataclass(frozen=True)
class Explanation:
    """The relevance of each input (None for one of no relevance), and of the layers' inputs and outputs.

    `layers` are (module path, relevance of the layer's input, of its output), the last layer first. A batch norm that
    is folded into a layer counts as part of it.
    """

    inputs: tuple[Tensor | None, ...]
    layers: tuple[tuple[str, Tensor, Tensor], ...] = field(repr=False)


def explain(
    model: nn.Module,
    inputs: Nested,
    labels: Tensor | None = None,
    composite: Composite | None = None,
    start: Start = logit,
    gates: float = 0.5,
    stabilizer: float = STABILIZER,
) -> Explanation:
    """Why the model says what it says about one batch.

    Args:
        model: run in eval mode, as a copy; left as found.
        inputs: a batch, given as `find_groups` takes example inputs.
        labels: the classes that are asked about; by default those that the model predicts.
        composite, start, gates, stabilizer: as for `Relevance`; the default composite is `EpsilonPlus()`.

    Raises:
        PlanError, CaptureError: as `Relevance` does.

    >>> net = nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[3.0, -1.0], [0.0, 0.0]]))
    >>> explain(net, torch.tensor([[1.0, 2.0]]), torch.tensor([0])).inputs[0].round(decimals=3)
    tensor([[ 3., -2.]])
    """
    with torch.inference_mode(False):
        tape = take(model, inputs)
        relevance, output = starting(tape, labels, start)
        return _gathered(tape, propagate(tape, output, relevance, composite or EpsilonPlus(), gates, stabilizer))


def _gathered(tape: Tape, flows: Iterable[Flow]) -> Explanation:
    inputs = [ref for ref, value in enumerate(tape.trace.values) if value.origin == "input"]
    found: dict[int, Tensor | None] = dict.fromkeys(inputs)
    layers = []
    for flow in flows:
        for ref, taken in zip(operands(tape.trace.calls[flow.index]), flow.taken):
            if ref.id in found and taken is not None:
                held = found[ref.id]
                found[ref.id] = taken if held is None else held + taken
        if flow.layer is not None:
            read = next(taken for taken in flow.taken if taken is not None)
            assert flow.made[0] is not None
            layers.append((flow.layer.name, read, flow.made[0]))
    return Explanation(tuple(found.values()), tuple(layers))
