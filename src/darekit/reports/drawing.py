# SPDX-License-Identifier: Apache-2.0
"""Plots for papers that no other room draws: scores of several models with their errors, the course of a search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from darekit import plotting


def draw_dots(rows: Sequence[tuple[str, Sequence[tuple[str, float, float | None]]]], stem: Path) -> tuple[Path, Path]:
    """Scores, each with (model, value, standard error) -> STEM.png and STEM.svg: a panel for each score."""
    with plotting.settings():
        tallest = max(len(found) for _, found in rows)
        columns = min(3, len(rows))
        lines = -(-len(rows) // columns)
        figure, grid = plotting.new_figure(
            lines, columns, width=plotting.WIDTH * (0.62 if columns > 1 else 1), height=1.1 + 0.38 * tallest
        )
        every = [axes for line in grid for axes in line]
        for axes, (score, found) in zip(every, rows, strict=False):
            places = range(len(found))
            look = plotting.line_style(0)
            axes.errorbar(
                [value for _, value, _ in found], places, xerr=[error or 0.0 for *_, error in found],
                fmt=look["marker"], color=look["color"], capsize=4, linestyle="none",
            )  # fmt: skip
            axes.set_yticks(places, [name for name, *_ in found])
            axes.set_ylim(len(found) - 0.5, -0.5)
            axes.set_xlabel(f"{score} (bars: ± 1 standard error)" if columns == 1 else score)
            axes.grid(visible=True, axis="x")
        for axes in every[len(rows) :]:
            axes.set_visible(False)
        return plotting.save(figure, stem)


def draw_search(
    trials: Sequence[tuple[int, float, bool]], levels: Sequence[tuple[str, float]],
    slices: Sequence[tuple[str, Sequence[tuple[Any, float, bool]], bool]], score: str, higher: bool, folder: Path,
    stem: str,
) -> list[Path]:  # fmt: skip
    """(number, score, whether all items were asked) of each trial -> STEM.png: over trials; STEM-slices.png: a panel
    for each setting (its name, its values with scores, whether on a log scale); each as SVG too."""
    written: list[Path] = []
    with plotting.settings():
        figure, grid = plotting.new_figure(extra=0.3)
        axes = grid[0][0]
        _scatter(axes, trials)
        best: list[float] = []
        done = [(number, value) for number, value, complete in trials if complete]
        for _, value in done:
            best.append(value if not best else max(best[-1], value) if higher else min(best[-1], value))
        if done:  # to the end, as nothing better came
            best.append(best[-1])
            done.append((max(number for number, *_ in trials), best[-1]))
        axes.step([number for number, _ in done], best, where="post", color="black", linewidth=1.2, label="best so far")
        for (name, height), dash in zip(levels, plotting.DASHES[1:], strict=False):
            axes.axhline(height, color=plotting.GREY, linestyle=dash, linewidth=1.3, label=name, zorder=1)
        axes.set_xlabel("trial")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(f"{score} on validation")
        figure.legend(loc="outside lower center", ncols=3)
        written += plotting.save(figure, folder / stem)
        if slices:
            columns = min(3, len(slices))
            rows = math.ceil(len(slices) / columns)
            figure, grid = plotting.new_figure(
                rows, columns, width=plotting.WIDTH * 0.6, height=plotting.HEIGHT * 0.66, extra=0.3
            )
            every = [axes for row in grid for axes in row]
            for axes, (name, points, log) in zip(every, slices, strict=False):
                _scatter(axes, points)
                axes.set_xlabel(name)
                if log:
                    axes.set_xscale("log")
            for axes in every[len(slices) :]:
                axes.set_visible(False)
            figure.supylabel(f"{score} on validation", fontsize=11)
            handles, labels = every[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=2)
            written += plotting.save(figure, folder / f"{stem}-slices")
    return written


def _scatter(axes: Any, points: Sequence[tuple[Any, float, bool]]) -> None:
    for complete, name, index in ((False, "stopped", 1), (True, "all items", 0)):
        chosen = [(x, y) for x, y, whole in points if whole == complete]
        look = plotting.line_style(index)
        if chosen and any(isinstance(x, str) for x, _ in chosen):
            axes.margins(x=0.3)
        if chosen:
            axes.plot([x for x, _ in chosen], [y for _, y in chosen], color=look["color"], marker=look["marker"],
                      linestyle="none", markersize=4.5, alpha=0.7, label=name)  # fmt: skip
