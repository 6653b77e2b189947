"""What the layers of a model take on this machine, for a recipe's cut that has a budget for latency."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from secateur.codec.files import read_json, write_json
from secateur.errors import RecipeError
from secateur.graph.records import Groups
from secateur.measure.measure_table import machine_name, measure_table
from secateur.measure.runtimes import Runtime, compiled, eager, onnx_runtime
from secateur.measure.table import LatencyTable
from secateur.recipe.schema import Cut

RUNTIMES: Mapping[str, Runtime] = MappingProxyType({"eager": eager, "compiled": compiled, "onnx": onnx_runtime})


def table_for(step: Cut, model: nn.Module, groups: Groups, example: Tensor, file: Path | None) -> LatencyTable:
    """The table in the step's file, or else in `file`; if there is none, measured now and kept there.

    Raises:
        RecipeError: the table that is there is of another model, runtime, torch or machine.
    """
    path = file if step.table is None else Path(step.table)
    if path is not None and path.exists():
        table = LatencyTable.from_json(read_json(path))
        _check(table, step, groups, example.device, path)
        return table
    layers = eager if step.runtime == "compiled" else None  # torch.compile takes a second for each shape
    table = measure_table(model, example, groups, runtime=RUNTIMES[step.runtime], layers=layers)
    if path is not None:
        write_json(path, table.to_json())
    return table


def _check(table: LatencyTable, step: Cut, groups: Groups, device: torch.device, path: Path) -> None:
    had = table.conditions
    pairs = (
        ("units", table.units, groups.offsets[-1]),
        ("runtime", had.runtime, RUNTIMES[step.runtime].__name__),
        ("device", had.device, str(device)),
        ("machine", had.machine, machine_name(device)),
        ("threads", had.threads, torch.get_num_threads()),
        ("torch", had.torch, torch.__version__),
    )
    for name, then, now in pairs:
        if then != now:
            raise RecipeError(
                f"the times in {str(path)!r} were measured with {name} {then!r}, and here it is {now!r}; name another "
                "table, or remove the file to measure anew."
            )
