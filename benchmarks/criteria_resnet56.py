"""What is left of a residual network when nothing is trained: criteria side by side, Torch-Pruning's among them.

    python benchmarks/criteria_resnet56.py --data parquet:DIR --weights resnet56_cifar10.safetensors
    python benchmarks/criteria_resnet56.py --table criteria_resnet56.jsonl

ResNet-56 on CIFAR-10. For each seed, 2,048 train images are drawn; criteria that look at images score on these alone,
and after the cut the statistics of the batch norms are estimated anew from the same ones (`sc.reset_statistics`).
Nothing else is changed. Accuracy is on all test images, which nothing else sees: "raw" as cut, "reset" with the new
statistics. Of criteria that read the weights alone, raw is the same for all seeds and is run once.

What may go are the inner channels of the blocks, one at least staying; not the residual stream. Ours rank all of them
in one list (`sc.GlobalRanking`, "per cost" where the name says so) until the MACs are divided by each of `--times`.
Torch-Pruning ranks them with `global_pruning=True` and its criteria's defaults, all other layers ignored; its ratio is
bisected until the MACs, counted the same way, are within 1 % of the same target. With "labels": the labels of the
images are used as well.

Rows that are in `--out` are not run again. `--table` prints a file as Markdown: means over seeds, and the sample
standard deviation where there are two or more. `--plot` draws the means after re-estimation.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.score.direction import Direction
from secateur.score.scaling import by_mean, lamp

PIECE = 128
FIXED = ("L1", "L1, by mean", "L2", "LAMP", "FPGM", "FPGM, by mean", "BN scale")
"""Criteria that read the weights alone."""

Cut = Callable[[nn.Module, float], nn.Module]
"""The model and by what its MACs are divided -> the smaller one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="a data set, as load_data takes it")
    parser.add_argument("--normalise", default="imagenet", help="as the weights were trained; see load_data")
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--weights")
    parser.add_argument("--times", type=float, nargs="*", default=[2.11, 1.6, 1.3])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=2048, help="train images drawn for each seed")
    parser.add_argument("--kinds", nargs="*", default=["reset", "raw"])
    parser.add_argument("--only", nargs="*", help="the criteria of these names")
    parser.add_argument("--out", type=Path, default=Path("criteria_resnet56.jsonl"))
    parser.add_argument("--table", type=Path, metavar="FILE", help="print these rows and stop")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="with --table: draw them too, or those of --only")
    options = parser.parse_args()
    if options.table is not None:
        rows = [json.loads(line) for line in options.table.read_text().splitlines()]
        report(rows)
        if options.plot is not None:
            draw(rows, options.only, options.plot)
        return
    data = sc.load_data(options.data, normalise=options.normalise)
    test = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches_of(data, data.test)]
    model = sc.build_model(f"secateur:{options.model}", classes=10, weights=options.weights).model.eval()
    groups = sc.find_groups(model, data.example())
    print(f"{options.model}, {groups.macs / 1e6:.1f} M MACs; {len(data.test)} test images", flush=True)
    done = {}
    if options.out.exists():
        for row in map(json.loads, options.out.read_text().splitlines()):
            done[key(row)] = row
    else:
        print(f"dense: {accuracy(model, test):.2f} %", flush=True)
    for seed in options.seeds:
        images = drawn(data, options.images, seed)
        cuts = {**ours(groups, images, seed), **peers(groups, images, seed)}
        for name in options.only or cuts:
            for row in rows_of(model, groups, name, cuts[name], images, test, seed, options, done):
                done[key(row)] = row
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)
    report(list(done.values()))


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["criterion"], row["times"], row["seed"], row["kind"]


