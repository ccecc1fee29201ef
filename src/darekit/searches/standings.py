# SPDX-License-Identifier: Apache-2.0
"""Who is ahead: the best so far, the Pareto front and its hypervolume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from darekit.searches.asking import COMPLETE
from darekit.searches.folders import Folder, Line
from darekit.searches.racing import Bound, Goal, Race, front_of


@dataclass(frozen=True)
class Standings:
    """All that was judged in full and keeps the constraints, and who leads."""

    goals: tuple[Goal, ...]
    bounds: tuple[Bound, ...]
    lines: tuple[Line, ...]

    @property
    def judged(self) -> list[Line]:
        """Those that were judged in full, by every goal."""
        return [one for one in self.lines if one.state == COMPLETE and all(g.score in one.scores for g in self.goals)]

    @property
    def able(self) -> list[Line]:
        """Those that can be chosen."""
        return [one for one in self.judged if one.feasible is not False]

    @property
    def best(self) -> Line | None:
        """With one goal the first of the best; with several the member of the front that is nearest to the ideal point.

        The ideal point has the front's best value of every goal; each goal is measured in the front's range of it
        (compromise programming: Zeleny, Multiple Criteria Decision Making, 1973).
        """
        able = self.able if len(self.goals) == 1 else self.front
        if not able:
            return None
        if len(self.goals) == 1:
            goal = self.goals[0]
            return max(able, key=lambda one: self.value(one, goal) * (1 if goal.higher else -1))
        return min(able, key=lambda one: math.hypot(*(self._lacks(one, goal, able) for goal in self.goals)))

    @property
    def front(self) -> list[Line]:
        """Those that nobody dominates."""
        able = self.able
        return [able[at] for at in front_of([self.values(one) for one in able], self.goals)]

    def _lacks(self, line: Line, goal: Goal, among: Sequence[Line]) -> float:
        """What a line lacks to the best of some by a goal, in the range of their values."""
        values = [self.value(one, goal) for one in among]
        best, worst = (max(values), min(values)) if goal.higher else (min(values), max(values))
        return abs(best - self.value(line, goal)) / abs(best - worst) if best != worst else 0.0

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
