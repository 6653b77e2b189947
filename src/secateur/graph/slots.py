"""The parts of `Groups`: tensors, slots, groups, frozen axes, and the integers that follow a cut."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorInfo:
    """A parameter or buffer; `itemsize` is the bytes of one of its numbers in a saved file, 0 if it is not saved."""

    name: str
    shape: tuple[int, ...]
    parameter: bool
    itemsize: int


@dataclass(frozen=True)
class Slot:
    """Where a group touches one tensor: `index[unit]` are the unit's places along axis `dim`.

    `role` says what the tensor does with the unit: "write" makes it (the output channels of a convolution),
    "read" takes it in (the input channels of the next), "scale" passes it on (batch norm, bias).
    """

    tensor: str
    dim: int
    role: str
    index: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Group:
    """Units that can go one by one, each with all that is coupled to it.

    `inexact` says why a cut changes what the units that stay compute (a norm over them); empty if it does not.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    inexact: str = ""

    @property
    def modules(self) -> tuple[str, ...]:
        """Dotted names of the modules whose tensors a cut of this group changes; "" is the model itself."""
        return tuple(dict.fromkeys(slot.tensor.rpartition(".")[0] for slot in self.slots))


@dataclass(frozen=True)
class Frozen:
    """`units` of the `size` indices along an axis that may not change, and why."""

    tensor: str
    dim: int
    units: int
    size: int
    reason: str


@dataclass(frozen=True)
class Int:
    """An integer attribute of a module that counts units; `units[i]` is -1 for one that always stays."""

    module: str
    attribute: str
    position: int | None
    original: int | tuple[int, ...]
    units: tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """A number that Python gives to a torch function, and which no attribute holds: it is replayed (`graph.replay`).

    `function` and `ordinal` say which call in the module's forward, `place` which of its numbers. It counts `units`;
    or, with `constant`, it is a factor computed from sizes that must stay what it was.
    """

    module: str
    function: str
    ordinal: int
    place: tuple[str, int]
    units: tuple[int, ...]
    constant: float | None = None
