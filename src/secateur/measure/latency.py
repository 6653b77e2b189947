"""How long a forward pass takes on this machine, in milliseconds: median and spread.

A single timing says little on a busy machine. `latency` gives the median of many runs with the 10th and 90th
percentile; `compare_latency` runs two models by turns, so that whatever slows the machine slows both.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy
import torch
from torch import nn

from secateur.graph.nested import as_arguments, map_tensors
from secateur.measure.accuracy import check_device, evaluating
from secateur.measure.macs import batch_size


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass over `runs` runs: the median, 10th and 90th percentile; and how."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    batch: int
    threads: int
    device: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**value)


def latency(
    model: nn.Module,
    example_inputs: Any,
    *,
    runs: int = 30,
    warmup: int = 5,
    threads: int | None = None,
    device: str | torch.device = "cpu",
) -> Latency:
    """Times forward passes in eval mode without gradients.

    Args:
        model: is on `device`, and left as found.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; sent to `device`.
        runs: how many are timed.
        warmup: how many go before, untimed.
        threads: of torch on the CPU, for the time of the measurement; as they are if left out.
        device: where to run.

    Raises:
        ModelError: the model is on another device.

    >>> latency(nn.Linear(3, 2), torch.zeros(4, 3), runs=3, warmup=1, threads=1).batch
    4
    """
    return _time([model], example_inputs, runs, warmup, threads, torch.device(device))[0][0]


def compare_latency(
    first: nn.Module,
    second: nn.Module,
    example_inputs: Any,
    *,
    runs: int = 30,
    warmup: int = 5,
    threads: int | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Latency, Latency, float]:
    """Times two models by turns; arguments and errors as `latency`.

    Returns:
        Both latencies, and how many times faster the second is: the median over the pairs of runs of the
        first's time divided by the second's.

    >>> before, after, speedup = compare_latency(
    ...     nn.Linear(3, 2), nn.Linear(3, 2), torch.zeros(4, 3), runs=3, warmup=1, threads=1
    ... )
    >>> (before.runs, after.runs, speedup > 0)
    (3, 3, True)
    """
    (one, one_ms), (two, two_ms) = _time(
        [first, second], example_inputs, runs, warmup, threads, torch.device(device)
    )
    return one, two, float(numpy.median(numpy.divide(one_ms, two_ms)))


def _time(
    models: Sequence[nn.Module],
    example_inputs: Any,
    runs: int,
    warmup: int,
    threads: int | None,
    device: torch.device,
) -> list[tuple[Latency, list[float]]]:
    """For each model its latency and the milliseconds of each run; the models take turns."""
    if runs < 1 or warmup < 0 or (threads is not None and threads < 1):
        raise ValueError(f"need runs >= 1, warmup >= 0 and threads >= 1; got {runs}, {warmup}, {threads}")
    for model in models:
        check_device(model, device)
    args, kwargs = as_arguments(map_tensors(lambda tensor: tensor.to(device), example_inputs))
    times: list[list[float]] = [[] for _ in models]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        stack.enter_context(torch.inference_mode())
        for model in models:
            stack.enter_context(evaluating(model))
        for run in range(warmup + runs):
            for model, spent in zip(models, times):
                _wait(device)
                start = time.perf_counter()
                model(*args, **kwargs)
                _wait(device)
                elapsed_ms = 1000 * (time.perf_counter() - start)
                if run >= warmup:
                    spent.append(elapsed_ms)
        used = torch.get_num_threads()
    batch = batch_size(example_inputs)
    return [(_summary(spent, batch, used, device), spent) for spent in times]


def _summary(spent: Sequence[float], batch: int, threads: int, device: torch.device) -> Latency:
    low, median, high = (float(value) for value in numpy.percentile(spent, (10, 50, 90)))
    return Latency(median, low, high, len(spent), batch, threads, str(device))


def _wait(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Within the block torch computes with `count` threads on the CPU, or as before if None; then as before.

    >>> before = torch.get_num_threads()
    >>> with torch_threads(1):
    ...     torch.get_num_threads()
    1
    >>> torch.get_num_threads() == before
    True
    """
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)
