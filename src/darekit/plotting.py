# SPDX-License-Identifier: Apache-2.0
"""How plots look: colours that every kind of colour vision tells apart, dashes and markers that need no colour, axes
with names; files that are the same for the same data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from darekit.errors import Unsupported

# Okabe and Ito (jfly.uni-koeln.de/color), darkest contrast first; yellow is left out: it vanishes on white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

MARKERS = ("o", "s", "^", "D", "v", "P", "X")

DASHES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1.5, 1, 1.5)))

GREY, PALE = "#5F5F5F", "#DDDDDD"

SEQUENTIAL, DIVERGING = "cividis", "PuOr"

WIDTH, HEIGHT = 6.4, 4.2  # inches of one panel that stands alone

DPI = 160

_SETTINGS = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": PALE,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.handlelength": 3.4,  # room for a dash on each side of the marker
    "lines.linewidth": 2.0,
    "lines.markersize": 6.5,
    "figure.dpi": 100,
    "svg.hashsalt": "darekit",  # otherwise every run names its clips and markers anew
    "svg.fonttype": "none",  # text stays text
}


def require_matplotlib() -> None:
    """Plots are an extra.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise Unsupported("plots need matplotlib: pip install 'darekit[plot]'")


def settings() -> Any:
    """The context in which figures are made and saved."""
    require_matplotlib()
    import matplotlib

    return matplotlib.rc_context(_SETTINGS)


def line_style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line at `index`: no two share any of them up to seven."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
    }


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = WIDTH, height: float = HEIGHT, extra: float = 0.0
) -> tuple[Any, Any]:
    """A figure and its (rows, columns) axes; width and height of one panel in inches, `extra` height for a legend.

    Needs no display.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows + extra), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Any, stem: Path) -> tuple[Path, Path]:
    """Write STEM.png and STEM.svg, each in one step; the same figure gives the same bytes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        path = stem.with_name(stem.name + suffix)
        partial = stem.with_name(f".{stem.name}{suffix}")
        figure.savefig(partial, format=suffix[1:], dpi=DPI, metadata=metadata)
        partial.replace(path)
        written.append(path)
        figure.set_layout_engine("none")  # it stands; laying it out is half of the work
    return written[0], written[1]


def spaced_evenly(ticks: Sequence[Any]) -> bool:
    """Whether numbers on a true scale would be one blot: the closest two nearer than 1/15 of the range."""
    if not all(isinstance(tick, int | float) for tick in ticks) or len(ticks) < 3:
        return True
    ordered = sorted(ticks)
    gaps = [b - a for a, b in itertools.pairwise(ordered)]
    return bool(min(gaps) < (ordered[-1] - ordered[0]) / 15)