def rows_of(
    model: nn.Module,
    groups: sc.Groups,
    name: str,
    cut: Cut,
    images: Sequence[tuple[Tensor, Tensor]],
    test: Sequence[tuple[Tensor, Tensor]],
    seed: int,
    options: argparse.Namespace,
    done: dict[tuple[Any, ...], dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """What is missing of a criterion and a seed."""
    fixed = name.removeprefix("Torch-Pruning ") in FIXED
    for times in options.times:
        seeds = {kind: options.seeds[0] if fixed and kind == "raw" else seed for kind in options.kinds}
        missing = [kind for kind in options.kinds if (name, times, seeds[kind], kind) not in done]
        if not missing:
            continue
        begun = time.perf_counter()
        small = cut(model, times)
        left = sc.find_groups(small, images[0][0][:1]).macs
        row = {"criterion": name, "times": times, "seed": seed, "macs": left, "whole": groups.macs}
        row["cut_seconds"] = round(time.perf_counter() - begun, 1)
        for kind in sorted(missing):  # "raw" before "reset", which changes the model
            if kind == "reset":
                sc.reset_statistics(small, [x for x, _ in images])
            yield {**row, "kind": kind, "accuracy": accuracy(small, test)}


def ours(groups: sc.Groups, images: Sequence[tuple[Tensor, Tensor]], seed: int) -> dict[str, Cut]:
    inputs = [x for x, _ in images]
    labelled = [(x, y) for batch, labels in images for x, y in zip(batch.split(32), labels.split(32), strict=True)]
    plain, per_cost = sc.GlobalRanking(), sc.GlobalRanking(per_cost=True)

    def by(criterion: Any, strategy: Any = plain, **options: Any) -> Cut:
        scores = cache(lambda model: sc.score(model, groups, criterion, **options))
        return lambda model, times: cut(model, scores(model), strategy, times)

    return {
        "Direction, per cost": by(Direction(inputs), per_cost),
        "Energy, per cost": by(sc.Energy(inputs), per_cost),
        "Energy": by(sc.Energy(inputs)),
        "Activation": by(sc.Activation(inputs)),
        "L1": by(sc.Magnitude(1)),
        "L1, by mean": by(sc.Magnitude(1), scale=by_mean),
        "L2": by(sc.Magnitude(2)),
        "LAMP": by(sc.Magnitude(2), scale=lamp),
        "FPGM": by(sc.Median()),
        "FPGM, by mean": by(sc.Median(), scale=by_mean),
        "BN scale": by(sc.BatchNormScale()),
        "Random": by(sc.Random(seed)),
        "Taylor (labels)": by(sc.Taylor(labelled)),
        "BrainSurgeon": by(sc.BrainSurgeon(inputs)),
        "Reconstruction": by(sc.Reconstruction(inputs)),
        "Relevance (labels)": by(sc.Relevance(labelled)),
        "Fisher (labels)": by(sc.Fisher(labelled)),
    }


def cut(model: nn.Module, scores: sc.Scores, strategy: Any, times: float) -> nn.Module:
    groups = scores.groups
    within = set(inner(groups))
    limits = sc.Limits(keep=[group.name for i, group in enumerate(groups.groups) if i not in within])
    small: nn.Module = sc.apply(model, sc.allocate(scores, strategy, budget=sc.Budget(macs=1 / times), limits=limits))
    return small


def inner(groups: sc.Groups) -> list[int]:
    """The groups whose units one layer makes: those within the blocks, and not the stream that blocks add to."""
    shapes = {info.name: info.shape for info in groups.tensors}
    made = [[s for s in g.slots if s.role == "write" and len(shapes[s.tensor]) == 4] for g in groups.groups]
    return [index for index, slots in enumerate(made) if len(slots) == 1]


def peers(groups: sc.Groups, images: Sequence[tuple[Tensor, Tensor]], seed: int) -> dict[str, Cut]:
    """Torch-Pruning's criteria, each with its defaults."""
    import torch_pruning as tp

    criteria = {
        "FPGM": tp.importance.FPGMImportance,
        "LAMP": tp.importance.LAMPImportance,
        "L1": partial(tp.importance.MagnitudeImportance, p=1),
        "L2": partial(tp.importance.MagnitudeImportance, p=2),
        "BN scale": tp.importance.BNScaleImportance,
        "random": tp.importance.RandomImportance,
        "Taylor (labels)": tp.importance.TaylorImportance,
    }
    names = {groups.groups[i].name for i in inner(groups)}

    def pruned(model: nn.Module, make: Callable[[], Any], gradients: dict[str, Tensor], ratio: float) -> nn.Module:
        torch.manual_seed(seed)
        small = copy.deepcopy(model)
        for name, parameter in small.named_parameters():
            parameter.grad = gradients[name].clone() if gradients else None
        layers = [(n, m) for n, m in small.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        ignored = [m for n, m in layers if n not in names]
        example = images[0][0][:1]
        with torch.enable_grad():
            tp.pruner.BasePruner(
                small, example, make(), global_pruning=True, pruning_ratio=ratio, ignored_layers=ignored
            ).step()
        return small.eval()

    def by(make: Callable[[], Any], labels: bool) -> Cut:
        def matched(model: nn.Module, times: float) -> nn.Module:
            gradients = gradients_of(model, images) if labels else {}
            low, high, wanted = 0.0, 1.0, groups.macs / times
            for _ in range(16):
                ratio = (low + high) / 2
                small = pruned(model, make, gradients, ratio)
                left = sc.find_groups(small, images[0][0][:1]).macs
                if abs(left / wanted - 1) <= 0.01:
                    return small
                low, high = (ratio, high) if left > wanted else (low, ratio)
            raise SystemExit(f"no ratio leaves {wanted:.0f} MACs within 1 %: {left} at {ratio}")

        return matched

    return {f"Torch-Pruning {name}": by(make, "labels" in name) for name, make in criteria.items()}


def gradients_of(model: nn.Module, images: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Of the mean loss over the images, as its documentation takes them."""
    twin = copy.deepcopy(model)
    with torch.enable_grad():
        for x, labels in images:
            (F.cross_entropy(twin(x), labels) / len(images)).backward()
    return {name: parameter.grad for name, parameter in twin.named_parameters() if parameter.grad is not None}


def batches_of(data: sc.Data, images: sc.Images) -> list[tuple[Tensor, Tensor]]:
    return list(images.batches(PIECE, mean=data.mean, std=data.std))


def drawn(data: sc.Data, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:count]
    ((images, labels),) = data.train.take(chosen).batches(count, mean=data.mean, std=data.std)
    return list(zip(images.split(256), labels.split(256), strict=True))


@torch.inference_mode()
def accuracy(model: nn.Module, test: Sequence[tuple[Tensor, Tensor]]) -> float:
    fast = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    return 100 * sum(int((fast(x).argmax(1) == y).sum()) for x, y in test) / sum(len(y) for _, y in test)


def report(rows: Sequence[dict[str, Any]]) -> None:
    """A line for each criterion, the best at the largest cut first."""
    sizes = sorted({row["times"] for row in rows})
    heads = [(size, kind) for size in sizes for kind in ("raw", "reset")]

    def values(name: str, size: float, kind: str) -> list[float]:
        mine = [row for row in rows if (row["criterion"], row["times"], row["kind"]) == (name, size, kind)]
        return [row["accuracy"] for row in mine]

    def cell(found: list[float]) -> str:
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        return f"{statistics.mean(found):.1f}{spread}" if found else "-"

    def best(name: str) -> float:
        found = values(name, sizes[-1], "reset")
        return -statistics.mean(found) if found else 0.0

    print("| criterion | seeds | " + " | ".join(f"{size}x {kind}" for size, kind in heads) + " |")
    print("|---|---|" + "---|" * len(heads))
    for name in sorted({row["criterion"] for row in rows}, key=best):
        seeds = len({row["seed"] for row in rows if row["criterion"] == name})
        print(f"| {name} | {seeds} | " + " | ".join(cell(values(name, *head)) for head in heads) + " |")


def draw(rows: Sequence[dict[str, Any]], only: Sequence[str] | None, path: Path) -> None:
    """A line for each criterion, named at its end; Torch-Pruning's are dashed and grey."""
    import matplotlib.pyplot as plt

    names = [n for n in dict.fromkeys(row["criterion"] for row in rows) if not only or n in only]
    sizes = sorted({row["times"] for row in rows})
    means = {
        name: [
            statistics.mean(
                r["accuracy"] for r in rows if (r["criterion"], r["times"], r["kind"]) == (name, size, "reset")
            )
            for size in sizes
        ]
        for name in names
    }
    figure, axes = plt.subplots(figsize=(8, 5.6), layout="constrained")
    ends = spread([means[name][-1] for name in names], 1.55)
    ours = itertools.cycle(colour for i, colour in enumerate(plt.get_cmap("tab10").colors) if i != 7)  # no grey
    lead = {"arrowstyle": "-", "linewidth": 0.4, "relpos": (0, 0.5)}
    for name, end in zip(names, ends, strict=True):
        peer = name.startswith("Torch-Pruning")
        colour = "0.6" if peer else next(ours)
        axes.plot(sizes, means[name], color=colour, linestyle="--" if peer else "-", marker="o", markersize=3.5)
        axes.annotate(
            f"{name}  {means[name][-1]:.1f}", (sizes[-1], means[name][-1]), (sizes[-1] + 0.03, end), color=colour,
            va="center", fontsize=8.5, annotation_clip=False, arrowprops={**lead, "color": colour},
        )  # fmt: skip
    axes.set(xlabel="MACs, times fewer", ylabel="accuracy after re-estimation, %", xticks=sizes, xlim=(1.25, 2.62))
    axes.set_title("ResNet-56 / CIFAR-10 (93.39 %), nothing trained", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def spread(values: Sequence[float], least: float) -> list[float]:
    """The values moved apart as little as keeps them `least` from each other, in their order."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    out = list(values)
    for above, i in itertools.pairwise(order):
        out[i] = min(out[i], out[above] - least)
    return out


if __name__ == "__main__":
    main()
