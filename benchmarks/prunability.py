"""Which models can be cut, proven, and by how much: one row per model of a library, with the peer beside it.

    python benchmarks/prunability.py --source torchvision --peer --out torchvision.jsonl
    python benchmarks/prunability.py --source timm --families --out timm.jsonl
    python benchmarks/prunability.py --source timm --drawn --sides 112 128 --minutes 60 --out drawn.jsonl
    python benchmarks/prunability.py --source transformers --names llama swin --out transformers.jsonl
    python benchmarks/prunability.py --table torchvision.jsonl

Every model runs in a process of its own, forked from one that has the libraries, with a time limit; rows that are in
the file already are not run again. `--drawn` takes the names in an order drawn at random, the same each time, so that
as many as there is time for are a fair sample of all. With `--sides`, models of timm that take images so small are
given such: they have the same units, and take less time. `--dtype bfloat16` is for models of more than 3 billion
parameters, which take half the memory so; their proof is in float64 all the same. Ours:
find the groups, cut half of every group, and separately certify a random plan with another share for each group.
Outcomes: certified; runs (cut, but a check failed); frozen (nothing to cut); fails; slow (over the limit). The tier is
(a) if only attributes follow the cut, (b) if calls are replayed or attention is headwise. Seconds and memory are those
of finding and cutting; memory beyond the model, as a share of the model. The peer is Torch-Pruning as its users call
it: L2 magnitude, ratio 0.5, the last classifier ignored, a minute at most; "runs" is all that it claims.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import multiprocessing
import random
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch

Build = Callable[[str], tuple[Any, Any]]
"""A model by its name, and inputs for it."""
LIMIT_S = 300
PEER_LIMIT_S = 60
BARE = 1 << 20
"""Models smaller than this many bytes are too small for a share of memory to mean anything."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=("torchvision", "timm", "transformers"), default="torchvision")
    parser.add_argument("--families", action="store_true", help="of timm, one model of each architecture module")
    parser.add_argument("--names", nargs="*", help="models; default: all float models of the source")
    parser.add_argument("--out", type=Path, default=Path("prunability.jsonl"))
    parser.add_argument("--peer", action="store_true", help="run Torch-Pruning on the same models as well")
    parser.add_argument("--limit", type=int, default=LIMIT_S, help="seconds for one model")
    parser.add_argument("--drawn", action="store_true", help="in an order drawn at random")
    parser.add_argument("--sides", type=int, nargs="*", default=(), help="of images for timm: the first that is taken")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="that models are made in")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no more models after so many")
    parser.add_argument("--table", type=Path, help="print a results file as a Markdown table and stop")
    options = parser.parse_args()
    if options.table:
        print(markdown(read(options.table)))
        return
    chosen = options.names or (families() if options.families else models.names(options.source))
    if options.drawn:
        random.Random(0).shuffle(chosen)
    torch.set_default_dtype(getattr(torch, options.dtype))
    importlib.import_module(options.source)
    importlib.import_module("secateur").find_groups  # noqa: B018 - imported when asked for
    until = time.perf_counter() + 60 * options.minutes
    build = functools.partial(models.build, options.source, sides=options.sides)
    sweep(build, chosen, ("ours", "peer") if options.peer else ("ours",), options.out, options.limit, until)


def sweep(build: Build, names: list[str], who: tuple[str, ...], out: Path, limit: int, until: float) -> None:
    """Run what is missing in the file, one process for each row."""
    done = {(row["who"], row["name"]) for row in read(out)}
    for one, name in ((one, name) for name in names for one in who):
        if (one, name) in done or time.perf_counter() > until:
            continue
        row = in_process(one, build, name, limit if one == "ours" else min(limit, PEER_LIMIT_S))
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{one:4} {name:36} {row['outcome']:9} {row.get('note', '')[:90]}", flush=True)


