# SPDX-License-Identifier: Apache-2.0
"""What `dare similarity` and `sweep` show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from darekit.cli import tables
from darekit.cli.display import print_table

if TYPE_CHECKING:
    from darekit.similarities import Similarity
    from darekit.sweeps.data import Cell
    from darekit.sweeps.reports import Table as Text
    from darekit.sweeps.running import SweepResult


def show_similarity(found: Similarity, drawn: Sequence[Path], *, as_json: bool) -> None:
    """A row for each layer, a column for each curve."""
    if as_json:
        print(json.dumps(found.to_data() | {"plots": [str(path) for path in drawn]}))
        return
    print(f"mean cosine to {found.model}'s hidden states over {found.tokens} tokens of {found.rows} rows\n")
    from rich.table import Table

    table = Table("layer", box=None, pad_edge=False)
    for curve in found.curves:
        table.add_column(curve.title, justify="right")
    for i, layer in enumerate(found.layers):
        cells = [
            f"{curve.cosine[i]:.4f}" + (f" ± {curve.deviation[i]:.4f}" if len(curve.seeds) > 1 else "")
            for curve in found.curves
        ]
        table.add_row(layer, *cells)
    print_table(table)
    print()
    for curve in found.curves:
        lowest = min(range(len(curve.cosine)), key=curve.cosine.__getitem__)
        print(f"{curve.title}: lowest at layer {found.layers[lowest]}, {curve.cosine[lowest]:.4f}")
    for path in drawn:
        print(path)


def show_cells(cells: Sequence[Cell], notes: Sequence[str], *, as_json: bool) -> None:
    """What a sweep would evaluate."""
    from darekit.sweeps.grid import essence

    different = len({repr((essence(cell.recipe).to_data(), cell.judges)) for cell in cells})
    if as_json:
        listed = [
            {"kind": cell.kind, "at": dict(cell.at), "seed": cell.seed, "judges": list(cell.judges),
             "recipe": cell.recipe.to_data()}
            for cell in cells
        ]  # fmt: skip
        print(json.dumps({"cells": listed, "evaluations": different, "notes": list(notes)}))
        return
    again = f", {len(cells) - different} of them equal to others" if different < len(cells) else ""
    print(f"{_counted(len(cells), 'cell')}{again}: {_counted(different, 'evaluation')}\n")
    rows = [(cell.kind, cell.title.removeprefix(f"{cell.kind} "), ", ".join(cell.judges)) for cell in cells]
    print_table(tables.table_of(("kind", "cell", "judges"), rows, words=3))
    for note in notes:
        print(f"note: {note}")


def show_sweep(result: SweepResult, *, as_json: bool) -> None:
    """The choice, the table of the split that counts, and what must be said."""
    from darekit.sweeps.reports import data_of, short_tables, words_of
    from darekit.sweeps.summaries import summarise

    summary = summarise(result.sweep, result.finished)
    if as_json:
        print(json.dumps(data_of(result, summary)))
        return
    for table in short_tables(result.sweep, summary):
        _show(table)
    for line in words_of(result, summary):
        print(line)
    print(f"{result.out}: {len(result.finished)} cells in {result.seconds:.1f} s; every setting is in tables.md")


def _show(found: Text) -> None:
    print_table(tables.table_of(found.header, found.rows, found.words, title=found.title))
    print()


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
