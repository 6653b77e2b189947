"""`find_blocks`: any model and example inputs -> the modules that can be left out (`graph.blocks`)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.graph.blocks import CLONE, Block, Blocks, Counted, Form, Held, Pass, Refused, Step
from secateur.graph.capture import Ref, Trace, op_name
from secateur.graph.costs import find_products
from secateur.graph.replay import replay_of
from secateur.graph.runs import Given, Opaque, Run, Watched, watch
from secateur.graph.stream import Scene, Stream, Way, comes_back


@dataclass(frozen=True)
class Found:
    """The blocks, and for each the (call, operand) that are its branches in the additions of the trace."""

    watched: Watched
    blocks: Blocks
    branches: Mapping[str, tuple[tuple[int, int], ...]]


def find_blocks(model: nn.Module, example_inputs: Any) -> Blocks:
    """Every module of the model that can be left out, because what it gives is what it is given plus something.

    From what it is given to what it gives there is a way by additions; views and the like on it end as they began. Left
    out, a block gives what it would give if all that is added were 0. So relu(x + f(x)) becomes relu(x), and the norm
    behind the addition stays too; an activation goes where the trace shows that it changes nothing, since x was made by
    another. A module that changes the shape, or has a layer on both sides of its addition, is no block. One that is
    called more than once goes at all its calls, and is no block if these are not alike. It may hold other blocks, as a
    stage does.

    Args:
        model: any module, in train or eval mode; left exactly as found. Also one that was cut, or has lost blocks.
        example_inputs: as for `find_groups`.

    Raises:
        CaptureError: the model does not run on these inputs.

    >>> import torch, secateur as sc
    >>> print(find_blocks(sc.build_model("secateur:resnet20").model, torch.zeros(1, 3, 32, 32)))
    8 blocks can be left out, of 269,722 parameters and 40,551,040 MACs
    ...
    """
    return find_in(watch(model, example_inputs), model).blocks


def find_in(watched: Watched, model: nn.Module) -> Found:
    """The blocks in a run that was watched."""
    scene = Scene(watched)
    results: dict[str, list[_Call]] = {}
    for number, run in enumerate(watched.runs):
        if run.module and run.stop > run.start:
            inner = [each for each in watched.runs[:number] if each.start >= run.start]
            results.setdefault(run.module, []).append(_examine(scene, run, inner))
    paths = _paths(model)
    products = [(p.module, p.constant) for p in find_products(watched.trace, {})]
    held = _held(model)
    blocks: dict[str, Block] = {}
    branches: dict[str, tuple[tuple[int, int], ...]] = {}
    refused: list[Refused] = []
    for name, calls in results.items():
        why = next((call.why for call in calls if call.why), "")
        forms = [call.form for call in calls if call.added]
        if not why and forms and (len(forms) < len(calls) or any(form != forms[0] for form in forms)):
            why = f"it is called {len(calls)} times, and not alike"
        if why:
            refused.append(Refused(name, why))
        elif forms:
            assumed = tuple(dict.fromkeys(line for call in calls for line in call.assumed))
            block = Block(name, paths[name], len(calls), forms[0], assumed, 0, 0, 1)
            params = sum(t.size for t in held if t.parameter and all(block.takes_along(n) for n in t.names))
            macs = sum(macs for module, macs in products if block.takes_along(f"{module}."))
            blocks[name] = dataclasses.replace(block, params=params, macs=macs)
            branches[name] = tuple(pair for call in calls for pair in call.added)
    kept, more = _once(blocks, branches)
    ordered = _ordered(kept, {name: calls[0].run for name, calls in results.items()})
    whole = Blocks(
        tuple(ordered),
        tuple(refused + more),
        held,
        tuple(_counted(model, watched, kept)),
        sum(macs for _, macs in products),
    )
    return Found(watched, whole, {name: branches[name] for name in whole.names})


@dataclass(frozen=True)
class _Call:
    """What one call of a module is: a block's, with its form and branches; none, for a reason; or none at all."""

    run: Run
    form: Form = None
    added: tuple[tuple[int, int], ...] = ()
    assumed: tuple[str, ...] = ()
    why: str = ""


