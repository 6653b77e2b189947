"""Sizes that Python computes and that do not follow a cut, given again at each call: a `Replay` for a module.

`x.view(n, 12, 64)`, `x.shape[-1] // self.heads`, `x.split(96)`, `x[:, :48]`, `q * q.shape[-1] ** -0.5`: the probe finds
the calls whose sizes are not as predicted, or whose factors are not as before, and after a cut a hook on the module
that makes the call puts the right ones in. The module keeps its class, its parameters' names and its autograd. Only the
numbers that come out wrong are given: the batch, and whatever else Python gets right, stays as the caller has it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

SIZES = MappingProxyType(
    dict.fromkeys(("view", "reshape", "expand", "new_zeros", "new_ones", "new_empty", "new_full"), 1)
    | dict.fromkeys(("zeros", "ones", "empty", "full", "rand", "randn"), 0)
)
"""Functions that take the sizes of their result, and the position of the first."""

FOLLOWING = frozenset(("view", "reshape"))
"""Of those, the ones that find out one size by themselves."""

ATTENTION = "scaled_dot_product_attention"

PIECES = frozenset(("split", "chunk", "split_with_sizes"))
REPLAYABLE = frozenset((*SIZES, *PIECES, "unflatten", "__getitem__", "narrow", "pad"))

Place = tuple[str, int]
"""Which number: ("size", output axis), ("piece", number), ("start" or "stop", number of the slice), ("pad", position);
or a factor that was computed from sizes and must stay what it was: ("float", position), ("scale", 0) of attention."""

Sizes = dict[Place, int | float]
Change = Mapping[tuple[str, int], Mapping[Place, int | float]]
"""(function, which call of it in one forward of the module) -> the numbers to put in."""


@dataclass(frozen=True)
class PythonCall:
    """A torch function that Python called, the how manieth of its name in one forward of `module`, and its factors."""

    module: str
    function: str
    ordinal: int
    factors: tuple[tuple[Place, float], ...]

    @property
    def site(self) -> tuple[str, str, int]:
        return self.module, self.function, self.ordinal


class PythonCalls(TorchFunctionMode):
    """Counts the torch functions that Python calls, by name, in every module that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.recorder: Any = None
        self.made: list[PythonCall] = []
        self.current: int | None = None
        self._counts: list[tuple[str, defaultdict[str, int]]] = [("", defaultdict(int))]

    def enter(self, module: str) -> None:
        self._counts.append((module, defaultdict(int)))

    def leave(self) -> None:
        self._counts.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        for _, counts in self._counts:
            counts[name] += 1
        before, self.current = self.current, len(self.made)
        module, counts = self._counts[-1]
        self.made.append(PythonCall(module, name, counts[name] - 1, tuple(_factors(name, args, kwargs or {}).items())))
        try:
            return self.execute(self.recorder, func, args, kwargs or {})
        finally:
            self.current = before

    def execute(self, recorder: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Make the call; `recorder` writes down its ops."""
        return func(*args, **kwargs)


@dataclass
class Replay:
    """The hooks of one module: while it runs, its calls get the sizes in `changes`."""

    changes: dict[tuple[str, int], Sizes]
    _running: list[_Replaying] = field(default_factory=list)

    def start(self, *_: Any) -> None:
        """Forward pre-hook."""
        self._running.append(_Replaying(self.changes))
        self._running[-1].__enter__()  # type: ignore[no-untyped-call]

    def stop(self, *_: Any) -> None:
        """Forward hook, called after an error as well."""
        self._running.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Replaying(TorchFunctionMode):
    def __init__(self, changes: Change) -> None:
        super().__init__()
        self._changes, self._counts = changes, Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        change = self._changes.get((name, self._counts[name]))
        self._counts[name] += 1
        kwargs = dict(kwargs or {})
        if change is None:
            return func(*args, **kwargs)
        return changed(func, args, kwargs, change)


def install(model: nn.Module, changes: Mapping[str, Change]) -> None:
    """Give modules their replays; one that has some already keeps those that are not given anew."""
    for path, change in changes.items():
        module = model.get_submodule(path)
        replay = replay_of(module)
        if replay is None:
            replay = Replay({})
            module.register_forward_pre_hook(replay.start)
            module.register_forward_hook(replay.stop, always_call=True)
        for key, sizes in change.items():
            replay.changes.setdefault(key, {}).update(sizes)


def replay_of(module: nn.Module) -> Replay | None:
    """The module's replay, if it has one."""
    for hook in module._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Replay):
            return owner
    return None


def merged(first: Mapping[str, Change], then: Mapping[str, Change]) -> dict[str, dict[tuple[str, int], Sizes]]:
    """The replays after one more cut, which gives `then`."""
    return from_json([*to_json(first), *to_json(then)])


def to_json(changes: Mapping[str, Change]) -> list[list[Any]]:
    """Plain values: [module, function, ordinal, place, number, value] rows."""
    return [
        [module, *key, *place, value]
        for module, change in changes.items()
        for key, sizes in change.items()
        for place, value in sizes.items()
    ]


def from_json(rows: Sequence[Sequence[Any]]) -> dict[str, dict[tuple[str, int], Sizes]]:
    """What `to_json` wrote.

    >>> changes = {"block": {("view", 0): {("size", 1): 9}}}
    >>> from_json(to_json(changes)) == changes
    True
    """
    out: dict[str, dict[tuple[str, int], Sizes]] = {}
    for module, function, ordinal, place, number, value in rows:
        out.setdefault(module, {}).setdefault((function, ordinal), {})[place, number] = value
    return out


