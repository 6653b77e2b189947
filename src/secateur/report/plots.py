"""The pictures of a report, drawn by matplotlib from records; no global state of pyplot is touched.

`plots` gives every picture that a record has data for; `Plot.svg` is the page's inline SVG at any width, coloured
by CSS variables, and `save_plots` writes .svg and .png files.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from secateur.allocate.sensitivity import Sensitivity
from secateur.codec.files import write_bytes, write_text
from secateur.measure.sparsity import SparsityTable
from secateur.recover.history import EpochRow, History
from secateur.report import numbers
from secateur.report.ledger import ChannelRow, Ledger, RunRecord
from secateur.report.style import ACCENT, INK, MUTED, PALE, PALETTE, WARM, WIDE, new_figure, picture, with_dark

NAMED_LAYERS = 24

@dataclass(frozen=True)
class Plot:
    """One picture: the name of its file, what it shows in words, and how to draw it at a width."""

    name: str
    caption: str
    draw: Callable[[float], Figure]

    def svg(self, width: float = WIDE) -> str:
        """The picture as an <svg> element for an HTML page, `width` inches wide."""
        text = picture(self.draw, "svg", width).decode()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href=", "href=")
        # Every picture of the page needs ids of its own.
        own = f"{self.name}-{round(10 * width)}-"
        text = re.sub(r'\bid="', f'id="{own}', text)
        text = re.sub(r'href="#', f'href="#{own}', text).replace("url(#", f"url(#{own}")
        for name, (colour, _) in PALETTE.items():
            text = text.replace(colour, f"var(--plot-{name}, {colour})")
        return text.strip()


def plots(record: RunRecord) -> tuple[Plot, ...]:
    """The pictures that the record has data for: ledger, channels, sparsity, sensitivity, one for each training run.

    >>> plots(RunRecord("tiny", "2024-05-01", Ledger(())))
    ()
    """
    found = []
    if len(record.ledger.rows) > 1:
        caption = "File size, MACs, latency (each relative to the first step) and accuracy after each step."
        found.append(Plot("ledger", caption, lambda width: draw_ledger(record.ledger, width)))
    if record.channels:
        caption = "Output channels of each layer before (pale) and after (green)."
        found.append(Plot("channels", caption, lambda width: draw_channels(record.channels, width)))
    sparsity = record.sparsity
    if sparsity is not None and sparsity.rows:
        caption = "Share of zeros in each layer, in the order of the model."
        found.append(Plot("sparsity", caption, lambda width: draw_sparsity(sparsity, width)))
    sensitivity = record.sensitivity
    if sensitivity is not None and sensitivity.curves:
        caption = "Loss on held-out images when one group alone is cut, its lowest scores first; a line for each group."
        found.append(Plot("sensitivity", caption, lambda width: draw_sensitivity(sensitivity, width)))
    for number, (name, history) in enumerate(record.histories, start=1):
        if history.rows:
            found.append(_training_plot(number, name, history))
    return tuple(found)


def save_plots(record: RunRecord, folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Writes each picture as NAME.svg (light or dark, as the screen is) and NAME.png (on white) into a folder.

    The names are ledger, channels, sparsity, sensitivity, and training-1, training-2, ... Returns the paths.

    Raises:
        RunError: the folder is missing or may not be written, or the disk is full.

    >>> save_plots(RunRecord("tiny", "2024-05-01", Ledger(())), ".")
    ()
    """
    written = []
    for plot in plots(record):
        base = Path(folder) / plot.name
        write_text(base.with_suffix(".svg"), with_dark(picture(plot.draw, "svg").decode()))
        write_bytes(base.with_suffix(".png"), picture(plot.draw, "png"))
        written += [base.with_suffix(".svg"), base.with_suffix(".png")]
    return tuple(written)