def _examine(scene: Scene, run: Run, inner: Sequence[Run]) -> _Call:
    """Follow the way through one call."""
    way = Way(scene, run, inner)
    streams: list[Stream] = []
    whys: list[str] = []

    def form(gave: Any) -> Form:
        if isinstance(gave, Opaque):
            whys.append(f"it gives a {gave.kind}, and only tuples, lists, dicts and plain values can be made anew")
        if isinstance(gave, dict):
            return {key: form(item) for key, item in gave.items()}
        if isinstance(gave, tuple | list):
            return type(gave)([form(item) for item in gave])
        return leaf(gave) if isinstance(gave, Ref) else gave

    def leaf(out: Ref) -> Form:
        stream = way.found.get(out.id)
        if stream is None:
            if not scene.read_outside(out.id, run):
                return None
            whys.append(way.lost.get(out.id, _NOT_ON_THE_WAY))
            return None
        streams.append(stream)
        if not _fits(scene.trace, stream, out):
            whys.append("the views on its way do not come back to what it is given")
        steps = stream.steps
        if not steps and stream.added and _is_held(scene, run, stream.given, out):
            steps = (Step("", CLONE),)
        return Pass(stream.given.argument, stream.given.position, stream.given.place, steps)

    made = form(run.gave)
    added = tuple(dict.fromkeys(pair for stream in streams for pair in stream.added))
    if not added:
        lost = [why for why in whys if why in way.lost.values()]
        return _Call(run, why=_changed_shape(scene, run) or lost[0] if lost else "")
    why = whys[0] if whys else _outside(scene, run) or _in_vain(scene, run, streams)
    assumed = tuple(dict.fromkeys(line for stream in streams for line in stream.assumed))
    return _Call(run, made, added, assumed, why.replace(_NOT_ON_THE_WAY, "it gives something else besides"))


_NOT_ON_THE_WAY = "-"


def _fits(trace: Trace, stream: Stream, out: Ref) -> bool:
    first, last = trace.values[stream.given.ref.id], trace.values[out.id]
    return (first.shape, first.dtype) == (last.shape, last.dtype) and comes_back(trace, stream)


def _changed_shape(scene: Scene, run: Run) -> str:
    """In words, if the one tensor that it gives has the shape of none that it is given."""
    shapes = [scene.trace.values[given.ref.id].shape for given in run.given]
    out = scene.trace.values[run.gave.id].shape if isinstance(run.gave, Ref) else None
    if out is None or not shapes or out in shapes:
        return ""
    return f"it changes the shape from {shapes[0]} to {out}"


def _is_held(scene: Scene, run: Run, given: Given, out: Ref) -> bool:
    """Whether someone else reads the input later: a write into what the block gives must not reach it."""
    memory = scene.alias[given.ref.id]
    if scene.alias[out.id] == memory:
        return False
    same = [value for value in range(len(scene.alias)) if scene.alias[value] == memory]
    held = any(scene.trace.values[value].origin != "op" for value in same)
    return held or any(index >= run.stop for value in same for index in scene.readers.get(value, ()))


def _outside(scene: Scene, run: Run) -> str:
    """Who reads what is made inside, other than what is given."""
    gives = set(_refs(run.gave))
    for index in range(run.start, run.stop):
        for ref in scene.trace.calls[index].outputs:
            if ref is not None and ref.id not in gives and scene.read_outside(ref.id, run):
                what = f"what {op_name(scene.trace.calls[index])} makes inside"
                given = all(reader == len(scene.trace.calls) for reader in scene.readers[ref.id] if reader >= run.stop)
                return f"the model gives {what}; if nobody reads that, say so by an Example" if given else (
                    f"{what} is read outside"
                )
    return ""


