"""`bakeoff`: a recipe with every criterion, scale and guide that is to be compared, under its budget, seed by seed.

What comes before the cut is run once, in `start/`. Each cell, one entrant with one seed, is a line of `cells.jsonl`
once it is measured, so that what was broken off goes on after the last; cells run here, or on the workers of a Ray
cluster. All see the same data and weights: a seed decides which images score, what random draws, and the order in
training.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from secateur.codec.files import append_line, locked, write_bytes, write_text
from secateur.errors import RecipeError, RunError, UnknownName
from secateur.measure.accuracy import accuracy
from secateur.measure.macs import count_macs
from secateur.measure.params import count_params
from secateur.recipe.beginning import begin
from secateur.recipe.criteria import CRITERIA, SCALES, Unlabelled
from secateur.recipe.run import RECIPE, TEST_BATCH, Progress, Status, process
from secateur.recipe.schema import Cut, Recipe
from secateur.recipe.steps import Drawn, Setting, prepare, take
from secateur.recover.statistics import reset_statistics
from secateur.report.standings import draw_standings
from secateur.report.style import picture
from secateur.search.bakeoff import Cell, Entrant, Stage

CELLS = "cells.jsonl"
GUIDES = ("ranking", "ranking-per-cost", "knapsack", "sensitivity", "uniform")
RESET_IMAGES = 2048

Run = Callable[[Recipe, Sequence[tuple[Entrant, int]]], Iterator[Cell]]
"""What measures cells, in any order."""


@dataclass(frozen=True)
class Field:
    """Who runs: every criterion with every scale and guide, each with as many seeds.

    Raises:
        UnknownName: a criterion, scale or guide that is none. RecipeError: nothing of a kind, or seeds below 1.

    >>> [str(who) for who in Field(("taylor",), ("none", "mean")).entrants]
    ['taylor, ranking', 'taylor x mean, ranking', 'random, ranking']
    """

    criteria: tuple[str, ...] = tuple(CRITERIA)
    scales: tuple[str, ...] = ("none",)
    guides: tuple[str, ...] = ("ranking",)
    seeds: int = 3

    def __post_init__(self) -> None:
        kinds = ((self.criteria, CRITERIA, "criterion"), (self.scales, SCALES, "scale"), (self.guides, GUIDES, "guide"))
        for names, known, kind in kinds:
            for name in names:
                if name not in known:
                    raise UnknownName(kind, name, known)
        if self.seeds < 1 or not all(names for names, _, _ in kinds):
            raise RecipeError("a bake-off needs a criterion, a scale, a guide, and 1 seed or more.")

    @property
    def entrants(self) -> tuple[Entrant, ...]:
        """All of them, and random as a control for each guide."""
        every = [Entrant(*names) for names in itertools.product(self.criteria, self.scales, self.guides)]
        control = [Entrant("random", "none", guide) for guide in self.guides]
        return tuple(dict.fromkeys([*every, *control]))


def bakeoff(
    recipe: Recipe, field: Field, folder: Path, *, ray: str | None = None, progress: Progress | None = None
) -> tuple[Cell, ...]:
    """Run what is missing of all cells, in the folder, and return them all.

    Args:
        recipe: with one step that cuts to a budget; the steps after it are the recovery, and may be left out.
        field: who runs.
        folder: made if missing; one of an earlier call with the same recipe is gone on with.
        ray: the address of a Ray cluster, whose workers see the same files; "local" starts one here. Needs `ray`.
        progress: told after each cell.

    Raises:
        RecipeError: the recipe has no cut to a budget. RunError: the folder is of another recipe, or no cluster
            answers.
    """
    cuts = [step for step in recipe.steps if isinstance(step, Cut)]
    if len(cuts) != 1 or cuts[0].budget is None:
        raise RecipeError("a bake-off needs a recipe with one step that cuts, and that to a budget.")
    with _cluster(ray) as here, locked(folder):
        _claim(folder, recipe)
        rest = begin(recipe.model_copy(update={"floor": None}), folder / "start", progress)
        cells = {(cell.entrant, cell.seed): cell for cell in read_cells(folder)}
        todo = [(who, seed) for seed in range(field.seeds) for who in field.entrants if (who, seed) not in cells]
        total = len(todo)
        for number, cell in enumerate((_here if here is None else here)(rest, todo), start=1):
            append_line(folder / CELLS, json.dumps(cell.to_json()))
            cells[cell.entrant, cell.seed] = cell
            if progress is not None:
                progress(Status(f"{cell.entrant}, seed {cell.seed}", number, total))
        made = tuple(cells[key] for key in itertools.product(field.entrants, range(field.seeds)))
        for form in ("svg", "png"):
            write_bytes(folder / f"standings.{form}", picture(partial(draw_standings, made), form))
    return made


def read_cells(folder: Path) -> tuple[Cell, ...]:
    """The cells that are measured; a line that was cut off does not count."""
    path, cells = folder / CELLS, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            cells.append(Cell.from_json(json.loads(line)))
        except ValueError:
            continue
    return tuple(cells)


def measure_cell(rest: Recipe, entrant: Entrant, seed: int) -> Cell:
    """Cut, measured, recovered and measured again.

    Args:
        rest: the recipe from its cut on, with weights.
        entrant, seed: which cell.
    """
    start = time.perf_counter()
    with process(rest):
        setting, state = prepare(_with(rest, entrant))
        setting = replace(setting, seed=seed)
        state, _ = take(1, state, setting)
        images = setting.data.example(1, setting.device)
        macs, params = count_macs(state.model, images).per_image, count_params(state.model)
        found: dict[Stage, tuple[float, float]] = {"cut": _accuracies(state.model, setting)}
        renewed = copy.deepcopy(state.model)
        if reset_statistics(renewed, Unlabelled(Drawn(setting, RESET_IMAGES))):
            found["reset"] = _accuracies(renewed, setting)
        for number in range(2, len(rest.steps) + 1):
            state, _ = take(number, state, setting)
        if len(rest.steps) > 1:
            found["recovered"] = _accuracies(state.model, setting)
    validation, test = ({stage: pair[i] for stage, pair in found.items()} for i in (0, 1))
    return Cell(entrant, seed, int(macs or 0), params, validation, test, time.perf_counter() - start)


def _with(rest: Recipe, who: Entrant) -> Recipe:
    change = {"criterion": who.criterion, "scale": who.scale, "guide": who.guide, "sparsity": None}
    cut = rest.steps[0].model_copy(update=change)
    return rest.model_copy(update={"steps": (cut, *rest.steps[1:])})


def _accuracies(model: nn.Module, setting: Setting) -> tuple[float, float]:
    """On the validation and on the test images."""
    data, device = setting.data, setting.device
    validation = accuracy(model, data.batches("validation", TEST_BATCH, device=device), device=device)
    test = accuracy(model, data.batches("test", TEST_BATCH, device=device), device=device)
    return validation.top1, test.top1


def _here(rest: Recipe, todo: Sequence[tuple[Entrant, int]]) -> Iterator[Cell]:
    for who, seed in todo:
        yield measure_cell(rest, who, seed)


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[Run | None]:
    """What runs cells on the workers of a Ray cluster; None where they are run here.

    RecipeError if Ray is not installed, RunError if nothing answers at the address.
    """
    if address is None:
        yield None
        return
    try:
        import ray
    except ImportError as error:
        raise RecipeError("Ray is not installed here; pip install 'secateur[ray]', or leave --ray out.") from error
    _check_answers(address)
    try:
        ray.init(address=None if address == "local" else address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(f"the Ray cluster {address!r} cannot be joined: {str(error).splitlines()[0]}") from error

    def run(rest: Recipe, todo: Sequence[tuple[Entrant, int]]) -> Iterator[Cell]:
        """Each cell as a task; they come as they are done."""
        task = ray.remote(max_retries=2)(measure_cell)
        left = [task.remote(rest, who, seed) for who, seed in todo]
        while left:
            done, left = ray.wait(left)
            yield from ray.get(done)

    try:
        yield run
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """RunError unless something listens at a host and port; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise RunError(f"no Ray cluster answers at {address!r} ({error}); check the address, or give local.") from error


def _claim(folder: Path, recipe: Recipe) -> None:
    """The folder is this recipe's from now on, or has been."""
    path, text = folder / RECIPE, recipe.to_toml()
    if not path.exists():
        if any(folder.iterdir()):
            raise RunError(f"{str(folder)!r} exists and is no bake-off, so it is left alone; give another --out.")
        write_text(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise RunError(f"{str(folder)!r} holds the bake-off of another recipe; give another --out.")