def in_process(who: str, build: Build, name: str, limit: int) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_report, args=(there, who, build, name), daemon=True)
    start = time.perf_counter()
    child.start()
    there.close()
    row: dict[str, Any] = {"who": who, "name": name, "outcome": "slow", "note": f"over {limit} s"}
    if here.poll(limit):
        try:
            row = here.recv()
        except EOFError:  # killed, as for memory
            child.join()
            row |= {"outcome": "fails", "note": f"ended by signal {-(child.exitcode or 0)}"}
    child.kill()
    child.join()
    return {"seconds": time.perf_counter() - start, **row}


def _report(there: Any, who: str, build: Build, name: str) -> None:
    """In the process of its own: send the row, or the error as one."""
    try:
        there.send(measure_one(who, build, name))
    except Exception as error:
        note = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        there.send({"who": who, "name": name, "outcome": "fails", "note": note})


def measure_one(who: str, build: Build, name: str) -> dict[str, Any]:
    """One model, in this process."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model, inputs = build(name)
    model.eval()
    before = sum(p.numel() for p in model.parameters())
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    row = ours(model, inputs) if who == "ours" else peer(model, inputs)
    side = {"side": inputs.shape[-1]} if isinstance(inputs, torch.Tensor) else {}
    dtype = str(torch.get_default_dtype()).removeprefix("torch.")
    return {"who": who, "name": name, "before": before, "bytes": size, "dtype": dtype, **side, **row}


def families() -> list[str]:
    """One model of each of timm's architecture modules: the one whose name says that it is small."""
    import timm

    small = "atto femto pico nano xxtiny xxs tiny mini micro small lite 18 _s b0".split()

    def size(name: str) -> tuple[int, int, str]:
        return next((i for i, word in enumerate(small) if word in name), len(small)), len(name), name

    return [min(timm.list_models(module=module), key=size) for module in timm.list_modules()]


