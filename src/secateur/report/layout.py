"""A table as data, and its two layouts: for the terminal (rich) and for the page (HTML).

The text of each `Cell` is final; a layout only places it, so that a figure can never differ between the two.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import rich.box
import rich.table
from markupsafe import Markup
from rich.console import Console
from rich.measure import Measurement
from rich.text import Text

Align = Literal["left", "right"]


@dataclass(frozen=True)
class Cell:
    """One cell: its text, smaller lines below it, and whether it is good or bad news."""

    text: str
    notes: tuple[str, ...] = ()
    tone: Literal["", "good", "bad"] = ""


@dataclass(frozen=True)
class Table:
    """A table whose text is final.

    Attributes:
        title: the heading.
        columns: the column headings.
        rows: one tuple of cells per row, as long as `columns`.
        align: per column, "left" or "right".
        note: the conditions of the figures, below the table.
        total: whether the last row sums up the others.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    align: tuple[Align, ...]
    note: str = ""
    total: bool = False


def align(columns: Sequence[str], left: Sequence[str] = ()) -> tuple[Align, ...]:
    """Left for the first column and those named in `left`, right for all others.

    >>> align(("Layer", "Zeros"))
    ('left', 'right')
    """
    return tuple("left" if i == 0 or name in left else "right" for i, name in enumerate(columns))


def transposed(table: Table) -> Table:
    """The table on its side: a column per row. What stood below a row's name becomes a row of its own.

    >>> transposed(Table("Runs", ("Seed", "Loss"), ((Cell("0"), Cell("0.1")),), ("left", "right"))).columns
    ('Seed', '0')
    """
    columns = (table.columns[0], *(row[0].text for row in table.rows))
    body = [(Cell(name), *(row[i] for row in table.rows)) for i, name in enumerate(table.columns) if i]
    if any(row[0].notes for row in table.rows):
        body.insert(0, (Cell("Note"), *(Cell(" ".join(row[0].notes)) for row in table.rows)))
    return Table(table.title, columns, tuple(body), align(columns), table.note)


def to_rich(table: Table, width: int | None = None) -> rich.table.Table:
    """The table for a rich console; one too wide for `width` is turned on its side, if that is narrower.

    >>> to_rich(Table("Seeds", ("Seed",), ((Cell("0"),), (Cell("1"),)), ("left",))).row_count
    2
    """
    drawn = _rich_table(table)
    if width is None or _rich_widths(drawn).maximum <= width:
        return drawn
    turned = _rich_table(transposed(table))
    return turned if _rich_widths(turned).minimum < _rich_widths(drawn).minimum else drawn


def to_text(table: Table, width: int = 120) -> str:
    """The table as plain text without colours, at most `width` characters wide; turned as `to_rich` does.

    >>> print(to_text(Table("Runs", ("Seed", "Loss"), ((Cell("0"), Cell("0.1")),), ("left", "right"))))
    Runs
    Seed   Loss
    ───────────
    0       0.1
    """
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(to_rich(table, width))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def to_html(table: Table, kind: str = "") -> Markup:
    """The table as an HTML <table> with every text escaped.

    Args:
        table: what to show.
        kind: its CSS class.

    >>> "&lt;script&gt;" in to_html(Table("Runs", ("<script>",), (), ("left",)))
    True
    """
    heads = Markup("").join(
        Markup('<th scope="col" class="{}">{}</th>').format(side, name)
        for name, side in zip(table.columns, table.align)
    )
    rows = []
    for index, row in enumerate(table.rows):
        last = table.total and index == len(table.rows) - 1
        cells = Markup("").join(
            _html_cell(cell, name, side, head=position == 0)
            for position, (cell, name, side) in enumerate(zip(row, table.columns, table.align))
        )
        rows.append(Markup('<tr class="total">{}</tr>\n' if last else "<tr>{}</tr>\n").format(cells))
    return Markup('<table class="{}">\n<thead><tr>{}</tr></thead>\n<tbody>\n{}</tbody>\n</table>').format(
        kind, heads, Markup("").join(rows)
    )


def _rich_table(table: Table) -> rich.table.Table:
    drawn = rich.table.Table(
        title=Text(table.title, style="bold"),
        caption=Text(table.note) if table.note else None,
        box=rich.box.SIMPLE,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
        show_edge=False,
    )
    for name, side in zip(table.columns, table.align):
        drawn.add_column(Text(name), justify=side, overflow="fold")
    for index, row in enumerate(table.rows):
        if table.total and index == len(table.rows) - 1:
            drawn.add_section()
        drawn.add_row(*(_rich_cell(cell) for cell in row))
    return drawn


def _rich_widths(drawn: rich.table.Table) -> Measurement:
    # The caption wraps; only the columns decide how wide a table has to be.
    caption, drawn.caption = drawn.caption, None
    widths = Console(width=10_000).measure(drawn)
    drawn.caption = caption
    return widths


def _rich_cell(cell: Cell) -> Text:
    text = Text(cell.text, style={"": "", "good": "green", "bad": "bold red"}[cell.tone])
    for note in cell.notes:
        text.append("\n" + note, style="dim")
    return text


def _html_cell(cell: Cell, column: str, side: str, head: bool) -> Markup:
    notes = Markup("").join(Markup("<small>{}</small>").format(note) for note in cell.notes)
    classes = f"{side} {cell.tone}".strip()
    form = '<th scope="row" class="{}">{}{}</th>' if head else '<td class="{}" data-label="{}">{}{}</td>'
    text = Markup(".<wbr>").join(cell.text.split(".")) if side == "left" else cell.text
    return Markup(form).format(*((classes,) if head else (classes, column)), text, notes)
