"""Training in several processes against one: do the loss curves agree, and what does a step take?

    python benchmarks/two_processes.py --data parquet:DIR
    python benchmarks/two_processes.py --data parquet:DIR --rate 0.01 --weights resnet20_cifar10.safetensors --control
    python benchmarks/two_processes.py --data parquet:DIR --double --steps 10
    python benchmarks/two_processes.py --data parquet:DIR --processes 2 4 --device cuda
    python benchmarks/two_processes.py --table two_processes.jsonl

ResNet-20 on CIFAR-10 from the same weights, random or those of `--weights`: SGD at `--rate` with momentum 0.9 and
weight decay 1e-4, batches of 128 images, cropped and flipped, for 50 steps. One process does it alone; then so many as
`--processes` says, started by torchrun, each on its slice of the same batches. "sharded" parts the weights as well
(FSDP2). Told are the losses of all single steps: the largest difference, where it is, and the same for the weights
after the last step. On `--device cuda` each process has a GPU.

At a rate of 0.1 from random weights, training is chaotic: what is rounded otherwise grows by half and more in each
step, and also in one process with another number of threads, which `--control` runs too. With `--double`, weights and
images are float64: the first steps then show whether there is another difference than rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur as sc
from secateur.recover.train import Stage, fine_tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="as load_data takes it")
    parser.add_argument("--processes", type=int, nargs="*", default=[2])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--weights", help="a file to begin from, as in fine-tuning")
    parser.add_argument("--double", action="store_true", help="in float64")
    parser.add_argument("--control", action="store_true", help="one process with one more thread, too")
    parser.add_argument("--kinds", nargs="*", default=["replicated", "sharded"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of each process, on the CPU")
    parser.add_argument("--parallel", default="replicated", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("two_processes.jsonl"))
    parser.add_argument("--table", type=Path, metavar="FILE", help="print these rows and stop")
    options = parser.parse_args()
    if options.result is not None:
        train(options)
        return
    if options.table is None:
        compare(options)
    print(markdown([json.loads(line) for line in (options.table or options.out).read_text().splitlines()]))


def train(options: argparse.Namespace) -> None:
    """One run, in as many processes as torchrun has started; the first writes what came of it."""
    torch.set_num_threads(options.threads)
    data = sc.load_data(options.data, normalise="imagenet")
    torch.manual_seed(0)
    dtype = torch.float64 if options.double else torch.float32
    net = sc.build_model("secateur:resnet20", classes=10, weights=options.weights).model.to(dtype)
    sums: list[float] = []
    seen: list[float] = []

    def batches(epoch: int) -> Any:
        some = data.batches("train", options.batch, shuffle=epoch, augment=("crop", "flip"), device=options.device)
        return ((images.to(dtype), labels) for images, labels in islice(some, options.steps))

    def validation() -> Any:
        some = data.batches("validation", 256, device=options.device)
        return ((images.to(dtype), labels) for images, labels in islice(some, 2))

    def on_step(step: int, steps: int, mean: float) -> None:
        sums.append(mean * step)
        seen.append(time.perf_counter())

    fine_tune(
        net,
        batches,
        validation,
        [Stage(options.rate, 1)],
        weight_decay=1e-4,
        on_step=on_step,
        device=options.device,
        parallel=options.parallel,
    )
    if sums:
        losses = [after - before for before, after in zip([0.0, *sums], sums)]
        warm = sorted(b - a for a, b in pairwise(seen))
        weights = torch.cat([p.detach().flatten().double().cpu() for p in parameters(net)])
        result = {"losses": losses, "seconds": warm[len(warm) // 2], "weights": weights.tolist()}
        options.result.write_text(json.dumps(result))


def parameters(net: nn.Module) -> list[nn.Parameter]:
    return list(net.parameters())


def compare(options: argparse.Namespace) -> None:
    alone = run(options, 1, options.threads, "replicated")
    kinds = [(1, options.threads + 1, "replicated")] if options.control else []
    kinds += [(n, options.threads, kind) for n in options.processes for kind in options.kinds]
    for processes, threads, kind in kinds:
        found = run(options, processes, threads, kind)
        apart = [abs(a - b) for a, b in zip(found["losses"], alone["losses"], strict=True)]
        moved = [abs(a - b) for a, b in zip(found["weights"], alone["weights"], strict=True)]
        row = {
            "processes": processes,
            "parallel": kind if processes > 1 else f"{threads} threads",
            "device": options.device,
            "dtype": "float64" if options.double else "float32",
            "rate": options.rate,
            "weights_from": "trained" if options.weights else "random",
            "steps": len(apart),
            "batch": options.batch,
            "apart": max(apart),
            "at": apart.index(max(apart)) + 1,
            "weights": max(moved),
            "first": alone["losses"][0],
            "last": alone["losses"][-1],
            "ms": 1e3 * found["seconds"],
            "ms_alone": 1e3 * alone["seconds"],
        }
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def run(options: argparse.Namespace, processes: int, threads: int, kind: str) -> dict[str, Any]:
    """What a run in processes of their own gives."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        given = {"data": options.data, "steps": options.steps, "batch": options.batch, "device": options.device}
        given |= {"threads": threads, "parallel": kind, "result": out, "rate": options.rate}
        flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        flags += ["--weights", str(Path(options.weights).resolve())] if options.weights else []
        flags += ["--double"] if options.double else []
        command = [sys.executable, *(launch if processes > 1 else []), __file__, *flags]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| processes | device | numbers | rate, weights | steps | batch | loss, first and last | largest difference "
        "| at step | of weights | ms a step, and alone |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['processes']}, {row['parallel']} | {row['device']} | {row['dtype']} "
            f"| {row['rate']}, {row['weights_from']} | {row['steps']} | {row['batch']} "
            f"| {row['first']:.4f}, {row['last']:.4f} | {row['apart']:.1e} "
            f"| {row['at']} | {row['weights']:.1e} | {row['ms']:.0f}, {row['ms_alone']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
