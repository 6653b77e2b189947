"""How much accuracy do least squares give back after a cut, without labels and without training?

    python benchmarks/recover_without_labels.py --data parquet:DIR --weights resnet56_cifar10.safetensors
    python benchmarks/recover_without_labels.py --table

A residual network for CIFAR-10 is cut to its MACs divided by each of `--times`. For each draw of `--images` train
images, of which no label is read, there are three models: as cut ("raw"), with statistics of the batch norms estimated
anew on these images ("reset"), and with every layer solved on them ("solved"). Accuracy is on the test images, which
nothing else sees; the seconds are those of the choice of units and of the solving, all on this machine.

Which units go is the choice of `--choice`:

- "energy": `Energy` and `GlobalRanking` with a budget, over all groups.
- "direction": `Direction`, inner channels of the blocks only, ranked per MAC.
- "surgeon": `BrainSurgeon(in_order=True, centred=True)`, inner channels of the blocks only, score per MAC.
- "outputs": the same, and each price also counted as what it does to the logits: for a block's output with the
  Jacobian J of the logits, tr(G W_u [C^-1]_uu^-1 W_u^T) with G = E[J^T J], estimated by one random combination of the
  logits for each image; the score is the one price to the power of 1/4 times the other to the power of 3/4. The first
  takes errors as all alike, the second as if no later layer took them up.

Layers are solved on the images and, with `--mirrored`, on their mirror images. `--mixed` share: once more mixed
pairwise by this share, moved by up to four pixels and mirrored: the network is less sure of those, as it is of images
that it has not been trained on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.recover.reconstruct import reconstruct
from secateur.score.brain_surgeon import inverse
from secateur.score.streams import Seen, stream

Batches = Sequence[Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="a data set, as load_data takes it")
    parser.add_argument("--normalise", default="imagenet", help="as the weights were trained; see load_data")
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--weights")
    parser.add_argument("--times", type=float, nargs="*", default=[1.5, 2.11])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--choice", choices=sorted(CHOICES), default="outputs")
    parser.add_argument("--mirrored", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--mixed", type=float, default=0.0)
    parser.add_argument("--ridge", type=float, nargs="*", default=[0.03])
    parser.add_argument("--together", type=int, default=2, help="steps for two layers at once, as in `reconstruct`")
    parser.add_argument("--test", type=int, default=10000, help="test images, the first ones")
    parser.add_argument("--out", type=Path, default=Path("recover_without_labels.jsonl"), help="rows in it are kept")
    parser.add_argument("--table", action="store_true", help="print the rows that there are, and run nothing")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if not options.table:
        rows += run(options, rows)
    report(rows)


def run(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that are missing, each written as soon as it is there."""
    data = sc.load_data(options.data, normalise=options.normalise)
    model = sc.build_model(f"secateur:{options.model}", classes=10, weights=options.weights).model.eval()
    groups = sc.find_groups(model, data.example())
    test = list(data.test.take(range(options.test)).batches(250, mean=data.mean, std=data.std))
    kind = {"model": options.model, "choice": options.choice, "images": options.images, "mixed": options.mixed}
    kind |= {"ridge": options.ridge, "together": options.together, "mirrored": options.mirrored}
    kind |= {"test": len(data.test.take(range(options.test)))}
    whole = next((row["whole"] for row in rows if kind.items() <= row.items()), None)
    whole = accuracy(model, test) if whole is None else whole
    out = []
    for seed in options.seeds:
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[: options.images]
        images = torch.cat([x for x, _ in data.train.take(order).batches(64, mean=data.mean, std=data.std)])
        for times in options.times:
            key = {**kind, "times": times, "seed": seed}
            if any(key.items() <= row.items() for row in rows):
                continue
            begun = time.perf_counter()
            plan = CHOICES[options.choice](model, groups, images, times)
            chosen = time.perf_counter()
            raw, reset, solved = (sc.apply(model, plan) for _ in range(3))
            inputs = mixed(images, options.mixed, seed)
            inputs += [batch.flip(3) for batch in images.split(64)] if options.mirrored else []
            way = {"ridge": options.ridge, "together": options.together, "held": len(inputs)}
            found = reconstruct(model, solved, plan, inputs, **way)
            seconds = [chosen - begun, time.perf_counter() - chosen]
            sc.reset_statistics(reset, [images])
            row = {**key, "whole": whole, "macs": groups.macs / plan.macs_left, "layers": len(found)}
            row |= {"raw": accuracy(raw, test), "reset": accuracy(reset, test), "solved": accuracy(solved, test)}
            row |= {"choosing": seconds[0], "solving": seconds[1], "threads": torch.get_num_threads()}
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
            out.append(row)
    return out


