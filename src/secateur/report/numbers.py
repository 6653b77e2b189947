"""How each kind of number is written, everywhere: terminal, page and plots all call these.

One function per kind of number; `None` (not measured) is always the dash. MB is 10^6 bytes and MiB 2^20.
"""

from __future__ import annotations

import math

DASH = "–"


def count(value: int | None) -> str:
    """A whole number with thousands separators.

    >>> count(12141667)
    '12,141,667'
    """
    return DASH if value is None else f"{value:,}"


def scaled(value: float | None) -> str:
    """A large count to four significant figures, with k, M, G or T.

    >>> scaled(15470264320), scaled(812)
    ('15.47 G', '812')
    """
    if value is None:
        return DASH
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.99995:
            return f"{_four(value / limit)} {unit}"
    return f"{value:,.0f}"


def megabytes(size: float | None) -> str:
    """A size in bytes, written in MB (10^6 bytes).

    >>> megabytes(553433880)
    '553.4 MB'
    """
    return DASH if size is None else f"{_four(size / 1e6)} MB"


def mebibytes(size: float | None) -> str:
    """A size in bytes, written in MiB (2^20 bytes).

    >>> mebibytes(4 * 12141667)
    '46.32 MiB'
    """
    return DASH if size is None else f"{_four(size / 2**20)} MiB"


def percent(fraction: float | None) -> str:
    """A fraction as a percentage with two decimals.

    >>> percent(0.9339)
    '93.39 %'
    """
    return DASH if fraction is None else f"{_finite(100 * fraction, '.2f')} %"


def share(fraction: float) -> str:
    """A share that a person asked for as a percentage, as short as it can be written.

    >>> share(0.125), share(0.8)
    ('12.5 %', '80 %')
    """
    return f"{100 * fraction:g} %"


def points(before: float, after: float) -> str:
    """The difference of two fractions in percentage points, signed, taken from the figures as printed.

    >>> points(0.98889, 0.98333)
    '-0.56 points'
    """
    difference = round(round(100 * after, 2) - round(100 * before, 2), 2)
    return f"{_finite(difference + 0.0, '+.2f')} points"


def milliseconds(value: float | None) -> str:
    """A time in milliseconds.

    >>> milliseconds(1.23456), milliseconds(184.2)
    ('1.23 ms', '184 ms')
    """
    return DASH if value is None else f"{_three(value)} ms"


def millisecond_range(low: float, high: float) -> str:
    """A range of times in milliseconds.

    >>> millisecond_range(1.2, 1.31)
    '1.20–1.31 ms'
    """
    return f"{_three(low)}–{_three(high)} ms"


def duration(seconds: float | None) -> str:
    """A time that a person waited.

    >>> duration(0.04), duration(75.2), duration(7384)
    ('0.04 s', '1 min 15 s', '2 h 03 min')
    """
    if seconds is None:
        return DASH
    if not math.isfinite(seconds) or seconds < 59.95:
        return f"{_finite(seconds, '.2f' if seconds < 1 else '.1f')} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {rest:02d} min"


def loss(value: float | None) -> str:
    """A loss with four decimals.

    >>> loss(0.25), loss(float("nan"))
    ('0.2500', 'not finite')
    """
    return DASH if value is None else _finite(value, ".4f")


def learning_rate(value: float) -> str:
    """A learning rate, as short as it can be written.

    >>> learning_rate(0.001), learning_rate(1e-06)
    ('0.001', '1e-6')
    """
    return f"{value:.3g}".replace("e-0", "e-")


def ratio(before: float, after: float) -> str:
    """How many times as large the larger of two positive numbers is.

    >>> ratio(527.8, 22.85), ratio(1.0, 2500.0)
    ('23.1x', '2,500x')
    """
    factor = max(before, after) / min(before, after)
    return f"{factor:,.1f}x" if factor < 99.95 else f"{factor:,.0f}x"


def change(before: float | None, after: float | None, less: str, more: str) -> str:
    """What became of a number, as "23.1x smaller", "4.8 % larger" or "unchanged".

    Ratios under 1.1 are written as percentages, because "1.0x" says nothing. "" where a number is missing or
    zero.

    Args:
        before, after: the two numbers, in one unit.
        less, more: the words for a decrease and for an increase, such as "smaller" and "larger".

    >>> change(527.8, 22.85, "smaller", "larger")
    '23.1x smaller'
    >>> change(100.0, 104.8, "smaller", "larger")
    '4.8 % larger'
    """
    size = change_size(before, after)
    if not size or before is None or after is None or before == after:
        return size
    return f"{size} {less if after < before else more}"


def change_size(before: float | None, after: float | None) -> str:
    """The number in `change`, without its word: "23.1x", "4.8 %", "unchanged" or "".

    >>> change_size(10, 5), change_size(10, 9.6), change_size(3, 3), change_size(0, 3)
    ('2.0x', '4.0 %', 'unchanged', '')
    """
    if before is None or after is None or not (0 < before < math.inf and 0 < after < math.inf):
        return ""
    if before == after:
        return "unchanged"
    if max(before, after) / min(before, after) < 1.1:
        step = abs(after - before) / before
        return f"{100 * step:.1f} %" if step >= 0.0005 else "under 0.1 %"
    return ratio(before, after)


def _four(value: float) -> str:
    return _figures(value, 1000, 4)


def _three(value: float) -> str:
    return _figures(value, 100, 3)


def _figures(value: float, whole_from: float, figures: int) -> str:
    if not math.isfinite(value):
        return "not finite"
    if value == 0 or abs(value) >= whole_from:
        return f"{value:,.0f}"
    # Rounding first keeps 9.996 from being printed with one figure too many.
    digits = math.floor(math.log10(abs(float(f"{value:.{figures - 1}e}"))))
    return f"{value:,.{max(0, figures - 1 - max(digits, -1))}f}"


def _finite(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "not finite"