def _in_vain(scene: Scene, run: Run, streams: Sequence[Stream]) -> str:
    """What it is given besides, if layers compute that from the stream for it alone."""
    passed = {stream.given.ref.id for stream in streams}
    live, makers = set(passed), dict[int, str]()
    for call, product in zip(scene.trace.calls[: run.start], scene.products):
        used = live.intersection(_refs((call.args, dict(call.kwargs))))
        new = [ref.id for ref in call.outputs if ref is not None] if used else []
        live.update(new)
        if product or not used.isdisjoint(makers):
            makers.update(dict.fromkeys(new, call.module))
    for given in run.given:
        value = given.ref.id
        if value in makers and value not in passed and not scene.read_outside(value, run):
            return f"what {makers[value] or 'the model itself'} computes for it alone would be computed in vain"
    return ""


def _refs(nested: Any) -> list[int]:
    if isinstance(nested, Ref):
        return [nested.id]
    if isinstance(nested, tuple | list | dict):
        return [ref for item in (nested.values() if isinstance(nested, dict) else nested) for ref in _refs(item)]
    return []


def _once(
    blocks: Mapping[str, Block], branches: Mapping[str, tuple[tuple[int, int], ...]]
) -> tuple[list[Block], list[Refused]]:
    """Of blocks with the same branches the one with which most goes; of several such, the innermost."""
    alike: dict[tuple[tuple[int, int], ...], list[Block]] = {}
    for name, block in blocks.items():  # inner calls end first
        alike.setdefault(branches[name], []).append(block)
    kept, refused = [], []
    for same in alike.values():
        best = max(same, key=lambda block: block.params)
        kept.append(best)
        why = f"{best.name}, without which nothing else would change, has more that can go with it"
        refused += [Refused(block.name, why) for block in same if block.params < best.params]
    return kept, refused


def _ordered(blocks: Iterable[Block], first: Mapping[str, Run]) -> list[Block]:
    """As they run, those that hold others before them; with the number of blocks inside."""
    ordered = sorted(blocks, key=lambda b: (first[b.name].start, -first[b.name].stop, len(b.name)))
    single = [b for b in ordered if not any(other is not b and b.holds(other) for other in ordered)]
    return [dataclasses.replace(b, inside=sum(b.holds(other) for other in single)) for b in ordered]


def _counted(model: nn.Module, watched: Watched, blocks: Sequence[Block]) -> list[Counted]:
    """The calls that are given sizes by a module around blocks, with how many come earlier within each of these."""
    out: list[Counted] = []
    made = watched.trace.python
    for name, module in model.named_modules():
        replay, own = replay_of(module), next((run for run in watched.runs if run.module == name), None)
        inner = [b for b in blocks if not name or any(path.startswith(f"{name}.") for path in b.paths)]
        if replay is None or own is None or not inner:
            continue
        for function, ordinal in replay.changes:
            same = [i for i in range(*own.python) if made[i].function == function][:ordinal]
            before = [(block.name, _within(watched, block, same)) for block in inner]
            out.append(Counted(name, function, ordinal, tuple((b, count) for b, count in before if count)))
    return out


def _within(watched: Watched, block: Block, places: Sequence[int]) -> int:
    """How many of these torch functions run in the block, but not in what stays of it."""
    stay = {f"{block.name}.{step.module}" for step in block.keeps if step.module}
    counts = Counter[int]()
    for run in watched.runs:
        if run.module == block.name or run.module in stay:
            counts.update(dict.fromkeys(range(*run.python), 1))
    return sum(counts[place] == 1 for place in places)


def _paths(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Of each module, by its first path, all of them."""
    out: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        out.setdefault(id(module), []).append(path)
    return {paths[0]: tuple(paths) for paths in out.values()}


def _held(model: nn.Module) -> tuple[Held, ...]:
    out: dict[int, Held] = {}
    for parameter, named in ((True, model.named_parameters), (False, model.named_buffers)):
        for name, tensor in named(remove_duplicate=False):
            before = out.get(id(tensor), Held((), tuple(tensor.shape), parameter))
            out[id(tensor)] = dataclasses.replace(before, names=(*before.names, name))
    return tuple(out.values())
