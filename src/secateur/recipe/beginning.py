"""What several runs have in common is run once: the steps before the first cut, in a folder of their own."""

from __future__ import annotations

from pathlib import Path

from secateur.recipe.folder import WEIGHTS
from secateur.recipe.run import RECIPE, RUN, Progress, resume, run
from secateur.recipe.schema import Recipe


def begin(recipe: Recipe, folder: Path, progress: Progress | None = None) -> Recipe:
    """The rest of the recipe, from its first cut on, with the weights that the steps before leave.

    Args:
        recipe: its steps before the first cut only train and sparsify, which changes no shape.
        folder: where they are run, or gone on with; not made if there are none.
        progress: as for `run`.
    """
    before, rest = recipe.parted()
    if before is None:
        return rest
    run_or_resume(before, folder, progress)
    weights = str((folder / "model" / WEIGHTS).absolute())
    network = rest.model.model_copy(update={"weights": weights, "pretrained": False})
    return rest.model_copy(update={"model": network})


def run_or_resume(recipe: Recipe, folder: Path, progress: Progress | None = None) -> None:
    """Run a recipe, or go on with it, unless the run in the folder is finished."""
    if (folder / RUN).exists():
        return
    if (folder / RECIPE).exists():
        resume(folder, progress=progress)
    else:
        run(recipe, folder, progress=progress)
