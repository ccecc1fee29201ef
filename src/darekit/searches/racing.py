# SPDX-License-Identifier: Apache-2.0
"""The rule by which candidates are stopped before all items were asked.

After each rung but the last, a candidate is compared with what has been judged in full so far, on the items that it was
asked itself. It is stopped if, with 95 % confidence (one-sided), it will not reach the opponent's score once all items
are asked: difference + 1.645 standard errors of what is left < 0.

Of several goals it must be so in every one of them, against one and the same opponent: else it may still be a
compromise that nobody dominates. Of constraints one is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from darekit.searches.blends import CONFIDENCE, Blend, Difference
from darekit.searches.data import Limit
from darekit.searches.sheets import Sheet, difference


@dataclass(frozen=True)
class Goal:
    """A score that is to be good. `higher`: whether more of it is better; `blend`: what it is made of, if it is no
    judge's own."""

    score: str
    higher: bool
    blend: Blend | None = None

    @property
    def measure(self) -> str | Blend:
        """What to compare."""
        return self.blend or self.score


@dataclass(frozen=True)
class Bound:
    """A constraint whose scores have been found: `limit` as written, `score` in full, `of`: the sheet it refers to,
    `blend`: what the score is made of, if it is no judge's own."""

    limit: Limit
    score: str
    of: Sheet | None
    blend: Blend | None = None

    def margin(self, sheet: Sheet) -> Difference | None:
        """How far a candidate is on the right side; below 0 it is on the wrong one. None: not known."""
        if self.of is not None:
            found = difference(sheet, self.of, self.blend or self.score, self.limit.factor)
        else:
            found = _above(sheet, self.blend or self.score, self.limit.factor)
        if found is None or self.limit.least:
            return found
        return Difference(-found.value, found.stderr, found.left)


def _above(sheet: Sheet, score: str | Blend, bound: float) -> Difference | None:
    found = difference(sheet, sheet, score, 0.0)
    return None if found is None else Difference(found.value - bound, found.stderr, found.left)


@dataclass(frozen=True)
class Race:
    """What candidates are held against.

    Attributes:
        goals: of the search.
        bounds: its constraints.
        opponents: (name, sheet) of what was judged in full; with one goal, the best so far.
    """

    goals: tuple[Goal, ...] = ()
    bounds: tuple[Bound, ...] = ()
    opponents: tuple[tuple[str | int, Sheet], ...] = ()

    def against(self, sheet: Sheet) -> tuple[str | int | None, dict[str, Difference]]:
        """The opponent that leaves a candidate the least hope, and the differences from it; None without any."""
        worst: tuple[float, str | int | None, dict[str, Difference]] = (float("inf"), None, {})
        for name, other in self.opponents:
            found = differences(sheet, other, self.goals)
            hope = max((_reach(found[g.score], g.higher) for g in self.goals if g.score in found), default=float("inf"))
            if len(found) == len(self.goals) and hope < worst[0]:
                worst = hope, name, found
        return worst[1], worst[2]

    def is_hopeless(self, sheet: Sheet) -> bool:
        """Whether a candidate that was asked some of the items will not be chosen."""
        if any((margin := bound.margin(sheet)) is not None and _reach(margin, True) < 0 for bound in self.bounds):
            return True
        _, found = self.against(sheet)
        return bool(found) and all(_reach(found[goal.score], goal.higher) < 0 for goal in self.goals)


def differences(sheet: Sheet, other: Sheet, goals: Sequence[Goal]) -> dict[str, Difference]:
    """Goal's score -> this candidate minus the other; scores that one of them lacks are left out."""
    found = ((goal.score, difference(sheet, other, goal.measure)) for goal in goals)
    return {score: one for score, one in found if one is not None}


def _reach(found: Difference, higher: bool) -> float:
    """How far a candidate may still get above the other."""
    return (found.value if higher else -found.value) + CONFIDENCE * found.left


def is_feasible(sheet: Sheet, bounds: Sequence[Bound]) -> bool | None:
    """Whether all constraints hold; None without any, or where one is not known."""
    margins = [bound.margin(sheet) for bound in bounds]
    return None if not margins or None in margins else all(one is not None and one.value >= 0 for one in margins)


def dominates(first: Mapping[str, float], second: Mapping[str, float], goals: Sequence[Goal]) -> bool:
    """Whether the first is at least as good in every goal, and better in one. Goal's score -> value."""
    better = [(first[g.score] - second[g.score]) * (1 if g.higher else -1) for g in goals]
    return all(one >= 0 for one in better) and any(one > 0 for one in better)


def front_of(found: Sequence[Mapping[str, float]], goals: Sequence[Goal]) -> list[int]:
    """Which of several nobody dominates; of equal ones the first."""
    kept = []
    for at, one in enumerate(found):
        equal = any(all(other[g.score] == one[g.score] for g in goals) for other in found[:at])
        if not equal and not any(dominates(other, one, goals) for other in found):
            kept.append(at)
    return kept
