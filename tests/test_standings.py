# SPDX-License-Identifier: Apache-2.0
"""Who leads a search, and what candidates are held against: ties, several goals, constraints met exactly."""

from types import SimpleNamespace

import numpy as np

from darekit.evaluation.items import Items
from darekit.searches.asking import COMPLETE, FAILED, STOPPED
from darekit.searches.data import Limit
from darekit.searches.folders import BASELINE, TRIAL, Line
from darekit.searches.racing import Bound, Goal, Race, front_of, is_feasible
from darekit.searches.sheets import Sheet
from darekit.searches.standings import Standings

RIGHT, SLOW, THIRD = Goal("a/right", True), Goal("b/loss", False), Goal("c/right", True)


def sheet(**means):
    """Eight items of each score, all of which were asked; with this mean."""
    higher = {"a/right": True, "b/loss": False}
    items = {name: Items(np.full(8, means[name[0]]), np.ones(8), up) for name, up in higher.items() if name[0] in means}
    return Sheet(items, {}, dict.fromkeys(items, 8))


def line(trial, a=None, b=None, c=None, *, name=None, state=COMPLETE, feasible=None):
    values = {"a/right": a, "b/loss": b, "c/right": c}
    scores = {score: {"value": value} for score, value in values.items() if value is not None}
    kind = TRIAL if name is None else BASELINE
    return Line(kind, trial if name is None else None, name, state, {}, {}, scores=scores, feasible=feasible,
                digest=str(name or trial))  # fmt: skip


# --- races


def test_the_opponent_is_the_one_that_leaves_least_hope():
    """A candidate far behind in one goal may still be ahead in another: then there is hope."""
    far = ("far ahead in one", sheet(a=0.9, b=0.9))
    both = ("a little ahead in both", sheet(a=0.55, b=0.45))
    name, found = Race((RIGHT, SLOW), (), (far, both)).against(sheet(a=0.5, b=0.5))
    assert name == "a little ahead in both" and {*found} == {"a/right", "b/loss"}
    assert Race((RIGHT, SLOW), (), (both, far)).against(sheet(a=0.5, b=0.5))[0] == "a little ahead in both"


def test_an_opponent_that_lacks_a_score_is_none():
    lacking, whole = ("lacking", sheet(a=0.9)), ("whole", sheet(a=0.6, b=0.4))
    assert Race((RIGHT, SLOW), (), (lacking, whole)).against(sheet(a=0.5, b=0.5))[0] == "whole"
    assert Race((RIGHT, SLOW), (), (lacking,)).against(sheet(a=0.5, b=0.5)) == (None, {})


def test_of_equal_opponents_it_is_the_first():
    equal = (("first", sheet(a=0.9)), ("second", sheet(a=0.9)))
    assert Race((RIGHT,), (), equal).against(sheet(a=0.5))[0] == "first"


def test_who_is_exactly_as_good_is_not_hopeless():
    assert not Race((RIGHT,), (), (("best", sheet(a=0.5)),)).is_hopeless(sheet(a=0.5))
    assert Race((RIGHT,), (), (("best", sheet(a=0.5)),)).is_hopeless(sheet(a=0.25))
    least = Bound(Limit("a", 0.5, None, True), "a/right", None)
    assert not Race((), (least,), ()).is_hopeless(sheet(a=0.5)) and Race((), (least,), ()).is_hopeless(sheet(a=0.25))


def test_all_constraints_must_hold_and_may_be_met_exactly():
    least = Bound(Limit("a", 0.5, None, True), "a/right", None)
    most = Bound(Limit("b", 0.5, None, False), "b/loss", None)
    assert is_feasible(sheet(a=0.5, b=0.5), (least, most)) is True
    assert is_feasible(sheet(a=0.5, b=0.75), (least, most)) is False
    assert is_feasible(sheet(a=0.25, b=0.5), (least, most)) is False
    assert is_feasible(sheet(a=0.5), (least, most)) is None


def test_equal_in_one_goal_is_not_equal():
    points = [{"a/right": 1.0, "b/loss": 2.0}, {"a/right": 1.0, "b/loss": 1.0}]
    assert front_of(points, (RIGHT, SLOW)) == [1] and front_of(points, (RIGHT,)) == [0]


# --- standings


