# SPDX-License-Identifier: Apache-2.0
"""The plots of a search: its course, its rungs, what mattered, one goal against another, weights over depth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from darekit.recipe.texts import recipe_text
from darekit.reports.charts import LOOKS, Line, Point, Strand, Upright, bars, curves, parallel, plain, pointed
from darekit.reports.importance import importance_of
from darekit.reports.page import MINUS, Copy, Figure, Key, Plot, View
from darekit.reports.search_folder import Goal, SearchFolder, Trial, number, parts_of
from darekit.reports.sweeps import number_of, range_of
from darekit.searches.asking import COMPLETE, FAILED, STOPPED

BEST_SO_FAR = 6  # its look

_SIZES = (8, 6, 8)  # of marks: what was stopped is less certain
_AXES = 10  # of parallel coordinates; more cannot be told apart
_LONGEST = 13  # letters of a word beside one of them
_BEST = 0.1  # share of the trials that counts as among the best


@dataclass(frozen=True)
class Found:
    """A folder, with what several plots need of it."""

    folder: SearchFolder
    _texts: dict[str, Copy | None] = field(default_factory=dict, repr=False)

    def copy(self, one: Trial) -> Copy | None:
        """What a click on a candidate copies: its recipe. Made once: YAML is slow, and every plot asks."""
        if one.title not in self._texts:
            self._texts[one.title] = Copy(one.title, recipe_text(one.recipe)) if one.recipe else None
        return self._texts[one.title]

    def says(self, one: Trial) -> tuple[str, ...]:
        """What shows at the pointer above the recipe."""
        lines = [one.title if one.state == COMPLETE else f"{one.title}, {state_of(one)}"]
        for goal in self.folder.goals:
            if math.isfinite(one.value(goal.score)):
                lines.append(f"{goal.score} {scored(one.scores.get(goal.score))}")
        return (*lines, "breaks a constraint") if one.feasible is False else tuple(lines)


def scored(score: Mapping[str, Any] | None) -> str:
    """`0.869 ± 0.021`, or nothing."""
    if not score or not math.isfinite(number(score.get("value"))):
        return ""
    error = number(score.get("stderr"))
    return number_of(number(score["value"])) + (f" ± {number_of(error)}" if math.isfinite(error) else "")


def state_of(one: Trial) -> str:
    """How far a candidate came."""
    return f"stopped after {100 * one.share:.0f} % of the items" if one.state == STOPPED else one.state


def outcome_of(one: Trial) -> str:
    """The same in a table."""
    return f"stopped at {100 * one.share:.0f} %" if one.state == STOPPED else one.state


def levels_of(read: SearchFolder, goal: Goal) -> list[Trial]:
    """The baselines that a plot shows: the best single model, the best plain merge, the base."""
    names = [read.summary.get("best_single"), read.summary.get("best_plain"), "base"]
    by_name = {one.name: one for one in read.baselines}
    found = [by_name[name] for name in dict.fromkeys(names) if name in by_name]
    return [one for one in found if math.isfinite(one.value(goal.score))]


def dimensions(read: SearchFolder) -> list[str]:
    """Those that vary, in the order of the space."""
    names = dict.fromkeys([*read.space, *(name for one in read.trials for name in one.params)])
    return [n for n in names if len({repr(one.params[n]) for one in read.trials if n in one.params}) > 1]


def _groups(read: SearchFolder) -> list[tuple[str, int, list[Trial]]]:
    """(name, look, trials) of those that came to the end, that were stopped, and that may not win."""
    allowed = [one for one in read.trials if one.state == COMPLETE and one.feasible is not False]
    groups = (
        ("all items", 0, allowed),
        ("stopped", 1, [one for one in read.trials if one.state == STOPPED]),
        ("breaks a constraint", 2, [one for one in read.trials if one.state == COMPLETE and one.feasible is False]),
    )
    return [group for group in groups if group[2]]


def course(found: Found) -> Plot | None:
    """Scores over trials, how far each came, and what they are compared with."""
    read = found.folder
    views = []
    for goal in read.goals:
        lines, keys = [], []
        for name, look, trials in _groups(read):
            points = tuple(
                Point(one.number, one.value(goal.score), found.says(one), found.copy(one)) for one in trials
                if math.isfinite(one.value(goal.score))
            )  # fmt: skip
            if points:
                lines.append(Line(name, points, look, joined=False, size=_SIZES[look]))
                keys.append(Key(name, look, joined=False))
        if not lines:
            continue
        levels = [(one.title, one.value(goal.score), 3 + i) for i, one in enumerate(levels_of(read, goal))]
        heights = [p.y for line in lines for p in line.points] + [height for _, height, _ in levels]
        last = max(one.number or 0 for one in read.trials)
        x = {"title": "trial", "range": [-0.02 * last - 0.5, 1.02 * last + 0.5]}
        figure = curves(lines, x, {"title": f"{goal.score}, validation", "range": range_of(heights)}, levels)
        best = _best_so_far(found, goal)
        figure["data"].insert(len(levels), best)
        keys += [
            Key("best so far", BEST_SO_FAR, marks=False),
            *(Key(name, look, marks=False) for name, _, look in levels),
        ]
        views.append(View(goal.score, (("", figure),), tuple(keys)))
    how = "Each mark is a candidate. Those that were stopped were asked fewer items, so their scores are less certain."
    pointer = "Point at one for its recipe, click to copy it."
    return Plot("Scores over trials", how, tuple(views), None, "Goal", pointer) if views else None


def _best_so_far(found: Found, goal: Goal) -> dict[str, Any]:
    """Steps of the best complete candidate that breaks no constraint."""
    x: list[int] = []
    y: list[float] = []
    for one in found.folder.trials:
        value = one.value(goal.score)
        if one.state == COMPLETE and one.feasible is not False and math.isfinite(value):
            x.append(one.number or 0)
            y.append(value if not y else max(y[-1], value) if goal.higher else min(y[-1], value))
    if x:
        x.append(max(one.number or 0 for one in found.folder.trials))
        y.append(y[-1])
    return {"type": "scatter", "mode": "lines", "name": "best so far", "x": x, "y": y, "hoverinfo": "skip",
            "line": {"color": LOOKS[BEST_SO_FAR][0], "dash": LOOKS[BEST_SO_FAR][1], "shape": "hv", "width": 1.4},
            }  # fmt: skip


def rungs(found: Found) -> Plot | None:
    """The difference to the opponent at each rung: why a candidate was stopped."""
    read = found.folder
    views = []
    for goal in read.goals:
        lines = []
        for name, state, look in (("stopped", STOPPED, 1), ("all items", COMPLETE, 0)):
            x: list[float | None] = []
            y: list[float | None] = []
            points: list[Point] = []
            for one in read.trials:
                gaps = [(share, differences.get(goal.score) or {}) for share, _, differences in one.rungs]
                steps = [(share, number(gap.get("value")), gap.get("stderr")) for share, gap in gaps]
                steps = [step for step in steps if math.isfinite(step[1])]
                if one.state != state or not steps:
                    continue
                for share, value, error in steps:
                    gap = f"{number_of(value)}" + ("" if error is None else f" ± {number_of(error)}")
                    says = (*found.says(one), f"{gap} to its opponent at {100 * share:.0f} % of the items")
                    x.append(100 * share)
                    y.append(value)
                    points.append(Point(None, 0, says, found.copy(one)))
                x.append(None)
                y.append(None)
                points.append(points[-1])
            if x:
                lines.append((name, look, x, y, points))
        if not lines:
            continue
        shown = [Line(name, (), look) for name, look, *_ in lines]
        upward = {"title": f"difference in {goal.score}", "zeroline": True, "zerolinecolor": "soft"}
        figure = curves(shown, {"title": "% of the items", "range": [0, 104]}, upward)
        for trace, (_, _, x, y, points) in zip(figure["data"], lines, strict=True):
            trace |= {"x": x, "y": y, "opacity": 0.4, "connectgaps": False, **pointed(points)}  # fmt: skip
            trace["line"] = {**trace["line"], "width": 1.2, "dash": "solid"}
            trace["marker"] = {**trace["marker"], "size": 6}
        keys = tuple(Key(name, look, solid=True) for name, look, *_ in lines)
        views.append(View(goal.score, (("", figure),), keys))
    how = (
        "Each line is a candidate: its difference to the best at that time, on the items that both were asked. It ends "
        "where the candidate was stopped."
    )
    return Plot("Differences rung by rung", how, tuple(views), None, "Goal") if views else None


def _places(name: str, read: SearchFolder, values: Sequence[Any]) -> tuple[dict[Any, float], dict[str, Any]]:
    """Where the values of a dimension are on an axis: numbers as they are, words evenly."""
    space = read.space.get(name, {})
    if "choices" not in space and all(math.isfinite(number(value)) for value in values):
        log = bool(space.get("log")) and all(value > 0 for value in values)
        return {value: float(value) for value in values}, {"type": "log"} if log else {}
    words = list(dict.fromkeys([*space.get("choices", ()), *values]))
    more = {"tickmode": "array", "tickvals": [*range(len(words))], "ticktext": [plain(word) for word in words],
            "range": [-0.5, len(words) - 0.5]}  # fmt: skip
    return {word: float(i) for i, word in enumerate(words)}, more


def slices(found: Found, names: Sequence[str]) -> Plot | None:
    """A score over one setting at a time."""
    read = found.folder
    views = []
    for goal, name in itertools.product(read.goals, names):
        values = [one.params[name] for one in read.trials if name in one.params]
        places, more = _places(name, read, values)
        lines, keys = [], []
        for group, look, trials in _groups(read):
            points = tuple(
                Point(places[one.params[name]] + _aside(one, more), one.value(goal.score),
                      found.says(one), found.copy(one))
                for one in trials if name in one.params and math.isfinite(one.value(goal.score))
            )  # fmt: skip
            if points:
                lines.append(Line(group, points, look, joined=False, size=_SIZES[look]))
                keys.append(Key(group, look, joined=False))
        if lines:
            label = read.called(name) if len(read.goals) == 1 else f"{read.called(name)}: {goal.score}"
            figure = curves(lines, {"title": read.called(name), **more}, {"title": f"{goal.score}, validation"})
            views.append(View(label, (("", figure),), tuple(keys)))
    how = "One setting at a time: the others vary too, so a cloud without a slope says little."
    return Plot("Slices", how, tuple(views), None, "Setting") if views else None


def parallels(found: Found, every: Sequence[str]) -> Plot | None:
    """All settings at once."""
    read = found.folder
    names = every[:_AXES]
    if len(names) < 2:
        return None
    views = []
    for goal in read.goals:
        able = [one for one in read.trials if math.isfinite(one.value(goal.score))]
        if len(able) < 2:
            continue
        uprights, heights = [], []
        for name in names:
            upright, at = _upright(name, read, [one.params[name] for one in able if name in one.params])
            uprights.append(upright)
            heights.append([at.get(_hashed(one.params.get(name))) for one in able])
        scores = [one.value(goal.score) for one in able]
        low, high = min(scores), max(scores)
        uprights.append(Upright(goal.score, ((0.0, number_of(low)), (1.0, number_of(high)))))
        heights.append([(score - low) / (high - low or 1) for score in scores])
        order = sorted(range(len(able)), key=lambda i: -scores[i] if goal.higher else scores[i])
        fit = [i for i in order if able[i].state == COMPLETE and able[i].feasible is not False] or order
        few = {*fit[: _among_the_best(len(able))]}
        strands = [
            Strand(tuple(column[i] for column in heights), found.says(one), found.copy(one),
                   2 if i == fit[0] else 1 if i in few else 0)
            for i, one in enumerate(able)
        ]  # fmt: skip
        views.append(View(goal.score, (("", parallel(uprights, strands)),)))
    left = len(every) - len(names)
    count = _among_the_best(
        max(sum(math.isfinite(one.value(goal.score)) for one in read.trials) for goal in read.goals)
    )
    blue = f"blue are the next best {count - 1}. Where the blue lines run together, the setting matters."
    blue = "blue is the next best." if count == 2 else blue
    how = (
        f"Each line is a candidate: orange is the best complete one{f', {blue}' if count > 1 else '.'}"
        + (f" {left} more settings are left out." if left else "")
    )  # fmt: skip
    return Plot("Parallel coordinates", how, tuple(views), None, "Goal") if views else None


def _among_the_best(count: int) -> int:
    """Of so many candidates, how many are told apart as the best: of few the first alone."""
    return max(1, round(_BEST * count))


def _hashed(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | type(None)) else str(value)


def _upright(name: str, read: SearchFolder, values: Sequence[Any]) -> tuple[Upright, dict[Any, float]]:
    places, more = _places(name, read, [_hashed(value) for value in values])
    if more.get("type") == "log":
        places = {value: math.log(place) for value, place in places.items()}
    low, high = min(places.values()), max(places.values())
    heights = {value: (place - low) / (high - low) if high > low else 0.5 for value, place in places.items()}
    if "ticktext" in more:
        marks = tuple((height, _shortened(str(value))) for value, height in heights.items())
    else:
        marks = tuple((heights[value], _brief(value)) for value in
                      (min(places, key=lambda v: places[v]), max(places, key=lambda v: places[v])))  # fmt: skip
    return Upright(read.called(name), marks), heights


def _shortened(word: str) -> str:
    """A word beside an upright, not so long that it reaches the next one."""
    return word if len(word) <= _LONGEST else f"{word[: _LONGEST - 1]}…"


def _brief(value: float) -> str:
    text = f"{value:.3g}"
    return (text if len(text.lstrip("-")) <= 6 else f"{value:.1e}".replace("e-0", "e-")).replace("-", MINUS)


def _aside(one: Trial, axis: Mapping[str, Any]) -> float:
    """Marks over a word are spread, or they would hide each other: by the golden ratio, not at random."""
    return 0.5 * ((one.number or 0) * 0.618034 % 1 - 0.5) if "ticktext" in axis else 0.0


def importances(found: Found) -> tuple[Plot | None, dict[str, float], str]:
    """How much each setting matters; the numbers for the first goal; why there are none."""
    read = found.folder
    views, lead, measure = [], "", ""
    first: dict[str, float] = {}
    for goal in read.goals:
        measured, word = importance_of([one for one in read.trials if one.state != FAILED], read.space, goal)
        if not measured:
            lead = word
            continue
        measure, first = word, first or measured
        figure = bars([read.called(name) for name in measured], [*measured.values()], {"tickformat": ".0%"})
        views.append(View(goal.score, (("", figure),)))
    how = (
        f"How much of the differences in score each setting explains: Optuna's {measure}, over all candidates that "
        "have a score, stopped ones with what they had."
    )
    return Plot("Importance", how, tuple(views), None, "Goal") if views else None, first, lead


def by_importance(found: Found, measured: Mapping[str, float]) -> list[str]:
    """Settings that vary, those that matter most first."""
    return sorted(dimensions(found.folder), key=lambda name: -measured.get(name, 0.0))


def front(found: Found) -> Plot | None:
    """One goal against another."""
    read = found.folder
    front = {one.get("trial") for one in read.summary.get("front") or ()}
    views = []
    for one, other in itertools.combinations(read.goals, 2):
        lines, keys = [], []
        able = [t for t in read.trials if math.isfinite(t.value(one.score)) and math.isfinite(t.value(other.score))]
        groups = [
            ("stopped", [t for t in able if t.state == STOPPED], 1, False),
            ("all items", [t for t in able if t.state == COMPLETE and t.number not in front], 0, False),
            ("front", sorted((t for t in able if t.number in front), key=lambda t: t.value(one.score)), 2, True),
            ("baselines", [b for b in read.baselines if math.isfinite(b.value(one.score))
                           and math.isfinite(b.value(other.score))], 6, False),
        ]  # fmt: skip
        for name, trials, look, joined in groups:
            if trials:
                points = tuple(
                    Point(t.value(one.score), t.value(other.score), found.says(t), found.copy(t)) for t in trials
                )
                joined = joined and len(read.goals) == 2  # more goals than axes: the front is no line
                lines.append(Line(name, points, look, joined))
                keys.append(Key(name, look, joined=joined))
        if lines:
            figure = curves(lines, {"title": f"{one.score}, validation"}, {"title": f"{other.score}, validation"})
            views.append(View(f"{one.score} and {other.score}", (("", figure),), tuple(keys)))
    how = "On the front no candidate is better in one goal without being worse in another."
    return Plot("Pareto front", how, tuple(views)) if views else None


def over_depth(found: Found) -> Iterator[Plot]:
    """Settings with control points or a value for each group: the best candidate's among the next best."""
    read = found.folder
    goal = read.goals[0] if read.goals else None
    if goal is None:
        return
    able = [t for t in read.trials if t.state == COMPLETE and math.isfinite(t.value(goal.score))]
    able.sort(key=lambda t: -t.value(goal.score) if goal.higher else t.value(goal.score))
    best = read.best()
    chosen = ([best] if best else []) + [t for t in able if t is not best][: 9 + (best is None)]
    names = list(dict.fromkeys(name for t in chosen for name in parts_of(t.params)))
    views: dict[bool, list[View]] = {True: [], False: []}
    for name in names:
        tables = [(t, parts_of(t.params).get(name, {})) for t in chosen]
        places = list(dict.fromkeys(place for _, table in tables for place in table))
        numbered = all(place.isdecimal() for place in places)
        places = sorted(places, key=int) if numbered else places
        figure, keys = _depth_figure(found, name, tables, places, numbered)
        views[numbered].append(View(read.called(name), (("", figure),), keys))
    if views[True]:
        how = "Control points from the first layer to the last; between them the value is as the search file says."
        yield Plot("Over depth", how, tuple(views[True]), None, "Setting")
    if views[False]:
        yield Plot("By group of tensors", "One value for each group.", tuple(views[False]), None, "Setting")


