"""A cut ResNet-56 for CIFAR-10 trained for an hour: secateur's cut beside Torch-Pruning's, with the same recovery.

    python benchmarks/train_resnet56.py --data parquet:DIR --weights resnet56_cifar10.safetensors --cut ours
    python benchmarks/train_resnet56.py --data parquet:DIR --weights resnet56_cifar10.safetensors --cut peer
    python benchmarks/train_resnet56.py --data parquet:DIR --more parquet:OTHER --share 1.0 ...
    python benchmarks/train_resnet56.py --table rows.jsonl

Both cuts take inner channels of the blocks, one of each stays, until the MACs are 2.11 times fewer:

- "ours": the choice "outputs" of `recover_without_labels.py`, and layers solved by least squares, two at once, on 512
  train images and their mirror images.
- "peer": FPGM, the best of its criteria in `criteria_resnet56.py`, and statistics of the batch norms from 2,048 images.
- "scratch": the architecture of "ours" with new weights.

Then each is trained in the same way, with SGD and learning from the whole network, on 98 % of the train images. The
other 2 % are only watched: the published weights have seen them, so the last epoch counts, and not the best by them.
With `--more`, half of each batch are train images of another data set, whose labels are not read: the whole network has
not learned those by heart, so what it says of them tells more. An epoch has as many steps as without.
A run that was stopped goes on from its checkpoint. The test images are read once, before and after the training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import criteria_resnet56
import recover_without_labels
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import secateur as sc
from secateur.recover.history import EpochRow

KIND = ("model", "cut", "epochs", "lr", "temperature", "share", "mixed", "more", "features")
"""What two runs of one kind have in common."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="a data set, as load_data takes it")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--cut", choices=["ours", "peer", "scratch"], default="ours")
    parser.add_argument("--times", type=float, default=2.11, help="fewer MACs")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.05, help="the highest of the one-cycle schedule")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--share", type=float, default=0.9, help="of the teacher in the loss")
    parser.add_argument("--mixed", action="store_true", help="images are mixed pairwise: the teacher sees them as well")
    parser.add_argument("--features", type=float, default=0.0, help="weight of the blocks' outputs, beside the whole's")
    parser.add_argument("--more", help="a data set whose train images are half of each batch, without labels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("train_resnet56.jsonl"))
    parser.add_argument("--folder", type=Path, default=Path("train_resnet56"), help="of cut models and checkpoints")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print these rows and stop")
    options = parser.parse_args()
    if options.table is not None:
        report([json.loads(line) for line in options.table.read_text().splitlines()])
        return
    if options.more and options.share < 1:
        parser.error("images of another data set have no labels here: give --share 1.0 along with --more")
    row = run(options)
    print(json.dumps(row))
    with options.out.open("a") as file:
        file.write(json.dumps(row) + "\n")


def run(options: argparse.Namespace) -> dict[str, Any]:
    data = sc.load_data(options.data, normalise="imagenet", validation=0.02)
    shape: dict[str, Any] = {"mean": data.mean, "std": data.std, "channels_last": True}
    more = sc.load_data(options.more, normalise="imagenet") if options.more else None
    model = sc.build_model(f"secateur:{options.model}", classes=10, weights=options.weights).model.eval()
    test = list(data.test.batches(250, **shape))
    groups = sc.find_groups(model, data.example())
    begun = time.perf_counter()
    small = cut(model, groups, data, options)
    row = {name: getattr(options, name) for name in ("seed", *KIND)} | {"more": more and Path(more.name).name}
    row |= {"times": groups.macs / sc.find_groups(small, data.example()).macs}
    row |= {"cut_seconds": time.perf_counter() - begun, "before": criteria_resnet56.accuracy(small, test)}
    print(json.dumps(row), flush=True)
    name = "-".join(str(row[name]) for name in ("seed", *KIND))
    options.folder.mkdir(parents=True, exist_ok=True)
    begun, steps = time.perf_counter(), -(-len(data.train) // 128)

    def train(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order: dict[str, Any] = {"shuffle": 1000 * options.seed + epoch, "augment": ("crop", "flip"), **shape}
        if more is None:
            yield from data.train.batches(128, **order)
            return
        pairs = zip(data.train.batches(64, **order), more.train.batches(64, **order))
        for (images, labels), (others, _) in itertools.islice(pairs, steps):
            yield torch.cat([images, others]), torch.cat([labels, torch.zeros_like(labels)])

    def told(epoch: EpochRow) -> None:
        print(f"{time.perf_counter() - begun:.0f} s: {epoch}", flush=True)

    torch.manual_seed(options.seed)
    sc.fine_tune(
        small, train, lambda: data.validation.batches(250, **shape), [sc.Stage(options.lr, options.epochs)],
        schedule="one-cycle", nesterov=True, weight_decay=5e-4, channels_last=True, bf16=True, keep="last",
        distill=sc.Distillation(
            model, options.temperature, options.share, matches=matches(model, groups, options.features)
        ),
        mix=sc.OneOf((sc.Mixup(1.0), sc.CutMix(1.0))) if options.mixed else None,
        batches_per_epoch=steps, checkpoint=options.folder / name, on_epoch=told,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    save_file({k: v.contiguous() for k, v in small.state_dict().items()}, options.folder / f"{name}.safetensors")
    return row | {"accuracy": criteria_resnet56.accuracy(small, test), "train_seconds": seconds}


def cut(model: nn.Module, groups: sc.Groups, data: sc.Data, options: argparse.Namespace) -> nn.Module:
    if options.cut == "peer":
        images = criteria_resnet56.drawn(data, 2048, options.seed)
        small = criteria_resnet56.peers(groups, images, options.seed)["Torch-Pruning FPGM"](model, options.times)
        sc.reset_statistics(small, [x for x, _ in images])
        return small
    images = torch.cat([x for x, _ in criteria_resnet56.drawn(data, 512, options.seed)])
    plan = recover_without_labels.by_outputs(model, groups, images, options.times)
    small = sc.apply(model, plan)
    if options.cut == "ours":
        both = torch.cat([images, images.flip(3)]).split(64)
        sc.reconstruct(model, small, plan, both, ridge=0.01, together=2, held=len(both))
        return small
    torch.manual_seed(options.seed)
    for module in small.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
    return small


def matches(model: nn.Module, groups: sc.Groups, weight: float) -> tuple[sc.Features, ...]:
    """What each block gives, of which no unit was cut: the mean square of the difference, the mean over blocks."""
    blocks = [name for name, module in model.named_modules() if hasattr(module, "conv2")]
    whole = sc.Plan(groups, tuple(tuple(range(group.size)) for group in groups.groups))
    layers = {name: f"{name}.bn2" for name in blocks}
    return (sc.Features(whole, layers, weight / len(blocks)),) if weight else ()


def report(rows: list[dict[str, Any]]) -> None:
    """A line for each cut and way of training: means over seeds, and the sample standard deviation."""
    print("| cut | epochs x highest rate | teacher's share | seeds | before | after | minutes |\n|" + "---|" * 7)
    for kind in dict.fromkeys(tuple(row.get(name) for name in KIND) for row in rows):
        mine = [row for row in rows if tuple(row.get(name) for name in KIND) == kind]
        cells = []
        for name in ("before", "accuracy"):
            values = [row[name] for row in mine]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        minutes = statistics.mean(row["train_seconds"] + row["cut_seconds"] for row in mine) / 60
        way = f"{kind[2]} x {kind[3]} | {kind[5]} at T = {kind[4]}{', mixed' if kind[6] else ''}"
        way += f", blocks' outputs {kind[8]}" if kind[8] else ""
        way += f", half of the images from {kind[7]}" if kind[7] else ""
        print(f"| {kind[1]} | {way} | {len(mine)} | {cells[0]} | {cells[1]} | {minutes:.0f} |")


if __name__ == "__main__":
    main()
