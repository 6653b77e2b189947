"""A bake-off shown: who stands where, with spread and chance, as tables and one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType

from matplotlib.figure import Figure

from secateur.report import numbers
from secateur.report.layout import Cell, Table, align
from secateur.report.style import ACCENT, INK, MUTED, WIDE
from secateur.search.bakeoff import STAGES, Stage, Standing, rank
from secateur.search.bakeoff import Cell as Measured

TITLES = MappingProxyType(
    {"cut": "As cut", "reset": "Batch norm reset", "recovered": "Recovered"}
)


def standings_table(standings: Sequence[Standing], stage: Stage) -> Table:
    """The entrants, the best first.

    >>> standings_table([], "cut").title
    'As cut'
    """
    columns = ("Entrant", "Validation", "Spread", "Behind", "p, to the first", "p, to random", "Test", "Seeds")
    body = tuple(
        (
            Cell(str(s.entrant), tone="good" if number == 0 else ""),
            Cell(numbers.percent(s.mean)),
            Cell("–" if math.isnan(s.spread) else f"± {100 * s.spread:.2f}"),
            Cell("–" if number == 0 else f"{100 * s.behind:.2f}"),
            Cell(_chance(s.chance)),
            Cell(_chance(s.control)),
            Cell(numbers.percent(s.test)),
            Cell(numbers.count(s.seeds)),
        )
        for number, s in enumerate(standings)
    )
    note = (
        "Validation and test: mean accuracy over the seeds; spread: sample standard deviation in points. p: paired "
        "t-test over the seeds, two-sided. The validation accuracy ranks; the test images have no say."
    )
    return Table(TITLES[stage], columns, body, align(columns), note=note)


def standings_tables(cells: Sequence[Measured]) -> tuple[Table, ...]:
    """A table for each stage that was run."""
    ranked = ((stage, rank(cells, stage)) for stage in STAGES)
    return tuple(standings_table(standings, stage) for stage, standings in ranked if standings)


def draw_standings(cells: Sequence[Measured], width: float = WIDE) -> Figure:
    """Validation accuracy of each entrant: a dot for each seed, a line at the mean; a panel for each stage.

    The order is that of the last stage, the best on top.
    """
    ranked = {stage: standings for stage in STAGES if (standings := rank(cells, stage))}
    last = next(reversed(ranked.values()), ())
    order = [standing.entrant for standing in reversed(last)]
    figure = Figure(figsize=(width, 0.9 + 0.27 * max(len(order), 1)), layout="constrained")
    panels = figure.subplots(1, max(len(ranked), 1), squeeze=False, sharey=True)[0]
    for axes, (stage, standings) in zip(panels, ranked.items()):
        axes.set_title(TITLES[stage])
        axes.set_xlabel("validation accuracy, %")
        axes.grid(axis="x")
        axes.set_yticks(range(len(order)), [str(who) for who in order])
        axes.tick_params(axis="y", length=0)
        for standing in standings:
            row = order.index(standing.entrant)
            seen = [100 * cell.validation[stage] for cell in cells if cell.entrant == standing.entrant]
            colour = ACCENT if standing is standings[0] else MUTED if standing.entrant.criterion == "random" else INK
            axes.plot(seen, [row] * len(seen), "o", color=colour, markersize=4, markeredgewidth=0, alpha=0.6)
            axes.plot([100 * standing.mean] * 2, [row - 0.3, row + 0.3], color=colour)
    return figure


def _chance(value: float) -> str:
    return "–" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"