def _depth_figure(
    found: Found, name: str, tables: Sequence[tuple[Trial, Mapping[str, float]]], places: Sequence[str], numbered: bool
) -> tuple[Figure, tuple[Key, ...]]:
    lines = []
    for rank, (one, table) in reversed([*enumerate(tables)]):
        points = tuple(
            Point(float(i), table[place], (*found.says(one), f"{place}: {table[place]:.4g}"), found.copy(one))
            for i, place in enumerate(places) if place in table
        )  # fmt: skip
        lines.append(Line("best" if rank == 0 else "next best", points, 1 if rank == 0 else 0))
    last = len(places) - 1
    text = [f"{100 * i / last:.0f} %" for i in range(last + 1)] if numbered and last else [*places]
    x = {"title": "depth" if numbered else "group", "tickmode": "array", "tickvals": [*range(len(places))],
         "ticktext": [plain(one) for one in text], "range": [-0.15, last + 0.15]}  # fmt: skip
    figure = curves(lines, x, {"title": found.folder.called(name)})
    for trace in figure["data"][:-1]:
        trace |= {"opacity": 0.4, "line": {**trace["line"], "width": 1.2}, "marker": {**trace["marker"], "size": 5}}
    figure["data"][-1]["line"] = {**figure["data"][-1]["line"], "width": 3.5, "dash": "solid"}
    return figure, (Key("best", 1, solid=True), *([Key("next best", 0)] if len(lines) > 1 else []))
