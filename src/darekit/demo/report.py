# SPDX-License-Identifier: Apache-2.0
"""The demo's one table (terminal and Markdown), its one plot, and its numbers as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from darekit.demo.measurements import DemoResult, Row, curve, summarise

# Okabe and Ito's colours, told apart by every kind of colour vision; markers and dashes for print without colour.
STYLES = (
    ("dare", "DARE", "#0072B2", "o", "-"),
    ("magnitude", "magnitude pruning", "#D55E00", "s", "--"),
    ("drop_only", "DropOnly (no rescale)", "#009E73", "^", "-."),
)
SUFFIX = " + DARE"


def header(result: DemoResult) -> tuple[str, ...]:
    """The table's columns."""
    return ("model", *result.abilities, "mean", "±")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text; ± only where there are several runs."""
    spread = f"{row.spread:.1f}" if row.runs > 1 else ""
    return (row.title, *(f"{value:.1f}" for value in row.accuracy), f"{row.mean:.1f}", spread)


def notes(result: DemoResult) -> tuple[str, ...]:
    """What must be said under the table, with this run's numbers."""
    rows = {row.title: row for row in summarise(result.scores)}
    tune_seeds = {score.tune_seed for score in result.scores} - {None}
    mask_seeds = {score.mask_seed for score in result.scores} - {None}
    pairs = [(title, rows[title].mean, rows[title + SUFFIX].mean) for title in rows if title + SUFFIX in rows]
    differences = ", ".join(f"{title} {after - before:+.1f}" for title, before, after in pairs)
    control = summarise(result.controls)[0]
    tunings, masks = _count(tune_seeds, "fine-tuning"), _count(mask_seeds, "mask")
    return (
        f"Exact match in % on {result.items} held-out words for each ability. Each number is a mean over {tunings}"
        f", with DARE over {masks} each; ± is the standard deviation of those runs' means.",
        f"DARE drops {result.drop_rate:.0%} of each delta, with embeddings and norms kept dense. "
        f"Its effect on the mean: {differences}.",
        "A gain of TIES comes from scale, not from DARE itself: trimming shrinks a delta, and the rescale undoes "
        f"that. TIES at lambda {result.control_lambda:g} without DARE reaches {control.mean:.1f}. The average is low "
        "because it keeps only a third of each delta.",
    )


def render_table(result: DemoResult) -> RenderableType:
    """The table for a terminal."""
    table = Table(title="Abilities absorbed: exact match, %")
    for number, title in enumerate(header(result)):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    previous = ""
    for row in summarise(result.scores):
        if previous and _group(row.title) != _group(previous):
            table.add_section()
        table.add_row(*cells(row))
        previous = row.title
    return Group(table, *(Text(note, style="dim") for note in notes(result)))


def render_markdown(result: DemoResult) -> str:
    """The same table for a README."""
    titles = header(result)
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in summarise(result.scores)]
    return "\n".join([*lines, "", *(note + "\n" for note in notes(result))])


def write_report(result: DemoResult) -> None:
    """Write results.md, results.json and the plot."""
    _write(result.table, render_markdown(result))
    _write(result.data, json.dumps(result.to_data(), indent=1) + "\n")
    draw_plot(result)


def draw_plot(result: DemoResult) -> None:
    """Accuracy against drop rate. The drop rates are spaced evenly: on a true scale .9 to .99 would be one blot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for method, label, colour, marker, dashes in STYLES:
        rates, means, lows, highs = zip(*curve(result.points, method), strict=True)
        places = range(len(rates))
        axes.plot(
            places, means, label=label, color=colour, marker=marker, linestyle=dashes, linewidth=2.4, markersize=8
        )
        axes.fill_between(places, lows, highs, color=colour, alpha=0.12, linewidth=0)
    base = next(score for score in result.scores if score.row == "base")
    floor = sum(base.accuracy) / len(base.accuracy)
    axes.axhline(floor, color="#666666", linestyle=":", linewidth=1.6, label="base, not fine-tuned")
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_ylim(-3, 104)
    axes.set_xlabel("drop rate p: share of the delta that is dropped (even spacing, not to scale)", fontsize=12)
    axes.set_ylabel("exact match, %", fontsize=12)
    axes.set_title("What is left of an ability when delta parameters are dropped", fontsize=14)
    axes.tick_params(labelsize=12)
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(
        frameon=False,
        fontsize=12,
        loc="lower left",
        bbox_to_anchor=(0, 0.05),
        title="bands: lowest to highest run",
        title_fontsize=11,
        alignment="left",
    )
    FigureCanvasAgg(figure)
    partial = result.plot.with_name(f".{result.plot.name}")
    figure.savefig(partial, format="png", dpi=150)
    partial.replace(result.plot)


def _group(title: str) -> str:
    """Rows with one group stand together: the models, then each merge method with and without DARE."""
    return "models" if title == "base" or title.startswith("fine-tuned") else title.removesuffix(SUFFIX)


def _count(seeds: set[int | None], kind: str) -> str:
    return f"{len(seeds)} {kind} seed" + ("s" if len(seeds) != 1 else "")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
