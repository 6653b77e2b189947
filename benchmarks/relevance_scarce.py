"""Does relevance choose better than magnitude and Taylor where data are scarce and nothing is fine-tuned?

    python benchmarks/relevance_scarce.py --data parquet:DIR --weights resnet20_cifar10.safetensors
    python benchmarks/relevance_scarce.py --data parquet:DIR --model resnet56 --weights resnet56_cifar10.safetensors

The claim is that of Yeom et al. 2021, "Pruning by Explaining": with ten images per class as all the data there are,
relevance (layer-wise relevance propagation) leaves more accuracy than weights, gradients or Taylor expansions. Here: a
residual network trained on CIFAR-10, ten train images per class, drawn anew for each seed; the inner channels of the
blocks are cut, lowest scores first over all layers, one channel at least in each, until the MACs are divided by each
of `--times`; no training. Accuracy is on test images, which nothing else sees: as cut ("raw"), and with statistics of
the batch norms taken anew from the same hundred images ("reset"). A row is a mean over the seeds and the sample
standard deviation; the test images are the same in all rows.

"by layer" divides a layer's scores by their L2 norm, as Molchanov et al. 2017 and Yeom et al. do for all criteria but
relevance. Taylor is |dL/dg| of a gate on each channel, image by image. The network has been trained on all of the train
images, the hundred among them: only the choice of what to cut is made from scarce data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.score.lrp.composites import EpsilonAlphaBeta, EpsilonPlus
from secateur.score.lrp.starts import softmax_difference
from secateur.score.relevance import Relevance
from secateur.score.taylor import Taylor

Batches = Sequence[tuple[Tensor, Tensor]]


def by_layer(values: Tensor, group: object) -> Tensor:
    return values / values.norm().clamp(min=1e-30)


def criteria(images: Tensor, labels: Tensor, seed: int) -> dict[str, Callable[[nn.Module, sc.Groups], sc.Scores]]:
    whole: Batches = [(images, labels)]
    single: Batches = list(zip(images.split(1), labels.split(1), strict=True))
    alpha2 = EpsilonAlphaBeta()
    return {
        "relevance, epsilon+": lambda m, g: sc.score(m, g, Relevance(whole, composite=EpsilonPlus())),
        "relevance, alpha2 beta1": lambda m, g: sc.score(m, g, Relevance(whole, composite=alpha2)),
        "relevance, epsilon+, by layer": lambda m, g: sc.score(m, g, Relevance(whole), scale=by_layer),
        "relevance, epsilon+, softmax": lambda m, g: sc.score(m, g, Relevance(whole, start=softmax_difference)),
        "L1": lambda m, g: sc.score(m, g, sc.Magnitude(1)),
        "L1, by layer": lambda m, g: sc.score(m, g, sc.Magnitude(1), scale=by_layer),
        "L2": lambda m, g: sc.score(m, g, sc.Magnitude(2)),
        "L2, by layer": lambda m, g: sc.score(m, g, sc.Magnitude(2), scale=by_layer),
        "Taylor": lambda m, g: sc.score(m, g, Taylor(single, p=1)),
        "Taylor, by layer": lambda m, g: sc.score(m, g, Taylor(single, p=1), scale=by_layer),
        "random": lambda m, g: sc.score(m, g, sc.Random(seed)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="a data set, as load_data takes it")
    parser.add_argument("--normalise", default="imagenet", help="as the weights were trained; see load_data")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--times", type=float, nargs="*", default=[1.3, 1.6, 2.1])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--test", type=int, default=1000, help="test images, the first ones")
    parser.add_argument("--out", type=Path, default=Path("relevance_scarce.jsonl"), help="rows in it are not run again")
    parser.add_argument("--only", nargs="*", help="criteria that begin like this")
    options = parser.parse_args()
    begun = time.perf_counter()
    data = sc.load_data(options.data, normalise=options.normalise)
    model = sc.build_model(f"secateur:{options.model}", classes=10, weights=options.weights).model.eval()
    groups = sc.find_groups(model, data.example())
    test = list(data.test.take(range(options.test)).batches(250, mean=data.mean, std=data.std))
    print(f"{options.model}, {groups.macs / 1e6:.1f} M MACs, {options.test} test images: {accuracy(model, test):.2f} %")
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(row["criterion"], row["seed"]) for row in rows}
    for seed in options.seeds:
        images, labels = drawn(data, options.per_class, seed)
        for name, scores_of in criteria(images, labels, seed).items():
            if (name, seed) not in done and (not options.only or name.startswith(tuple(options.only))):
                for row in one(model, scores_of(model, groups), options.times, images, test):
                    rows.append({"criterion": name, "seed": seed, **row})
                with options.out.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows[-len(options.times) :])
    report(rows)
    print(f"{time.perf_counter() - begun:.0f} s, {torch.get_num_threads()} threads, torch {torch.__version__}")


def one(
    model: nn.Module, scores: sc.Scores, times: Sequence[float], images: Tensor, test: Batches
) -> Iterator[dict[str, float]]:
    """Accuracy raw and reset, at each size."""
    for size in times:
        plan = lowest_first(scores, inner(scores.groups), scores.groups.macs / size)
        small = sc.apply(model, plan)
        raw = accuracy(small, test)
        yield {"times": size, "raw": raw, "reset": accuracy(reset(small, images), test)}


def drawn(data: sc.Data, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """As many train images of each class, at random."""
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train), generator=random)
    labels = data.train.labels[order]
    chosen = torch.cat([order[labels == c][:per_class] for c in range(len(data.classes))])
    ((images, found),) = data.train.take(chosen).batches(len(chosen), mean=data.mean, std=data.std)
    return images, found


def inner(groups: sc.Groups) -> list[int]:
    """The groups whose units one layer makes: those within the blocks, and not the stream that blocks add to."""
    shapes = {info.name: info.shape for info in groups.tensors}
    made = [[s for s in g.slots if s.role == "write" and len(shapes[s.tensor]) == 4] for g in groups.groups]
    return [index for index, slots in enumerate(made) if len(slots) == 1]


def lowest_first(scores: sc.Scores, among: Sequence[int], macs: float) -> sc.Plan:
    """The plan that cuts units of these groups, lowest scores first, one at least staying, until few enough MACs."""
    units = [(float(value), g, u) for g in among for u, value in enumerate(scores.values[g])]
    spared = {(g, int(scores.values[g].argmax())) for g in among}
    order = [(g, u) for _, g, u in sorted(units) if (g, u) not in spared]

    def keep(count: int) -> tuple[tuple[int, ...], ...]:
        gone = set(order[:count])
        sizes = [group.size for group in scores.groups.groups]
        return tuple(tuple(u for u in range(n) if (g, u) not in gone) for g, n in enumerate(sizes))

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if scores.groups.macs_left(keep(middle)) <= macs else (middle + 1, high)
    return sc.Plan(scores.groups, keep(low))


def reset(model: nn.Module, images: Tensor) -> nn.Module:
    """The model with the statistics of its batch norms taken from these images alone; changes it."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over batches
    model.train()
    with torch.no_grad():
        model(images)
    return model.eval()


def accuracy(model: nn.Module, batches: Batches) -> float:
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return 100 * right / sum(len(labels) for _, labels in batches)


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Mean and spread for each criterion and size, raw and reset."""
    sizes = sorted({row["times"] for row in rows})
    heads = [f"{size}x {kind}" for size in sizes for kind in ("raw", "reset")]
    print("| criterion | seeds | " + " | ".join(heads) + " |\n|---|---|" + "---|" * len(heads))
    for name in dict.fromkeys(row["criterion"] for row in rows):
        cells, count = [], 0
        for size in sizes:
            mine = [row for row in rows if (row["criterion"], row["times"]) == (name, size)]
            for kind in ("raw", "reset"):
                column, count = [row[kind] for row in mine], len(mine)
                spread = statistics.stdev(column) if count > 1 else 0.0
                cells.append(f"{statistics.mean(column):.1f} ± {spread:.1f}")
        print(f"| {name} | {count} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
