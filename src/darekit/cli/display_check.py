# SPDX-License-Identifier: Apache-2.0
"""What `dare check` shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from darekit.cli import tables
from darekit.cli.display import count_of, counted, plan_data
from darekit.errors import DarekitError
from darekit.wording import size_of

if TYPE_CHECKING:
    from darekit.planning.checking import Findings


def show_problems(name: str, problems: Sequence[DarekitError], *, as_json: bool) -> None:
    """All that is wrong, numbered."""
    if as_json:
        found = [{"error": type(one).__name__, "message": str(one)} for one in problems]
        print(json.dumps({"recipe": name, "ok": False, "problems": found}))
        return
    print(f"{name}: {counted(len(problems), 'problem')}")
    for number, problem in enumerate(problems, start=1):
        first, *rest = str(problem).split("\n")
        print("\n" + tables.wrapped(first, "     ", f"{number:>3}. "))
        for line in rest:
            print(tables.wrapped(line.strip(), "       ", "     "))


def show_fit(name: str, found: Findings, threads: int | None, *, as_json: bool) -> None:
    """What the merge would be, where nothing is wrong."""
    plan = found.plan
    assert plan is not None
    data = plan_data(plan, (), plan.notes, threads)
    if as_json:
        more = {"not_looked_at": list(found.unread), "downloads": dict(found.downloads)}
        print(json.dumps({"recipe": name, "ok": True, "problems": [], **more, **data}))
        return
    print(f"{name}: no problems found; {plan.recipe.merge_method} of {counted(len(plan.summaries), 'model')}")
    formats = dict.fromkeys(place.dtype for shard in plan.shards for place in shard.placements)
    tables.print_facts([
        ("writes", f"{size_of(plan.bytes_out)} in {counted(len(plan.shards), 'file')}: "
         f"{counted(data['tensors'], 'tensor')}, {count_of(plan.parameters)} parameters, {', '.join(formats)}"),
        ("reads", size_of(plan.bytes_in)),
        ("downloads", ", ".join(f"{size_of(size)} of {ref}" for ref, size in found.downloads.items())),
        ("memory", f"about {size_of(data['peak_memory_bytes'])}"),
        ("tokenizer", f"of {plan.travel.tokenizer.ref}" if plan.travel.files else ""),
        ("not looked at", "; ".join(found.unread)),
    ])  # fmt: skip
    for note in plan.notes:
        print(tables.wrapped(f"note: {note}", "  "))
