"""Integers that tell when Python compares them.

An attribute may have the value of a count by chance, and steer: `if self.width != self.out_width: x = self.proj(x)`.
Bound to the count, it would take the other branch for some plans. One that is checked, and found equal, does not steer.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

Attribute = tuple[str, str]
"""(module path, name)."""


class Watched(int):
    """An integer that notes, as `attribute`, that it was compared with another, and was not equal.

    A count is above 0 whatever is cut, so that a comparison with 0 tells nothing.
    """

    attribute: Attribute
    compared: set[Attribute]

    def _note(self, other: Any) -> None:
        if isinstance(other, int) and other > 0 and int(other) != int(self):
            self.compared.add(self.attribute)

    def __eq__(self, other: object) -> bool:
        self._note(other)
        return int(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: int) -> bool:
        self._note(other)
        return int(self) < other

    def __le__(self, other: int) -> bool:
        self._note(other)
        return int(self) <= other

    def __gt__(self, other: int) -> bool:
        self._note(other)
        return int(self) > other

    def __ge__(self, other: int) -> bool:
        self._note(other)
        return int(self) >= other

    __hash__ = int.__hash__


def watch(model: nn.Module, attributes: Collection[Attribute]) -> set[Attribute]:
    """Where Python will compare these attributes and find them unequal, they will appear in the result.

    Args:
        model: a copy; its attributes are changed.

    >>> net = nn.Linear(3, 2)
    >>> compared = watch(net, [("", "in_features"), ("", "out_features")])
    >>> net.in_features == 2, net.out_features == 2, net.out_features * 3
    (False, True, 6)
    >>> sorted(compared)
    [('', 'in_features')]
    """
    compared: set[Attribute] = set()
    for path, name in attributes:
        module = model.get_submodule(path)
        value = getattr(module, name)
        if type(value) is int:
            watched = Watched(value)
            watched.attribute, watched.compared = (path, name), compared
            setattr(module, name, watched)
    return compared
