"""Where relevance starts, at the model's logits, and how that of a unit is summed up at the end."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.errors import PlanError
from secateur.graph.capture import Ref
from secateur.score.lrp.tape import Tape

Start = Callable[[Tensor, Tensor], Tensor]
"""(logits, labels) -> the relevance of the logits; logits are (images, classes, ...), labels (images, ...)."""

Fold = Callable[[Tensor], Tensor]
"""The relevance of units (images x positions, units), of one batch, -> one number per unit."""


def one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    """1 for the class that is asked about.

    >>> one_hot(torch.tensor([[2.0, 5.0]]), torch.tensor([1]))
    tensor([[0., 1.]])
    """
    return torch.zeros_like(logits).scatter_(1, labels.unsqueeze(1), 1.0)


def logit(logits: Tensor, labels: Tensor) -> Tensor:
    """The class's own logit: relevance adds up to what the model says (Bach et al. 2015).

    >>> logit(torch.tensor([[2.0, 5.0]]), torch.tensor([1]))
    tensor([[0., 5.]])
    """
    return one_hot(logits, labels) * logits


def softmax_difference(logits: Tensor, labels: Tensor) -> Tensor:
    """What the class's softmax gains with each logit: p (1 - p) for the class, -p q for the others (Iwana et al. 2019,
    "Explaining Convolutional Neural Networks using Softmax Gradient Layer-wise Relevance Propagation").

    It asks why this class and not another, and adds up to nothing; images that the model is sure of hardly count.

    >>> softmax_difference(torch.zeros(1, 2), torch.tensor([1]))
    tensor([[-0.2500,  0.2500]])
    """
    chances, chosen = logits.softmax(1), one_hot(logits, labels)
    return (chances * chosen).sum(1, keepdim=True) * (chosen - chances)


def signed(relevance: Tensor) -> Tensor:
    """The sum: what speaks against the class counts against the unit.

    >>> signed(torch.tensor([[1.0], [-3.0]]))
    tensor([-2.])
    """
    return relevance.sum(0)


def absolute(relevance: Tensor) -> Tensor:
    """The sum of absolute values, position by position.

    >>> absolute(torch.tensor([[1.0], [-3.0]]))
    tensor([4.])
    """
    return relevance.abs().sum(0)


def starting(tape: Tape, labels: Tensor | None, start: Start) -> tuple[Tensor, Ref]:
    """The relevance of a tape's logits, and which value they are; without labels, of the classes that are predicted."""
    outputs = [ref for ref in dict.fromkeys(tape.trace.outputs) if tape.is_live(ref)]
    if len(outputs) != 1:
        raise PlanError(
            f"the model has {len(outputs)} outputs that depend on its inputs; say which one relevance is for by "
            "giving the inputs as Example(inputs, lambda outputs: ...)."
        )
    logits = tape.values[outputs[0].id].detach()
    classes = logits.argmax(1) if labels is None else labels.to(logits.device)
    relevance = start(logits, classes)
    if relevance.shape != logits.shape:
        raise PlanError(f"relevance starts as {tuple(relevance.shape)}, and the logits are {tuple(logits.shape)}.")
    return relevance.to(logits.dtype), outputs[0]
