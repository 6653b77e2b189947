"""Which models can be cut, proven, and by how much: one row per torchvision or timm model, with the peer beside it.

    python benchmarks/prunability.py --source torchvision --out prunability.jsonl
    python benchmarks/prunability.py --source timm --names resnet18 vit_tiny_patch16_224 --peer
    python benchmarks/prunability.py --table prunability.jsonl > docs/prunability.md

Every model runs in a process of its own with a time limit; rows that are in the file already are not run again. Ours:
find the groups, cut half of every group, and separately certify a random plan with another share for each group.
Outcomes: certified; runs (cut, but a check failed); frozen (nothing to cut); fails; slow (over the limit). The peer is
Torch-Pruning as its users call it: L2 magnitude, ratio 0.5, the last classifier ignored; "runs" is all that it claims.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

LIMIT_S = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=("torchvision", "timm"), default="torchvision")
    parser.add_argument("--names", nargs="*", help="models; default: all float models of the source")
    parser.add_argument("--out", type=Path, default=Path("prunability.jsonl"))
    parser.add_argument("--peer", action="store_true", help="run Torch-Pruning on the same models as well")
    parser.add_argument("--limit", type=int, default=LIMIT_S, help="seconds for one model")
    parser.add_argument("--one", nargs=3, metavar=("WHO", "SOURCE", "NAME"), help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help="print a results file as a Markdown table and stop")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_one(*options.one)))
    elif options.table:
        print(markdown(read(options.table)))
    else:
        names = options.names or all_names(options.source)
        sweep(options.source, names, ("ours", "peer") if options.peer else ("ours",), options.out, options.limit)


def all_names(source: str) -> list[str]:
    """Every float model that the source builds."""
    if source == "timm":
        import timm

        return list(timm.list_models())
    import torchvision

    return [name for name in torchvision.models.list_models() if not name.startswith("quantized")]


def sweep(source: str, names: list[str], who: tuple[str, ...], out: Path, limit: int) -> None:
    """Run what is missing in the file, one process for each row."""
    done = {(row["who"], row["name"]) for row in read(out)}
    for name in names:
        for one in who:
            if (one, name) in done:
                continue
            row = in_process(one, source, name, limit)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{one:4} {name:36} {row['outcome']:9} {row.get('note', '')[:90]}", flush=True)


def in_process(who: str, source: str, name: str, limit: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", who, source, name]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"who": who, "name": name, "outcome": "slow", "seconds": limit, "note": f"over {limit} s"}
    if done.returncode == 0:
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    seconds = time.perf_counter() - start
    return {"who": who, "name": name, "outcome": "fails", "seconds": seconds, "note": lines[-1][:300]}


def measure_one(who: str, source: str, name: str) -> dict[str, Any]:
    """One model, in this process."""
    import torch

    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model, inputs = build(source, name)
    model.eval()
    before = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    row = ours(model, inputs) if who == "ours" else peer(model, inputs)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = row.pop("seconds", time.perf_counter() - start)
    return {"who": who, "name": name, "before": before, "seconds": seconds, "peak_mib": memory, **row}


def build(source: str, name: str) -> tuple[Any, Any]:
    """The model with random weights, and inputs for it."""
    import torch

    if source == "timm":
        import timm

        model = timm.create_model(name)
        return model, torch.randn(1, *model.pretrained_cfg["input_size"])
    import torchvision

    kwargs = {"weights_backbone": None} if any(part in name for part in ("rcnn", "fcos", "ssd", "retina")) else {}
    kwargs |= {"weights_backbone": None} if any(part in name for part in ("deeplab", "fcn_", "lraspp")) else {}
    kwargs |= {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **kwargs)
    return model, torchvision_inputs(name)


def torchvision_inputs(name: str) -> Any:
    import torch

    if name.startswith("raft"):
        return torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)
    if any(part in name for part in ("rcnn", "fcos", "ssd", "retinanet")):
        return ([torch.rand(3, 320, 320)],)
    if name.startswith(("r3d", "mc3", "r2plus1d", "s3d")):
        return torch.randn(1, 3, 14, 224, 224) if name == "s3d" else torch.randn(1, 3, 8, 112, 112)
    if name.startswith("mvit"):
        return torch.randn(1, 3, 16, 224, 224)
    if name.startswith("swin3d"):
        return torch.randn(1, 3, 8, 64, 64)
    side = 299 if name == "inception_v3" else 224
    return torch.randn(1, 3, side, side)


def ours(model: Any, inputs: Any) -> dict[str, Any]:
    """Groups, half of each cut, and the certificate of a random plan; seconds are those of finding and cutting."""
    import secateur as sc
    from secateur.graph.probe import random_keep

    start = time.perf_counter()
    groups = sc.find_groups(model, inputs)
    plan = sc.allocate(sc.score(model, groups, sc.Magnitude(2)), sc.Uniform(0.5))
    smaller = sc.apply(model, plan)
    seconds = time.perf_counter() - start
    after = sum(p.numel() for p in smaller.parameters())
    del smaller
    if not groups.groups:
        return {"outcome": "frozen", "after": after, "seconds": seconds, "note": groups.frozen[0].reason}
    uneven = sc.Plan(groups, random_keep(groups, 11))
    certificate = sc.certify(model, sc.apply(model, uneven), uneven, inputs)
    return {
        "outcome": "certified" if certificate.ok else "runs",
        "after": after,
        "seconds": seconds,
        "prunable": certificate.prunable_share,
        "error": max(certificate.permutation_error, certificate.masked_error),
        "replayed": len(groups.sizes),
        "note": "" if certificate.ok else certificate.sentence,
    }


def peer(model: Any, inputs: Any) -> dict[str, Any]:
    """Torch-Pruning without configuration."""
    import torch
    import torch_pruning as tp

    last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1:]
    start = time.perf_counter()
    pruner = tp.pruner.MagnitudePruner(
        model, inputs, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=last
    )
    pruner.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return {"outcome": "runs", "after": sum(p.numel() for p in model.parameters()), "seconds": seconds}


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The results as a table, ours and the peer's side by side."""
    by_who = {who: {row["name"]: row for row in rows if row["who"] == who} for who in ("ours", "peer")}
    lines = [
        "| model | outcome | prunable | removed at half | largest error | find + cut, s | MiB | peer | removed | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in by_who["ours"].items():
        other = by_who["peer"].get(name, {})
        error = f"{row['error']:.0e}" if "error" in row else "-"
        cells = [
            name, row["outcome"], _share(row.get("prunable")), _removed(row), error, f"{row['seconds']:.1f}",
            f"{row['peak_mib']:.0f}" if "peak_mib" in row else "-", other.get("outcome", "-"), _removed(other),
            f"{other['seconds']:.1f}" if other else "-",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _removed(row: dict[str, Any]) -> str:
    return _share(1 - row["after"] / row["before"]) if "after" in row else "-"


if __name__ == "__main__":
    main()
