# SPDX-License-Identifier: Apache-2.0
"""Who is ahead: goals and constraints by the names that scores really have, the best so far, the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from darekit.errors import RecipeError
from darekit.recipe.documents import suggest
from darekit.searches.asking import COMPLETE
from darekit.searches.baselines import BASE, SINGLE, Baseline
from darekit.searches.blends import Blend, Wish, wish_in
from darekit.searches.data import Limit, Search
from darekit.searches.folders import Folder, Line
from darekit.searches.racing import Bound, Goal, Race, front_of
from darekit.searches.sheets import Sheet, firsts_of, mean_of
from darekit.trials.judging import MEAN, judge_in


class Unasked(Exception):
    """A goal is a score that its judge does not give item by item. `judge`: whom to ask as a whole."""

    def __init__(self, judge: str, score: str) -> None:
        super().__init__(f"{score} is not a score of single items")
        self.judge = judge


def goals_of(
    search: Search, scores: Mapping[str, Mapping[str, Any]], whole: frozenset[str],
    singles: Sequence[Mapping[str, Mapping[str, Any]]] | None = None,
) -> tuple[Goal, ...]:  # fmt: skip
    """The goals as written -> by the names and directions of the scores that there are. `singles`: scores of each model
    alone; None: not known yet, and shares are not right.

    Raises:
        Unasked: the score may be among those that the judge gives as a whole.
        RecipeError: there is no such score, or none that is better in one direction.
    """
    asked = search.goals or ((MEAN,) if mean_of(scores) is not None else firsts_of(scores)[:1])
    return tuple(_goal(search, name, scores, whole, singles) for name in asked)


def bounds_of(
    search: Search, scores: Mapping[str, Mapping[str, Any]], whole: frozenset[str], sheets: Mapping[str, Sheet],
    singles: Sequence[Mapping[str, Mapping[str, Any]]],
) -> tuple[Bound, ...]:  # fmt: skip
    """The constraints likewise. `sheets`: of the models that they may name, and of `base`."""
    found = []
    for limit in search.limits:
        of = _sheet_of(search, limit, sheets)
        wish = wish_in(limit.score)
        if wish is None:
            found.append(Bound(limit, _full(search, limit.score, scores, whole, f"{limit}"), of))
        else:
            blend = _blend(search, limit.score, wish, scores, whole, singles, f"{limit}")
            found.append(Bound(limit, blend.name, of, blend))
    return tuple(found)


def _sheet_of(search: Search, limit: Limit, sheets: Mapping[str, Sheet]) -> Sheet | None:
    if limit.of is None:
        return None
    if limit.of not in sheets:
        raise RecipeError(f"{search.name}: {limit}: {limit.of} could not be judged, so nothing can be compared with it")
    return sheets[limit.of]


def _goal(
    search: Search, name: str, scores: Mapping[str, Mapping[str, Any]], whole: frozenset[str],
    singles: Sequence[Mapping[str, Mapping[str, Any]]] | None,
) -> Goal:  # fmt: skip
    wish = wish_in(name)
    what = f"choose: {name}"
    if wish is not None:
        blend = _blend(search, name, wish, scores, whole, singles, what)
        return Goal(blend.name, bool(scores[next(iter(blend.units))]["higher_is_better"]), blend)
    full = _full(search, name, scores, whole, what)
    higher = scores[full]["higher_is_better"]
    if higher is None:
        raise RecipeError(f"{search.name}: {what}: neither more nor less of {full} is better; choose another score")
    return Goal(full, bool(higher))


def _blend(
    search: Search, name: str, wish: Wish, scores: Mapping[str, Mapping[str, Any]], whole: frozenset[str],
    singles: Sequence[Mapping[str, Mapping[str, Any]]] | None, what: str,
) -> Blend:  # fmt: skip
    parts = [_full(search, part, scores, whole, what) for part in wish.parts] or firsts_of(scores)
    higher = {scores[part]["higher_is_better"] for part in parts}
    if len(higher) > 1 or None in higher:
        of = "the judges' first scores" if not wish.parts else "these scores"
        raise RecipeError(
            f"{search.name}: {what}: {of} do not all point one way; name some that do, as in choose: "
            f"{{{name.partition(' of ')[0]}: [A, B]}}{suggest(name, [*scores], 'there are')}"
        )
    if wish.least and higher == {False}:
        raise RecipeError(
            f"{search.name}: {what}: of {parts[0]} less is better, and the least would be the best of all; choose mean"
        )
    units = dict.fromkeys(parts, 1.0)
    for part in parts if wish.relative and singles is not None else ():
        values = [float(one[part]["value"]) for one in singles or () if part in one]
        units[part] = (max if True in higher else min)(values, default=0.0)
        if units[part] <= 0:
            raise RecipeError(
                f"{search.name}: {what}: no model alone has more than 0 in {part}, so there is nothing to take a share "
                "of; leave out `relative`, or this score"
            )
    return Blend(name, units, wish.least)


def _full(search: Search, name: str, scores: Mapping[str, Mapping[str, Any]], whole: frozenset[str], what: str) -> str:
    """A score's whole name; a judge's name stands for its first score."""
    if name in scores:
        return name
    firsts = [one for one in firsts_of(scores) if judge_in(one) == name]
    if firsts:
        return firsts[0]
    if judge_in(name) not in whole and any(judge_in(one) == judge_in(name) for one in scores):
        raise Unasked(judge_in(name), name)
    raise RecipeError(f"{search.name}: {what}: {name!r} is not a score{suggest(name, [*scores], 'there are')}")


def named_sheets(baselines: Sequence[tuple[Baseline, Sheet]]) -> dict[str, Sheet]:
    """What constraints may name -> its answers."""
    found = {}
    for one, sheet in baselines:
        if one.kind == BASE:
            found["base"] = sheet
        elif one.kind == SINGLE and one.model is not None:
            found[one.model] = sheet
    return found


@dataclass(frozen=True)
class Standings:
    """All that was judged in full and keeps the constraints, and who leads."""

    goals: tuple[Goal, ...]
    bounds: tuple[Bound, ...]
    lines: tuple[Line, ...]

    @property
    def able(self) -> list[Line]:
        """Those that can be chosen."""
        return [
            one for one in self.lines
            if one.state == COMPLETE and one.feasible is not False and all(g.score in one.scores for g in self.goals)
        ]  # fmt: skip

    @property
    def best(self) -> Line | None:
        """With one goal the first of the best; with several the member of the front with the best mean rank."""
        able = self.able if len(self.goals) == 1 else self.front
        if not able:
            return None
        if len(self.goals) == 1:
            goal = self.goals[0]
            return max(able, key=lambda one: self.value(one, goal) * (1 if goal.higher else -1))
        return min(able, key=lambda one: sum(self._rank(one, goal, able) for goal in self.goals))

    @property
    def front(self) -> list[Line]:
        """Those that nobody dominates."""
        able = self.able
        return [able[at] for at in front_of([self.values(one) for one in able], self.goals)]

    def _rank(self, line: Line, goal: Goal, among: Sequence[Line]) -> int:
        sign = 1 if goal.higher else -1
        return sum(sign * self.value(other, goal) > sign * self.value(line, goal) for other in among)

    def value(self, line: Line, goal: Goal) -> float:
        """A line's value for a goal."""
        return float(line.scores[goal.score]["value"])

    def values(self, line: Line) -> dict[str, float]:
        """A line's values for all goals."""
        return {goal.score: self.value(line, goal) for goal in self.goals}

    def best_of(self, names: Sequence[str]) -> Line | None:
        """The best of some baselines, by the first goal; constraints do not matter to what is beaten."""
        goal = self.goals[0]
        found = [one for one in self.lines if one.name in names and one.state == COMPLETE and goal.score in one.scores]
        return max(found, key=lambda one: self.value(one, goal) * (1 if goal.higher else -1), default=None)

    def race(self, folder: Folder) -> Race:
        """What the next candidates are held against."""
        ahead = self.front if len(self.goals) > 1 else [one for one in (self.best,) if one is not None]
        opponents = ((one.key, folder.sheet(one.digest)) for one in ahead)
        return Race(self.goals, self.bounds, tuple((key, sheet) for key, sheet in opponents if sheet is not None))


def hypervolume(points: Sequence[Sequence[float]], worst: Sequence[float]) -> float:
    """(n, d) points of which more is better -> the volume that they dominate above a point; slice by slice.

    >>> hypervolume([(2, 1), (1, 3)], (0, 0))
    4
    """
    above = [point for point in points if all(x > w for x, w in zip(point, worst, strict=True))]
    if not above:
        return 0
    if len(worst) == 1:
        return max(point[0] for point in above) - worst[0]
    volume: float = 0
    floor = worst[-1]
    for level in sorted({point[-1] for point in above}):
        rest = [point[:-1] for point in above if point[-1] >= level]
        volume += (level - floor) * hypervolume(rest, worst[:-1])
        floor = level
    return volume
