# SPDX-License-Identifier: Apache-2.0
"""What a dry run shows of adapters: which kinds of modules they change, and how much."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from darekit.cli import tables
from darekit.wording import label

if TYPE_CHECKING:
    from rich.table import Table

    from darekit.planning.plan import Plan


def adapters_data(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Of each model with an adapter: its kinds of modules, JSON-able."""
    from darekit.checkpoints import traits_of
    from darekit.errors import NotFetched

    found = {}
    for model in plan.checkpoints:
        try:
            if all(traits_of(info.source).identity is None for info in model.tensors.values()):
                continue  # nothing is computed, so there is no adapter, nor a need to import what knows adapters
            from darekit.inputs.adapters.strengths import strengths_of

            rows = strengths_of(model)
        except NotFetched:  # only headers are here
            continue
        if rows:
            found[model.ref] = [
                {"kind": row.kind, "modules": row.modules, "norm": row.change, "relative": row.ratio} for row in rows
            ]
    return found


LEGEND = (
    "How many modules of each kind an adapter changes, and by how much: the norm of what it adds, divided by the norm "
    "of the base's weights (from a sample)."
)


def adapters_table(found: dict[str, list[dict[str, Any]]]) -> Table | None:
    """The same as a table: a row for each kind, columns for each model; None without adapters."""
    if not found:
        return None
    by_model = [{row["kind"]: row for row in rows} for rows in found.values()]
    rows = []
    for kind in dict.fromkeys(row["kind"] for each in found.values() for row in each):
        cells = [kind]
        for model in by_model:
            row = model.get(kind)
            cells += [f"{row['modules']}", f"{row['relative']:.3g}"] if row else ["", ""]
        rows.append(tuple(cells))
    heads = ["adapter changes"]
    for ref in found:
        heads += [tables.shorten(label(ref), 24), "||sBA||/||W||"]
    return tables.table_of(tuple(heads), rows)
