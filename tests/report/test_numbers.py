"""Numbers at the edges of their formats; the plain cases are the doctests."""

import math

import pytest

from secateur.report import numbers


@pytest.mark.parametrize(
    "form",
    [
        numbers.count, numbers.scaled, numbers.megabytes, numbers.mebibytes, numbers.percent, numbers.milliseconds,
        numbers.duration, numbers.loss,
    ],
)  # fmt: skip
def test_what_was_not_measured_is_a_dash(form):
    assert form(None) == "–"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (numbers.scaled(999_949), "999.9 k"),
        (numbers.scaled(999_950), "1.000 M"),
        (numbers.scaled(0), "0"),
        (numbers.megabytes(9_999_600), "10.00 MB"),
        (numbers.megabytes(47_312), "0.0473 MB"),
        (numbers.megabytes(0), "0 MB"),
        (numbers.mebibytes(2**20), "1.000 MiB"),
        (numbers.milliseconds(0.1234), "0.123 ms"),
        (numbers.milliseconds(99.96), "100 ms"),
        (numbers.percent(1), "100.00 %"),
        (numbers.percent(math.nan), "not finite %"),
        (numbers.points(0.5, 0.5), "+0.00 points"),
        (numbers.duration(59.96), "1 min 00 s"),
        (numbers.duration(3599.6), "1 h 00 min"),
        (numbers.duration(math.inf), "not finite s"),
        (numbers.ratio(99.96, 1), "100x"),
        (numbers.change(4, None, "less", "more"), ""),
        (numbers.change(4, 0, "less", "more"), ""),
        (numbers.change(100_000, 99_999, "less", "more"), "under 0.1 % less"),
        (numbers.change(2, 3, "less", "more"), "1.5x more"),
        (numbers.share(0.07), "7 %"),
        (numbers.share(1 / 3), "33.3333 %"),
    ],
)
def test_edges(shown, expected):
    assert shown == expected


def test_points_agree_with_the_printed_percentages():
    # 98.885 and 98.325 print as 98.89 (98.88) and 98.33 (98.32); the difference must be that of what is printed.
    before, after = 0.98894, 0.98326
    printed = float(numbers.percent(after)[:-2]) - float(numbers.percent(before)[:-2])
    assert numbers.points(before, after) == f"{printed:+.2f} points"
