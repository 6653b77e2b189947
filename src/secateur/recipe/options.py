"""The command line's options as recipes, models and records: what is left out gets its default here.

Whatever is wrong is raised as the reading of a recipe file raises it, in one sentence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.codec.files import write_bytes
from secateur.errors import ModelError, RecipeError, UnknownName
from secateur.graph.groups import find_groups
from secateur.graph.records import Groups
from secateur.measure.measurement import measure
from secateur.measure.sparsity import SparsityTable
from secateur.recipe.folder import load
from secateur.recipe.reading import anchored, build, changed, read_recipe
from secateur.recipe.schema import Recipe
from secateur.report.ledger import Ledger, LedgerRow
from secateur.report.plots import draw_sparsity
from secateur.report.style import picture
from secateur.zoo.data import load_data
from secateur.zoo.models import build_model

SPARSITY, EPOCHS, RATE = 0.5, 3, 0.01
TEST_BATCH = 256
RUNS = Path("runs")
PICTURES = ("png", "svg", "pdf")


def recipe_from(
    path: Path | None,
    *,
    data: str | None = None,
    model: str | None = None,
    weights: str | None = None,
    sparsity: float | None = None,
    epochs: int | None = None,
    normalise: str | None = None,
    budget: Sequence[str] = (),
    floor: float | None = None,
) -> Recipe:
    """The recipe file `path` with the options' values in place of its own; without a file, a recipe of the options.

    That recipe cuts at `sparsity` (0.5 if left out), guided by the sparsity of each layer, or, with a `budget` alone,
    by a ranking of all units by `Energy` (for a latency by knapsack), and estimates batch norm's statistics anew; and
    it fine-tunes for `epochs` (3 if left out). With a `floor` the budget is searched: that of the measure which
    `budget` names, or of MACs.

    Raises `RecipeError` where the file or an option is wrong, or too little is said.
    """
    left = amounts(budget)
    if path is not None:
        parts = changed(read_recipe(path), sparsity=sparsity, epochs=epochs, budget=left or None).model_dump()
    elif model is None or data is None:
        missing = " and ".join(option for option, value in (("--model", model), ("--data", data)) if value is None)
        raise RecipeError(f"there is no recipe and no {missing}; give a recipe file, or both --model and --data.")
    else:
        cut: dict[str, Any] = {"kind": "cut", "sparsity": SPARSITY if sparsity is None else sparsity}
        if floor is not None and not left:
            left = {"macs": SPARSITY}
        if left and sparsity is not None:
            cut |= {"budget": left}
        elif left:
            guide = "knapsack" if "latency" in left else "ranking"
            cut = {"kind": "cut", "budget": left, "guide": guide, "criterion": "energy", "recover": "statistics"}
        stages = ({"lr": RATE, "epochs": EPOCHS if epochs is None else epochs},)
        parts = {"data": {}, "model": {}, "steps": (cut, {"kind": "train", "stages": stages, "schedule": "cosine"})}
    if floor is not None:
        measure = {"measure": next(iter(left))} if left else {}
        parts["floor"] = {**(parts.get("floor") or {}), "accuracy": floor, **measure}
    if data is not None:
        parts["data"]["source"] = data
    if normalise is not None:
        parts["data"]["normalise"] = normalise
    if model is not None:
        parts["model"] = {"source": model}
    if weights is not None:
        parts["model"]["weights"] = weights
    return anchored(build(**parts), Path.cwd())


def amounts(words: Sequence[str]) -> dict[str, float]:
    """A budget in words, each a measure and a share or a count.

    >>> amounts(["macs=0.5", "params=1_000_000"])
    {'macs': 0.5, 'params': 1000000}
    """
    out: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            out[name] = float(value) if "." in value or "e" in value else int(value)
        except ValueError:
            raise RecipeError(f"--budget {word!r} says no number; write macs=0.5, or params=1000000.") from None
    return out


def run_folder(path: Path | None, recipe: Recipe) -> Path:
    """Where a run goes if nothing is said: runs/ and the name of the recipe file or of the model.

    >>> run_folder(Path("recipes/report.toml"), None).as_posix()
    'runs/report'
    """
    return RUNS / (path.stem if path is not None else recipe.model.source.rpartition(":")[2])


def open_model(source: str, weights: Path | None = None, classes: int | None = None) -> nn.Module:
    """The model of a run folder, or one that `zoo.models.build_model` builds, in eval mode."""
    if Path(source).is_dir():
        if weights is not None or classes is not None:
            raise ModelError(f"{source!r} is a run folder, with weights and classes of its own; leave the option out.")
        return load(source)
    return build_model(source, classes=classes, weights=str(weights) if weights else None).model.eval()


def measure_model(
    source: str,
    *,
    weights: Path | None = None,
    classes: int | None = None,
    data: str | None = None,
    shape: str | None = None,
    normalise: str = "data",
) -> Ledger:
    """A ledger of one row for the model `source`; with its accuracy where `data` names test images."""
    images = None if data is None else load_data(data, normalise=normalise)
    if images is not None and classes is None and not Path(source).is_dir():
        classes = len(images.classes)
    model = open_model(source, weights, classes)
    example = images.example() if images is not None and shape is None else example_input(source, shape)
    batches = None if images is None else images.batches("test", TEST_BATCH)
    return Ledger((LedgerRow(source, data or "", measure(model, example, batches=batches), 0.0),))


def inspect_model(
    source: str, *, weights: Path | None = None, classes: int | None = None, shape: str | None = None
) -> Groups:
    """The channel groups of the model `source`."""
    return find_groups(open_model(source, weights, classes), example_input(source, shape))


def groups_json(groups: Groups) -> str:
    """`Groups.to_json` with what of the model can be cut and the cost of a unit of each group, as one line."""
    shares = {name: getattr(groups, name) for name in ("params", "prunable_params", "macs", "prunable_macs")}
    return json.dumps({**shares, "unit_costs": [asdict(cost) for cost in groups.unit_costs], **groups.to_json()})


def plot_sparsity(table: SparsityTable, path: Path) -> None:
    """Draws sparsity against layer into the picture `path`, whose ending says its format."""
    format = path.suffix.removeprefix(".").lower()
    if format not in PICTURES:
        raise UnknownName("kind of picture", path.suffix, [f".{known}" for known in PICTURES])
    write_bytes(path, picture(partial(draw_sparsity, table), format))


def example_input(source: str, shape: str | None) -> Tensor:
    """An input for the model `source`, of the shape that is given in words, or else of the one it is made for.

    >>> example_input("torchvision:resnet18", "2,3,64,64").shape
    torch.Size([2, 3, 64, 64])
    """
    if shape is None:
        recipe = Path(source) / "recipe.toml"
        name = read_recipe(recipe).model.source if recipe.exists() else source
        shape = "1,1,8,8" if name == "secateur:digits_vgg" else "1,3,224,224"
        shape = "1,3,32,32" if name.startswith("secateur:") and shape == "1,3,224,224" else shape
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ModelError(f"--input {shape!r} is not a shape; give whole numbers with commas, such as 1,3,32,32.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.randn(sizes)
