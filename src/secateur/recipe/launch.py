"""A recipe in a folder, whatever kind it is: run as it stands, or searched for the smallest size above its floor."""

from __future__ import annotations

from pathlib import Path

from secateur.recipe import floor
from secateur.recipe import run as single
from secateur.recipe.reading import read_recipe
from secateur.recipe.run import RECIPE, Progress
from secateur.recipe.schema import Recipe
from secateur.report.ledger import RunRecord


def run(
    recipe: Recipe, folder: str | Path, *, force: bool = False, progress: Progress | None = None
) -> RunRecord:
    """Runs `recipe` in the new folder `folder` and returns all that its report shows.

    With a floor in the recipe, its steps from the cut on are run at several sizes, and what is shown, and saved, is the
    smallest above the floor.

    Args:
        recipe: what to do.
        folder: made if missing; one that has something in it is refused.
        force: replace the run that is in the folder, once the recipe, the data and the model have been found good.
        progress: called before each step, after each epoch and, with a share above 0, after each step of one.

    Raises:
        RunError: the folder is taken, another process is at work in it, or it cannot be written.
        PlanError: no size is above the floor; says which came nearest.
        SecateurError: as the data, the model and the steps; what was finished stays in the folder.
    """
    if recipe.floor is not None:
        return floor.run_floor(recipe, Path(folder), force=force, progress=progress)
    return single.run(recipe, folder, force=force, progress=progress)


def resume(folder: str | Path, *, progress: Progress | None = None) -> RunRecord:
    """Goes on with the run in `folder` after its last finished step, and within a training step after its last epoch.

    Raises `RunError` where there is no run, one that is finished, or one that another process is at work on.
    """
    folder = Path(folder)
    if (folder / RECIPE).exists() and read_recipe(folder / RECIPE).floor is not None:
        return floor.resume_floor(folder, progress=progress)
    return single.resume(folder, progress=progress)
