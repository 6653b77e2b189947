"""The command line: arguments to a recipe or a verb, and its record to tables. It decides nothing else.

What a user can put right ends in one sentence and exit code 2; Ctrl-C says how to go on, exit code 130. Only typer is
imported at the top, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.errors import RunError, SecateurError

if TYPE_CHECKING:
    from secateur.recipe.run import Progress, Status
    from secateur.recipe.schema import Recipe
    from secateur.report.layout import Table
    from secateur.report.ledger import RunRecord

app = typer.Typer(
    name="secateur",
    help="Make a trained PyTorch model smaller and faster, with the same accuracy, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelSpec = Annotated[
    str, typer.Option("--model", help="secateur:NAME, torchvision:NAME, timm:NAME, file.py:factory or a run folder.")
]
Weights = Annotated[Path | None, typer.Option("--weights", help="A safetensors file that fits the model.")]
Out = Annotated[Path | None, typer.Option("--out", help="The run folder to make.", show_default="runs/NAME")]
Force = Annotated[bool, typer.Option("--force", help="Replace the run that is in the folder.")]
Classes = Annotated[int | None, typer.Option("--classes", min=1, help="Outputs of the model's head.")]
Normalise = Annotated[
    str | None, typer.Option(help="Mean and deviation to normalise with: data (the train images') or imagenet.")
]
InputShape = Annotated[str | None, typer.Option("--input", help="Shape of an example input, such as 1,3,32,32.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code.

    >>> main(["resume", "nowhere"])
    2
    """
    if _several():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns of what it was asked for
        from secateur.recipe.together import one_of_several

        one_of_several(partial(_main, arguments))
    return _main(arguments)


