"""How every picture looks: colours for white and for black, matplotlib's settings, and the bytes of a file.

The same figure gives the same bytes: ids are hashed with a fixed salt, text stays text, and no date is written.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import matplotlib
from matplotlib.figure import Figure

WIDE, NARROW = 7.6, 3.7
INK, MUTED, LINE, ACCENT, PALE, WARM = "#4a5560", "#74808c", "#d4dadf", "#1f7a5c", "#c3cbd1", "#b4691f"
# Name of each colour, as it is on white and on black.
PALETTE = MappingProxyType(
    {
        "ink": (INK, "#c9d2da"),
        "muted": (MUTED, "#93a0ab"),
        "line": (LINE, "#343d46"),
        "accent": (ACCENT, "#4fbf95"),
        "pale": (PALE, "#4b5763"),
        "warm": (WARM, "#e0a05e"),
    }
)
STYLE: MappingProxyType[Any, Any] = MappingProxyType(
    {
        "text.parse_math": False,
        "svg.hashsalt": "secateur",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9.0,
        "text.color": INK,
        "axes.edgecolor": LINE,
        "axes.labelcolor": MUTED,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.axisbelow": True,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "grid.color": LINE,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.6,
        "lines.solid_capstyle": "round",
        "figure.facecolor": "none",
    }
)


def picture(draw: Callable[[float], Figure], form: str, width: float = WIDE) -> bytes:
    """One drawing as the bytes of a file, always in the report's style.

    Args:
        draw: makes the figure, given its width in inches.
        form: "svg", "png" or another format of matplotlib; all but SVG are on white.
        width: in inches.

    >>> picture(lambda width: new_figure(width, 1.0), "png")[1:4]
    b'PNG'
    """
    out = io.BytesIO()
    options: dict[str, Any] = {"metadata": {"Date": None}} if form == "svg" else {"facecolor": "white", "dpi": 200}
    with matplotlib.rc_context():
        # A user's own matplotlibrc must not change the report.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        draw(width).savefig(out, format=form, **options)
    return out.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """Empty, of a size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def with_dark(svg: str) -> str:
    """The picture with its colours for a dark screen, for viewers that know of them."""
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark} !important}}'
        for light, dark in PALETTE.values()
        for kind in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    return svg.replace("</svg>", f"{style}</svg>", 1)
