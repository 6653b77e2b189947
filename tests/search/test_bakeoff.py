"""Rankings of a bake-off: means, spreads, and what chance may have done, seed by seed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from secateur.report.layout import to_text
from secateur.report.standings import draw_standings, standings_tables
from secateur.report.style import picture
from secateur.search.bakeoff import Cell, Entrant, paired, rank

ACCURACIES = {
    ("energy", "ranking"): (0.91, 0.90, 0.93, 0.92),
    ("magnitude", "ranking"): (0.90, 0.85, 0.92, 0.88),
    ("random", "ranking"): (0.80, 0.82, 0.79, 0.85),
    ("random", "uniform"): (0.70, 0.72, 0.79, 0.75),
}
CELLS = tuple(
    Cell(
        Entrant(criterion, "none", guide), seed, 10, 20,
        {"cut": a, "recovered": a / 2 + 0.5}, {"cut": a - 0.01, "recovered": a}, 2.0,
    )
    for (criterion, guide), values in ACCURACIES.items()
    for seed, a in enumerate(values)
)  # fmt: skip


def test_the_ranking_is_numpys_and_scipys():
    standings = rank(CELLS, "cut")
    first = ACCURACIES["energy", "ranking"]
    assert [(s.entrant.criterion, s.entrant.guide) for s in standings] == list(ACCURACIES)
    for standing, values in zip(standings, ACCURACIES.values()):
        assert standing.mean == pytest.approx(np.mean(values))
        assert standing.spread == pytest.approx(np.std(values, ddof=1))
        assert standing.behind == pytest.approx(np.mean(first) - np.mean(values))
        assert standing.test == pytest.approx(np.mean(values) - 0.01)
        if values != first:
            assert standing.chance == pytest.approx(stats.ttest_rel(values, first).pvalue)
    assert math.isnan(standings[0].chance)
    control = stats.ttest_rel(first, ACCURACIES["random", "ranking"]).pvalue
    assert standings[0].control == pytest.approx(control)
    assert math.isnan(standings[2].control)
    assert rank(CELLS, "reset") == ()


def test_pairs_are_by_seed_and_say_when_nothing_can_be_said():
    assert paired({0: 0.1, 2: 0.5, 5: 0.3}, {5: 0.2, 0: 0.15, 2: 0.6, 7: 0.9}) == pytest.approx(
        stats.ttest_rel([0.1, 0.5, 0.3], [0.15, 0.6, 0.2]).pvalue
    )
    assert math.isnan(paired({0: 0.5}, {0: 0.4}))
    assert math.isnan(paired({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.5}))
    assert math.isnan(paired({0: 0.5, 1: 0.6}, {2: 0.4, 3: 0.5}))


def test_cells_are_json_values():
    for cell in CELLS:
        assert Cell.from_json(json.loads(json.dumps(cell.to_json()))) == cell


def test_tables_and_picture_show_every_entrant_and_stage():
    tables = standings_tables(CELLS)
    assert [table.title for table in tables] == ["As cut", "Recovered"]
    text = to_text(tables[0], 120)
    assert text.index("energy, ranking") < text.index("magnitude, ranking") < text.index("random, uniform")
    assert "91.50 %" in text
    drawn = picture(lambda width: draw_standings(CELLS, width), "svg").decode()
    assert all(str(cell.entrant) in drawn for cell in CELLS)
    assert len(draw_standings(CELLS).axes) == 2
