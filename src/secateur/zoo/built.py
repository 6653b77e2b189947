"""The record of a built network: what every model source of this room hands back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Built:
    """A network, the text it was asked for by, its number of classes where known, and what a reader should know.

    >>> Built(nn.Linear(2, 3), "mine.py:make", 3, ("weights are freshly initialised",)).classes
    3
    """

    model: nn.Module
    spec: str
    classes: int | None
    notes: tuple[str, ...]
