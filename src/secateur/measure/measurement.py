"""Everything about a model that the ledger keeps, in one record: `measure(model, example_inputs, ...)`.

Each figure is also a verb of its own: `accuracy`, `count_params`, `count_macs`, `file_bytes`, `latency`,
`sparsity`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from secateur.graph.nested import map_tensors
from secateur.measure.accuracy import Accuracy, accuracy, check_device
from secateur.measure.latency import Latency, latency
from secateur.measure.macs import Macs, count_macs
from secateur.measure.params import count_params, file_bytes
from secateur.measure.sparsity import SparsityTable, sparsity


@dataclass(frozen=True)
class Measurement:
    """What a model costs and what it is worth; `bytes` are those of its safetensors file.

    `accuracy` and `latency` are None where they were not asked for.
    """

    accuracy: Accuracy | None
    params: int
    macs: Macs
    bytes: int
    latency: Latency | None
    sparsity: SparsityTable

    @property
    def mb(self) -> float:
        """The size of the file in MB, of 10^6 bytes."""
        return self.bytes / 10**6

    @property
    def mib(self) -> float:
        """The size of the file in MiB, of 2^20 bytes."""
        return self.bytes / 2**20

    def to_json(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy and self.accuracy.to_json(),
            "params": self.params,
            "macs": self.macs.to_json(),
            "bytes": self.bytes,
            "latency": self.latency and self.latency.to_json(),
            "sparsity": self.sparsity.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(
            accuracy=value["accuracy"] and Accuracy.from_json(value["accuracy"]),
            params=value["params"],
            macs=Macs.from_json(value["macs"]),
            bytes=value["bytes"],
            latency=value["latency"] and Latency.from_json(value["latency"]),
            sparsity=SparsityTable.from_json(value["sparsity"]),
        )


def measure(
    model: nn.Module,
    example_inputs: Any,
    *,
    batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    latency_runs: int = 30,
    threads: int | None = None,
    device: str | torch.device = "cpu",
) -> Measurement:
    """Measures a model, which is left as found.

    Args:
        model: is on `device`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        batches: pairs of images and labels for the accuracy; without them it is not measured.
        latency_runs: timed forward passes of `example_inputs`; 0 leaves the latency out.
        threads: of torch on the CPU while timing; as they are if left out.
        device: where accuracy and latency are measured.

    Raises:
        DataError, ModelError, CaptureError: as the verbs of the parts.

    >>> before = measure(nn.Linear(3, 2), torch.zeros(4, 3), latency_runs=0)
    >>> before.params, before.macs.total, before.sparsity.elements, before.accuracy
    (8, 24, 6, None)
    """
    check_device(model, torch.device(device))
    return Measurement(
        accuracy=None if batches is None else accuracy(model, batches, device=device),
        params=count_params(model),
        macs=count_macs(model, map_tensors(lambda tensor: tensor.to(device), example_inputs)),
        bytes=file_bytes(model),
        latency=latency(model, example_inputs, runs=latency_runs, threads=threads, device=device)
        if latency_runs
        else None,
        sparsity=sparsity(model),
    )
