"""A recipe run in a folder: step by step, each written to the journal when it is done, so that it can go on later.

Nothing is written before the recipe, the data and the model have been found good. From then on the folder holds at
any moment what `resume` needs: `recipe.toml`, the journal, the model after the last finished step, within a training
step the checkpoint of its last epoch, and the models that are timed against each other when all steps are done. The
folder of a finished run has besides:

    ledger.json  metrics.jsonl  run.json  report.html  plots/  model/
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.codec.files import append_line, locked, read_json, write_json, write_text
from secateur.errors import ProofError, RunError
from secateur.measure.latency import Latency, compare_latency, latency
from secateur.measure.measurement import measure
from secateur.recipe.folder import load, read_model, save_model
from secateur.recipe.journal import Entry, Outcome, metrics, metrics_line, read_entries, record, write_entry
from secateur.recipe.reading import read_recipe
from secateur.recipe.schema import Cut, Recipe, Train
from secateur.recipe.steps import Setting, State, distils, prepare, take
from secateur.recover.history import EpochRow
from secateur.recover.parallel import first, started
from secateur.report import numbers
from secateur.report.ledger import CheckRow, LedgerRow, RunRecord
from secateur.report.page import write_page
from secateur.report.plots import save_plots
from secateur.surgery.masks import Masks

RECIPE, RUN, REPORT, METRICS, LEDGER = "recipe.toml", "run.json", "report.html", "metrics.jsonl", "ledger.json"
MASKS = "masks.safetensors"
TEST_BATCH = 256


@dataclass(frozen=True)
class Status:
    """Where a run stands: what it is doing, how many of all its epochs are done, and how much of the one under way."""

    text: str
    done: int
    total: int
    share: float = 0.0


Progress = Callable[[Status], None]


def run(
    recipe: Recipe, folder: str | Path, *, force: bool = False, progress: Progress | None = None
) -> RunRecord:
    """Runs the steps of `recipe` as they stand; arguments and errors as of `launch.run`."""
    folder = Path(folder)
    check_free(folder, force)
    with process(recipe):
        setting, state = prepare(recipe)
        with locked(folder):
            check_free(folder, force)  # once more: another process may have come first
            empty(folder)
            write_text(folder / RECIPE, recipe.to_toml())
            return _go(folder, setting, state, (), progress)


def resume(folder: str | Path, *, progress: Progress | None = None) -> RunRecord:
    """Goes on with such a run, as `launch.resume` does."""
    folder = Path(folder)
    if not (folder / RECIPE).exists():
        raise RunError(f"{str(folder)!r} holds no run; give the folder that was made by `secateur compress`.")
    with locked(folder):
        return _resume(folder, progress)


def _resume(folder: Path, progress: Progress | None) -> RunRecord:
    if (folder / RUN).exists():
        raise RunError(f"the run in {str(folder)!r} is finished; its report is {folder / REPORT}.")
    recipe = read_recipe(folder / RECIPE)
    entries = read_entries(folder)
    with process(recipe):
        setting, state = prepare(recipe)
        if entries:
            state = _state_after(folder, entries[-1].step, setting)
        return _go(folder, setting, state, entries, progress)


def take_part(folder: Path, number: int, setting: Setting) -> None:
    """Trains with the process that has `folder`, in its training step `number`."""
    state = _state_after(folder, number - 1, setting)
    take(number, state, setting, checkpoint=_training(folder, number))


def call(where: list[Any] | None) -> None:
    """Calls the other processes, if there are any, to a training step of a run: its folder and number; None: home."""
    if started() > 1:
        first(where)


def read_record(folder: str | Path) -> RunRecord:
    """What the report of the finished run in `folder` shows; raises `RunError` where there is none."""
    folder = Path(folder)
    if not (folder / RUN).exists():
        going = (folder / RECIPE).exists()
        then = f"go on with: secateur resume {folder}" if going else "give the folder of a run"
        raise RunError(f"{str(folder)!r} holds no {'finished ' if going else ''}run; {then}.")
    return RunRecord.from_json(read_json(folder / RUN))


def _go(
    folder: Path, setting: Setting, state: State, entries: tuple[Entry, ...], progress: Progress | None
) -> RunRecord:
    """The steps that are not in `entries` yet, and then the report."""
    steps = setting.recipe.steps
    tell = _Teller(progress, sum(_epochs(step) for step in steps))
    for number in range(len(entries), len(steps) + 1):
        start = time.perf_counter()
        outcome = Outcome("original")
        if number:
            step = steps[number - 1]
            done = sum(_epochs(earlier) for earlier in steps[: number - 1])
            tell(f"step {number} of {len(steps)}: {step.kind}", done)
            # What a step draws depends on its number alone: the steps before may have been taken by another process.
            torch.manual_seed(setting.seed + number)

            def on_epoch(row: EpochRow, number: int = number, done: int = done) -> None:
                append_line(folder / METRICS, metrics_line(number, asdict(row)))
                accuracy = numbers.percent(row.validation_accuracy)
                tell(f"step {number} of {len(steps)}: validation {accuracy}", done + row.epoch)

            if isinstance(step, Train):
                call([str(folder.absolute()), number])
            state, outcome = take(
                number, state, setting, checkpoint=_training(folder, number),
                table=folder / f"latency-{number}.json", on_epoch=on_epoch, on_step=tell.within_epoch,
            )  # fmt: skip
        seconds = time.perf_counter() - start if number else 0.0
        row = None if number == 0 and not setting.trained else _row(state, outcome, setting, seconds)
        _save_state(_step_folder(folder, number), state)
        entries = (*entries, Entry(number, outcome, row))
        write_entry(folder, entries[-1])
        _drop_checkpoints(folder, number, setting)
        write_text(folder / METRICS, metrics(entries))
    tell("writing the report", tell.total)
    return _finish(folder, setting, state, entries)


def _row(state: State, outcome: Outcome, setting: Setting, seconds: float) -> LedgerRow:
    """The model measured on the test images; its latency is taken when all steps are done."""
    measured = measure(
        state.model,
        setting.data.example(device=setting.device),
        batches=setting.data.batches("test", TEST_BATCH, device=setting.device),
        latency_runs=0,
        device=setting.device,
    )
    return LedgerRow(outcome.label, outcome.note, measured, seconds)


def _timed(folder: Path, setting: Setting, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """The entries with their latencies: each model is timed by turns with the first, so that both see the same machine.

    Latencies taken one step at a time, hours apart, would tell as much of what else the machine did.
    """

    def model(step: int) -> nn.Module:
        return _saved_state(_step_folder(folder, step), setting).model

    device, threads = setting.device, setting.recipe.threads
    example = setting.data.example(device=device)
    start, *cuts = _timed_steps(setting)
    first = model(start)
    found: dict[int, tuple[Latency, float | None]] = {}
    for cut in cuts:
        before, after, speedup = compare_latency(first, model(cut), example, threads=threads, device=device)
        found |= {start: (before, None), cut: (after, speedup)}
    if not cuts:
        found = {start: (latency(first, example, threads=threads, device=device), None)}

    def timed(entry: Entry) -> Entry:
        if entry.row is None:
            return entry
        taken, speedup = found[max(step for step in found if step <= entry.step)]
        measured = replace(entry.row.measurement, latency=taken)
        return replace(entry, row=replace(entry.row, measurement=measured, speedup=speedup))

    return tuple(timed(entry) for entry in entries)


def _timed_steps(setting: Setting) -> tuple[int, ...]:
    """The steps whose models are timed: the first that is measured, and each cut, for no other step changes a shape."""
    cuts = (number for number, step in enumerate(setting.recipe.steps, start=1) if isinstance(step, Cut))
    return (0 if setting.trained else 1, *cuts)


def _finish(folder: Path, setting: Setting, state: State, entries: tuple[Entry, ...]) -> RunRecord:
    """Writes the model, proves that it loads as it was saved, and writes the report."""
    model = state.model.cpu().eval()
    save_model(folder / "model", model, state.architecture)
    with torch.no_grad():
        images = setting.data.example(8)
        loaded, held = load(folder)(images), model(images)
    if not torch.allclose(loaded, held, rtol=0, atol=0, equal_nan=True):
        raise ProofError(
            f"the model saved in {folder / 'model'} gives other outputs when it is loaded; its code may draw random "
            "numbers in eval mode, or keep tensors that are neither parameter nor buffer."
        )
    made = record(
        _timed(folder, setting, entries),
        title=setting.recipe.title or f"{setting.recipe.model.source} on {setting.data.name}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=(folder / RECIPE).read_text(encoding="utf-8"),
        conditions=_conditions(setting),
    )
    reloaded = CheckRow("the saved model gives the same outputs when it is loaded", "bit for bit", True)
    made = replace(made, certificate=(*made.certificate, reloaded), notes=(*setting.notes, *made.notes))
    write_json(folder / LEDGER, made.ledger.to_json())
    (folder / "plots").mkdir(exist_ok=True)
    save_plots(made, folder / "plots")
    write_page(made, folder / REPORT)
    # Last of all, for it is what says that the run is finished.
    write_json(folder / RUN, made.to_json())
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return made


def _conditions(setting: Setting) -> tuple[tuple[str, str], ...]:
    data, recipe = setting.data, setting.recipe
    sizes = f"{len(data.train):,} train, {len(data.validation):,} validation, {len(data.test):,} test images"
    return (
        ("data", f"{data.name}: {sizes}"),
        ("model", recipe.model.source + (f", weights {recipe.model.weights}" if recipe.model.weights else "")),
        ("seed", str(recipe.seed)),
        ("device", str(setting.device)),
        ("threads", str(torch.get_num_threads())),
        *((("processes", str(started())),) if started() > 1 else ()),
        ("torch", torch.__version__),
        ("Python", platform.python_version()),
        ("machine", f"{platform.system()} {platform.machine()}"),
    )


def check_free(folder: Path, force: bool) -> None:
    """RunError unless the folder is free, or holds a run that may be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / RECIPE).is_file():
        raise RunError(f"{str(folder)!r} exists and is not a run folder, so it is left alone; give another --out.")
    if not force:
        raise RunError(
            f"{str(folder)!r} holds a run already; go on with it (secateur resume {folder}), replace it (--force), "
            "or give another --out."
        )