def reset_peak() -> int:
    """Forget the peak of this process's memory so far; what it holds now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def ours(model: Any, inputs: Any) -> dict[str, Any]:
    """Groups, half of each cut, and the certificate of a random plan."""
    import secateur as sc
    from secateur.graph.probe import random_keep

    half(*tiny())
    held, start = reset_peak(), time.perf_counter()
    groups, smaller = half(model, inputs)
    row = {"seconds": time.perf_counter() - start, "memory": _memory("VmHWM") - held}
    row["after"] = sum(p.numel() for p in smaller.parameters())
    headwise = any(type(module).__name__ == "HeadwiseAttention" for module in smaller.modules())
    row["tier"] = "b" if groups.sizes or headwise else "a"
    del smaller
    if not groups.groups:
        return {**row, "outcome": "frozen", "note": groups.frozen[0].reason}
    uneven = sc.Plan(groups, random_keep(groups, 11))
    certificate = sc.certify(model, sc.apply(model, uneven), uneven, inputs)
    return {
        **row,
        "outcome": "certified" if certificate.ok else "runs",
        "prunable": certificate.prunable_share,
        "error": max(certificate.permutation_error, certificate.masked_error),
        "rounding": max(certificate.permutation_rounding, certificate.masked_rounding),
        "control": certificate.control_error,
        "effect": certificate.masked_effect,
        "inexact": len(certificate.inexact),
        "groups": len(groups.groups),
        "replayed": len(groups.sizes),
        "note": "" if certificate.ok else certificate.sentence,
        "frozen": dict(Counter(f.reason for f in groups.frozen).most_common(6)),
    }


def half(model: Any, inputs: Any) -> tuple[Any, Any]:
    """Our groups, and the model with half of each."""
    import secateur as sc

    groups = sc.find_groups(model, inputs)
    return groups, sc.apply(model, sc.allocate(sc.score(model, groups, sc.Magnitude(2)), sc.Uniform(0.5)))


def tiny() -> tuple[Any, Any]:
    """What each is run on first, so that what it imports does not count."""
    return torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 2)), torch.zeros(1, 2)


def peer(model: Any, inputs: Any) -> dict[str, Any]:
    """Torch-Pruning without configuration."""
    peer_half(*tiny())
    inputs = getattr(inputs, "inputs", inputs)  # of an `Example`, which says as well what is read
    held, start = reset_peak(), time.perf_counter()
    peer_half(model, inputs)
    seconds = time.perf_counter() - start
    memory = _memory("VmHWM") - held
    with torch.no_grad():
        model(*inputs) if isinstance(inputs, tuple) else model(**inputs) if isinstance(inputs, dict) else model(inputs)
    after = sum(p.numel() for p in model.parameters())
    return {"outcome": "runs", "after": after, "seconds": seconds, "memory": memory}


def peer_half(model: Any, inputs: Any) -> None:
    import torch_pruning as tp

    last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1:]
    importance = tp.importance.MagnitudeImportance(p=2)
    tp.pruner.MagnitudePruner(model, inputs, importance=importance, pruning_ratio=0.5, ignored_layers=last).step()


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The results as a summary and a table, ours and the peer's side by side."""
    by_who = {who: {row["name"]: row for row in rows if row["who"] == who} for who in ("ours", "peer")}
    lines = [
        *summary(list(by_who["ours"].values()), by_who["peer"]),
        "",
        "| model | outcome | tier | prunable | removed at half | largest error | s | memory | peer | removed | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in by_who["ours"].items():
        other = by_who["peer"].get(name, {})
        error = f"{row['error']:.0e}" if "error" in row else "-"
        cells = [
            name, row["outcome"], row.get("tier", "-"), _share(row.get("prunable")), _removed(row), error,
            f"{row['seconds']:.1f}", _times(row), other.get("outcome", "-"), _removed(other),
            f"{other['seconds']:.1f}" if "after" in other else "-",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(ours: list[dict[str, Any]], peer: dict[str, dict[str, Any]]) -> list[str]:
    """What the rows add up to, a line each."""
    count = Counter(row["outcome"] for row in ours)
    certified = [row for row in ours if row["outcome"] == "certified"]
    lines = ["- " + ", ".join(f"{n} {outcome}" for outcome, n in count.most_common()) + f", of {len(ours)}"]
    if certified:
        wide = sum(row["prunable"] >= 0.9 for row in certified)
        removed = statistics.median(1 - row["after"] / row["before"] for row in certified)
        tiers = Counter(row["tier"] for row in certified)
        large = [row["memory"] / row["bytes"] for row in certified if row["bytes"] > BARE]
        lines += [
            f"- at least 90 % prunable: {wide}; median removed at half: {100 * removed:.1f} %; "
            f"largest error: {max(row['error'] for row in certified):.0e}",
            f"- tier (a): {tiers['a']}, tier (b): {tiers['b']}",
            f"- seconds: median {statistics.median(r['seconds'] for r in certified):.1f}, "
            f"most {max(r['seconds'] for r in certified):.1f}; memory beyond the model, as a share of it: "
            + (f"median {statistics.median(large):.2f}, most {max(large):.2f}" if large else "-"),
        ]
    both = [(row["seconds"], peer[row["name"]]["seconds"]) for row in certified if "after" in peer.get(row["name"], {})]
    if peer:
        lines.append(f"- the peer runs on {sum('after' in row for row in peer.values())} of {len(peer)}")
    if both:
        ratio = statistics.median(mine / theirs for mine, theirs in both)
        lines.append(f"- seconds, ours over the peer's, median of the {len(both)} where both work: {ratio:.2f}")
    return lines


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _removed(row: dict[str, Any]) -> str:
    return _share(1 - row["after"] / row["before"]) if "after" in row else "-"


def _times(row: dict[str, Any]) -> str:
    return f"{row['memory'] / row['bytes']:.2f}x" if "memory" in row else "-"


if __name__ == "__main__":
    main()
