# SPDX-License-Identifier: Apache-2.0
"""What `dare extract` shows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from darekit.cli import tables
from darekit.cli.display import count_of, counted, print_table, time_of
from darekit.wording import size_of

if TYPE_CHECKING:
    from darekit.extraction.plan import ExtractPlan
    from darekit.extraction.writing import ExtractReport, ModuleReport


@dataclass(frozen=True)
class Planned:
    """One module of a plan, as tables know it."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    group: str | None
    rank: int


def show_plan(plan: ExtractPlan, *, as_json: bool) -> None:
    """What an extraction would do: sizes, memory, time, then ranks by kind of tensor."""
    if as_json:
        print(json.dumps(plan.to_data()))
        return
    modules = plan.selection.targets
    bound = "" if plan.terms.rank else " at most"
    print(
        f"Would write {size_of(plan.most_bytes)}{bound}, for {counted(len(modules), 'module')} of "
        f"{plan.model.ref} ({size_of(plan.model_bytes)}); nothing was written"
    )
    saved, left = plan.selection.saved, plan.selection.left_out
    tables.print_facts([
        ("keeps", _asked(plan)),
        ("whole", _kinds([one.kind for one in saved])),
        ("left out", _kinds([one.kind for one in left])),
        ("memory", f"about {size_of(plan.peak_memory)}, with {counted(plan.threads, 'thread')}"),
        ("time", f"about {time_of(max(1, round(plan.seconds)))} on this machine, plus the time to read"),
    ])  # fmt: skip
    print()
    rows = [Planned(one.tensors[0].name, one.shape, one.count, one.tensors[0].group, plan.rank_of(one))
            for one in modules]  # fmt: skip
    kinds = tables.kinds_of(rows)
    cells = [
        (tables.shorten(kind.name, tables.LONGEST), str(len(kind.tensors)), count_of(kind.parameters),
         _shapes([one.shape for one in kind.tensors]), tables.spans({one.rank for one in kind.tensors}))
        for kind in kinds
    ]  # fmt: skip
    heads = ("kind of tensor", "modules", "parameters", "out x in", f"rank{bound}")
    print_table(tables.table_of(heads, cells))


def show_report(report: ExtractReport, *, as_json: bool) -> None:
    """How much of the delta is in the adapter, how large it is, and the error of each kind of module."""
    if as_json:
        print(json.dumps(report.to_data()))
        return
    carried = 1 - report.total_error**2
    times = report.model_bytes / report.bytes
    size = f"{times:.3g} times smaller" if times >= 1 else f"{1 / times:.3g} times LARGER"
    print(
        f"Wrote {report.output}: {size_of(report.bytes)}, {size} than the model; it carries {tables.share(carried)} of "
        "the delta"
    )
    kept = [one for one in report.tensors if one.saved and not one.why]
    left = [one for one in report.tensors if not one.saved and one.norm]
    modules = [one for one in report.modules if one.rank]
    outside = f"{tables.share(report.outside)} of the delta ({_kinds([one.kind for one in left])})"
    tables.print_facts([
        ("factors", f"{counted(len(modules), 'module')}, {_ranks(modules)}, relative error {report.error:.3g}"),
        ("whole", _kinds([one.kind for one in kept])),
        ("left out", outside if left else "nothing that differs"),
        ("in all", f"relative error {report.total_error:.3g} against the model"),
        ("took", f"{time_of(report.seconds)}, {size_of(report.peak_rss_bytes)} of memory at most"),
    ])  # fmt: skip
    print()
    everything = sum(one.norm**2 for one in report.modules) or 1.0
    kinds = [*tables.kinds_of(modules), tables.whole(modules)]
    rows = [
        (tables.shorten(kind.name, tables.LONGEST), str(len(kind.tensors)),
         tables.spans({one.rank for one in kind.tensors}) if len({one.rank for one in kind.tensors}) < 4
         else f"{min(one.rank for one in kind.tensors)} to {max(one.rank for one in kind.tensors)}",
         f"{_error(kind.tensors):.4f}", tables.share(1 - _error(kind.tensors) ** 2),
         tables.share(sum(one.norm**2 for one in kind.tensors) / everything))
        for kind in kinds
    ]  # fmt: skip
    courses = [{layer: _error(part.tensors) for layer, part in kind.by_layer().items()} for kind in kinds]
    layers = tables.layers_of(kinds)
    heads = ("kind of tensor", "modules", "rank", "error", "kept", "of the delta")
    table, room = tables.with_bars(heads, rows, courses, layers, top=1.0, what="error, ")
    print_table(table)
    print()
    tables.print_small(
        "error: ||delta - B A|| / ||delta||, measured on the factors as stored. kept: 1 - error^2, the share of the "
        "squared delta. of the delta: each kind's share of all modules' squared delta."
        + tables.bar_legend("error", layers, room, "1")
    )


def _asked(plan: ExtractPlan) -> str:
    terms = plan.terms
    if terms.rank:
        return f"rank {terms.rank} of each module"
    most = f", with rank {terms.max_rank} at most" if terms.max_rank else ""
    if terms.energy is not None:
        return f"{100 * terms.energy:g} % of each squared delta{most}; ranks are known afterwards"
    if not terms.error:
        return f"everything{most}; ranks are known afterwards"
    return f"all but {100 * terms.error:g} % of each delta's norm{most}; ranks are known afterwards"


def _error(modules: Sequence[ModuleReport]) -> float:
    total = sum(one.norm**2 for one in modules)
    return math.sqrt(sum((one.norm * one.error) ** 2 for one in modules) / total) if total else 0.0


def _ranks(modules: Sequence[ModuleReport]) -> str:
    ranks = {one.rank for one in modules}
    return f"rank {min(ranks)}" if len(ranks) == 1 else f"rank {min(ranks)} to {max(ranks)}"


def _kinds(kinds: Sequence[str]) -> str:
    """How many tensors of each kind."""
    return ", ".join(f"{_WORDS.get(kind, kind)} ({kinds.count(kind)})" for kind in dict.fromkeys(kinds))


_WORDS = {"matrices": "other matrices"}


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    found = list(dict.fromkeys(" x ".join(map(str, shape)) for shape in shapes))
    return found[0] if len(found) == 1 else f"{found[0]}, ..."