def empty(folder: Path) -> None:
    """Removes all that is in the folder, not the folder itself: this process holds it."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


class _Teller:
    """Tells `progress`, if there is one, where the run stands; what was told last stays within the next epoch."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.total = total
        self._progress, self._last = progress, Status("", 0, total)

    def __call__(self, text: str, done: int) -> None:
        self._last = Status(text, done, self.total)
        self.within_epoch(0.0)

    def within_epoch(self, share: float) -> None:
        if self._progress is not None:
            self._progress(replace(self._last, share=share))


def _epochs(step: object) -> int:
    return step.epochs if isinstance(step, Train) else 0


def _step_folder(folder: Path, number: int) -> Path:
    return folder / "checkpoints" / f"step-{number}"


def _training(folder: Path, number: int) -> Path:
    return folder / "checkpoints" / f"train-{number}"


def _state_after(folder: Path, last: int, setting: Setting) -> State:
    """The state that step `last` left."""
    begins = _timed_steps(setting)[0]
    state = _saved_state(_step_folder(folder, last), setting)
    if last >= begins and distils(setting.recipe):
        state = replace(state, original=_saved_state(_step_folder(folder, begins), setting).model)
    return state


def _save_state(folder: Path, state: State) -> None:
    save_model(folder, state.model, state.architecture)
    if state.masks is not None:
        state.masks.save(folder / MASKS)


def _saved_state(folder: Path, setting: Setting) -> State:
    architecture, tensors = read_model(folder)
    masks = Masks.load(folder / MASKS) if (folder / MASKS).exists() else None
    return State(architecture.build(tensors).to(setting.device), architecture, masks)


def _drop_checkpoints(folder: Path, number: int, setting: Setting) -> None:
    """Removes what the step before needed: the journal no longer points to it."""
    shutil.rmtree(_training(folder, number), ignore_errors=True)
    if number - 1 not in _timed_steps(setting):
        shutil.rmtree(_step_folder(folder, number - 1), ignore_errors=True)


@contextlib.contextmanager
def process(recipe: Recipe) -> Iterator[None]:
    """The recipe's threads and seed for the time of the run; the caller's are given back."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(recipe.threads or threads)
        torch.manual_seed(recipe.seed)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
