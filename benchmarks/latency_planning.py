"""Plans for a latency against plans for MACs: how fast each is, and what the measured table said it would be.

    python benchmarks/latency_planning.py --models resnet18 vgg16 --out latency.jsonl --tables tables
    python benchmarks/latency_planning.py --models resnet20 --data parquet:DIR --weights DIR --out latency.jsonl
    python benchmarks/latency_planning.py --models resnet18-64 vgg16_bn-32 --data parquet:DIR --weights DIR
    python benchmarks/latency_planning.py --table latency.jsonl

A table is measured for each model and runtime. A plan for MACs (`Knapsack`, all widths or multiples of 8 only) sets
what is to be kept; then the fastest plan is looked for, by the table, that keeps as much. The whole model and the plans
are timed by turns.

resnet18 and vgg16 of torchvision, at 224 x 224, have random weights, and scores drawn for each unit (log-normal, each
group summing to 1): as much is kept if the sum of scores is. resnet20 and resnet56 for CIFAR-10 are trained; so are
torchvision's models with a size behind their name, on images scaled to it: here, simplified first (`sc.simplify`), on
so many images as `--train` says, `--epochs` times (flips, one-cycle, bf16), and kept in `--weights`. Scores are
`Energy` on 512 train images, batch norms take their statistics anew from 2,048, and as much is kept if the accuracy on
2,048 train images that nothing else sees is: of plans for 0.7 to 1.4 times the latency at which the scores are equal,
the fastest that has it. Test images are only reported on. No group loses more than three quarters.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur as sc
from secateur.allocate.knapsack import Knapsack
from secateur.allocate.latency_knapsack import LatencyKnapsack
from secateur.allocate.limits import Limits
from secateur.measure.latency import torch_threads
from secateur.measure.measure_table import measure_table
from secateur.measure.reasons import why_not_faster
from secateur.measure.runtimes import compiled, eager, onnx_runtime
from secateur.measure.table import LatencyTable

RUNTIMES = {"eager": eager, "onnx": onnx_runtime, "compile": compiled}
KINDS = {"MACs": 1, "MACs by 8": 8}
"""Of what the widths of a plan for MACs are multiples."""
HALVINGS = 7
TRIED = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.1, 1.2, 1.3, 1.4)
CAP = 0.75


@dataclass
class Case:
    """A model, what its units are worth, and how good a cut model is: None where that cannot be said."""

    name: str
    model: nn.Module
    example: Tensor
    scores: sc.Scores
    held_out: Callable[[sc.Plan], float] | None
    test: Callable[[sc.Plan], float] | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["resnet18", "vgg16"])
    parser.add_argument("--runtimes", nargs="*", default=["eager", "onnx"], choices=list(RUNTIMES))
    parser.add_argument("--shares", type=float, nargs="*", default=[0.5], help="of the MACs")
    parser.add_argument("--data", default="cifar10", help="a data set, as load_data takes it")
    parser.add_argument("--weights", type=Path, help="the folder of resnet20_cifar10.safetensors")
    parser.add_argument("--train", type=int, default=40000, help="images that models without weights are trained on")
    parser.add_argument("--epochs", type=int, default=4, help="how often they see them")
    parser.add_argument("--test", type=int, default=10000, help="test images, the first ones")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), help="of plans for MACs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=9, help="how often each layer is timed")
    parser.add_argument("--runs", type=int, default=30, help="how often each plan is timed")
    parser.add_argument("--tables", type=Path, default=Path("tables"), help="where measured tables are kept")
    parser.add_argument("--out", type=Path, default=Path("latency_planning.jsonl"))
    parser.add_argument("--table", type=Path, help="print a results file as a Markdown table and stop")
    options = parser.parse_args()
    if options.table:
        print(markdown([json.loads(line) for line in options.table.read_text().splitlines()]))
        return
    warnings.simplefilter("ignore")
    options.tables.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        with torch_threads(options.threads):
            case = build(name, options)
            tables = {runtime: table_of(case, runtime, options) for runtime in options.runtimes}
            for runtime, table in tables.items():
                for row in rows(case, runtime, table, options):
                    with options.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")


def build(name: str, options: argparse.Namespace) -> Case:
    torch.manual_seed(0)
    if name in ("resnet20", "resnet56"):
        data = sc.load_data(options.data, normalise="imagenet")  # as the weights were trained
        weights = options.weights / f"{name}_cifar10.safetensors"
        model = sc.build_model(f"secateur:{name}", classes=10, weights=weights).model.eval()
        return trained(name, data, model, options)
    if "-" in name:
        data = sc.load_data(options.data, image_size=int(name.partition("-")[2]), normalise="imagenet")
        return trained(name, data, taught(name, data, options), options)
    import torchvision

    model = torchvision.models.get_model(name, weights=None).eval()
    example = torch.randn(1, 3, 224, 224)
    groups = sc.find_groups(model, example)
    return Case(name, model, example, sc.score(model, groups, drawn), None, None)


def drawn(model: nn.Module, groups: sc.Groups) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(g.size, generator=generator, dtype=torch.float64).exp() for g in groups.groups]
    return [value / value.sum() for value in values]


def order_of(data: sc.Data) -> Tensor:
    """Train images: 2,048 for statistics, 2,048 held out, and the others."""
    return torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))


def taught(name: str, data: sc.Data, options: argparse.Namespace) -> nn.Module:
    """A network of torchvision's after a short training, or as it was kept, without what computes nothing."""
    model = sc.build_model(f"torchvision:{name.partition('-')[0]}", classes=len(data.classes)).model.eval()
    model = sc.simplify(model, data.example())[0]
    path = options.weights / f"{name}-{options.train}x{options.epochs}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        start, size = time.perf_counter(), 128
        seen = data.train.take(order_of(data)[4096 : 4096 + options.train])
        after = data.train.take(order_of(data)[2048:4096])

        def batches(images: sc.Images, size: int, **how: Any) -> Iterator[tuple[Tensor, Tensor]]:
            return images.batches(size, mean=data.mean, std=data.std, channels_last=True, **how)

        history = sc.fine_tune(
            model, lambda epoch: batches(seen, size, shuffle=epoch, augment=("flip",)), lambda: batches(after, 256),
            [sc.Stage(0.05, options.epochs)], schedule="one-cycle", weight_decay=5e-4, nesterov=True, bf16=True,
            channels_last=True, batches_per_epoch=-(-len(seen) // size),
        )  # fmt: skip
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
        accuracy = 100 * history.best.validation_accuracy
        print(f"{name}: trained for {time.perf_counter() - start:.0f} s, held out {accuracy:.2f} %", flush=True)
    return model.eval()


def trained(name: str, data: sc.Data, model: nn.Module, options: argparse.Namespace) -> Case:
    order = order_of(data)
    shape = {"mean": data.mean, "std": data.std}
    train = [images for images, _ in data.train.take(order[:2048]).batches(256, **shape)]
    held = list(data.train.take(order[2048:4096]).batches(256, **shape))
    test = list(data.test.take(range(options.test)).batches(250, **shape))
    groups = sc.find_groups(model, data.example())
    scores = sc.score(model, groups, sc.Energy(train[:2]))
    known: dict[tuple[str, int], float] = {}

    def right(plan: sc.Plan, batches: list[tuple[Tensor, Tensor]]) -> float:
        key = (plan.hash, id(batches))
        if key not in known:
            smaller = sc.apply(model, plan)
            sc.reset_statistics(smaller, train)
            with torch.inference_mode():
                hits = sum(int((smaller(images).argmax(1) == labels).sum()) for images, labels in batches)
            known[key] = hits / sum(len(labels) for _, labels in batches)
        return known[key]

    return Case(name, model, data.example(), scores, lambda plan: right(plan, held), lambda plan: right(plan, test))


def table_of(case: Case, runtime: str, options: argparse.Namespace) -> LatencyTable:
    path = options.tables / f"{case.name}_{runtime}_{options.threads}.json"
    if not path.exists():
        start = time.perf_counter()
        layers = eager if runtime == "compile" else None
        kwargs = {"runtime": RUNTIMES[runtime], "layers": layers, "turns": options.turns}
        table = measure_table(case.model, case.example, case.scores.groups, **kwargs)
        path.write_text(json.dumps(table.to_json()))
        print(f"{case.name}, {runtime}: table in {time.perf_counter() - start:.0f} s, {len(table.layers)} layers")
        print(f"  {table.conditions}\n  {table.fit}")
        for check in table.checks:
            print(f"  {check}", flush=True)
    return LatencyTable.from_json(json.loads(path.read_text()))


def kept(plan: sc.Plan, scores: sc.Scores) -> float:
    sums = [(float(v[list(units)].sum()), float(v.sum())) for v, units in zip(scores.values, plan.keep)]
    return sum(part for part, _ in sums) / sum(whole for _, whole in sums)


def rows(case: Case, runtime: str, table: LatencyTable, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each share and set of widths, the plan for MACs and the fastest that keeps as much."""
    for share in options.shares:
        for kind in options.kinds:
            limits = Limits(cap=CAP, multiple=KINDS[kind])
            budget = sc.Budget(macs=share)
            plain = sc.allocate(case.scores, Knapsack(), budget=budget, limits=limits)
            start = time.perf_counter()
            fast = fastest(case, table, plain, limits=Limits(cap=CAP))
            seconds = time.perf_counter() - start
            if fast is None:
                print(f"{case.name}, {runtime}, {kind} {share}: no faster plan keeps as much", flush=True)
                fast = plain
            timed = times(case, runtime, [None, plain, fast], options)
            for label, plan, ms in zip(("whole", kind, "latency"), (None, plain, fast), timed):
                row = {"model": case.name, "runtime": runtime, "kind": label, "against": kind, "target": share}
                row |= {"predicted_ms": table.whole_ms if plan is None else table.predict(plan), "measured_ms": ms}
                row |= {"faster": ms / timed[2], "seconds": seconds, "threads": options.threads}
                if plan is not None:
                    row |= {"macs": plan.macs_left / plan.groups.macs, "kept": kept(plan, case.scores)}
                    row |= {"widths": [len(units) for units in plan.keep]}
                    if case.held_out and case.test:
                        row |= {"held_out": case.held_out(plan), "test": case.test(plan)}
                print(json.dumps(row), flush=True)
                yield row
            print("\n".join(why_not_faster(table, fast)[:8]), flush=True)


def fastest(case: Case, table: LatencyTable, plain: sc.Plan, limits: Limits) -> sc.Plan | None:
    """The fastest plan, by the table, that keeps as much as `plain`; None if none was found."""

    def plan(ms: float) -> sc.Plan | None:
        try:
            return sc.allocate(case.scores, LatencyKnapsack(table, ms=ms), limits=limits)
        except sc.SecateurError:
            return None

    goal, low, high = kept(plain, case.scores), 0.0, table.predict(plain)
    best = None
    for _ in range(HALVINGS):
        middle = high if best is None else (low + high) / 2
        found = plan(middle)
        if found is not None and kept(found, case.scores) >= goal:
            best, high = found, min(middle, table.predict(found))
        elif best is None:
            high *= 1.05
        else:
            low = middle
    if case.held_out is None or best is None:
        return best
    goal = case.held_out(plain)
    tried = (plan(high * factor) for factor in TRIED if high * factor < table.predict(plain))
    return next((p for p in tried if p is not None and case.held_out(p) >= goal), None)


def times(case: Case, runtime: str, plans: list[sc.Plan | None], options: argparse.Namespace) -> list[float]:
    """Median milliseconds of the cut models, by turns; of the whole one for None."""
    models = [case.model if plan is None else sc.apply(case.model, plan) for plan in plans]
    ready = [RUNTIMES[runtime](model.eval(), case.example) for model in models]
    out = []
    for first, second in ((0, 2), (1, 2)):
        pair = sc.compare_latency(ready[first], ready[second], case.example, runs=options.runs, threads=options.threads)
        out.append(pair[0].median_ms)
    return [*out, pair[1].median_ms]


def markdown(rows: list[dict[str, Any]]) -> str:
    """One row for each plan."""
    lines = [
        "| model | runtime | plan | MACs left | scores kept | held out | test | predicted ms | measured ms | off by | "
        "latency plan is faster by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["kind"] if row["kind"] != "latency" else f"latency, as good as {row['against']}"
        off = f"{100 * (row['predicted_ms'] / row['measured_ms'] - 1):+.0f} %"
        shares = [f"{100 * row[key]:.1f} %" if key in row else "–" for key in ("macs", "kept", "held_out", "test")]
        cells = [row["model"], row["runtime"], name, *shares, f"{row['predicted_ms']:.2f}", f"{row['measured_ms']:.2f}"]
        faster = "" if row["kind"] == "latency" else f"{row['faster']:.2f}x"
        lines.append(f"| {' | '.join([*cells, off, faster])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