def missed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], wanted: Mapping[Place, Any]) -> set[Place]:
    """Which of the wanted numbers the call is not given; a size of -1 is whatever it must be."""
    held = _given(func, args, kwargs)
    return {place for place, value in wanted.items() if held.get(place) not in (-1, value)}


def _given(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sizes:
    """The numbers of a call by their places; pieces are only given all at once."""
    name = func.__name__
    out: Sizes = {}
    if name == "__getitem__":
        for number, item in enumerate(item for item in _indices(args[1]) if _is_piece(item)):
            out |= {("start", number): item.start, ("stop", number): item.stop}
    elif name == "narrow" and len(args) > 3:
        out = {("start", 0): args[2], ("stop", 0): args[2] + args[3]}
    elif name == "pad":
        out = {("pad", i): n for i, n in enumerate(args[1])}
    elif name == "unflatten":
        out = {("size", args[1] % args[0].ndim + i): n for i, n in enumerate(args[2])}
    elif name in SIZES:
        out = {("size", d): n for d, n in enumerate(_sizes(args, kwargs, SIZES[name])[0])}
    return {place: n for place, n in {**out, **_factors(name, args, kwargs)}.items() if n is not None}


def _factors(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Place, float]:
    """The factors of a call, which may have been computed from sizes, as attention's scale is if none is given."""
    factors: dict[Place, float] = {("float", i): item for i, item in enumerate(args) if isinstance(item, float)}
    if name == ATTENTION and kwargs.get("scale") is None:
        query = args[0] if args else kwargs["query"]
        factors["scale", 0] = query.shape[-1] ** -0.5
    return factors


def changed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], change: Mapping[Place, int | float]) -> Any:
    """The call with its new numbers."""
    name, args, kwargs = func.__name__, list(args), dict(kwargs)
    for (place, position), value in change.items():
        if place == "float":
            args[position] = value
        elif place == "scale":
            kwargs["scale"] = value
    if name in PIECES:
        key = next((k for k in ("split_size", "split_size_or_sections", "split_sizes", "chunks") if k in kwargs), "")
        if key:
            kwargs.pop(key)
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        return _in_pieces(name, args[0], [int(change["piece", i]) for i in range(len(change))], dim)
    if name == "__getitem__":
        args[1] = _sliced(args[1], change)
    elif name == "narrow":
        start, stop = change.get(("start", 0), args[2]), change.get(("stop", 0), args[2] + args[3])
        args[2:] = [start, stop - start]
    elif name == "pad":
        args[1] = [change.get(("pad", i), n) for i, n in enumerate(args[1])]
    elif name == "unflatten":
        first = args[1] % args[0].ndim
        args[2] = [n if n == -1 else change.get(("size", first + i), n) for i, n in enumerate(args[2])]
    elif name in SIZES:
        _resize(args, kwargs, name, change)
    return func(*args, **kwargs)


def _in_pieces(name: str, whole: torch.Tensor, sizes: list[int], dim: int) -> Any:
    """`whole` in pieces; to modes that watch, as the analysis of a second cut, it is the call that it stands for."""

    def pieces(x: torch.Tensor, sizes: list[int], dim: int) -> Any:
        return torch.split(x, sizes, dim)

    pieces.__name__ = name
    if has_torch_function((whole,)):
        return handle_torch_function(pieces, (whole,), whole, sizes, dim)
    return pieces(whole, sizes, dim)


def _sizes(args: Sequence[Any], kwargs: Mapping[str, Any], first: int) -> tuple[list[Any], str | None, bool]:
    """The sizes in a call, by which keyword they are given, and whether one by one."""
    key = next((k for k in ("size", "shape") if k in kwargs), None)
    spread = key is None and len(args) > first and isinstance(args[first], int | torch.SymInt)
    sizes = kwargs[key] if key is not None else args[first:] if spread else args[first] if len(args) > first else ()
    return list(sizes) if isinstance(sizes, Sequence) else [], key, spread


def _resize(args: list[Any], kwargs: dict[str, Any], name: str, change: Mapping[Place, int | float]) -> None:
    """New sizes; the first of a view's follows from the others, so that it may be the batch times heads."""
    first = SIZES[name]
    sizes, key, spread = _sizes(args, kwargs, first)
    new: list[Any] = [n if n == -1 else change.get(("size", d), n) for d, n in enumerate(sizes)]
    if name in FOLLOWING and -1 not in new:
        new[next(d for d in range(len(new)) if ("size", d) in change)] = -1
    if key is not None:
        kwargs[key] = new
    elif spread:
        args[first:] = new
    else:
        args[first] = new


def _indices(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _is_piece(item: Any) -> bool:
    return isinstance(item, slice) and item != slice(None)


def _sliced(index: Any, change: Mapping[Place, int | float]) -> Any:
    """The index with the slices that are not trivial given new ends, counted in order."""
    out: list[Any] = []
    number = 0
    for item in _indices(index):
        if _is_piece(item):
            start = change.get(("start", number), item.start) if item.start is not None else None
            stop = change.get(("stop", number), item.stop) if item.stop is not None else None
            item = slice(start, stop, item.step)
            number += 1
        out.append(item)
    return tuple(out) if isinstance(index, tuple) else out[0]
