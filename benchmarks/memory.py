"""What finding and cutting take of memory, beside what the model's own forward pass takes.

    python benchmarks/memory.py --source torchvision --out memory.jsonl
    python benchmarks/memory.py --table memory.jsonl

Each model has a process of its own, in which a small network has been cut before, so that the libraries are there; what
they take is no model's. Then, each from a heap that was given back: the peak of one forward pass, and the peak of
`find_groups`, `score` by L2, `allocate` and `apply` at half of each group, the cut model still held. Both are bytes
beyond the model itself. Models and inputs are those of `prunability.py`. Rows that are in `--out` are not run again.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import models

SMALL = 30 * 2**20
"""Models of fewer bytes are told of apart: a few activations are as large."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=["torchvision", "timm"], default="torchvision")
    parser.add_argument("--names", nargs="*")
    parser.add_argument("--limit", type=int, default=300, help="seconds for a model")
    parser.add_argument("--out", type=Path, default=Path("memory.jsonl"))
    parser.add_argument("--one", metavar="NAME", help="measure this model here and print its row")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a summary of these rows and stop")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measured(options.source, options.one)))
        return
    if options.table is not None:
        report([json.loads(line) for line in options.table.read_text().splitlines()])
        return
    options.out.touch()
    done = {json.loads(line)["name"] for line in options.out.read_text().splitlines()}
    for name in options.names or models.names(options.source):
        if name in done:
            continue
        row = apart(options.source, name, options.limit)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
    report([json.loads(line) for line in options.out.read_text().splitlines()])


def apart(source: str, name: str, limit: int) -> dict[str, Any]:
    """The row of a model, from a process of its own."""
    command = [sys.executable, __file__, "--source", source, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=True)
    except subprocess.TimeoutExpired:
        return {"name": name, "failed": f"over {limit} s"}
    except subprocess.CalledProcessError as error:
        return {"name": name, "failed": error.stderr.strip().splitlines()[-1]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measured(source: str, name: str) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    conv, norm = torch.nn.Conv2d, torch.nn.BatchNorm2d
    half(torch.nn.Sequential(conv(3, 8, 3), norm(8), torch.nn.ReLU(), conv(8, 8, 3)).eval(), torch.randn(2, 3, 8, 8))
    model, inputs = models.build(source, name)
    model.eval()
    row = {"name": name, "bytes": sum(t.nbytes for t in model.state_dict().values())}
    for kind, work in (("forward", forward), ("cut", half)):
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        held = memory("VmRSS")
        made = work(model, inputs)
        row[kind] = memory("VmHWM") - held
        del made
    return row


def forward(model: Any, inputs: Any) -> Any:
    import torch

    from secateur.graph.nested import as_arguments

    with torch.no_grad():
        args, kwargs = as_arguments(inputs)
        return model(*args, **kwargs)


def half(model: Any, inputs: Any) -> Any:
    import secateur as sc

    groups = sc.find_groups(model, inputs)
    return sc.apply(model, sc.allocate(sc.score(model, groups, sc.Magnitude(2)), sc.Uniform(0.5)))


def memory(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def report(rows: list[dict[str, Any]]) -> None:
    good = [row for row in rows if "failed" not in row]
    print(f"{len(good)} of {len(rows)} models; failed: {[row['name'] for row in rows if 'failed' in row]}")
    for title, chosen in (
        ("all", good),
        (f"{SMALL >> 20} MiB or more", [row for row in good if row["bytes"] >= SMALL]),
        ("smaller", [row for row in good if row["bytes"] < SMALL]),
    ):
        if chosen:
            shares = sorted(row["cut"] / row["bytes"] for row in chosen)
            more = sum((row["cut"] - row["forward"]) / row["bytes"] <= 1 for row in chosen)
            print(
                f"{title}: {len(chosen)} models; beyond the model, as a share of it: median "
                f"{statistics.median(shares):.2f}, most {shares[-1]:.2f}; at most 1: {sum(s <= 1 for s in shares)}; "
                f"at most 1 more than its forward pass takes: {more}; most MiB {max(r['cut'] for r in chosen) >> 20}"
            )
    for row in sorted(good, key=lambda row: -row["cut"] / row["bytes"])[:12]:
        sizes = {key: f"{row[key] / 2**20:.0f} MiB" for key in ("bytes", "forward", "cut")}
        print(f"  {row['name']}: {sizes}")


if __name__ == "__main__":
    main()
