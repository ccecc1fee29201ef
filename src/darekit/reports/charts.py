# SPDX-License-Identifier: Apache-2.0
"""Plots as data for plotly: points that know what a click on them copies.

Colours are names of the page's style sheet (`c1`, `ink`, `grid`), so that one figure serves light and dark; the page's
script puts the values in. A point's `customdata` is what the page shows at the pointer and what a click copies, which
`markup` replaces by numbers. plotly's own text is turned off: it vanishes where it is taller than the plot, as recipes
are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from darekit import plotting
from darekit.reports.page import AtPointer, Copy, Figure

# As `plotting.line_style`: no two share colour, dash or marker up to seven.
LOOKS = tuple(
    zip(
        (f"c{i + 1}" for i in range(len(plotting.COLOURS))),
        ("solid", "dash", "dashdot", "dot", "longdash", "longdashdot", "8px,2px,2px,2px,2px,2px"),
        ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"),
        strict=True,
    )
)

HEIGHT = 360  # pixels of a panel

SCALE_STEPS = 11

_SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

# cividis (Nunez, Anderton and Renslow 2018) and PuOr (ColorBrewer) at even steps, as matplotlib has them.
CIVIDIS = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838")
PUOR = ("#7f3b08", "#b35806", "#e08214", "#fdb863", "#fee0b6", "#f7f7f7", "#d8daeb", "#b2abd2", "#8073ac", "#542788",
        "#2d004b")  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A place in a plot.

    Attributes:
        x: from left to right.
        y: from below.
        says: lines that are shown at the pointer, above the recipe.
        copy: what a click copies.
        error: standard error of y; None where it is unknown.
    """

    x: Any
    y: float
    says: tuple[str, ...] = ()
    copy: Copy | None = None
    error: float | None = None


@dataclass(frozen=True)
class Line:
    """Points that belong together."""

    name: str
    points: tuple[Point, ...]
    look: int
    joined: bool = True
    size: int = 8


def plain(text: Any) -> str:
    """Text that plotly shows as it is: it reads tags in names, titles and labels.

    >>> plain("<b>math</b>")
    '&lt;b&gt;math&lt;/b&gt;'
    """
    return escape(str(text), quote=False)


def at_pointer(says: Sequence[str], copy: Copy | None = None) -> AtPointer:
    """A point's `customdata`: lines that are shown as they are, and what a click copies."""
    return AtPointer("\n".join(says), copy)


