"""Each table of the report, once, as data: record in, `Table` out, every figure written by `numbers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from secateur.measure.sparsity import SparsityTable
from secateur.recover.history import History
from secateur.report import numbers
from secateur.report.layout import Cell, Table, align
from secateur.report.ledger import (
    ChannelRow,
    CheckRow,
    FrozenRow,
    Ledger,
    LedgerRow,
    TrialRow,
    latency_change,
)


def ledger_table(ledger: Ledger) -> Table:
    """The ledger: a row per step, each figure with what became of it since the first row.

    Columns that no row has are left out. Accuracy is top-1; MB is 10^6 bytes and MiB 2^20.

    >>> ledger_table(Ledger(())).columns
    ('Step', 'Took')
    """
    rows = ledger.rows
    columns: list[tuple[str, list[Cell]]] = []
    for name, cell in LEDGER_COLUMNS:
        cells = [cell(row, rows[0]) for row in rows]
        if any(c.text != numbers.DASH for c in cells):
            columns.append((name, cells))
    names = ("Step", *(name for name, _ in columns), "Took")
    body = tuple(
        (_step(row), *(cells[i] for _, cells in columns), Cell(numbers.duration(row.seconds or None)))
        for i, row in enumerate(rows)
    )
    return Table("Ledger", names, body, align(names), note=" ".join(_ledger_conditions(rows)))


def sparsity_table(table: SparsityTable) -> Table:
    """The zeros of each layer and of all together, as the report's Table 1.

    >>> sparsity_table(SparsityTable(())).columns
    ('Layer', 'Number of Zeros', 'Number of Elements', 'Sparsity')
    """
    body = [(row.name, row.zeros, row.elements) for row in table.rows]
    body.append(("Total", table.zeros, table.elements))
    return _table(
        "Sparsity of each layer",
        ("Layer", "Number of Zeros", "Number of Elements", "Sparsity"),
        ([name, numbers.count(z), numbers.count(n), _share(z, n)] for name, z, n in body),
        total=True,
    )


def channels_table(channels: Sequence[ChannelRow]) -> Table:
    """Output channels of each layer before and after the cut, and of all together.

    >>> [cell.text for cell in channels_table([ChannelRow("conv", 64, 48)]).rows[-1]]
    ['Total', '64', '48', '25.00 %']
    """
    body = [(row.layer, row.before, row.after) for row in channels]
    body.append(("Total", sum(row.before for row in channels), sum(row.after for row in channels)))
    return _table(
        "Channels before and after",
        ("Layer", "Before", "After", "Cut"),
        ([name, numbers.count(b), numbers.count(a), _share(b - a, b)] for name, b, a in body),
        total=True,
    )


def frozen_table(frozen: Sequence[FrozenRow], shown: int = 4) -> Table:
    """What could not be cut, one row per reason, the reason that holds most tensors first.

    Args:
        frozen: the tensors and reasons.
        shown: how many tensors of a reason are named; the others are counted.

    >>> print(frozen_table([FrozenRow("fc.weight", "reaches the output")]).rows[0][0].text)
    reaches the output
    """
    reasons: dict[str, list[str]] = {}
    for row in frozen:
        reasons.setdefault(row.reason, []).append(row.tensor)
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
    return _table(
        "What could not be cut",
        ("Reason", "Tensors", "Which"),
        ([reason, numbers.count(len(names)), _some(names, shown)] for reason, names in ordered),
        left=("Which",),
    )


def certificate_table(checks: Sequence[CheckRow]) -> Table:
    """The checks of the proof, what each gave, and whether it passed.

    >>> certificate_table([CheckRow("masked equals cut", "off by 3e-15", True)]).rows[0][2]
    Cell(text='passed', notes=(), tone='good')
    """
    body = tuple(
        (
            Cell(row.check),
            Cell(row.value),
            Cell("passed", tone="good") if row.passed else Cell("FAILED", tone="bad"),
        )
        for row in checks
    )
    return Table("Proof", ("Check", "Value", "Result"), body, ("left", "right", "left"))


def trials_table(trials: Sequence[TrialRow]) -> Table:
    """The sizes that were tried, in order, and which was chosen.

    >>> trials_table([TrialRow("50.0 % of the MACs", 0.91, 12.0, "chosen")]).rows[0][1].text
    '91.00 %'
    """
    body = tuple(
        (
            Cell(row.size),
            Cell(numbers.percent(row.accuracy)),
            Cell(row.verdict, tone="good" if row.verdict == "chosen" else ""),
            Cell(numbers.duration(row.seconds)),
        )
        for row in trials
    )
    columns = ("Size tried", "Validation accuracy", "Result", "Took")
    return Table("Sizes tried", columns, body, align(columns, ("Result",)))


def history_table(name: str, history: History) -> Table:
    """The epochs of one training run; the best one is marked.

    >>> history_table("fine-tuning", History()).title
    'Epochs of fine-tuning'
    """
    body = tuple(
        tuple(
            Cell(text, tone="good" if row.epoch == history.best_epoch else "")
            for text in (
                f"{row.epoch}{' (best)' if row.epoch == history.best_epoch else ''}",
                numbers.learning_rate(row.lr),
                numbers.loss(row.train_loss),
                numbers.percent(row.train_accuracy),
                numbers.loss(row.validation_loss),
                numbers.percent(row.validation_accuracy),
                numbers.duration(row.seconds),
            )
        )
        for row in history.rows
    )
    sides = ("Train loss", "Train accuracy", "Validation loss", "Validation accuracy")
    columns = ("Epoch", "Learning rate", *sides, "Took")
    return Table(f"Epochs of {name}", columns, body, align(columns), note=" ".join(history.notes))


def conditions_table(conditions: Iterable[tuple[str, str]]) -> Table:
    """What the figures were taken with, as pairs.

    >>> conditions_table([("torch", "2.15.0")]).rows[0][1].text
    '2.15.0'
    """
    return _table("Conditions", ("Condition", "Value"), conditions, left=("Value",))


def _accuracy(now: LedgerRow, first: LedgerRow) -> Cell:
    after, before = now.measurement.accuracy, first.measurement.accuracy
    if after is None:
        return Cell(numbers.DASH)
    changed = () if before is None or now is first else (numbers.points(before.top1, after.top1),)
    return Cell(numbers.percent(after.top1), changed)


def _top5(now: LedgerRow, first: LedgerRow) -> Cell:
    measured = now.measurement.accuracy
    return Cell(numbers.percent(None if measured is None else measured.top5))


def _loss(now: LedgerRow, first: LedgerRow) -> Cell:
    measured = now.measurement.accuracy
    return Cell(numbers.loss(None if measured is None else measured.loss))


def _params(now: LedgerRow, first: LedgerRow) -> Cell:
    before, after = first.measurement.params, now.measurement.params
    return Cell(numbers.count(after), _since(now, first, numbers.change(before, after, "fewer", "more")))


def _macs(now: LedgerRow, first: LedgerRow) -> Cell:
    before, after = first.measurement.macs.per_image, now.measurement.macs.per_image
    return Cell(numbers.scaled(after), _since(now, first, numbers.change(before, after, "fewer", "more")))


def _file(now: LedgerRow, first: LedgerRow) -> Cell:
    before, after = first.measurement.bytes, now.measurement.bytes
    changed = _since(now, first, numbers.change(before, after, "smaller", "larger"))
    return Cell(numbers.megabytes(after), (numbers.mebibytes(after), *changed))


def _latency(now: LedgerRow, first: LedgerRow) -> Cell:
    before, after = first.measurement.latency, now.measurement.latency
    if after is None:
        return Cell(numbers.DASH)
    spread = numbers.millisecond_range(after.low_ms, after.high_ms)
    changed = _since(now, first, latency_change(before, after, now.speedup))
    return Cell(numbers.milliseconds(after.median_ms), (spread, *changed))


def _sparsity(now: LedgerRow, first: LedgerRow) -> Cell:
    table = now.measurement.sparsity
    return Cell(numbers.percent(table.sparsity if table.rows else None))


LEDGER_COLUMNS: tuple[tuple[str, Callable[[LedgerRow, LedgerRow], Cell]], ...] = (
    ("Accuracy", _accuracy),
    ("Top-5", _top5),
    ("Loss", _loss),
    ("Parameters", _params),
    ("MACs", _macs),
    ("File", _file),
    ("Latency", _latency),
    ("Sparsity", _sparsity),
)


def _since(now: LedgerRow, first: LedgerRow, changed: str) -> tuple[str, ...]:
    return () if now is first or changed in ("", "unchanged") else (changed,)


def _step(row: LedgerRow) -> Cell:
    return Cell(row.step, (row.note,) if row.note else ())


def _ledger_conditions(rows: Sequence[LedgerRow]) -> Iterable[str]:
    measured = [row.measurement for row in rows]
    images = {numbers.count(m.accuracy.images) for m in measured if m.accuracy is not None}
    yield from sorted({f"{m.accuracy.note}." for m in measured if m.accuracy is not None and m.accuracy.note})
    if images:
        yield f"Accuracy (top-1) and loss on {_and(images)} images."
    if measured:
        yield "MACs of one image; a fused multiply-add counts as one."
        yield "File: MB is 10^6 bytes, MiB is 2^20."
    uncounted = sorted({op.removeprefix("aten.") for m in measured for op, _ in m.macs.uncounted})
    if uncounted:
        yield f"MACs leave out: {_some(uncounted, 8)}."
    timed = [m.latency for m in measured if m.latency is not None]
    runs = {f"{t.runs:,} runs, batch {t.batch}, {_plural(t.threads, 'thread')}, {t.device}" for t in timed}
    if runs:
        yield f"Latency: median, and 10th to 90th percentile, of {'; or '.join(sorted(runs))}."
    if any(row.speedup is not None for row in rows):
        yield "Each size of the model was timed by turns with the first; how much faster is the median over the turns."


def _share(part: int, whole: int) -> str:
    return numbers.percent(part / whole if whole else None)


def _table(
    title: str,
    columns: tuple[str, ...],
    rows: Iterable[Sequence[str]],
    total: bool = False,
    left: tuple[str, ...] = (),
) -> Table:
    body = tuple(tuple(Cell(text) for text in row) for row in rows)
    return Table(title, columns, body, align(columns, left), total=total)


def _some(names: Sequence[str], shown: int) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest:,} more" if rest > 0 else "")


def _and(words: Iterable[str]) -> str:
    return " and ".join(sorted(words))


def _plural(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