def draw_sparsity(table: SparsityTable, width: float = WIDE) -> Figure:
    """Sparsity against layer, as the report's Figure 6; the dashed line is that of all layers together.

    >>> from secateur.measure.sparsity import SparsityRow
    >>> len(draw_sparsity(SparsityTable((SparsityRow("conv", 1, 4),))).axes)
    1
    """
    shares = [row.sparsity for row in table.rows]
    named = len(shares) <= NAMED_LAYERS and width >= WIDE
    figure = new_figure(width, 3.6 if named else 2.9)
    axes = figure.subplots()
    axes.axhline(table.sparsity, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    size = 5 if len(shares) <= 30 else 3
    places = range(len(shares))
    axes.plot(places, shares, color=ACCENT, marker="o", markersize=size, markeredgewidth=0, clip_on=False)
    label = f"all layers\n{numbers.percent(table.sparsity)}"
    _note(axes, label, (1, table.sparsity), (4, 0), ("axes fraction", "data"), MUTED, va="center", fontsize=8)
    axes.set_ylim(0, 1)
    axes.set_xlim(-0.5, max(len(shares) - 0.5, 0.5))
    axes.set_ylabel("sparsity")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.grid(axis="y")
    _layer_axis(axes, [_short(row.name) for row in table.rows] if named else None, len(shares))
    return figure


def draw_sensitivity(sensitivity: Sensitivity, width: float = WIDE) -> Figure:
    """The loss against the share of a group that is cut, a line for each group; the worst is named.

    >>> len(draw_sensitivity(Sensitivity(1.0, ())).axes)
    1
    """
    figure = new_figure(width, 2.9)
    axes = figure.subplots()
    curves = sorted((curve for curve in sensitivity.curves if curve.gone), key=lambda curve: curve.losses[-1])
    for curve in curves:
        shares = [gone / curve.size for gone in (0, *curve.gone)]
        colour = WARM if curve is curves[-1] else ACCENT
        axes.plot(shares, [sensitivity.whole, *curve.losses], color=colour, linewidth=0.9, marker="o", markersize=2.5)
    for curve in curves[-1:]:
        _note(axes, _short(curve.group), (shares[-1], curve.losses[-1]), (5, 0), colour=WARM, va="center")
    axes.set(xlim=(0, None), xlabel="share of the group that is cut", ylabel="loss")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.grid(axis="y")
    return figure


def draw_channels(channels: Sequence[ChannelRow], width: float = WIDE) -> Figure:
    """Output channels of each layer: before pale, after solid on it; named where the layers are few.

    >>> len(draw_channels([ChannelRow("conv", 64, 48)]).axes)
    1
    """
    after, before = [row.after for row in channels], [row.before for row in channels]
    places = range(len(channels))
    if len(channels) > NAMED_LAYERS:
        figure = new_figure(width, 2.9)
        axes = figure.subplots()
        axes.bar(places, before, width=0.86, color=PALE)
        axes.bar(places, after, width=0.86, color=ACCENT)
        axes.set_ylabel("output channels")
        axes.set_xlim(-1, len(channels))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y")
        _layer_axis(axes, None, len(channels))
        return figure
    figure = new_figure(width, 0.55 + 0.235 * len(channels))
    axes = figure.subplots()
    axes.barh(places, before, height=0.66, color=PALE)
    axes.barh(places, after, height=0.66, color=ACCENT)
    for place, row in enumerate(channels):
        text = f"{row.before:,} → {row.after:,}" if row.after != row.before else f"{row.before:,}"
        _note(axes, text, (max(row.before, row.after), place), (5, 0), va="center")
    axes.set_yticks(places, [_short(row.layer, 26 if width >= WIDE else 18) for row in channels])
    axes.set_xlim(0, 1.22 * max((*before, *after, 1)))
    axes.set_ylim(len(channels) - 0.4, -0.6)
    axes.set_xlabel("output channels")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines.left.set_visible(False)
    axes.tick_params(length=0)
    return figure


def draw_history(history: History, width: float = WIDE) -> Figure:
    """Loss and accuracy per epoch, with the stages of the learning rate and the best epoch.

    >>> row = EpochRow(1, 0.1, 0.7, 0.5, 0.6, 0.75, 1.5)
    >>> [axes.get_ylabel() for axes in draw_history(History().with_row(row)).axes]
    ['loss', 'accuracy']
    """
    beside = width >= WIDE
    figure = new_figure(width, 2.9 if beside else 5.2)
    left, right = figure.subplots(1, 2) if beside else figure.subplots(2, 1)
    best, rows = history.best, history.rows
    _curves(left, rows, [r.train_loss for r in rows], [r.validation_loss for r in rows])
    _curves(right, rows, [r.train_accuracy for r in rows], [r.validation_accuracy for r in rows])
    left.set_ylim(bottom=0)
    _mark_best(left, best, best.validation_loss, f"loss {numbers.loss(best.validation_loss)}")
    accuracy = numbers.percent(best.validation_accuracy)
    _mark_best(right, best, best.validation_accuracy, f"accuracy {accuracy}")
    left.set_ylabel("loss")
    right.set_ylabel("accuracy")
    right.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    return figure


def draw_ledger(ledger: Ledger, width: float = WIDE) -> Figure:
    """File size, MACs and latency as shares of the first step's, and accuracy, one bar for each step.

    >>> len(draw_ledger(Ledger(())).axes)
    0
    """
    panels = list(_ledger_panels(ledger))
    steps = [_short(row.step, 22) for row in ledger.rows]
    columns = len(panels) if width >= WIDE else min(2, len(panels))
    lines = -(-len(panels) // max(columns, 1))
    figure = new_figure(width, (0.55 + 0.28 * len(steps)) * max(lines, 1))
    for index, (title, values, labels) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        places = range(len(values))
        colours = [PALE, *[ACCENT] * (len(values) - 1)]
        axes.barh(places, [v or 0.0 for v in values], height=0.62, color=colours)
        for place, (value, label) in enumerate(zip(values, labels)):
            _note(axes, label, (value or 0.0, place), (4, 0), va="center")
        axes.set_xlim(0, 1.55 * max(v or 0.0 for v in values) or 1)
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_title(title, color=INK)
        axes.set_xticks([])
        axes.set_yticks(places, steps if index % columns == 0 else [])
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
    return figure


def _ledger_panels(ledger: Ledger) -> Iterator[tuple[str, list[float | None], list[str]]]:
    measured = [row.measurement for row in ledger.rows]
    costs = (
        ("File size", [float(m.bytes) for m in measured]),
        ("MACs", [m.macs.per_image for m in measured]),
        ("Latency", [None if m.latency is None else m.latency.median_ms for m in measured]),
    )
    for title, values in costs:
        first = values[0] if values else None
        if first:
            shares = [None if value is None else value / first for value in values]
            labels = [numbers.DASH if share is None else f"{100 * share:.3g} %" for share in shares]
            yield title, shares, labels
    accuracies = [None if m.accuracy is None else m.accuracy.top1 for m in measured]
    if any(value is not None for value in accuracies):
        yield "Accuracy", accuracies, [numbers.percent(value) for value in accuracies]


def _curves(
    axes: Axes, rows: Sequence[EpochRow], train: Sequence[float], validation: Sequence[float]
) -> None:
    epochs = [row.epoch for row in rows]
    marker = "o" if len(epochs) < 3 else ""
    axes.plot(epochs, train, color=WARM, marker=marker, markersize=4)
    axes.plot(epochs, validation, color=ACCENT, marker=marker, markersize=4)
    axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    _end_labels(axes, (("train", train[-1], WARM), ("validation", validation[-1], ACCENT)))
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.grid(axis="y")
    changes = [row for last, row in itertools.pairwise(rows) if row.lr != last.lr]
    # A schedule that moves at every epoch has no stages to show.
    if len(changes) > 5:
        return
    labelled = -len(epochs)
    for row in (rows[0], *changes):
        if row.epoch > epochs[0]:
            axes.axvline(row.epoch - 0.5, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        if row.epoch - labelled > 0.2 * len(epochs):
            labelled = row.epoch
            label = f"lr {numbers.learning_rate(row.lr)}"
            _note(axes, label, (row.epoch - 0.5, 1), (2, 3), ("data", "axes fraction"), MUTED, fontsize=7.5)


def _end_labels(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    # Where two curves end close together their labels are pushed apart, the higher one up.
    top, bottom = sorted(ends, key=lambda end: -end[1])
    low, high = axes.get_ylim()
    near = (top[1] - bottom[1]) < 0.09 * (high - low)
    for (name, value, colour), side in ((top, 5), (bottom, -5)):
        place = (4, side if near else 0)
        _note(axes, name, (1, value), place, ("axes fraction", "data"), colour, va="center")


def _mark_best(axes: Axes, best: EpochRow, value: float, label: str) -> None:
    axes.plot([best.epoch], [value], marker="o", markersize=6, color=ACCENT, markeredgewidth=0, clip_on=False)
    axes.set_title(f"● best epoch {best.epoch}: {label}", color=ACCENT, fontsize=8.5, pad=15)


def _note(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    shift: tuple[float, float],
    coordinates: str | tuple[str, str] = "data",
    colour: str = INK,
    **style: Any,
) -> None:
    """Text `shift` points from a place."""
    style = {"fontsize": 8.5, **style}
    axes.annotate(text, at, shift, coordinates, "offset points", color=colour, annotation_clip=False, **style)


def _layer_axis(axes: Axes, names: Sequence[str] | None, layers: int) -> None:
    if names is None:
        axes.xaxis.set_major_locator(MaxNLocator(min(10, max(layers - 1, 1)), integer=True))
        axes.set_xlabel("layer, in the order of the model")
    else:
        axes.set_xticks(range(layers), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
        axes.tick_params(axis="x", length=2)


def _training_plot(number: int, name: str, history: History) -> Plot:
    caption = f"Loss and accuracy during {name}; dotted lines mark a new learning rate (lr)."
    return Plot(f"training-{number}", caption, lambda width: draw_history(history, width))


def _short(name: str, limit: int = 22) -> str:
    """The end of a long dotted name says more than its beginning."""
    name = name.removesuffix(".weight")
    return name if len(name) <= limit else "…" + name[1 - limit :]