def mixed(images: Tensor, share: float, seed: int) -> list[Tensor]:
    """The images in batches of 64; if there is a share, then again mixed pairwise, moved and mirrored."""
    random, out = torch.Generator().manual_seed(seed), list(images.split(64))
    if not share:
        return out
    for batch in images.split(64):
        both = (1 - share) * batch + share * batch[torch.randperm(len(batch), generator=random)]
        top, left, mirror = (int(torch.randint(0, n, (1,), generator=random)) for n in (9, 9, 2))
        moved = F.pad(both, (4, 4, 4, 4))[:, :, top : top + both.shape[2], left : left + both.shape[3]]
        out.append(moved.flip(3) if mirror else moved)
    return out


def by_energy(model: nn.Module, groups: sc.Groups, images: Tensor, times: float) -> sc.Plan:
    scores = sc.score(model, groups, sc.Energy(images.split(64)))
    return sc.allocate(scores, sc.GlobalRanking(), budget=sc.Budget(macs=1 / times))


def by_direction(model: nn.Module, groups: sc.Groups, images: Tensor, times: float) -> sc.Plan:
    scores = sc.score(model, groups, sc.Direction(images.split(64)))
    return lowest_first(scores.groups, scores.values, times)


def by_surgeon(model: nn.Module, groups: sc.Groups, images: Tensor, times: float) -> sc.Plan:
    scores = sc.score(model, groups, sc.BrainSurgeon(images[:256].split(64), in_order=True, centred=True))
    return lowest_first(scores.groups, scores.values, times)


def by_outputs(model: nn.Module, groups: sc.Groups, images: Tensor, times: float) -> sc.Plan:
    metrics = sensitivities(model, images[:128].split(64))
    ends = stream(model, groups, images[:256].split(64), products="all")
    values = [torch.full((group.size,), torch.inf, dtype=torch.float64) for group in groups.groups]
    for index in inner(groups):
        first, group = groups.offsets[index], groups.groups[index]
        (seen,) = [seen for seen in ends if int(seen.units[0]) == first and len(seen.units) == group.size]
        metric = metrics[group.name.replace("conv1", "bn2")]
        one, other = in_order(seen, torch.eye(len(metric), dtype=metric.dtype)), in_order(seen, metric)
        values[index] = one**0.25 * other**0.75
    return lowest_first(groups, values, times)


CHOICES: dict[str, Callable[[nn.Module, sc.Groups, Tensor, float], sc.Plan]] = {
    "direction": by_direction,
    "energy": by_energy,
    "surgeon": by_surgeon,
    "outputs": by_outputs,
}


def sensitivities(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """For what each batch norm gives, E[J^T J] summed over positions, J being the Jacobian of the logits."""
    outputs: dict[str, Tensor] = {}
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: outputs.__setitem__(name, out))
        for name, module in norms.items()
    ]
    random, sums = torch.Generator().manual_seed(0), dict.fromkeys(norms, torch.zeros((), dtype=torch.float64))
    for batch in batches:
        logits = model(batch)
        mix = torch.randn(logits.shape, generator=random)
        given = torch.autograd.grad(((mix - mix.mean(1, keepdim=True)) * logits).sum(), list(outputs.values()))
        for name, gradient in zip(outputs, given):
            rows = gradient.transpose(0, 1).flatten(1)
            sums[name] = sums[name] + (rows @ rows.T).double() / sum(map(len, batches))
    for hook in hooks:
        hook.remove()
    return sums


