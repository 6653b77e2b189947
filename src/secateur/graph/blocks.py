"""The record of `find_blocks`: which modules can be left out, what stands in their place then, and what goes with it.

A residual block gives x + f(x). Left out, it gives x: what came in goes on. Where an activation or a norm stands on
that way that does not leave x as it is, it stays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from secateur.codec.ops import from_plain, to_plain
from secateur.errors import PlanError, UnknownName
from secateur.graph.rebuild import Shapes

NAMED = 8
"""Modules named for each reason."""


@dataclass(frozen=True)
class Step:
    """What stays on the way through a block: a module, by its path in the block, or an op and its other arguments."""

    module: str = ""
    op: str = ""
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.module or self.op.removeprefix("aten.").partition(".")[0]


CLONE = "aten.clone.default"
"""The op of a block whose input is read by others too: a write into what the block gives must not reach these."""


@dataclass(frozen=True)
class Pass:
    """A tensor that a block is given and that goes on when the block is left out, through `steps`.

    Args:
        argument, position: the name of the argument and its position; "" and None where it has none.
        place: keys and indices that lead to the tensor, where the argument is a tuple, list or dict.
        steps: in order.
    """

    argument: str
    position: int | None
    place: tuple[int | str, ...] = ()
    steps: tuple[Step, ...] = ()


Form = Any
"""What a block gives: tuples, lists, dicts and plain values, with a `Pass` for each tensor."""


@dataclass(frozen=True)
class Block:
    """A module that can be left out: its name, first of the `paths` where it stands.

    Args:
        calls: how often it is called; it goes at all calls at once.
        form: what is given in its place.
        assumed: what was seen on the trace so that an activation can go too.
        params, macs: what goes with it, MACs of one pass of the example inputs.
        inside: how many blocks that hold no others it is made of; 1 for one that holds none.
    """

    name: str
    paths: tuple[str, ...]
    calls: int
    form: Form
    assumed: tuple[str, ...]
    params: int
    macs: int
    inside: int

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The tensors that go on."""
        return tuple(passes_in(self.form))

    @property
    def keeps(self) -> tuple[Step, ...]:
        """All that stays of it."""
        return tuple(step for each in self.passes for step in each.steps)

    def takes_along(self, tensor: str) -> bool:
        """Whether a tensor goes with the block; by its name."""
        stay = [f"{path}.{step.module}." for path in self.paths for step in self.keeps if step.module]
        return any(tensor.startswith(f"{path}.") for path in self.paths) and not tensor.startswith(tuple(stay))

    def holds(self, other: Block) -> bool:
        """Whether the other is this one or lies in it."""
        return any(path == own or path.startswith(f"{own}.") for path in other.paths for own in self.paths)


