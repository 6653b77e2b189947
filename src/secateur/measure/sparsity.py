"""Which weights of a model are zero, layer by layer: the table of sparsity (zeros, elements) and L0.

`find_weights` is how every verb that prunes single weights turns the user's names into tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Self

from torch import Tensor, nn

from secateur.errors import ModelError, UnknownName

LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
# Of an attention layer; its output projection is a linear layer by itself.
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class SparsityRow:
    """One weight tensor: how many of its elements are zero."""

    name: str
    zeros: int
    elements: int

    @property
    def l0(self) -> int:
        """The elements that are not zero."""
        return self.elements - self.zeros

    @property
    def sparsity(self) -> float:
        """The share of zeros, 0 to 1; 0 for a tensor without elements."""
        return self.zeros / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class SparsityTable:
    """A row for each weight tensor, in the order of the model, and the totals over them.

    >>> table = SparsityTable((SparsityRow("conv.weight", 3, 4), SparsityRow("fc.weight", 2, 16)))
    >>> table.zeros, table.elements, table.l0, table.sparsity
    (5, 20, 15, 0.25)
    """

    rows: tuple[SparsityRow, ...]

    @property
    def zeros(self) -> int:
        return sum(row.zeros for row in self.rows)

    @property
    def elements(self) -> int:
        return sum(row.elements for row in self.rows)

    @property
    def l0(self) -> int:
        return self.elements - self.zeros

    @property
    def sparsity(self) -> float:
        """The share of zeros in all elements (not the mean of the rows), 0 to 1."""
        return SparsityRow("total", self.zeros, self.elements).sparsity

    def __getitem__(self, name: str) -> SparsityRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise UnknownName("weight", name, [row.name for row in self.rows])

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": [{"name": row.name, "zeros": row.zeros, "elements": row.elements} for row in self.rows]
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(tuple(SparsityRow(**row) for row in value["rows"]))


def sparsity(model: nn.Module, names: str | Iterable[str] | None = None) -> SparsityTable:
    """Counts the zeros in the weight tensors of a model.

    Args:
        model: any module.
        names: which tensors, as `find_weights` reads them; all prunable weights if left out.

    Raises:
        UnknownName: a name or pattern that fits no tensor.

    >>> layer = nn.Linear(4, 2)
    >>> _ = nn.init.eye_(layer.weight)
    >>> sparsity(layer).rows
    (SparsityRow(name='weight', zeros=6, elements=8),)
    """
    return SparsityTable(
        tuple(
            SparsityRow(name, weight.numel() - int(weight.count_nonzero()), weight.numel())
            for name, weight in find_weights(model, names).items()
        )
    )


def prunable_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all convolutions, linear and attention layers by name, in the order of the model, tied ones once.

    >>> list(prunable_weights(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))))
    ['0.weight', '2.weight']
    """
    chosen = {f"{name}.{weight}".lstrip(".") for name, module in model.named_modules() for weight in _weights(module)}
    found = {}
    for name, parameter in model.named_parameters():
        if name in chosen:
            if nn.parameter.is_lazy(parameter):
                layer = name.rpartition(".")[0]
                raise ModelError(f"layer {layer!r} has no weights yet (it is lazy); run the model once.")
            if parameter.is_floating_point() and parameter.ndim >= 2:
                found[name] = parameter.detach()
    return found


def find_weights(model: nn.Module, names: str | Iterable[str] | None = None) -> dict[str, Tensor]:
    """The weight tensors that `names` means, in the order of the model, each once; they share its memory.

    Args:
        model: any module.
        names: full names of parameters, of any kind, or patterns with `*`, `?` and `[...]`, which choose
            among `prunable_weights`. All of these if left out.

    Raises:
        UnknownName: a name or pattern that fits no tensor.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))
    >>> list(find_weights(model, ["2.*", "1.weight"]))
    ['1.weight', '2.weight']
    """
    prunable = prunable_weights(model)
    if names is None:
        return prunable
    every = {name: parameter.detach() for name, parameter in model.named_parameters()}
    chosen = set()
    for name in [names] if isinstance(names, str) else names:
        fitting = {name} & every.keys() or {known for known in prunable if fnmatchcase(known, name)}
        if not fitting:
            raise UnknownName("weight", name, every)
        chosen |= fitting
    return {name: weight for name, weight in every.items() if name in chosen}


def _weights(module: nn.Module) -> tuple[str, ...]:
    """The names of the weights that a module itself has to prune."""
    if isinstance(module, nn.MultiheadAttention):
        return PROJECTIONS
    return ("weight",) if isinstance(module, LAYERS) else ()