def in_order(seen: Seen, metric: Tensor, damping: float = 1e-3) -> Tensor:
    """The price of each unit when it goes, the cheapest first, the reader's weights being solved in between."""
    left, weights = inverse(seen.covariance, damping), seen.weights.clone()
    prices, alive, paid = torch.zeros(len(seen.units), dtype=torch.float64), list(range(len(seen.units))), 0.0
    while alive:
        columns = seen.columns[alive]
        inverses = torch.linalg.inv(left[columns[:, :, None], columns[:, None, :]])
        own = weights[:, columns].transpose(0, 1)
        costs = (inverses * torch.einsum("uok,op,upl->ukl", own, metric, own)).sum((1, 2))
        place = int(costs.argmin())
        paid = max(paid, float(costs[place])) * (1 + 1e-9)
        prices[alive.pop(place)] = paid
        at = columns[place]
        share = inverses[place] @ left[at]
        weights = weights - weights[:, at] @ share
        left = left - left[:, at] @ share
    return prices


def inner(groups: sc.Groups) -> list[int]:
    """The groups whose units one layer makes: those within the blocks, and not the stream that blocks add to."""
    shapes = {info.name: info.shape for info in groups.tensors}
    made = [[s for s in g.slots if s.role == "write" and len(shapes[s.tensor]) == 4] for g in groups.groups]
    return [i for i, slots in enumerate(made) if len(slots) == 1 and slots[0].tensor.endswith("conv1.weight")]


def lowest_first(groups: sc.Groups, values: Sequence[Tensor], times: float) -> sc.Plan:
    """The plan that cuts inner units, the lowest score per MAC first, one at least staying, until few enough MACs."""
    costs, among = groups.unit_costs, inner(groups)
    spared = {(g, int(values[g].argmax())) for g in among}
    units = sorted((float(value) / costs[g].macs, g, u) for g in among for u, value in enumerate(values[g]))
    order = [(g, u) for _, g, u in units if (g, u) not in spared]

    def keep(count: int) -> tuple[tuple[int, ...], ...]:
        gone = set(order[:count])
        return tuple(tuple(u for u in range(g.size) if (i, u) not in gone) for i, g in enumerate(groups.groups))

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if groups.macs_left(keep(middle)) <= groups.macs / times else (middle + 1, high)
    return sc.Plan(groups, keep(low))


def accuracy(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return 100 * right / sum(len(labels) for _, labels in batches)


def report(rows: Sequence[dict[str, Any]]) -> None:
    """A line for each ratio and choice: means over the draws and the sample standard deviation."""
    print("| model | choice | images | MACs | draws | whole | raw | reset | solved | seconds |\n|" + "---|" * 10)
    names = ("model", "choice", "images", "mixed", "ridge", "together", "mirrored", "test", "times")
    kinds = [tuple(str(row.get(name, 0)) for name in names) for row in rows]
    for kind in dict.fromkeys(kinds):
        mine = [row for row, own in zip(rows, kinds) if own == kind]
        cells = []
        for name in ("raw", "reset", "solved"):
            column = [row[name] for row in mine]
            cells.append(f"{statistics.mean(column):.2f} ± {statistics.stdev(column) if len(column) > 1 else 0:.2f}")
        seconds = statistics.mean(row["choosing"] + row["solving"] for row in mine)
        way = f"{kind[2]}, mixed {kind[3]}, ridge {kind[4]}, together {kind[5]}, mirrored {kind[6]}"
        start = f"| {kind[0]} | {kind[1]} | {way} | 1/{kind[8]} | {len(mine)} | "
        print(start + f"{mine[0]['whole']:.2f} | " + " | ".join(cells) + f" | {seconds:.0f} |")


if __name__ == "__main__":
    main()
