"""How accurate is a network for CIFAR-10 with 80 % and 90 % of its single weights gone, without training and with?

    python benchmarks/unstructured_resnet20.py --data parquet:DIR --weights resnet20_cifar10.safetensors
    python benchmarks/unstructured_resnet20.py --table

Without labels, on `--images` train images (part "solved"), for three draws of them:

- "magnitude": the smallest weights of all layers together go; with statistics of the batch norms taken anew ("reset"),
  and with the weights that stay solved by least squares ("solved").
- "surgeon": weights are chosen by optimal brain surgery and solved, layer by layer, as many in each layer as magnitude
  takes ("as magnitude"), or by one threshold for the losses of all layers ("by loss").

With training (part "trained"), `--epochs` epochs at a one-cycle rate, the same for all, on the 90 % of the train images
that are not held out, moved and mirrored; three seeds:

- "fixed": the masks of magnitude stay. "surgeon": those by optimal brain surgery, "as magnitude", with the weights that
  are solved on 512 images.
- "gradual", "acdc", "rigl": masks that move; RigL begins with the masks of magnitude.

The peak rate, of 0.02, 0.05 and 0.1, was chosen on the held-out images, for "fixed" at 90 % (`--rate` with
`--held-out`). Accuracy is on all test images, which nothing else sees.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.recover.moving import ACDC, Gradual, RigL
from secateur.recover.prune import prune_weights
from secateur.recover.reconstruct import reconstruct

Row = dict[str, Any]
FREE = ("magnitude", "reset", "solved", "as magnitude", "by loss")
TRAINED = ("fixed", "surgeon", "gradual", "acdc", "rigl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="a data set, as load_data takes it")
    parser.add_argument("--normalise", default="imagenet", help="as the weights were trained; see load_data")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights")
    parser.add_argument("--parts", nargs="*", choices=("solved", "trained"), default=["solved", "trained"])
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.8, 0.9])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--images", type=int, nargs="*", default=[512], help="of the part without training")
    parser.add_argument("--ways", nargs="*", choices=FREE + TRAINED, default=FREE + TRAINED)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, nargs="*", default=[0.1], help="peak learning rate")
    parser.add_argument("--held-out", action="store_true", help="measure on held-out train images, not on the test")
    parser.add_argument("--out", type=Path, default=Path("unstructured_resnet20.jsonl"), help="rows in it are kept")
    parser.add_argument("--table", action="store_true", help="print the rows that there are, and run nothing")
    options = parser.parse_args()
    if not options.table:
        run(options)
    report([json.loads(line) for line in options.out.read_text().splitlines()])


def run(options: argparse.Namespace) -> None:
    """The rows that are missing, each written as soon as it is there."""
    data = sc.load_data(options.data, normalise=options.normalise)
    measured = "validation" if options.held_out else "test"
    for part, seed, sparsity in itertools.product(options.parts, options.seeds, options.sparsity):
        kind = {"part": part, "model": options.model, "measured": measured, "sparsity": sparsity, "seed": seed}
        if part == "solved":
            for images in options.images:
                without_training(options, data, {**kind, "images": images})
        else:
            for way, rate in itertools.product((way for way in options.ways if way in TRAINED), options.rate):
                trained(options, data, {**kind, "way": way, "rate": rate, "epochs": options.epochs})


def trained(options: argparse.Namespace, data: sc.Data, key: Row) -> None:
    """The row of one training run."""
    if there(options, key):
        return
    model, sparsity, way = network(options), key["sparsity"], key["way"]
    magnitude = sc.find_masks(model, sparsity)
    masks: Any = magnitude
    begun = time.perf_counter()
    if way == "gradual":
        masks = Gradual(sparsity, end=0.5, every=10)
    elif way == "acdc":
        masks = ACDC(sparsity, cycles=2, warmup=0.1, final=0.4)
    elif way == "rigl":
        masks = RigL(magnitude, every=20)
    elif way == "surgeon":
        pruned = prune_weights(model, magnitude, drawn(data, 512, key["seed"]), held=8)
        model, masks = pruned.model, pruned.masks
    size = 128
    count = len(data.train) // size

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        seed = 1000 * key["seed"] + epoch
        return itertools.islice(data.batches("train", size, shuffle=seed, augment=("crop", "flip")), count)

    torch.manual_seed(key["seed"])
    history = sc.fine_tune(
        model, batches, lambda: data.batches("validation", 500), [sc.Stage(key["rate"], key["epochs"])], masks=masks,
        schedule="one-cycle", batches_per_epoch=count, weight_decay=5e-4, keep="last", channels_last=True, bf16=True,
    )  # fmt: skip
    found = sc.find_masks(model, sparsity)
    assert found.holds(model)  # the smallest are exactly zero
    row = {**key, "accuracy": accuracy(model, data, key["measured"]), "seconds": time.perf_counter() - begun}
    write(options, {**row, "validation": 100 * history.rows[-1].validation_accuracy, "zeros": sc.sparsity(model).zeros})


def without_training(options: argparse.Namespace, data: sc.Data, key: Row) -> None:
    """The rows of one draw of images."""
    model = network(options)
    images = drawn(data, key["images"], key["seed"])
    magnitude = sc.find_masks(model, key["sparsity"])
    for way in (way for way in options.ways if way in FREE):
        row = {**key, "way": way}
        if there(options, row):
            continue
        begun = time.perf_counter()
        sparse, masks = network(options), magnitude
        magnitude.apply_(sparse)
        if way == "reset":
            sc.reset_statistics(sparse, images)
        elif way == "solved":
            reconstruct(model, sparse, magnitude, images, held=len(images))
        elif way in ("as magnitude", "by loss"):
            amount = magnitude if way == "as magnitude" else key["sparsity"]
            pruned = prune_weights(model, amount, images, held=len(images))
            sparse, masks = pruned.model, pruned.masks
        row["seconds"] = time.perf_counter() - begun
        assert masks.holds(sparse)
        row["zeros"] = sc.sparsity(sparse).zeros
        write(options, {**row, "accuracy": accuracy(sparse, data, key["measured"])})


def network(options: argparse.Namespace) -> nn.Module:
    return sc.build_model(f"secateur:{options.model}", classes=10, weights=options.weights).model.eval()


def drawn(data: sc.Data, count: int, seed: int) -> list[Tensor]:
    """Train images, without labels, in batches of 64."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:count]
    return [images for images, _ in data.train.take(order).batches(64, mean=data.mean, std=data.std)]


