"""How what a unit is worth in each tensor makes one number: a function of the table, slots x units -> units."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Combine = Callable[[Tensor], Tensor]
"""A row for each slot of a group, in their order, and a column for each unit -> one number per unit."""


def total(rows: Tensor) -> Tensor:
    """The sum over the slots.

    >>> import torch
    >>> rows = torch.tensor([[1.0, 4.0], [3.0, 2.0]])
    >>> [combine(rows).tolist() for combine in (total, mean, largest, product, first)]
    [[4.0, 6.0], [2.0, 3.0], [3.0, 4.0], [3.0, 8.0], [1.0, 4.0]]
    """
    return rows.sum(0)


def mean(rows: Tensor) -> Tensor:
    """The mean over the slots."""
    return rows.mean(0)


def largest(rows: Tensor) -> Tensor:
    """The largest of the slots."""
    return rows.amax(0)


def product(rows: Tensor) -> Tensor:
    """The product over the slots."""
    return rows.prod(0)


def first(rows: Tensor) -> Tensor:
    """The first slot alone: in the model's order of parameters, the layer by which a group is usually named."""
    return rows[0]
