# SPDX-License-Identifier: Apache-2.0
"""What one candidate answered, item by item; and two candidates compared on the items that both were asked."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from darekit.evaluation.items import Items, spread
from darekit.evaluation.scores import Score
from darekit.searches.blends import Blend, Difference, Part
from darekit.trials.judging import MEAN, judge_in


@dataclass(frozen=True)
class Sheet:
    """A candidate's answers on one split.

    Attributes:
        items: score -> what it made of each item asked so far, in the fixed order.
        whole: score -> value, of judges that are asked as a whole.
        sizes: score -> how many items there are in all.
    """

    items: Mapping[str, Items] = field(default_factory=dict)
    whole: Mapping[str, Score] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def asked(self) -> int:
        """How many items were asked. Several scores of a judge are about the same ones."""
        groups = {(judge_in(name), one.group): len(one) for name, one in self.items.items()}
        return sum(groups.values())

    def scores(self, order: Iterable[str], blends: Iterable[Blend] = ()) -> dict[str, dict[str, Any]]:
        """Every score in JSON-able form, judges in this order; with their mean where they have one, and blends."""
        found: dict[str, dict[str, Any]] = {}
        for judge in order:
            for name in (*self.items, *self.whole):
                if judge_in(name) == judge:
                    one = self.items.get(name)
                    score = self.whole[name] if one is None else one.score
                    found[name] = {**score.to_data(), "items": None if one is None else len(one)}
        wanted = tuple(blends)
        own = None if any(one.name == MEAN for one in wanted) else mean_of(found)  # never that of fewer judges
        return with_blends(found, (own, *wanted), self.asked or None)

    def of(self, score: str) -> Score | None:
        """One score; None where it was not asked."""
        return self.items[score].score if score in self.items else self.whole.get(score)


def mean_of(scores: Mapping[str, Mapping[str, Any]]) -> Blend | None:
    """The mean of every judge's first score; None of a single judge, or where they do not all point one way."""
    firsts = firsts_of(scores)
    alike = len({scores[name]["higher_is_better"] for name in firsts} - {None}) == 1
    return Blend(MEAN, dict.fromkeys(firsts, 1.0)) if len(firsts) > 1 and alike else None


def with_blends(
    scores: Mapping[str, Mapping[str, Any]], blends: Iterable[Blend | None], items: int | None
) -> dict[str, dict[str, Any]]:
    """Scores in JSON-able form, and those that are made of them."""
    found = {name: dict(score) for name, score in scores.items()}
    for blend in blends:
        score = blend.score(scores, items) if blend is not None else None
        if blend is not None and score is not None:
            found[blend.name] = score
    return found


def firsts_of(scores: Iterable[str]) -> list[str]:
    """Each judge's first score: what the mean is taken over."""
    found: dict[str, str] = {}
    for name in scores:
        if name != MEAN:
            found.setdefault(judge_in(name), name)
    return [*found.values()]


def difference(first: Sheet, second: Sheet, score: str | Blend, factor: float = 1.0) -> Difference | None:
    """First minus `factor` times second in one score, on the items that both were asked; None where one lacks it.

    Paired: the standard error is that of the items' differences. Where few items were asked, two models may by luck
    agree on all of them: one more item is added to their variance, which differs as if the models' errors were
    independent. For what is left, items are drawn without replacement: the variance shrinks by 1 - n/N (Cochran,
    Sampling Techniques, section 2.8).
    """
    if isinstance(score, Blend):
        parts = {name: _part(first, second, name, factor) for name in score.units}
        known = {name: one for name, one in parts.items() if one is not None}
        return score.difference(known, factor) if known and len(known) == len(parts) else None
    if score in first.items and score in second.items:
        count = min(len(first.items[score]), len(second.items[score]))
        a, b = first.items[score].first(count), second.items[score].first(count)
        own, other = a.influence, factor * b.influence
        stderr = spread(own - other)
        if count < 2:
            return Difference(a.value - factor * b.value, None, math.inf)
        extra = float(np.mean(own * own) + np.mean(other * other))
        variance = (float(np.sum((own - other) ** 2)) + extra) / (count - 1) / count
        left = max(0.0, 1 - count / first.sizes.get(score, count))
        return Difference(a.value - factor * b.value, stderr, math.sqrt(variance * left))
    if score in first.whole and score in second.whole:
        one, two = first.whole[score], second.whole[score]
        # Nothing says how errors of a judge that is asked as a whole go together: as if they were independent.
        errors = [one.stderr, two.stderr]
        stderr = None if None in errors else math.hypot(one.stderr or 0.0, factor * (two.stderr or 0.0))
        return Difference(one.value - factor * two.value, stderr, 0.0)
    return None


def _part(first: Sheet, second: Sheet, score: str, factor: float) -> Part | None:
    found, own, other = difference(first, second, score, factor), first.of(score), second.of(score)
    if found is None or own is None or other is None:
        return None
    return Part(found, (own.value, own.stderr), (other.value, other.stderr))


def to_bytes(sheet: Sheet) -> bytes:
    """A sheet as a file holds it: a JSON line, then an array."""
    names = list(sheet.items)
    arrays = [np.stack([sheet.items[name].sums, sheet.items[name].weights]) for name in names]
    head = {
        "items": {name: [len(sheet.items[name]), sheet.items[name].higher_is_better, sheet.items[name].group]
                  for name in names},
        "whole": {name: score.to_data() for name, score in sheet.whole.items()},
        "sizes": dict(sheet.sizes),
    }  # fmt: skip
    file = io.BytesIO()
    file.write(json.dumps(head).encode() + b"\n")
    np.save(file, np.concatenate(arrays, axis=1) if arrays else np.zeros((2, 0)))
    return file.getvalue()


def from_bytes(raw: bytes) -> Sheet:
    """The reverse.

    Raises:
        ValueError: it is something else.
    """
    line, _, rest = raw.partition(b"\n")
    head = json.loads(line)
    values = np.load(io.BytesIO(rest), allow_pickle=False)
    items, begin = {}, 0
    for name, (count, higher, group) in head["items"].items():
        part = values[:, begin : begin + count]
        items[name], begin = Items(part[0].copy(), part[1].copy(), higher, group), begin + count
    return Sheet(items, {name: Score(**score) for name, score in head["whole"].items()}, head["sizes"])
