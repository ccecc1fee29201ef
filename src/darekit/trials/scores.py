# SPDX-License-Identifier: Apache-2.0
"""Names of scores as somebody writes them: whether a judge gives such a score, and what may have been meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from darekit.errors import RecipeError
from darekit.evaluation.judges import Judge, metrics_of, names_of
from darekit.recipe.documents import Document, Key, did_you_mean, fail, suggest
from darekit.trials.judging import MEAN

WORDS = (MEAN, "min", "relative mean", "relative min")  # several scores as one; a sweep knows the first alone
LISTED = 12  # scores that an error lists

_MEANT = {  # what people also call them
    "least": "min", "minimum": "min", "worst": "min", "lowest": "min", "smallest": "min", "weakest": "min",
    "average": "mean", "avg": "mean", "relative": "relative mean", "rel": "relative mean",
    "normalized": "relative mean", "normalised": "relative mean",
}  # fmt: skip


def word_meant(text: str) -> str | None:
    """Which of `WORDS` somebody probably means who writes something like it; None where it is like none of them.

    >>> word_meant("relative least"), word_meant("Average"), word_meant("relatve-min"), word_meant("chat")
    ('relative min', 'mean', 'relative min', None)
    """
    said = re.split(r"[\s_-]+", text.strip().lower().partition(" of ")[0])
    plain = " ".join(_MEANT.get(word, word) for word in said).replace("relative mean m", "relative m")
    close = difflib.get_close_matches(plain, WORDS, 1, 0.75)
    return close[0] if close else None


def check_score(
    document: Document,
    path: Key,
    score: str,
    judges: Mapping[str, Any],
    search: Sequence[Path],
    where: str,
    words: Sequence[str] = (MEAN,),
) -> None:
    """Complain about a score that no judge gives: `reverse/exact_mach`, `revers`, or `average`. `where`: whose judges,
    in words; `words`: what may be written instead of a score.

    Raises:
        RecipeError: so it is; with line, and what there is.
    """
    judge, _, metric = score.partition("/")
    if judge not in judges:
        meant = word_meant(score)
        hint = did_you_mean(judge, [*judges]) or (f"; did you mean {meant!r}?" if meant in words else "")
        there = f"{where} are: {', '.join(judges)}"
        fail(document, path, f"no judge gives {score!r}{_after(hint, there)}")
    known = metrics_of(judges[judge], search=search)
    if metric and known and metric not in known:
        near = suggest(metric, known, f"{judge} has")
        fail(document, path, f"{judge} has no score {metric!r}{near}")


def check_known(what: str, score: str, judges: Mapping[str, Judge], split: str) -> None:
    """Complain about a score of which it is known, before it is asked, that its judge never gives it. `what`: the file
    and the key that names it; `judges`: those of a split.

    Raises:
        RecipeError: so it is; with what there is.
    """
    judge, _, metric = score.partition("/")
    known = names_of(judges[judge]) if judge in judges else ()
    if metric and known and metric not in known:
        there = suggest_score(metric, known, f"{judge} has")
        raise RecipeError(f"{what}: {split}.{judge} has no score {metric!r}{there}")


def suggest_score(name: str, there: Sequence[str], verb: str) -> str:
    """What somebody may have meant by the name of a score, and what there is; of hundreds of lm-eval's the first."""
    more = len(there) - LISTED
    listed = ", ".join(there[:LISTED]) + (f" and {more} more" if more > 0 else "")
    return _after(did_you_mean(name, there), f"{verb}: {listed}")


def _after(hint: str, there: str) -> str:
    """A sentence's end: what there is, after the question whether something was meant, if that is asked."""
    return f"{hint} {there[:1].upper()}{there[1:]}" if hint else f"; {there}"
