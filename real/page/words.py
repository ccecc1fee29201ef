# SPDX-License-Identifier: Apache-2.0
"""What all sections write with: tables, numbers, names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from real.claims import Cell
from real.lessons import PROSE
from real.page.results import Results

TASKS = {
    "numbers": "number -> words",
    "json": "sentence -> JSON with four fields",
    "topics": "docstring -> one of 8 topics",
}

SOURCES = {
    "numbers": "num2words",
    "json": "sentences, names and goods of our own; places of the CLDR (Babel)",
    "topics": "the standard library's own docstrings; a module is of one split",
    PROSE: "the language reference that Python ships (`pydoc_data.topics`)",
}


Gap = tuple[float, float | None]  # a difference, and its standard error


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """Markdown; the first columns hold words, the others numbers."""
    rule = "|" + "---|" * words + "---:|" * (len(header) - words)
    escaped = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in escaped)])


def told(cell: Cell, digits: int = 1) -> str:
    """`90.5 ± 1.2`: a mean and the deviation over masks."""
    spread = "" if cell.deviation is None else f" ± {cell.deviation:.{digits}f}"
    return f"{cell.mean:.{digits}f}{spread}"


def rate_word(rate: float) -> str:
    """0.99 -> .99"""
    return f"{rate:g}".replace("0.", ".", 1)


def told_gap(gap: Gap | None, digits: int = 1) -> str:
    """`-1.3 ± 1.1`: a difference with its standard error.

    >>> told_gap((-1.25, 1.1)), told_gap(None)
    ('-1.2 ± 1.1', '')
    """
    if gap is None:
        return ""
    value, error = round(gap[0], digits) + 0.0, gap[1]  # no -0.0
    return f"{value:+.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def is_worse(gap: Gap) -> bool:
    """Whether a difference is below 0 by more than two of its standard errors."""
    return gap[1] is not None and gap[0] < -2 * gap[1]


# --- what `dare eval` found ---


def evaluated(results: Results, step: str) -> dict[str, dict[str, float]]:
    """Model (the last part of its path) -> judge -> exact match in percent, or perplexity.

    Raises:
        KeyError: it was not run.
    """
    found = {}
    for one in results["steps"][step]["evaluations"]:
        if not one.get("error"):
            found[_short(one["model"])] = {
                judge: (1 if judge == PROSE else 100) * value["value"]
                for score, value in one["scores"].items()
                if (judge := _judge(score))
            }
    return found


def gaps(results: Results, step: str, model: str) -> dict[str, Gap]:
    """Judge -> how far a model is from the first one that the step judged, row by row; empty where nothing is known."""
    found = {}
    for score, models in results["steps"][step].get("differences", {}).items():
        one = next((gap for name, gap in models.items() if _short(name) == model), None)
        if one is not None and (judge := _judge(score)):
            factor = 1 if judge == PROSE else 100
            error = one["stderr"]
            found[judge] = (factor * one["value"], None if error is None else factor * error)
    return found


def mean_gap(found: Mapping[str, Gap], judges: Sequence[str]) -> Gap | None:
    """The mean of several judges' differences; they ask rows of their own, so the errors are independent."""
    if any(one not in found for one in judges):
        return None
    errors = [found[one][1] for one in judges]
    error = None if None in errors else math.hypot(*(e or 0.0 for e in errors)) / len(judges)
    return fmean(found[one][0] for one in judges), error


def _short(model: str) -> str:
    return Path(model).name.removesuffix(".yaml")


def _judge(score: str) -> str | None:
    """`json.test/exact_match` -> json; None: a score that the page does not show."""
    if not score.endswith(("/exact_match", "/perplexity")):
        return None
    return score.partition(".")[0]
