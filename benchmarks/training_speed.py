"""What does the training loop cost beside the same steps written out by hand, and what does its way of loading save?

    python benchmarks/training_speed.py --data parquet:DIR

Three loops train the same network on the same images, by turns, with the same seed, batch size, crops and flips, SGD
with momentum, in one process; medians over `--rounds`, seconds for `--steps` steps:

- bare: `for images, labels in batches: forward, loss, backward, step`, the batches being `Images.batches`.
- ours: `fine_tune` on the same batches with the same switches, its validation on 10 images and its copies at the end
  of the epoch included.
- usual: a `torch.utils.data.DataLoader` with `--workers` processes over PIL images, torchvision's RandomCrop,
  RandomHorizontalFlip, ToTensor and Normalize, and the bare loop on it in the usual memory format. The first batch,
  with the start of the workers, is not counted.

"ours" and "bare" run in both memory formats.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import secateur as sc
from secateur.zoo.images import Images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="a data set, as load_data takes it")
    parser.add_argument("--model", default="secateur:resnet20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = sc.load_data(options.data)
    data_of = {"train": data.train.take(range(options.batch * options.steps)), "held": data.train.take(range(10))}
    model = sc.build_model(options.model, classes=len(data.classes)).model
    twin, train = partial(copy.deepcopy, model), data_of["train"]
    loops = {
        "bare": lambda: bare(twin(), resident(data, train, options, False)),
        "ours": lambda: ours(twin(), data, data_of, options, False),
        "bare, channels-last": lambda: bare(twin(), resident(data, train, options, True), True),
        "ours, channels-last": lambda: ours(twin(), data, data_of, options, True),
        "usual": lambda: usual(twin(), data, options),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(options.rounds + 1):
        for name, loop in loops.items():
            took = loop()
            if turn:  # the first is to warm up
                seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name:20} {medians[name]:.2f} s ({min(values):.2f} to {max(values):.2f})")
    last = "ours, channels-last"
    for one, other in (("ours", "bare"), (last, "bare, channels-last"), ("usual", last)):
        ratios = [a / b for a, b in zip(seconds[one], seconds[other])]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{one} over {other}: {statistics.median(ratios):.3f}, median of {len(ratios)} turns, {spread}")
    print(f"{options.model}, batch {options.batch}, {options.steps} steps, {torch.get_num_threads()} threads")


def resident(data: sc.Data, images: Images, options: argparse.Namespace, last: bool) -> Iterable[tuple[Tensor, Tensor]]:
    how: dict[str, Any] = {"mean": data.mean, "std": data.std, "shuffle": 0, "augment": ("crop", "flip")}
    return images.batches(options.batch, **how, channels_last=last)


def bare(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], last: bool = False) -> float:
    if last:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model.train()
    begun = time.perf_counter()
    for images, labels in batches:
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(model(images), labels)
        loss.item()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - begun


def ours(model: nn.Module, data: sc.Data, parts: dict[str, Images], options: argparse.Namespace, last: bool) -> float:
    begun = time.perf_counter()
    sc.fine_tune(
        model,
        lambda epoch: resident(data, parts["train"], options, last),
        lambda: parts["held"].batches(10, mean=data.mean, std=data.std),
        [sc.Stage(0.1, 1)],
        channels_last=last,
    )
    return time.perf_counter() - begun


class Pictures(Dataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR10 gives them."""

    def __init__(self, data: sc.Data) -> None:
        self.pixels = data.train.pixels.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.train.labels.tolist()
        cut = [transforms.RandomCrop(self.pixels.shape[1], padding=4), transforms.RandomHorizontalFlip()]
        self.change = transforms.Compose([*cut, transforms.ToTensor(), transforms.Normalize(data.mean, data.std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.change(Image.fromarray(self.pixels[index])), self.labels[index]


def usual(model: nn.Module, data: sc.Data, options: argparse.Namespace) -> float:
    loader = DataLoader(Pictures(data), options.batch, shuffle=True, num_workers=options.workers)
    batches = iter(loader)
    next(batches)
    return bare(model, itertools.islice(batches, options.steps))


if __name__ == "__main__":
    main()
