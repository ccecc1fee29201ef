# SPDX-License-Identifier: Apache-2.0
"""Several scores as one: their mean or the least of them, as they are or as shares of what single models reach."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 1.6448536269514722  # standard errors: 95 %, one-sided

LEAST = "min"

_WORDS = re.compile(r"(relative )?(mean|min)(?: of (.+))?")


@dataclass(frozen=True)
class Wish:
    """A blend as somebody writes it: `min`, `relative mean of math, chat`.

    Attributes:
        relative: whether each score is divided by that of the best single model.
        least: whether the least counts, not the mean.
        parts: scores or judges; empty: every judge's first score.
    """

    relative: bool
    least: bool
    parts: tuple[str, ...]


def wish_in(text: str) -> Wish | None:
    """What a text asks for; None where it is the name of a single score.

    >>> wish_in("relative min of math, chat")
    Wish(relative=True, least=True, parts=('math', 'chat'))
    """
    match = _WORDS.fullmatch(text.strip())
    if match is None:
        return None
    parts = tuple(part.strip() for part in (match[3] or "").split(",") if part.strip())
    return Wish(match[1] is not None, match[2] == LEAST, parts)


@dataclass(frozen=True)
class Difference:
    """Of one score, one candidate minus another.

    Attributes:
        value: of the difference.
        stderr: of it, as an estimate of the difference on all that could be asked; None: unknown.
        left: its standard error as an estimate of the difference on all items there are: 0 when all were asked.
    """

    value: float
    stderr: float | None
    left: float


@dataclass(frozen=True)
class Part:
    """One score of two candidates: `difference` of the two, and both as (value, standard error)."""

    difference: Difference
    first: tuple[float, float | None]
    second: tuple[float, float | None]


@dataclass(frozen=True)
class Blend:
    """Several scores as one.

    Attributes:
        name: what it is called.
        units: score -> what it is divided by.
        least: whether it is the least of them, not their mean.
    """

    name: str
    units: Mapping[str, float]
    least: bool = False

    def score(self, scores: Mapping[str, Mapping[str, Any]], items: int | None) -> dict[str, Any] | None:
        """Its value in JSON-able form, from those of its parts; None where one is missing. The error of the least is
        that of the score that it is: a little too large where others are close."""
        if not self.units or any(name not in scores for name in self.units):
            return None
        found = [
            (scores[name]["value"] / unit, _over(scores[name]["stderr"], unit)) for name, unit in self.units.items()
        ]
        value, error = min(found, key=lambda one: one[0]) if self.least else _mean(found)
        higher = scores[next(iter(self.units))]["higher_is_better"]
        return {"value": value, "stderr": error, "higher_is_better": higher, "items": items}

    def difference(self, parts: Mapping[str, Part], factor: float = 1.0) -> Difference:
        """First minus `factor` times second. `parts`: of each score, with the same factor."""
        if self.least:
            return self._of_least(parts, factor)
        scaled = [
            Difference(one.difference.value / unit, _over(one.difference.stderr, unit), one.difference.left / unit)
            for name, unit in self.units.items()
            for one in (parts[name],)
        ]
        value, error = _mean([(one.value, one.stderr) for one in scaled])
        return Difference(value, error, math.hypot(*(one.left for one in scaled)) / len(scaled))

    def _of_least(self, parts: Mapping[str, Part], factor: float) -> Difference:
        """Of the least. A candidate ends at most as high as each of its scores will: the one that surely holds it back
        decides. What a score will be is the other's, which is known, plus the difference on common items."""
        others = {name: factor * parts[name].second[0] / unit for name, unit in self.units.items()}
        known = {name: others[name] + parts[name].difference.value / unit for name, unit in self.units.items()}
        at = min(known, key=lambda name: known[name] + CONFIDENCE * parts[name].difference.left / self.units[name])
        floor = min(others, key=lambda name: (others[name], name != at))
        if at == floor:
            error = _over(parts[at].difference.stderr, self.units[at])
        else:  # two scores about different items
            own, other = parts[at].first[1], parts[floor].second[1]
            spread = math.hypot((own or 0.0) / self.units[at], factor * (other or 0.0) / self.units[floor])
            error = None if own is None or other is None else spread
        return Difference(known[at] - others[floor], error, parts[at].difference.left / self.units[at])


def _over(error: float | None, unit: float) -> float | None:
    return None if error is None else error / unit


def _mean(found: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    errors = [error for _, error in found]
    stderr = None if None in errors else math.hypot(*(one or 0.0 for one in errors)) / len(found)
    return math.fsum(value for value, _ in found) / len(found), stderr