def accuracy(model: nn.Module, data: sc.Data, split: Any) -> float:
    model.eval()
    with torch.no_grad():
        pairs = [(model(images).argmax(1) == labels) for images, labels in data.batches(split, 500)]
    return 100 * float(torch.cat(pairs).double().mean())


def there(options: argparse.Namespace, key: Row) -> bool:
    rows = options.out.read_text().splitlines() if options.out.exists() else []
    return any(key.items() <= json.loads(row).items() for row in rows)


def write(options: argparse.Namespace, row: Row) -> None:
    with options.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def report(rows: Sequence[Row]) -> None:
    """A line for each sparsity and way: the mean over seeds and the sample standard deviation."""
    print("| model | on | weights gone | way | | runs | accuracy | seconds |\n|" + "---|" * 8)
    names = ("model", "measured", "sparsity", "part", "way", "images", "epochs", "rate")
    kinds = [tuple(row.get(name) for name in names) for row in rows]
    for kind in sorted(set(kinds), key=lambda kind: (kind[:4], kinds.index(kind))):
        mine = [row for row, own in zip(rows, kinds) if own == kind]
        column = [row["accuracy"] for row in mine]
        spread = f" ± {statistics.stdev(column):.2f}" if len(column) > 1 else ""
        model, measured, sparsity, part, way, images, epochs, rate = kind
        how = f"{images} images" if part == "solved" else f"{epochs} epochs, rate {rate}"
        seconds = statistics.mean(row["seconds"] for row in mine)
        start = f"| {model} | {measured} | {sparsity:.0%} | {part}: {way} | {how} | {len(mine)} | "
        print(start + f"{statistics.mean(column):.2f}{spread} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
