# SPDX-License-Identifier: Apache-2.0
"""What `dare inspect`, `similarity` and `sweep` show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from darekit.cli.display import print_table, say_note

if TYPE_CHECKING:
    from darekit.analysis.inspection import Comparison, Inspection, TensorReport
    from darekit.analysis.similarities import Similarity
    from darekit.sweeps.data import Cell
    from darekit.sweeps.reports import Table as Text
    from darekit.sweeps.store import SweepResult


PERCENT_COLUMNS = ("10%", "50%", "90%", "max")


def show_inspections(found: Inspection | Comparison, drawn: Sequence[Path], *, as_json: bool) -> None:
    """Of one model every tensor, then the verdict; of several a line for each, and how they stand to each other."""
    from darekit.analysis.inspection import Comparison

    if as_json:
        print(json.dumps(found.to_data() | ({"plots": [str(path) for path in drawn]} if drawn else {})))
        return
    for note in found.notes:
        say_note(note)
    if isinstance(found, Comparison):
        _show_comparison(found)
    else:
        print_table(_deltas([*found.tensors, found.total]))
        print(f"\n{found.verdict}: {found.words}")
    for path in drawn:
        print(path)


def _deltas(reports: Sequence[TensorReport], head: Sequence[str] = ("tensor", "shape")) -> Table:
    table = Table(
        *head, "r", "p_max", "zeros", *(f"<{limit}" for limit in reports[-1].shares),
        *(f"|d| {name}" for name in PERCENT_COLUMNS), box=None, pad_edge=False,
    )  # fmt: skip
    for report in reports:
        deciles = [report.deciles[i] for i in (1, 5, 9, 10)]
        table.add_row(
            *(report.name, "x".join(map(str, report.shape)))[: len(head)], f"{report.r:.4f}", f"{report.p_max:.4f}",
            f"{100 * report.zeros:.1f}%", *(f"{100 * share:.1f}%" for share in report.shares.values()),
            *(f"{value:.1e}" for value in deciles),
        )  # fmt: skip
    return table


def _show_comparison(found: Comparison) -> None:
    from dataclasses import replace

    from darekit.wording import distinct_labels

    names = distinct_labels([one.model for one in found.models])
    print_table(_deltas([replace(one.total, name=n) for one, n in zip(found.models, names, strict=True)], ("model",)))
    print()
    for one, name in zip(found.models, names, strict=True):
        print(f"{name}: {one.verdict}: {one.words}")
    together = found.interference
    print()
    pairs = [f"{names[i]} & {names[j]}" for i, j in together.pairs]
    table = Table("tensor", "conflict", "cancelled", *(f"cos {pair}" for pair in pairs),
                  *(f"signs {pair}" for pair in pairs), box=None, pad_edge=False)  # fmt: skip
    for row in (*together.tensors, together.total):
        table.add_row(
            row.name, _percent(row.conflict), _percent(row.cancelled), *(f"{one.cosine:.3f}" for one in row.pairs),
            *(_percent(one.agreement) for one in row.pairs),
        )  # fmt: skip
    table.add_row("mean by parameters", "", "", *(f"{mean:.3f}" for mean in together.mean_cosine))
    print_table(table)
    print(
        "\nconflict: elements that some raise and others lower; cancelled: what a plain sum loses of the deltas' size;"
    )
    print("cos: cosine of two deltas; signs: equal ones, of the elements that both moved (chance: 50 %)\n")
    for line in together.words:
        print(line)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


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
        table.add_row(cell.kind, cell.title.removeprefix(f"{cell.kind} "), ", ".join(cell.judges))
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