def test_only_what_was_judged_in_full_and_keeps_the_constraints_can_be_chosen():
    lines = (
        line(0, 0.5), line(1, 0.9, state=STOPPED), line(2, 0.9, state=FAILED), line(3, 0.9, feasible=False),
        line(4, 0.6, feasible=True), line(5, b=0.1),
    )  # fmt: skip
    found = Standings((RIGHT,), (), lines)
    assert [one.trial for one in found.able] == [0, 4] and found.best.trial == 4
    assert Standings((RIGHT,), (), lines[1:4]).best is None
    assert [one.trial for one in Standings((RIGHT, SLOW), (), (*lines, line(6, 0.1, 0.1))).able] == [6]


def test_the_best_is_the_first_of_equals_in_the_direction_of_the_score():
    assert Standings((RIGHT,), (), (line(0, 0.2), line(1, 0.8), line(2, 0.8))).best.trial == 1
    assert Standings((SLOW,), (), (line(0, b=0.8), line(1, b=0.2), line(2, b=0.2))).best.trial == 1


def test_the_best_compromise_is_nearest_to_the_ideal_point():
    """The ideal point has the front's best value of every goal; what is lacked is measured in the front's range."""
    extremes = (line(0, 1.0, 0.9), line(1, 0.8, 0.4), line(2, 0.7, 0.3), line(3, 0.1, 0.2), line(4, 0.1, 0.9))
    found = Standings((RIGHT, SLOW), (), extremes)
    assert [one.trial for one in found.front] == [0, 1, 2, 3]
    assert found.best.trial == 1  # lacks (0, 1), (2/9, 2/7), (1/3, 1/7) and (1, 0): .362 against .363
    tenfold = tuple(line(at, *(value * factor for value, factor in zip(values, (1, 10), strict=True)))
                    for at, values in enumerate([(1.0, 0.9), (0.8, 0.4), (0.7, 0.3), (0.1, 0.2)]))  # fmt: skip
    assert Standings((RIGHT, SLOW), (), tenfold).best.trial == 1
    assert Standings((RIGHT, SLOW), (), (line(0, 0.5, 0.5), line(1, 0.9, 0.1))).best.trial == 1
    assert Standings((RIGHT, SLOW), (), (line(0, 0.5, 0.5), line(1, 0.5, 0.5))).best.trial == 0
    three = Standings(
        (RIGHT, SLOW, THIRD), (), (line(0, 0.9, 0.5, 0.1), line(1, 0.8, 0.4, 0.9), line(2, 0.1, 0.3, 0.8))
    )
    assert len(three.front) == 3 and three.best.trial == 1  # lacks (0, 1, 1), (1/8, 1/2, 0) and (1, 0, 1/8)
    assert Standings((RIGHT, SLOW), (), ()).best is None
    # Who is dominated has no say in the ranges: with the fourth, a goal's range would be ten times as wide.
    front = (line(0, 1.0, 0.9), line(1, 0.9, 0.4), line(2, 0.5, 0.3))
    assert Standings((RIGHT, SLOW), (), (*front, line(3, 0.4, 9.0))).best.trial == 1
    even = (line(0, 0.1, 0.1, 0.8), line(1, 0.9, 0.2, 0.1), line(2, 0.9, 0.3, 0.9))
    assert Standings((RIGHT, SLOW, THIRD), (), even).best.trial == 2  # lacks (1, 0, 1/8), (0, 1/2, 1) and (0, 1, 0)


def test_baselines_are_compared_by_the_first_goal_whatever_the_constraints_say():
    lines = (
        line(None, 0.4, 0.1, name="base"), line(None, 0.7, 0.9, name="math", feasible=False),
        line(None, 0.9, 0.9, name="chat", state=FAILED), line(None, b=0.1, name="empty"), line(9, 0.99, 0.0),
    )  # fmt: skip
    names = ["base", "math", "chat", "empty"]
    assert Standings((RIGHT, SLOW), (), lines).best_of(names).name == "math"
    assert Standings((SLOW, RIGHT), (), lines).best_of(["base", "math"]).name == "base"
    assert Standings((RIGHT,), (), lines).best_of(["none"]) is None


def test_candidates_are_held_against_the_best_or_the_front():
    lines = (line(0, 0.5, 0.5), line(1, 0.9, 0.9), line(2, 0.1, 0.9))
    folder = SimpleNamespace(sheet=lambda digest: {"0": "sheet of 0", "1": "sheet of 1"}.get(digest))
    assert Standings((RIGHT,), (), lines).race(folder).opponents == ((1, "sheet of 1"),)
    assert Standings((RIGHT, SLOW), (), lines).race(folder).opponents == ((0, "sheet of 0"), (1, "sheet of 1"))
    assert Standings((RIGHT,), (), ()).race(folder).opponents == ()
    assert Standings((RIGHT,), (), (line(7, 1.0),)).race(folder).opponents == ()  # its answers are not there
