"""What would free an axis that cannot be cut: a sentence for each reason that the rules and the probe give.

The reasons stand where they are given; here is only how each of them starts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from secateur.graph.rules import RULES


@dataclass(frozen=True)
class Advice:
    """What to do, in one sentence; or, where nothing can or need be done, why, and `possible` is False."""

    text: str
    possible: bool


@dataclass(frozen=True)
class Reason:
    """A reason taken apart: the sentence; the op it names, its module, and the error, "" where it has none."""

    text: str
    op: str
    module: str
    error: str


UNRULED = "the op reads this axis in a way that no rule accounts for"
LOOKUPS = frozenset(
    """
    argmax argmin argsort cummax cummin cumprod cumsum embedding gather index index_select kthvalue logcumsumexp roll
    scatter scatter_add select sort topk tril triu unbind
    """.split()
)
"""Ops that tell the indices along an axis apart."""

ADVICE = (
    ("reaches the model's output", False, "the caller reads it."),
    (
        "meets an axis that cannot be cut, such as the model's input",
        False,
        "the caller decides the input's width; behind an op named here, free that one.",
    ),
    ("meets an axis that cannot be cut", True, "free the axis that it is joined with."),
    ("is concatenated from parts that cannot be cut", False, "only the parts beside it can be cut."),
    ("is a piece of its own", False, "a piece has to keep one index, and this one has no other."),
    ("position within a group of a grouped convolution", False, "whole groups can be cut instead."),
    ("a view merges this axis with another", False, "the other is cut instead; reshape without merging the two."),
    ("no op reads these indices", True, "give example inputs that use them, such as the longest sequence."),
    (
        "an integer in Python does not follow a cut",
        True,
        "write that size as -1, take it from a tensor's shape, or keep it in an attribute of the module.",
    ),
    ("a cut model stops before this", True, "write the sizes in forward as -1, or take them from the tensors' shapes."),
    ("the op's rule does not fit this call", True, "let the rule of `{op}` in graph/rules.py take such a call."),
)
"""(how a reason starts, whether anything can be done, and what, or why not); the first that fits counts."""

WITHOUT_RULE = (True, "add a line for `{op}` to graph/rules.py ('Adding an op' in ARCHITECTURE.md).")
WITH_RULE = (True, "the rule of `{op}` in graph/rules.py follows other uses of it: write it in another way.")
LOOKS_UP = (False, "`{op}` tells the indices along this axis apart, so none of them may go.")


def taken_apart(reason: str) -> Reason:
    """The parts of a reason.

    >>> taken_apart("meets an axis that cannot be cut (aten.cat.default in block.join)")
    Reason(text='meets an axis that cannot be cut', op='cat', module='block.join', error='')
    """
    found = re.fullmatch(r"(.*?) \(\w+\.(\w+)\.\w+ in (.*?)(?:: (.*))?\)", reason, re.DOTALL)
    text, op, module, late = found.groups("") if found else (reason, "", "", "")
    text, _, early = text.partition(": ")
    return Reason(text, op.strip("_"), module, late or early)


def advice(reason: str) -> Advice:
    """What would free an axis that is frozen for this reason.

    >>> advice("reaches the model's output").text
    'the caller reads it.'
    >>> advice("the op reads this axis in a way that no rule accounts for (aten.cdist.default in 0)").text
    "add a line for `cdist` to graph/rules.py ('Adding an op' in ARCHITECTURE.md)."
    """
    op = taken_apart(reason).op
    if reason.startswith(UNRULED):
        possible, text = LOOKS_UP if op in LOOKUPS else WITH_RULE if op in RULES else WITHOUT_RULE
    else:
        possible, text = next(((can, what) for start, can, what in ADVICE if reason.startswith(start)), (True, ""))
    return Advice(text.replace("{op}", op), possible)
