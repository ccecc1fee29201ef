# SPDX-License-Identifier: Apache-2.0
"""What `dare similarity` and `sweep` show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from darekit.cli import tables
from darekit.cli.display import counted, print_table, time_of

if TYPE_CHECKING:
    from darekit.analysis.similarities import Similarity
    from darekit.sweeps.data import Cell
    from darekit.sweeps.reports import Table as Text
    from darekit.sweeps.store import SweepResult


def show_similarity(found: Similarity, drawn: Sequence[Path], *, as_json: bool) -> None:
    """A row for each layer, a column for each curve."""
    if as_json:
        print(json.dumps(found.to_data() | {"plots": [str(path) for path in drawn]}))
        return
    print(
        f"Cosine to {found.model}'s own hidden states, mean over {found.tokens} tokens of "
        f"{counted(found.rows, 'row')}\n"
    )
    turned = [{i: 1 - value for i, value in enumerate(curve.cosine)} for curve in found.curves]
    lowest = [min(range(len(curve.cosine)), key=curve.cosine.__getitem__) for curve in found.curves]
    rows = [
        (curve.title, found.layers[at], f"{curve.cosine[at]:.4f}", f"{curve.cosine[-1]:.4f}")
        for curve, at in zip(found.curves, lowest, strict=True)
    ]
    top = max((value for course in turned for value in course.values()), default=0.0)
    table, room = tables.with_bars(
        ("", "lowest at layer", "cosine", "last layer"), rows, turned, len(found.layers), top=max(top, 1e-9), words=2,
        title="1 - cosine",
    )  # fmt: skip
    print_table(table)
    if room:
        print()
        tables.print_small(tables.bar_legend("1 - cosine", len(found.layers), room, f"{top:.3g}").strip())
    print()
    several = any(len(curve.seeds) > 1 for curve in found.curves)
    heads = ("layer", *(curve.title for curve in found.curves))
    cells = [
        (layer, *(f"{curve.cosine[i]:.4f}" + (
            (f" ± {curve.deviation[i]:.4f}" if len(curve.seeds) > 1 else " " * 9) if several else "")
            for curve in found.curves))
        for i, layer in enumerate(found.layers)
    ]  # fmt: skip
    for part in tables.side_by_side(heads, cells):
        print_table(part)
        print()
    if several:
        print(tables.shown("± is the standard deviation over mask seeds"))
    for path in drawn:
        print(path)


def show_cells(cells: Sequence[Cell], notes: Sequence[str], *, as_json: bool) -> None:
    """What a sweep would evaluate."""
    from darekit.recipe.essence import essence

    different = len({repr((essence(cell.recipe).to_data(), cell.judges)) for cell in cells})
    if as_json:
        listed = [
            {"kind": cell.kind, "at": dict(cell.at), "seed": cell.seed, "judges": list(cell.judges),
             "recipe": cell.recipe.to_data()}
            for cell in cells
        ]  # fmt: skip
        print(json.dumps({"cells": listed, "evaluations": different, "notes": list(notes)}))
        return
    once = "; equivalent cells are evaluated once" if different < len(cells) else ""
    print(f"Dry run, nothing is evaluated: {counted(len(cells), 'cell')}, {counted(different, 'evaluation')}{once}")
    for note in notes:
        print(tables.wrapped(f"note: {note}", "  "))
    print()
    rows = [(cell.kind, cell.title.removeprefix(f"{cell.kind} "), ", ".join(cell.judges)) for cell in cells]
    print_table(tables.table_of(("kind", "cell", "judges"), rows, words=3))


def show_sweep(result: SweepResult, *, as_json: bool) -> None:
    """The choice, the table of the split that counts, and what must be said."""
    from darekit.sweeps.reports import data_of, short_tables, words_of
    from darekit.sweeps.summaries import summarise

    summary = summarise(result.sweep, result.finished)
    if as_json:
        print(json.dumps(data_of(result, summary)))
        return
    if summary.unlike:  # before any number that it is about
        tables.print_headline("note", f"{summary.unlike}.", "yellow")
        print()
    for table in short_tables(result.sweep, summary, result.out):
        _show(table)
    said = {f"{note}." for note in result.notes}  # when the sweep began
    for line in words_of(result, summary):
        if line not in said:
            print(tables.wrapped(tables.shown(line), "  "))
    cells = f"{counted(len(result.finished), 'cell')} in {time_of(result.seconds)}"
    print(f"Wrote {result.out}: {cells}; tables.md has every setting")


def _show(found: Text) -> None:
    for part in tables.side_by_side(found.header, found.rows, found.words, title=found.title):
        print_table(part)
        print()