def layout(x: Mapping[str, Any] | None = None, y: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """What all plots have in common; titles are escaped by those who give them."""
    return {
        "height": HEIGHT,
        "margin": {"l": 56, "r": 12, "t": 20, "b": 48},
        "paper_bgcolor": "none",
        "plot_bgcolor": "none",
        "font": {"family": _SANS, "size": 13, "color": "ink"},
        "hovermode": "closest",
        "dragmode": "zoom",
        "showlegend": False,
        "modebar": {"bgcolor": "none", "color": "soft", "activecolor": "accent"},
        "xaxis": axis(**(x or {})),
        "yaxis": axis(**(y or {})),
        **more,
    }  # fmt: skip


def axis(title: str = "", *, grid: bool = True, **more: Any) -> dict[str, Any]:
    """An axis with its name."""
    return {
        "title": {"text": plain(title), "standoff": 10, "font": {"color": "soft", "size": 13}},
        "showgrid": grid,
        "gridcolor": "grid",
        "linecolor": "line",
        "tickcolor": "line",
        "tickfont": {"color": "soft", "size": 12},
        "zeroline": False,
        "automargin": True,
        **more,
    }


def finite(value: float | None) -> float | None:
    """A number that JSON has; None for NaN and infinities, of which plotly shows nothing."""
    return value if value is not None and math.isfinite(value) else None


def ticks_of(labels: Sequence[Any], shown: Sequence[str]) -> tuple[dict[Any, float], dict[str, Any]]:
    """Places of labels on an axis, to scale where that can be read, else evenly; and how the axis says so."""
    even = plotting.spaced_evenly(labels)
    places = {label: float(i) if even else float(label) for i, label in enumerate(labels)}
    span = max(places.values()) - min(places.values()) or 1.0
    low, high = min(places.values()) - 0.06 * span, max(places.values()) + 0.06 * span
    more = {"tickmode": "array", "tickvals": [places[one] for one in labels], "ticktext": [plain(s) for s in shown],
            "range": [low, high]}  # fmt: skip
    return places, more


def curves(
    lines: Sequence[Line],
    x: Mapping[str, Any],
    y: Mapping[str, Any],
    levels: Sequence[tuple[str, float, int]] = (),
    **more: Any,
) -> Figure:
    """Lines with error bars; `levels`: name, height and look of lines from side to side of the x axis' range."""
    data = [_level(name, height, look, x["range"]) for name, height, look in levels]
    data += [_trace(line) for line in lines]
    return {"data": data, "layout": layout(x, y, **more)}


def _level(name: str, height: float, look: int, sides: Sequence[float]) -> dict[str, Any]:
    colour, dash, _ = LOOKS[look % len(LOOKS)]
    places = [sides[0] + (sides[1] - sides[0]) * i / 20 for i in range(21)]  # so that it can be pointed at
    return {"type": "scatter", "name": plain(name), "mode": "lines", "x": places, "y": [height] * 21,
            "line": {"color": colour, "dash": dash, "width": 1.5}, "hoverinfo": "none",
            "customdata": [at_pointer((f"{name}: {height:.4g}",))] * 21}  # fmt: skip


def _trace(line: Line) -> dict[str, Any]:
    colour, dash, symbol = LOOKS[line.look % len(LOOKS)]
    points = [point for point in line.points if finite(point.y) is not None]
    trace: dict[str, Any] = {
        "type": "scatter", "name": plain(line.name), "mode": "lines+markers" if line.joined else "markers",
        "x": [point.x for point in points], "y": [point.y for point in points],
        "line": {"color": colour, "dash": dash, "width": 2},
        "marker": {"color": colour, "symbol": symbol, "size": line.size},
        **pointed(points),
    }  # fmt: skip
    if any(point.error for point in points):
        trace["error_y"] = {"type": "data", "array": [finite(point.error) or 0 for point in points], "color": colour,
                            "thickness": 1.2, "width": 4, "visible": True}  # fmt: skip
    return trace


def pointed(points: Sequence[Point]) -> dict[str, Any]:
    """What shows at the pointer, and what a click copies."""
    return {"hoverinfo": "none", "customdata": [at_pointer(point.says, point.copy) for point in points]}


def dots(names: Sequence[str], points: Sequence[Point], x: Mapping[str, Any], look: int = 0) -> Figure:
    """A row for each name: its number as a dot with its error, to compare; `y` of a point is its number."""
    colour, _, symbol = LOOKS[look % len(LOOKS)]
    kept = [(name, point) for name, point in zip(names, points, strict=True) if finite(point.y) is not None]
    trace = {
        "type": "scatter", "mode": "markers", "x": [p.y for _, p in kept], "y": [plain(name) for name, _ in kept],
        "marker": {"color": colour, "symbol": symbol, "size": 10},
        "error_x": {"type": "data", "array": [finite(p.error) or 0 for _, p in kept], "color": colour,
                    "thickness": 1.6, "width": 5, "visible": True},
        **pointed([p for _, p in kept]),
    }  # fmt: skip
    y = {"type": "category", "categoryorder": "array", "categoryarray": [plain(n) for n in reversed(names)],
         "range": [-0.6, len(names) - 0.4]}  # fmt: skip
    return {"data": [trace], "layout": layout(x, y, height=90 + 34 * len(names))}


def bars(names: Sequence[str], values: Sequence[float], x: Mapping[str, Any], look: int = 0) -> Figure:
    """A bar for each name, from left to right, in the order given; values are shares."""
    trace = {
        "type": "bar", "orientation": "h", "x": [finite(v) for v in values], "y": [plain(n) for n in names],
        "marker": {"color": LOOKS[look][0]}, "hoverinfo": "none", "text": [f"{100 * v:.2g} %" for v in values],
        "customdata": [at_pointer((n, f"{100 * v:.3g} %")) for n, v in zip(names, values, strict=True)],
        "textposition": "outside",
        "cliponaxis": False, "textfont": {"color": "soft"},
    }  # fmt: skip
    y = {"type": "category", "categoryorder": "array", "categoryarray": [plain(n) for n in reversed(names)],
         "grid": False}  # fmt: skip
    top = max((v for v in values if math.isfinite(v)), default=1.0) or 1.0
    return {"data": [trace], "layout": layout({"range": [0, top * 1.25], **x}, y, height=80 + 30 * len(names))}


@dataclass(frozen=True)
class Square:
    """One cell of a heat map: its number, the number as text, what shows at the pointer, what a click copies."""

    value: float
    text: str
    says: tuple[str, ...]
    copy: Copy | None = None


def heat_map(
    columns: Sequence[str],
    rows: Sequence[str],
    squares: Mapping[tuple[str, str], Square],
    x: str,
    y: str,
    bar: str,
    *,
    low: float,
    high: float,
    log: bool = False,
    diverging: bool = False,
    reverse: bool = False,
) -> Figure:
    """Numbers by row and column, (row, column) -> square; what is missing stays empty."""

    def scaled(value: float) -> float | None:
        if finite(value) is None:
            return None
        return math.log10(max(value, low)) if log else value

    rows = [row for row in rows if any((row, column) in squares for column in columns)]
    columns = [column for column in columns if any((row, column) in squares for row in rows)]
    grid = [[squares.get((row, column)) for column in columns] for row in rows]
    colours = PUOR if diverging else CIVIDIS[::-1] if reverse else CIVIDIS
    first, last = (math.log10(low), math.log10(high)) if log else (low, high)
    written = len(rows) * len(columns) <= 400 and len(columns) <= 16
    trace: dict[str, Any] = {
        "type": "heatmap", "x": [plain(c) for c in columns], "y": [plain(r) for r in rows],
        "z": [[None if s is None else scaled(s.value) for s in row] for row in grid],
        "zmin": first, "zmax": last if last > first else first + 1e-9, "xgap": 1.5, "ygap": 1.5,
        "colorscale": [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)],
        "customdata": [[at_pointer(s.says, s.copy) if s else at_pointer(()) for s in row] for row in grid],
        "hoverinfo": "none", "hoverongaps": False,
        "colorbar": {"title": {"text": plain(bar), "side": "right", "font": {"color": "soft", "size": 12}},
                     "thickness": 10, "outlinewidth": 0, "tickfont": {"color": "soft", "size": 11}, "len": 0.9,
                     **(_decades(low, high) if log else {})},
    }  # fmt: skip
    if written:
        trace |= {"text": [["" if s is None else plain(s.text) for s in row] for row in grid],
                  "texttemplate": "%{text}", "textfont": {"size": 11}}  # fmt: skip
    step = max(1, len(columns) // 16)
    marked = [i for i in range(len(columns)) if i % step == 0 or i == len(columns) - 1]
    across = {"title": x, "type": "category", "grid": False, "tickmode": "array", "tickangle": 0, "tickvals": marked,
              "ticktext": [plain(columns[i]) for i in marked]}  # fmt: skip
    if max(map(len, columns), default=0) * len(columns) > 90:
        across |= {"tickangle": -35}
    down = {"title": y, "type": "category", "grid": False, "autorange": "reversed"}
    return {"data": [trace], "layout": layout(across, down, height=110 + 30 * max(3, len(rows)))}


def _decades(low: float, high: float) -> dict[str, Any]:
    marks = [
        m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)
    ]
    marks = [mark for mark in marks if low <= mark <= high] or [low, high]
    return {
        "tickmode": "array",
        "tickvals": [math.log10(mark) for mark in marks],
        "ticktext": [f"{m:g}" for m in marks],
    }