@dataclass(frozen=True)
class Refused:
    """A module that adds and yet cannot be left out, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Held:
    """A parameter or buffer of the model, by all its names."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    parameter: bool

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Counted:
    """A call that `graph.replay` gives sizes: number `ordinal` of `function` in `module`; and how many come earlier in
    each block."""

    module: str
    function: str
    ordinal: int
    before: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Blocks:
    """Every module of a model that can be left out, what cannot and why, and what it all costs.

    >>> import torch, secateur as sc
    >>> from secateur.graph.residual import find_blocks
    >>> net = sc.build_model("secateur:resnet20").model
    >>> blocks = find_blocks(net, torch.zeros(1, 3, 32, 32))
    >>> blocks.names[:4], blocks.params_left(["layer1.1"]), blocks.params
    (('layer1', 'layer1.0', 'layer1.1', 'layer1.2'), 265050, 269722)
    >>> Blocks.from_json(blocks.to_json()) == blocks
    True
    """

    blocks: tuple[Block, ...]
    refused: tuple[Refused, ...]
    tensors: tuple[Held, ...]
    counted: tuple[Counted, ...]
    macs: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of the blocks, in the order in which they run; one that holds others comes before them."""
        return tuple(block.name for block in self.blocks)

    @property
    def params(self) -> int:
        """Parameters of the whole model."""
        return sum(t.size for t in self.tensors if t.parameter)

    @cached_property
    def shapes(self) -> Shapes:
        """Name -> shape of every tensor of the model."""
        return {tensor.names[0]: tensor.shape for tensor in self.tensors}

    def chosen(self, names: Sequence[str]) -> tuple[Block, ...]:
        """The blocks of these names.

        Raises:
            UnknownName: there is none. PlanError: it cannot be left out; or one lies in another.
        """
        known, refused = {block.name: block for block in self.blocks}, {item.name: item.why for item in self.refused}
        for name in names:
            if name not in known and name in refused:
                raise PlanError(f"{name} cannot be left out: {refused[name]}.")
            if name not in known:
                raise UnknownName("block", name, known)
        out = [known[name] for name in dict.fromkeys(names)]
        for block in out:
            inner = next((other for other in out if other is not block and block.holds(other)), None)
            if inner is not None:
                raise PlanError(f"{inner.name} lies in {block.name}; name one of them only.")
        return tuple(out)

    def shapes_left(self, names: Sequence[str]) -> Shapes:
        """Name -> shape of every tensor that is left without these blocks."""
        blocks = self.chosen(names)
        left = [(_left(tensor, blocks), tensor.shape) for tensor in self.tensors]
        return {first[0]: shape for first, shape in left if first}

    def params_left(self, names: Sequence[str]) -> int:
        """Parameters without these blocks."""
        blocks = self.chosen(names)
        return sum(t.size for t in self.tensors if t.parameter and _left(t, blocks))

    def macs_left(self, names: Sequence[str]) -> int:
        """MACs of one pass of the example inputs without these blocks."""
        return self.macs - sum(block.macs for block in self.chosen(names))

    def renumbered(self, names: Sequence[str]) -> dict[str, dict[tuple[str, int], int]]:
        """Module -> (function, ordinal) -> its ordinal without these blocks, for each call that is given sizes."""
        gone = {block.name for block in self.chosen(names)}
        out: dict[str, dict[tuple[str, int], int]] = {}
        for item in self.counted:
            fewer = sum(count for name, count in item.before if name in gone)
            out.setdefault(item.module, {})[item.function, item.ordinal] = item.ordinal - fewer
        return out

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "blocks": [{**vars(b), "paths": list(b.paths), "form": form_to_json(b.form), "assumed": list(b.assumed)}
                       for b in self.blocks],
            "refused": [[item.name, item.why] for item in self.refused],
            "tensors": [[list(t.names), list(t.shape), t.parameter] for t in self.tensors],
            "counted": [[c.module, c.function, c.ordinal, [list(row) for row in c.before]] for c in self.counted],
            "macs": self.macs,
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Blocks:
        """The record that `to_json` wrote."""
        return cls(
            tuple(_block_from(block) for block in value["blocks"]),
            tuple(Refused(*row) for row in value["refused"]),
            tuple(Held(tuple(names), tuple(shape), parameter) for names, shape, parameter in value["tensors"]),
            tuple(Counted(m, f, o, tuple((n, c) for n, c in before)) for m, f, o, before in value["counted"]),
            value["macs"],
        )

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def passes_in(form: Form) -> Iterator[Pass]:
    """The passes in a form, in order."""
    if isinstance(form, Pass):
        yield form
    elif isinstance(form, tuple | list | dict):
        for item in form.values() if isinstance(form, dict) else form:
            yield from passes_in(item)


def form_to_json(form: Form) -> Any:
    """Plain values.

    >>> form = (Pass("x", 0, (), (Step(op="aten.relu.default"),)), None)
    >>> form_from_json(form_to_json(form)) == form
    True
    """
    if isinstance(form, Pass):
        steps = [[s.module, s.op, s.args, [list(pair) for pair in s.kwargs]] for s in form.steps]
        return {"pass": [form.argument, form.position, list(form.place), to_plain(steps, repr)]}
    if isinstance(form, dict):
        return {"dict": [[key, form_to_json(item)] for key, item in form.items()]}
    if isinstance(form, tuple | list):
        return {type(form).__name__: [form_to_json(item) for item in form]}
    return {"value": form}


def form_from_json(value: Mapping[str, Any]) -> Form:
    """What `form_to_json` gave."""
    ((kind, held),) = value.items()
    if kind == "pass":
        argument, position, place, rows = held
        steps = [
            Step(module, op, tuple(from_plain(args, ())), tuple((k, from_plain(v, ())) for k, v in kwargs))
            for module, op, args, kwargs in rows
        ]
        return Pass(argument, position, tuple(place), tuple(steps))
    if kind == "dict":
        return {key: form_from_json(item) for key, item in held}
    if kind == "value":
        return held
    items = [form_from_json(item) for item in held]
    return tuple(items) if kind == "tuple" else items


def _block_from(value: Mapping[str, Any]) -> Block:
    made = {"paths": tuple(value["paths"]), "form": form_from_json(value["form"]), "assumed": tuple(value["assumed"])}
    return Block(**{**value, **made})


def _left(tensor: Held, blocks: Collection[Block]) -> list[str]:
    """The names that a tensor has without these blocks."""
    return [name for name in tensor.names if not any(block.takes_along(name) for block in blocks)]


def _lines(blocks: Blocks) -> Iterator[str]:
    yield f"{len(blocks.blocks)} blocks can be left out, of {blocks.params:,} parameters and {blocks.macs:,} MACs"
    if blocks.blocks:
        yield f"{'params':>14} {'MACs':>16}  block"
    for block in blocks.blocks:
        depth = sum(other is not block and other.holds(block) for other in blocks.blocks)
        notes = [f"called {block.calls} times"] if block.calls > 1 else []
        keeps = [str(step) for step in block.keeps if step.op != CLONE]
        notes += [f"keeps {', '.join(keeps)}"] if keeps else []
        more = f"  ({'; '.join(notes)})" if notes else ""
        yield f"{block.params:>14,} {block.macs:>16,}  {'  ' * depth}{block.name}{more}"
    yield from _listed("assumed, as seen on the trace:", [(b.name, why) for b in blocks.blocks for why in b.assumed])
    yield from _listed("cannot be left out:", [(item.name, item.why) for item in blocks.refused])


def _listed(title: str, rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    if rows:
        yield title
    alike: dict[str, list[tuple[str, str]]] = {}
    for name, why in rows:
        alike.setdefault(re.sub(r"(?<=[A-Za-z_.])\d+", "*", why), []).append((name, why))
    for pattern, same in alike.items():
        names = list(dict.fromkeys(name for name, _ in same))
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        why = same[0][1] if len({why for _, why in same}) == 1 else pattern
        yield f"  {', '.join(names[:NAMED])}{more}: {why}"
