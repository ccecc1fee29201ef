# SPDX-License-Identifier: Apache-2.0
"""What `dare sweep` and `dare similarity` show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

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
    table = Table("kind", "cell", "judges", box=None, pad_edge=False)
    for cell in cells:
        table.add_row(cell.kind, cell.title, ", ".join(cell.judges))
    print_table(table)
    print(f"\n{len(cells)} cells, {different} evaluations (cells that come to the same are evaluated once)")
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
    table = Table(title=found.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, head in enumerate(found.header):
        table.add_column(head, justify="left" if i < found.words else "right", no_wrap=True)
    for row in found.rows:
        table.add_row(*row)
    print_table(table)
    print()
