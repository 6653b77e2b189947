"""A command in several processes: the first does it as if it were alone, and calls the others to each training step.

What is cut, proved, measured and written is the first process's alone, so that there is one truth; the others read the
model that a step begins with from the run folder, as `resume` does, train with it, and wait to be called again.

A process that ends takes all with it: `torchrun` ends the others at once. The one that has something to say comes
first: the others wait a moment before they speak, and mostly are ended by then.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from secateur.errors import SecateurError
from secateur.recipe.reading import read_recipe
from secateur.recipe.run import RECIPE, call, process, take_part
from secateur.recipe.schema import Recipe
from secateur.recipe.steps import Setting, prepare
from secateur.recover.parallel import first, join, leave, rank

MOMENT_S = 2.0
"""In which torchrun ends a process that failed only because another one did."""


def one_of_several(command: Callable[[], int]) -> NoReturn:
    """Runs the command if this is the first process, else what that calls this one to; ends with its exit code.

    With another exit code than 0 this process ends at once, without waiting for connections to the others.
    """
    if rank():
        # The first process says that it was interrupted.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        join()
        code = _follow() if rank() else command()
    except SecateurError as error:
        if rank():
            time.sleep(2 * MOMENT_S)
        print(f"secateur: {error}", file=sys.stderr)
        _end(2)
    except BaseException:
        time.sleep(MOMENT_S * (2 if rank() else 1))
        traceback.print_exc()
        _end(1)
    if code:
        _end(code)
    if not rank():
        call(None)
    leave()
    # Gloo's threads may still hold tensors, and one that lets go of them while Python ends aborts the process.
    _end(0)


def _follow() -> int:
    """Takes part in every training step that the first process begins, until that is done."""
    setting: Setting | None = None
    recipe: Recipe | None = None
    while (where := first(None)) is not None:
        folder, number = Path(where[0]), int(where[1])
        asked = read_recipe(folder / RECIPE)
        with process(asked):
            if setting is None or asked != recipe:
                setting, recipe = prepare(asked)[0], asked
            take_part(folder, number, setting)
    return 0


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