def _several() -> bool:
    """Whether torchrun has started several processes; asked here without `recover.parallel`, which imports torch."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _main(arguments: Sequence[str] | None) -> int:
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="secateur")
    except SecateurError as error:
        return _refuse(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _refuse(f"the disk is full ({error.filename or 'no file named'}); free some space, then resume the run.")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    return 0


@app.command()
def demo(out: Out = None, force: Force = False) -> None:
    """Compress a small network on scikit-learn's digits, from training to report, in less than a minute.

    Example:  secateur demo --out runs/demo
    """
    from secateur.recipe.reading import embedded

    _compress(embedded("digits"), out or Path("runs/demo"), force)


@app.command()
def compress(
    recipe: Annotated[Path | None, typer.Argument(help="A TOML recipe; without one, give --model and --data.")] = None,
    out: Out = None,
    force: Force = False,
    data: Annotated[str | None, typer.Option(help="digits, cifar10, cifar100, imagefolder:DIR or parquet:DIR.")] = None,
    model: Annotated[str | None, typer.Option(help="secateur:, torchvision: or timm:NAME, or file.py:factory.")] = None,
    weights: Weights = None,
    sparsity: Annotated[float | None, typer.Option(help="How much to prune, at least 0 and less than 1.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of the last training step.")] = None,
    normalise: Normalise = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="What may be left, at most: macs=0.5, params=0.6, bytes=100000; repeat it. Or latency=0.7."),
    ] = None,
    floor: Annotated[
        float | None,
        typer.Option(help="Search the smallest model above this validation accuracy; -1.0: one point may be lost."),
    ] = None,
) -> None:
    """Run a recipe, or prune and fine-tune one model as the options say; the options change the recipe.

    Examples:

      secateur compress recipes/report.toml --out runs/report

      secateur compress recipes/digits.toml --sparsity 0.9 --force

      secateur compress --model secateur:digits_vgg --data digits --budget macs=0.5 --budget params=0.6

      secateur compress --model secateur:resnet56 --weights resnet56.safetensors
      --data parquet:cifar10 --normalise imagenet --sparsity 0.5 --epochs 3

      secateur compress recipes/digits_budget.toml --floor -1.0

      torchrun --nproc-per-node 2 -m secateur compress recipes/report.toml
    """
    from secateur.recipe.options import recipe_from, run_folder

    chosen = recipe_from(
        recipe,
        data=data,
        model=model,
        weights=str(weights) if weights else None,
        sparsity=sparsity,
        epochs=epochs,
        normalise=normalise,
        budget=budget or (),
        floor=floor,
    )
    _compress(chosen, out or run_folder(recipe, chosen), force)


@app.command()
def bakeoff(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe with one step that cuts to a budget.")],
    out: Out = None,
    criteria: Annotated[str, typer.Option(help="Names with commas; all if left out.")] = "",
    scales: Annotated[str, typer.Option(help="For scores of all layers: none, mean, max, gaussian, lamp.")] = "none",
    guides: Annotated[str, typer.Option(help="ranking, ranking-per-cost, knapsack, sensitivity, uniform.")] = "ranking",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, on the same data.")] = 3,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster; local starts one here.")] = None,
) -> None:
    """Compare criteria, scales and guides under a recipe's budget, as cut and recovered; random is the control.

    Example:  secateur bakeoff recipes/digits_budget.toml --criteria magnitude,taylor,energy --seeds 5
    """
    from secateur.recipe.bakeoff import Field
    from secateur.recipe.bakeoff import bakeoff as run
    from secateur.recipe.options import run_folder
    from secateur.recipe.reading import read_recipe
    from secateur.report.standings import standings_tables

    if _several():
        raise RunError("a bake-off trains one cell at a time in one process; start it without torchrun, or give --ray.")
    folder = out or Path(f"{run_folder(recipe, read_recipe(recipe))}-bakeoff")
    named = {"scales": tuple(scales.split(",")), "guides": tuple(guides.split(","))}
    field = Field(**named, seeds=seeds, **({"criteria": tuple(criteria.split(","))} if criteria else {}))
    with _resumable(folder, "the same command"), _progress("cells") as progress:
        cells = run(read_recipe(recipe), field, folder, ray=ray, progress=progress)
    for table in standings_tables(cells):
        _print(table)
    typer.echo(f"picture: {folder / 'standings.svg'}")


@app.command()
def resume(run: Annotated[Path, typer.Argument(help="The folder of a run that was broken off.")]) -> None:
    """Go on with a run that was broken off, after its last finished step and epoch.

    Example:  secateur resume runs/report
    """
    from secateur.recipe.launch import resume as go_on

    with _resumable(run), _progress() as progress:
        record = go_on(run, progress=progress)
    _show(record, run)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="The folder of a finished run.")]) -> None:
    """Print the tables of a finished run, and write its report.html anew.

    Example:  secateur report runs/demo
    """
    from secateur.recipe.run import read_record
    from secateur.report.page import write_page
    from secateur.report.tables import channels_table, history_table, sparsity_table

    record = read_record(run)
    if record.sparsity is not None:
        _print(sparsity_table(record.sparsity))
    if record.channels:
        _print(channels_table(record.channels))
    for name, history in record.histories:
        _print(history_table(name, history))
    write_page(record, run / "report.html")
    _show(record, run)


@app.command()
def sparsity(
    model: ModelSpec,
    sparsity: Annotated[float, typer.Option(help="The share of all weights to zero, at least 0 and less than 1.")],
    weights: Weights = None,
    classes: Classes = None,
    plot: Annotated[Path | None, typer.Option(help="Draw sparsity against layer into this .png or .svg file.")] = None,
) -> None:
    """Show which layers global magnitude pruning would take its zeros from; the model is left as it is.

    Example:  secateur sparsity --model secateur:resnet56 --weights resnet56.safetensors --sparsity 0.8
    """
    from secateur.recipe.options import open_model, plot_sparsity
    from secateur.report.tables import sparsity_table
    from secateur.surgery.masks import find_masks

    table = find_masks(open_model(model, weights, classes), sparsity).table()
    _print(sparsity_table(table))
    if plot is not None:
        plot_sparsity(table, plot)
        typer.echo(f"plot: {plot}")


@app.command()
def measure(
    model: ModelSpec,
    data: Annotated[str | None, typer.Option(help="Test images for the accuracy, as for compress.")] = None,
    weights: Weights = None,
    classes: Classes = None,
    input: InputShape = None,
    normalise: Normalise = None,
) -> None:
    """Measure a model: parameters, MACs, bytes on disk, milliseconds, sparsity, and accuracy where there are data.

    Examples:

      secateur measure --model runs/demo --data digits

      secateur measure --model torchvision:resnet18 --input 1,3,224,224
    """
    from secateur.recipe.options import measure_model
    from secateur.report.tables import ledger_table

    ledger = measure_model(
        model, weights=weights, classes=classes, data=data, shape=input, normalise=normalise or "data"
    )
    _print(ledger_table(ledger))


@app.command()
def inspect(
    model: ModelSpec,
    weights: Weights = None,
    classes: Classes = None,
    input: InputShape = None,
    json: Annotated[bool, typer.Option("--json", help="Print all of it as one JSON object instead.")] = False,
) -> None:
    """Show what of a model can be cut and what a unit costs; and what cannot, why, and what would free it.

    Examples:

      secateur inspect --model torchvision:resnet18 --input 1,3,224,224

      secateur inspect --model torchvision:resnet18 --json > resnet18.json
    """
    from secateur.recipe.options import groups_json, inspect_model

    groups = inspect_model(model, weights=weights, classes=classes, shape=input)
    typer.echo(groups_json(groups) if json else str(groups))


def _compress(recipe: Recipe, out: Path, force: bool) -> None:
    from secateur.recipe.launch import run

    with _resumable(out), _progress() as progress:
        record = run(recipe, out, force=force, progress=progress)
    _show(record, out)


def _show(record: RunRecord, run: Path) -> None:
    from secateur.report.page import summary_text

    typer.echo(summary_text(record, _width()))
    # Once more, for a reader of the end of the output.
    typer.echo(f"\n{record.ledger.verdict}")
    typer.echo(f"report: {run / 'report.html'}")


def _print(table: Table) -> None:
    from secateur.report.layout import to_text

    typer.echo(to_text(table, _width()) + "\n")


def _width() -> int:
    """Of the terminal; what goes to a file or a pipe gets room for the ledger."""
    return shutil.get_terminal_size((120, 24)).columns


def _refuse(sentence: str) -> int:
    print(f"secateur: {sentence}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _resumable(run: Path, command: str = "") -> Iterator[None]:
    """Ctrl-C within the block ends the command with the way to go on: `secateur resume` if no other is given."""
    try:
        yield
    except KeyboardInterrupt:
        going = (run / "recipe.toml").exists() and not (run / "run.json").exists()
        then = f"go on with: {command or f'secateur resume {run}'}" if going else "nothing was written."
        print(f"\nsecateur: interrupted; {then}", file=sys.stderr)
        raise typer.Exit(130) from None


@contextlib.contextmanager
def _progress(parts: str = "epochs") -> Iterator[Progress]:
    """A progress bar over the parts of a run, with the time it will still take; a line for each without a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield partial(_print_line, parts)
        return
    counted = (MofNCompleteColumn(), TextColumn(parts), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), BarColumn(), *counted, console=console, transient=True) as bar:
        task = bar.add_task("reading data and model", total=None)
        yield lambda status: bar.update(
            task, description=status.text, completed=status.done + status.share, total=status.total
        )


def _print_line(parts: str, status: Status) -> None:
    if not status.share:
        print(f"{status.text} ({status.done} of {status.total} {parts})", file=sys.stderr, flush=True)