@dataclass(frozen=True)
class Upright:
    """One axis of parallel coordinates: its name, and marks on it: (height from 0 to 1, text)."""

    name: str
    marks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Strand:
    """One line through parallel coordinates: a height from 0 to 1 at each axis, or None where it has no place."""

    heights: tuple[float | None, ...]
    says: tuple[str, ...]
    copy: Copy | None
    rank: int  # 0: of the many; 1: among the best; 2: the best


def parallel(uprights: Sequence[Upright], paths: Sequence[Strand]) -> Figure:
    """Lines through upright axes; the best are drawn last and strongest."""
    data = []
    for rank, (colour, width, opacity) in enumerate((("soft", 1.0, 0.3), ("c1", 1.6, 0.75), ("c2", 3.2, 1.0))):
        chosen = [path for path in paths if path.rank == rank]
        x: list[float | None] = []
        y: list[float | None] = []
        points: list[Point] = []
        for path in chosen:
            x += [*map(float, range(len(uprights))), None]
            y += [*path.heights, None]
            points += [Point(None, 0, path.says, path.copy)] * (len(uprights) + 1)
        data.append({
            "type": "scatter", "mode": "lines+markers", "x": x, "y": y, "opacity": opacity, "name": str(rank),
            "line": {"color": colour, "width": width}, "marker": {"color": colour, "size": 4 + 2 * (rank == 2)},
            "connectgaps": False, **pointed(points),
        })  # fmt: skip
    marks = [
        {"x": i, "y": height, "text": plain(text), "showarrow": False, "xanchor": "left", "xshift": 4,
         "font": {"size": 11, "color": "soft"}, "bgcolor": "raised", "opacity": 0.85, "borderpad": 0}
        for i, upright in enumerate(uprights) for height, text in upright.marks
    ]  # fmt: skip
    shapes = [
        {"type": "line", "x0": i, "x1": i, "y0": -0.02, "y1": 1.02, "layer": "below", "line": {"color": "line"}}
        for i in range(len(uprights))
    ]
    names = [plain(upright.name) for upright in uprights]
    x_axis = {"grid": False, "tickmode": "array", "tickvals": [*range(len(uprights))], "ticktext": names,
              "tickangle": 25 if sum(map(len, names)) > 80 else 0, "range": [-0.15, len(uprights) - 0.4],
              "showline": False}  # fmt: skip
    y_axis = {"grid": False, "showticklabels": False, "ticks": "", "showline": False, "range": [-0.06, 1.06]}
    figure = layout(x_axis, y_axis, annotations=marks, shapes=shapes, height=420, meta={"wide": 90 * len(uprights)})
    figure["margin"] = {**figure["margin"], "l": 16, "t": 28, "r": 64}
    return {"data": data, "layout": figure}
