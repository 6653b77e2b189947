"""How long a data set takes to load, how much memory beside the result, and what share of an epoch is not the step.

    python benchmarks/loading.py --data parquet:DIR
    python benchmarks/loading.py --data parquet:DIR --model secateur:resnet20 --batches 50 --threads 2

Every figure is printed with its conditions. The share is measured inside the loop: time until a batch is there, over
the whole time, with the model's forward, backward and step (training) or forward alone (evaluation) as the rest.
"""

from __future__ import annotations

import argparse
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import PIL
import pyarrow.parquet
import torch
import torchvision
from torch import Tensor, nn

from secateur.zoo.data import Data, load_data

AUGMENT = ("crop", "flip")


@dataclass
class PeakMemory:
    """The most resident memory of this process above what it had on entry, sampled every 2 ms, in bytes."""

    extra: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> PeakMemory:
        self._start = resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.extra = max(self.extra, resident() - self._start)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.extra = max(self.extra, resident() - self._start)


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def timed_pass(batches: Iterator[tuple[Tensor, Tensor]], step: Callable[[Tensor, Tensor], None]) -> tuple[float, float]:
    """(seconds spent waiting for batches, seconds in all), the first batch left out as a warm-up."""
    step(*next(batches))
    loading, begin = 0.0, time.perf_counter()
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        loading += time.perf_counter() - asked
        if batch is None:
            return loading, time.perf_counter() - begin
        step(*batch)


def training_step(model: nn.Module) -> Callable[[Tensor, Tensor], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()

    return step


def evaluation_step(model: nn.Module) -> Callable[[Tensor, Tensor], None]:
    def step(x: Tensor, y: Tensor) -> None:
        with torch.inference_mode():
            model(x)

    return step


def passes(data: Data, size: int) -> tuple[tuple[str, Iterator[tuple[Tensor, Tensor]]], ...]:
    train = data.batches("train", size, shuffle=0, augment=AUGMENT)
    return ("training", train), ("evaluation", data.batches("test", size))


def shares(data: Data, model: nn.Module, size: int, count: int | None) -> None:
    steps = (training_step(model), evaluation_step(model))
    for (name, batches), step in zip(passes(data, size), steps):
        model.train(name == "training")
        limited = islice(batches, None if count is None else count + 1)
        loading, total = timed_pass(limited, step)
        print(f"{name}: {100 * loading / total:.2f} % of {total:.1f} s waiting for batches of {size}")


def loading_alone(data: Data, size: int) -> None:
    for name, batches in passes(data, size):
        begin = time.perf_counter()
        count = sum(1 for _ in batches)
        seconds = time.perf_counter() - begin
        print(f"{name} pass without a model: {seconds:.2f} s, {1e3 * seconds / count:.2f} ms a batch of {size}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="a data set, as load_data takes it")
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--model", default=None, help="a model, as build_model takes it; without, loading alone")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=None, help="how many to time; without, a whole epoch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}"
    print(f"{options.threads} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {platform.machine()}")
    print(f"Python {platform.python_version()}, {versions}, pyarrow {pyarrow.__version__}")

    begin, used = time.perf_counter(), time.process_time()
    with PeakMemory() as memory:
        data = load_data(options.data, image_size=options.image_size)
    seconds, used = time.perf_counter() - begin, time.process_time() - used
    parts = (data.train, data.validation, data.test)
    size = sum(part.pixels.numel() + 8 * part.labels.numel() for part in parts)
    print(f"{data.name}: {sum(map(len, parts)):,} images in {seconds:.1f} s ({used:.1f} s of CPU)")
    print(f"result {size / 1e6:.1f} MB, peak of extra memory {memory.extra / 1e6:.1f} MB = {memory.extra / size:.2f} x")
    loading_alone(data, options.batch)
    if options.model is not None:
        from secateur.zoo.models import build_model

        shares(data, build_model(options.model, classes=len(data.classes)).model, options.batch, options.batches)


if __name__ == "__main__":
    main()
