"""A recipe with a floor: from the first cut on it is run at one size after another, until the smallest is found.

The folder of such a run holds, besides what every run folder does, which is that of the size that was chosen:

    start/       the run of the steps before the cut, if there are any
    trials/      a run folder for each size, named by the share that was left
    trials.jsonl what was tried
    latency.json the times of the layers, if the size is the latency

Sizes are chosen by accuracy on the validation images; the test images are only reported.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from torch import nn

from secateur.allocate.budget import WORDS
from secateur.codec.files import locked, write_json, write_text
from secateur.errors import PlanError, RunError
from secateur.measure.accuracy import accuracy
from secateur.recipe.beginning import begin, run_or_resume
from secateur.recipe.folder import load
from secateur.recipe.reading import read_recipe
from secateur.recipe.run import (
    LEDGER,
    RECIPE,
    REPORT,
    RUN,
    TEST_BATCH,
    Progress,
    check_free,
    empty,
    process,
    read_record,
)
from secateur.recipe.schema import Recipe
from secateur.recipe.steps import Setting, prepare
from secateur.report import numbers
from secateur.report.ledger import RunRecord, TrialRow
from secateur.report.page import write_page
from secateur.search.floor import Search, Trial, find_floor

TRIALS, TIMES = "trials", "latency.json"
KEPT = ("model", "plots", "metrics.jsonl")


def run_floor(recipe: Recipe, folder: Path, *, force: bool = False, progress: Progress | None = None) -> RunRecord:
    """Search in the new folder `folder`; as `run`, and PlanError if no size is above the floor."""
    check_free(folder, force)
    prepare(_without(recipe))
    with locked(folder):
        check_free(folder, force)
        empty(folder)
        write_text(folder / RECIPE, recipe.to_toml())
        return _search(recipe, folder, progress)


def resume_floor(folder: Path, *, progress: Progress | None = None) -> RunRecord:
    """Go on with the search in `folder`: within the trial under way, after its last finished step and epoch."""
    with locked(folder):
        if (folder / RUN).exists():
            raise RunError(f"the run in {str(folder)!r} is finished; its report is {folder / REPORT}.")
        return _search(read_recipe(folder / RECIPE), folder, progress)


def _without(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"floor": None})


def _search(recipe: Recipe, folder: Path, progress: Progress | None) -> RunRecord:
    floor = recipe.floor
    assert floor is not None
    rest = begin(recipe, folder / "start", progress)
    with process(rest):
        setting, state = prepare(rest)
        whole = _validation(state.model, setting)
        if floor.measure == "latency":
            rest = rest.with_table(str((folder / TIMES).absolute()))

        def attempt(share: float) -> float:
            made = folder / TRIALS / _name(share)
            run_or_resume(rest.with_budget({floor.measure: share}), made, _within(progress, share))
            return _validation(load(made), setting)

        found = find_floor(
            attempt,
            whole,
            floor.accuracy / 100,
            tries=floor.tries,
            width=floor.width,
            journal=folder / f"{TRIALS}.jsonl",
        )
    if found.best is None:
        raise PlanError(found.sentence)
    return _finish(recipe, folder, found, found.best)


def _name(share: float) -> str:
    return f"{share:.6f}"


def _validation(model: nn.Module, setting: Setting) -> float:
    batches = setting.data.batches("validation", TEST_BATCH, device=setting.device)
    return accuracy(model.to(setting.device), batches, device=setting.device).top1


def _within(progress: Progress | None, share: float) -> Progress | None:
    """Progress that says which size it is of."""
    if progress is None:
        return None
    return lambda status: progress(replace(status, text=f"{numbers.share(share)} left, {status.text}"))


def _finish(recipe: Recipe, folder: Path, found: Search, best: Trial) -> RunRecord:
    """What the chosen run has to show becomes what this one does."""
    chosen, floor = folder / TRIALS / _name(best.share), recipe.floor
    assert floor is not None
    for name in KEPT:
        if (chosen / name).is_dir():
            shutil.copytree(chosen / name, folder / name, dirs_exist_ok=True)
        elif (chosen / name).exists():
            shutil.copyfile(chosen / name, folder / name)
    record = read_record(chosen)
    rows = (
        TrialRow(
            f"{numbers.percent(trial.share)} of the {WORDS.get(floor.measure, floor.measure)}",
            trial.accuracy,
            trial.seconds,
            "chosen" if trial is best else _verdict(trial, found.floor),
        )
        for trial in found.trials
    )
    record = replace(
        record,
        title=recipe.title or record.title,
        recipe=(folder / RECIPE).read_text(encoding="utf-8"),
        notes=(f"Validation accuracy: {found.sentence}", *record.notes),
        trials=tuple(rows),
    )
    write_json(folder / LEDGER, record.ledger.to_json())
    write_page(record, folder / REPORT)
    write_json(folder / RUN, record.to_json())
    return record


def _verdict(trial: Trial, floor: float) -> str:
    if trial.accuracy is None:
        return "out of reach"
    return "above" if trial.accuracy >= floor else "below"
