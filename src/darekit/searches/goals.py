# SPDX-License-Identifier: Apache-2.0
"""Goals and constraints as somebody writes them -> by the names and directions of the scores that judges give.

Some mistakes in them show before anything is judged (`check_goals`), others with the first baseline's scores; shares of
what single models reach are known as soon as these were judged. `Known` is what there is so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from darekit.errors import RecipeError
from darekit.evaluation.judges import Judge
from darekit.searches.baselines import BASE, SINGLE, Baseline
from darekit.searches.blends import Blend, Wish, wish_in
from darekit.searches.data import Limit, Search
from darekit.searches.racing import Bound, Goal
from darekit.searches.sheets import Sheet, firsts_of, mean_of
from darekit.trials.judging import MEAN, judge_in
from darekit.trials.scores import check_known, suggest_score


class Unasked(Exception):
    """A goal is a score that its judge does not give item by item. `judge`: whom to ask as a whole."""

    def __init__(self, judge: str, score: str) -> None:
        super().__init__(f"{score} is not a score of single items")
        self.judge = judge


@dataclass(frozen=True)
class Known:
    """What the baselines have shown so far.

    Attributes:
        scores: of one that was judged in full: what there is.
        whole: judges that are asked as a whole.
        singles: scores of each model alone; None: not all of them were judged yet.
        sheets: answers of the base and of each model alone, by the names that constraints give them.
    """

    scores: Mapping[str, Mapping[str, Any]]
    whole: frozenset[str] = frozenset()
    singles: Sequence[Mapping[str, Mapping[str, Any]]] | None = None
    sheets: Mapping[str, Sheet] = field(default_factory=dict)


# --- before anything is judged


def check_goals(search: Search, judges: Mapping[str, Mapping[str, Judge]], baselines: Sequence[Baseline]) -> None:
    """Complain about goals and constraints that, as is known beforehand, nobody can give. `judges`: split -> name ->
    judge, of those that could be made.

    Raises:
        RecipeError: a judge has no such score; or there is no single model to take shares of.
    """
    for what, name in _wanted(search):
        wish = wish_in(name)
        if wish is not None and wish.relative and not any(one.kind == SINGLE for one in baselines):
            raise RecipeError(
                f"{what}: shares are those of the best single model, but where a recipe has slices no "
                "model is judged alone; leave out `relative`"
            )
        for split, named in judges.items():
            for part in (name,) if wish is None else wish.parts:
                check_known(what, part, named, split)


def _wanted(search: Search) -> Iterable[tuple[str, str]]:
    """(what an error calls it, the score as written) of all goals and constraints."""
    yield from ((_goal_at(search, name), name) for name in search.goals)
    yield from ((_limit_at(search, limit), limit.score) for limit in search.limits)


def _goal_at(search: Search, name: str) -> str:
    return f"{search.places.at('choose')}: {name}"


def _limit_at(search: Search, limit: Limit) -> str:
    return search.places.at("at_least" if limit.least else "at_most", limit.score)


# --- once there are scores


def goals_of(search: Search, known: Known) -> tuple[Goal, ...]:
    """The goals as written -> by the names and directions of the scores that there are.

    Raises:
        Unasked: the score may be among those that the judge gives as a whole.
        RecipeError: there is no such score, none that is better in one direction, or nothing to take a share of.
    """
    asked = search.goals or ((MEAN,) if mean_of(known.scores) is not None else firsts_of(known.scores)[:1])
    return tuple(_goal(search, name, known) for name in asked)


def bounds_of(search: Search, known: Known) -> tuple[Bound, ...]:
    """The constraints likewise. As long as not all single models were judged, they have nothing to refer to."""
    found = []
    for limit in search.limits:
        of = None if known.singles is None else _sheet_of(search, limit, known.sheets)
        wish = wish_in(limit.score)
        if wish is None:
            found.append(Bound(limit, _full(limit.score, known, _limit_at(search, limit)), of))
        else:
            blend = _blend(limit.score, wish, known, _limit_at(search, limit))
            found.append(Bound(limit, blend.name, of, blend))
    return tuple(found)


def _sheet_of(search: Search, limit: Limit, sheets: Mapping[str, Sheet]) -> Sheet | None:
    if limit.of is None:
        return None
    if limit.of not in sheets:
        raise RecipeError(
            f"{_limit_at(search, limit)}: {limit.of} could not be judged, so nothing can be compared with it"
        )
    return sheets[limit.of]


def _goal(search: Search, name: str, known: Known) -> Goal:
    wish = wish_in(name)
    what = _goal_at(search, name)
    if wish is not None:
        blend = _blend(name, wish, known, what)
        return Goal(blend.name, bool(known.scores[next(iter(blend.units))]["higher_is_better"]), blend)
    full = _full(name, known, what)
    higher = known.scores[full]["higher_is_better"]
    if higher is None:
        raise RecipeError(f"{what}: neither more nor less of {full} is better; choose another score")
    return Goal(full, bool(higher))


def _blend(name: str, wish: Wish, known: Known, what: str) -> Blend:
    parts = [_full(part, known, what) for part in wish.parts] or firsts_of(known.scores)
    higher = {known.scores[part]["higher_is_better"] for part in parts}
    if len(higher) > 1 or None in higher:
        of = "the judges' first scores" if not wish.parts else "these scores"
        raise RecipeError(
            f"{what}: {of} do not all point one way; name some that do, as in choose: "
            f"{{{name.partition(' of ')[0]}: [A, B]}}{suggest_score(name, [*known.scores], 'there are')}"
        )
    if wish.least and higher == {False}:
        raise RecipeError(f"{what}: of {parts[0]} less is better, and the least would be the best of all; choose mean")
    units = dict.fromkeys(parts, 1.0)
    for part in parts if wish.relative and known.singles is not None else ():
        values = [float(one[part]["value"]) for one in known.singles or () if part in one]
        units[part] = (max if True in higher else min)(values, default=0.0)
        if units[part] <= 0:
            why = f"has more than 0 in {part}" if values else "could be judged"
            raise RecipeError(
                f"{what}: no model alone {why}, so there is nothing to take a share of; leave out "
                "`relative`, or this score"
            )
    return Blend(name, units, wish.least)


def _full(name: str, known: Known, what: str) -> str:
    """A score's whole name; a judge's name stands for its first score."""
    scores = known.scores
    if name in scores:
        return name
    firsts = [one for one in firsts_of(scores) if judge_in(one) == name]
    if firsts:
        return firsts[0]
    by_item = any(judge_in(one) == judge_in(name) and score["items"] is not None for one, score in scores.items())
    if by_item and judge_in(name) not in known.whole:  # asked as a whole it may give more
        raise Unasked(judge_in(name), name)
    raise RecipeError(f"{what}: {name!r} is not a score{suggest_score(name, [*scores], 'there are')}")


def named_sheets(baselines: Iterable[tuple[Baseline, Sheet]]) -> dict[str, Sheet]:
    """What constraints may name -> its answers."""
    found = {}
    for one, sheet in baselines:
        if one.kind == BASE:
            found["base"] = sheet
        elif one.kind == SINGLE and one.model is not None:
            found[one.model] = sheet
    return found
