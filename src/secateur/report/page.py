"""The report as one HTML file that asks nothing of the network, and as text for the terminal.

`page.html.jinja` says what stands where, `page.css.jinja` how it looks; tables and pictures come ready from `tables`
and `plots`. Everything that a user supplied is escaped, and sections without data are left out.
"""

from __future__ import annotations

import os
import textwrap
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from secateur.codec.files import write_text
from secateur.report import plots, style, tables
from secateur.report.layout import to_html, to_text
from secateur.report.ledger import RunRecord


def write_page(record: RunRecord, path: str | os.PathLike[str]) -> None:
    """Writes the report to `path`, whole or not at all.

    Raises:
        RunError: the folder is missing or may not be written, or the disk is full.

    >>> import pathlib
    >>> from secateur.report.ledger import Ledger
    >>> write_page(RunRecord("tiny", "2024-05-01", Ledger(())), "report.html")
    >>> "<h1>tiny</h1>" in pathlib.Path("report.html").read_text(encoding="utf-8")
    True
    >>> pathlib.Path("report.html").unlink()
    """
    write_text(path, page_html(record))


def page_html(record: RunRecord) -> str:
    """The report as the text of one self-contained HTML file, without scripts.

    >>> from secateur.report.ledger import Ledger
    >>> "&lt;b&gt;" in page_html(RunRecord("<b>", "2024-05-01", Ledger(())))
    True
    """
    loader = PackageLoader("secateur", "report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["arrows"] = _arrows
    pictures = {plot.name: _Drawn(plot) for plot in plots.plots(record)}
    trained = [
        {"name": name, "table": tables.history_table(name, history), "plot": pictures[f"training-{number}"]}
        for number, (name, history) in enumerate(record.histories, start=1)
        if history.rows
    ]
    return environment.get_template("page.html.jinja").render(
        record=record,
        date=_day(record.created),
        tables=_tables(record),
        plots=pictures,
        training=trained,
        failed=[row for row in record.certificate if not row.passed],
        palette=style.PALETTE,
        to_html=to_html,
    )


def summary_text(record: RunRecord, width: int = 100) -> str:
    """The report for a terminal: verdict, ledger, proof, what could not be cut, and the notes.

    Args:
        record: what to show.
        width: in characters; a ledger that is wider is turned on its side.

    >>> from secateur.report.ledger import Ledger
    >>> print(summary_text(RunRecord("tiny", "2024-05-01", Ledger(()))))
    tiny
    Nothing was measured.
    """
    made = _tables(record)
    shown = ["\n".join(textwrap.fill(line, width) for line in (record.title, record.ledger.verdict))]
    parts = (
        ("ledger", record.ledger.rows),
        ("trials", record.trials),
        ("certificate", record.certificate),
        ("frozen", record.frozen),
    )
    shown += [to_text(made[name], width) for name, filled in parts if filled]
    if record.notes:
        shown.append("\n".join(textwrap.fill(f"note: {note}", width) for note in record.notes))
    return "\n\n".join(shown)


class _Drawn:
    """A picture ready for the page, in both widths."""

    def __init__(self, plot: plots.Plot) -> None:
        self.caption = plot.caption
        # matplotlib has escaped the texts in its SVG already.
        self.wide = Markup(plot.svg(style.WIDE))
        self.narrow = Markup(plot.svg(style.NARROW))


def _tables(record: RunRecord) -> dict[str, Any]:
    return {
        "ledger": tables.ledger_table(record.ledger),
        "channels": tables.channels_table(record.channels),
        "sparsity": None if record.sparsity is None else tables.sparsity_table(record.sparsity),
        "certificate": tables.certificate_table(record.certificate),
        "frozen": tables.frozen_table(record.frozen),
        "conditions": tables.conditions_table(record.conditions),
        "trials": tables.trials_table(record.trials),
    }


def _arrows(text: str) -> str:
    return text.replace("->", "→")


def _day(created: str) -> str:
    """The date in words; a text that is no ISO date stays as it is."""
    try:
        day = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{day.day} {day:%B %Y}"
