# SPDX-License-Identifier: Apache-2.0
"""The plot of a sweep: a score over one axis, a line for each method, a panel for each of the rest."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from darekit import plotting
from darekit.sweeps.data import DROP_RATE
from darekit.sweeps.summaries import Figure, Panel, shown_label

_COLUMNS = 3

_LEVELS = {"best single model": (0, (6, 2)), "base": (0, (1, 2))}


def draw_sweep(found: Figure, stem: Path) -> tuple[Path, Path]:
    """Write STEM.png and STEM.svg."""
    with plotting.settings():
        columns = min(_COLUMNS, len(found.panels))
        rows = math.ceil(len(found.panels) / columns)
        scale = 1.0 if columns == 1 else 0.72
        figure, grid = plotting.new_figure(
            rows,
            columns,
            width=plotting.WIDTH * scale,
            height=plotting.HEIGHT * scale,
            extra=0.4 if columns == 1 else 0.9,
        )
        every = [axes for row in grid for axes in row]
        names = list(dict.fromkeys(line.name for panel in found.panels for line in panel.lines))
        low, high = _limits(found)
        even = plotting.spaced_evenly(found.ticks)
        handles: dict[str, Any] = {}
        for axes, panel in zip(every, found.panels, strict=False):
            handles |= _draw_panel(axes, panel, found, names, even)
            axes.set_ylim(low, high)
        for axes in every[len(found.panels) :]:
            axes.set_visible(False)
        for i, axes in enumerate(every[: len(found.panels)]):
            if i % columns:
                axes.tick_params(labelleft=False)
            if i + columns >= len(found.panels):  # beside each other, long ones would run into each other
                axes.set_xlabel(_x_label(found, even) if columns == 1 else found.across)
        figure.supylabel(found.y, fontsize=11)
        figure.suptitle(found.title, fontsize=13)
        ordered = {k: v for k, v in handles.items() if k not in _LEVELS} | {
            k: v for k, v in handles.items() if k in _LEVELS
        }
        title = found.lines + (
            f" (bands: ± 1 standard deviation over {found.runs} mask seeds)" if found.runs > 1 else ""
        )
        figure.legend(
            ordered.values(), ordered.keys(), loc="outside lower center", ncols=min(2 + columns, len(handles)),
            title=title or None, title_fontsize=10,
        )  # fmt: skip
        return plotting.save(figure, stem)


def _draw_panel(axes: Any, panel: Panel, found: Figure, names: list[str], even: bool) -> dict[str, Any]:
    means = [mean for panel in found.panels for line in panel.lines for _, mean, _ in line.points]
    shares = min(means) >= 0 and max(means) <= 1
    handles = {}
    places = {tick: i if even else tick for i, tick in enumerate(found.ticks)}
    for line in panel.lines:
        look = plotting.line_style(names.index(line.name))
        points = sorted((places[x], mean, spread) for x, mean, spread in line.points if x in places)
        at, means = [p[0] for p in points], [p[1] for p in points]
        (handles[line.name],) = axes.plot(at, means, label=line.name, **look)
        floor, ceiling = (0.0, 1.0) if shares else (-math.inf, math.inf)
        lows = [max(floor, mean - (spread or 0)) for _, mean, spread in points]
        highs = [min(ceiling, mean + (spread or 0)) for _, mean, spread in points]
        axes.fill_between(at, lows, highs, color=look["color"], alpha=0.15, linewidth=0)
    for name, value in panel.levels:
        handles[name] = axes.axhline(value, color=plotting.GREY, linestyle=_LEVELS[name], linewidth=1.4, zorder=1)
    axes.set_xticks([places[tick] for tick in found.ticks], [shown_label(tick) for tick in found.ticks])
    if panel.title:
        axes.set_title(panel.title)
    return {name or "result": handle for name, handle in handles.items()}


def _limits(found: Figure) -> tuple[float, float]:
    """All panels share one scale; shares of 1 show all of it."""
    values = [
        v for p in found.panels for line in p.lines for _, m, s in line.points for v in (m - (s or 0), m + (s or 0))
    ]
    values += [value for panel in found.panels for _, value in panel.levels]
    low, high = min(values), max(values)
    if low > -0.05 and 0.5 < high <= 1.05:
        return -0.03, 1.04
    room = 0.06 * (high - low or abs(high) or 1)
    return low - room, high + room


def _x_label(found: Figure, even: bool) -> str:
    words = found.across
    if found.x == DROP_RATE:
        words += ": share of each delta that is dropped"
    return words + (" (evenly spaced, not to scale)" if even and isinstance(found.ticks[0], int | float) else "")
