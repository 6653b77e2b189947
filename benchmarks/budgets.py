"""How exactly plans meet budgets, and how long planning takes: 20 models of torchvision and timm, random weights.

    python benchmarks/budgets.py --out budgets.jsonl
    python benchmarks/budgets.py --names resnet50 vit_b_16
    python benchmarks/budgets.py --table budgets.jsonl

Each model runs in a process of its own: its groups are found once and scored by L2 magnitude; then every strategy plans
for 0.7, 0.5 and 0.3 of the MACs, of the parameters, and of both. Each plan is carried out, and the MACs and parameters
of the cut model are counted anew, by `sc.count_macs` and over its tensors. What is reached stands over what was asked:
never above 1, and at least 0.99, or nothing more would fit. Seconds are those of `allocate` alone, the first call of a
model with the tables that later ones reuse.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

LIMIT_S = 540
SHARES = (0.7, 0.5, 0.3)
SMALL = MappingProxyType(
    {
        "torchvision": "resnet18 resnet50 resnext50_32x4d vgg11_bn mobilenet_v2 mobilenet_v3_small efficientnet_b0 "
        "densenet121 densenet201 shufflenet_v2_x1_0 regnet_y_400mf squeezenet1_1 convnext_tiny swin_t",
        "timm": "ghostnet_100 repvgg_a0 hrnet_w18_small poolformer_s12",
    }
)
MODELS: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        **{name: (library, 64) for library, names in SMALL.items() for name in names.split()},
        "vit_b_16": ("torchvision", 224),
        "mixer_s16_224": ("timm", 224),
    }
)
"""Name -> library, and the side of the images, small where the model takes such."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", default=list(MODELS), help="models; default: all 20")
    parser.add_argument("--out", type=Path, default=Path("budgets.jsonl"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help="print a results file as a Markdown table and stop")
    options = parser.parse_args()
    if options.one:
        for row in measure(options.one):
            print(json.dumps(row), flush=True)
    elif options.table:
        print(markdown(read(options.table)))
    else:
        done = {row["name"] for row in read(options.out)}
        for name in options.names:
            if name not in done:
                command = [sys.executable, __file__, "--one", name]
                ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
                if ran.returncode:
                    print(f"{name} failed: {ran.stderr.splitlines()[-1]}", flush=True)
                    continue
                with options.out.open("a") as file:
                    file.write(ran.stdout)
                print(markdown([json.loads(line) for line in ran.stdout.splitlines()]), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(name: str) -> Iterator[dict[str, Any]]:
    """A row for each strategy and budget."""
    warnings.simplefilter("ignore")
    import torch
    from models import build

    import secateur as sc
    from secateur.allocate.budget import Budget
    from secateur.allocate.knapsack import Knapsack
    from secateur.allocate.plan import Strategy, allocate
    from secateur.allocate.ranking import GlobalRanking
    from secateur.allocate.uniform import Uniform

    torch.set_num_threads(1)
    library, side = MODELS[name]
    model, _ = build(library, name)
    inputs = torch.zeros(1, 3, side, side)
    groups = sc.find_groups(model.eval(), inputs)
    scores = sc.score(model, groups, sc.Magnitude(2))
    strategies: dict[str, Strategy] = {
        "uniform": Uniform(),
        "ranking": GlobalRanking(),
        "per cost": GlobalRanking(per_cost=True),
        "knapsack": Knapsack(),
    }
    whole = {"macs": sc.count_macs(model, inputs).total, "params": sc.count_params(model)}
    total = sum(float(values.sum()) for values in scores.values)
    for label, strategy in strategies.items():
        for measures in (("macs",), ("params",), ("macs", "params")):
            for share in SHARES:
                row = {"name": name, "groups": len(groups.groups), "units": groups.offsets[-1], "strategy": label}
                row |= {"measures": measures, "share": share}
                start = time.perf_counter()
                try:
                    plan = allocate(scores, strategy, budget=Budget(**dict.fromkeys(measures, share)))
                except sc.SecateurError as error:
                    yield {**row, "seconds": time.perf_counter() - start, "refused": str(error)}
                    continue
                row["seconds"] = time.perf_counter() - start
                smaller = sc.apply(model, plan)
                try:
                    left = {"macs": sc.count_macs(smaller, inputs).total, "params": sc.count_params(smaller)}
                except sc.SecateurError as error:
                    yield {**row, "refused": f"cut to {min(map(len, plan.keep))} units at least, {error}"}
                    continue
                row["reached"] = {m: left[m] / int(whole[m] * share) for m in measures}
                kept = sum(float(values[list(units)].sum()) for values, units in zip(scores.values, plan.keep))
                yield {**row, "kept": kept / total}


def markdown(rows: list[dict[str, Any]]) -> str:
    """One row for each model: reached over asked, for each single measure and share, by strategy the worst."""
    columns = [(measure, share) for measure in ("macs", "params") for share in SHARES]
    heads = [f"{measure} {share}" for measure, share in columns]
    lines = [
        f"| model | groups | {' | '.join(heads)} | both, worst | seconds: uniform, ranking, per cost, knapsack |",
        "|---|---|" + "---|" * (len(heads) + 2),
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        cells = [worst([r for r in own if r["measures"] == [m] and r["share"] == share]) for m, share in columns]
        both = worst([r for r in own if len(r["measures"]) == 2])
        strategies = dict.fromkeys(row["strategy"] for row in own)
        seconds = [max(r["seconds"] for r in own if r["strategy"] == strategy) for strategy in strategies]
        times = ", ".join(f"{s:.2f}" for s in seconds)
        lines.append(f"| {name} | {own[0]['groups']} | {' | '.join(cells)} | {both} | {times} |")
    refused = {f"{row['name']}: {row['refused']}" for row in rows if "refused" in row}
    return "\n".join([*lines, "", *sorted(refused)])


def worst(rows: list[dict[str, Any]]) -> str:
    """The reached share that is farthest below one, or above; of several measures, the binding one's."""
    reached = [max(row["reached"].values()) for row in rows if "reached" in row]
    if not reached:
        return "refused"
    refusals = len(rows) - len(reached)
    most, least = max(reached), min(reached)
    return f"{most if most > 1 else least:.4f}" + (f" ({refusals} not counted)" if refusals else "")


if __name__ == "__main__":
    main()
