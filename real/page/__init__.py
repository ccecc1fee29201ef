# SPDX-License-Identifier: Apache-2.0
"""docs/real: results.json, and from it alone the tables, the plots and the page. ``python -m real.page`` writes them again."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from real.page import deltas, headline, merges, packs, run
from real.page.drops import draw_drops
from real.page.results import RESULTS, Results, lines_of, results_of, size_of

__all__ = ["PAGE", "RESULTS", "SECTIONS", "render", "results_of", "size_of", "write_page"]

PAGE = "README.md"
SECTIONS = (
    ("The headline", headline.first),
    ("The paper says, and here", headline.verdicts),
    ("Ways to drop", headline.curves),
    ("Merges", merges.merged),
    ("Merges that know the inputs", merges.informed),
    ("A search for the best merge", merges.searched),
    ("Rounding", merges.rounding),
    ("Packs", packs.packed),
    ("Adapters of the same size", packs.adapters),
    ("What the deltas are like", deltas.deltas),
    ("The headline again", headline.again),
    ("Tasks and data", run.data),
    ("The run", run.run),
)

LONGER = {"A search for the best merge": "; `python -m real --also search` has it"}


def write_page(results: Results, page: Path) -> None:
    """Write everything into `page`."""
    page.mkdir(parents=True, exist_ok=True)
    (page / RESULTS).write_text(lines_of(results))
    kept = json.loads((page / RESULTS).read_text())
    for draw in (draw_drops, packs.draw_packs, merges.draw_merges):
        with suppress(KeyError):  # not run
            draw(kept, page)
    (page / PAGE).write_text(render(kept, page))


def render(results: Results, page: Path) -> str:
    """The page."""
    parts = [*headline.opening(results)]
    for title, section in SECTIONS:
        try:
            body = [*section(results, page)]
        except KeyError:
            body = [f"Not in this run{LONGER.get(title, '')}."]
        parts += [f"## {title}", *body]
    return "\n\n".join(parts) + "\n"
