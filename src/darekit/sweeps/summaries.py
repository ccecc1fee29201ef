# SPDX-License-Identifier: Apache-2.0
"""What a sweep found: means and standard deviations over seeds, what validation chooses, curves for the plots."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from darekit.errors import RecipeError
from darekit.recipe.essence import is_single
from darekit.sweeps.data import DROP_RATE, SPLITS, UNDROPPED, Axis, Sweep
from darekit.sweeps.store import OK, Finished
from darekit.trials.judging import MEAN, judge_in
from darekit.trials.scores import suggest_score
from darekit.trials.settings import spoken
from darekit.wording import distinct_labels, label


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (None for one run) over mask seeds."""

    mean: float
    deviation: float | None
    runs: int


@dataclass(frozen=True)
class Row:
    """One setting: all its seeds together. `scores`: split -> score's name -> statistic; `alone`: it is one of the
    models, untouched; `beside`: nothing is dropped, beside a row of the grid with a drop rate that is no axis;
    `finished`: its cells."""

    kind: str
    at: Mapping[str, Any]
    models: tuple[str, ...]
    judges: tuple[str, ...]
    scores: Mapping[str, Mapping[str, Statistic]]
    failed: int
    warnings: tuple[str, ...]
    alone: bool
    beside: bool
    finished: tuple[Finished, ...] = field(repr=False, compare=False)

    @property
    def title(self) -> str:
        """For people."""
        if self.kind == "base":
            return f"{label(self.models[0])} (the base)"
        if self.kind == "single":
            return f"{label(self.models[0])} alone"
        models = distinct_labels(self.models)
        parts = [said(name, value, models) for name, value in self.at.items()]
        return ", ".join([*parts, UNDROPPED] if self.beside else parts) or self.kind


@dataclass(frozen=True)
class Summary:
    """Rows in the order of the grid, and the choice.

    Attributes:
        rows: one for each setting.
        score: what settings are chosen by.
        higher: whether more of it is better.
        unlike: what must be said first: there is no mean, and nobody chose a score; empty otherwise.
        directions: score -> whether more is better (None: neither).
        chosen: what validation chooses; None without validation, or where every setting failed.
        by_name: the same for each combination of the named axes, where there are several.
        single: the best of the models alone (by validation, else by test).
        models: short names of the models in the grid's recipes; empty where these differ from cell to cell.
    """

    rows: tuple[Row, ...]
    score: str
    higher: bool
    unlike: str
    directions: Mapping[str, bool | None]
    chosen: Row | None
    by_name: tuple[Row, ...]
    single: Row | None
    models: tuple[str, ...] = ()

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of all scores, in order."""
        return tuple(self.directions)

    @property
    def abilities(self) -> tuple[str, ...]:
        """What a headline shows: the score that settings are chosen by, then each judge's first."""
        firsts = {judge_in(name): name for name in reversed(self.scores) if name != MEAN}
        found = dict.fromkeys((self.score, *(name for name in self.scores if name in firsts.values())))
        return tuple(name for name in found if name)


def summarise(sweep: Sweep, finished: Sequence[Finished]) -> Summary:
    """Cells -> rows and the choice.

    Raises:
        RecipeError: `choose` or `plot.score` names no score that there is.
    """
    check_scores(sweep, finished)
    directions = _directions(sweep, finished)
    rows = _rows(sweep, finished, directions)
    score = sweep.choose or (MEAN if MEAN in directions else next(iter(directions), ""))
    higher = directions.get(score) is not False
    split = _deciding(sweep)
    grid = [row for row in rows if row.kind in ("grid", "undropped")]
    chosen, by_name = None, []
    if split == "validation":
        chosen = _best(grid, split, score, higher)
        named = [axis.name for axis in sweep.axes if axis.setting is None]
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in grid:
            groups.setdefault(tuple(row.at.get(name) for name in named), []).append(row)
        by_name = [best for group in groups.values() if (best := _best(group, split, score, higher))]
    singles = [row for row in rows if row.kind != "base" and row.alone]
    families = {row.models for row in grid}
    return Summary(
        tuple(rows), score, higher, unlike(sweep, directions), directions, chosen,
        tuple(by_name) if len(by_name) > 1 else (),
        _best(singles, split, score, higher), tuple(distinct_labels(families.pop())) if len(families) == 1 else (),
    )  # fmt: skip


def _deciding(sweep: Sweep) -> str:
    """The split by which settings are compared."""
    return "validation" if "validation" in sweep.judges else "test"


def check_scores(sweep: Sweep, finished: Sequence[Finished]) -> None:
    """Complain about scores that a sweep names and its judges do not give, as soon as the cells that are there tell.

    Raises:
        RecipeError: `choose` or `plot.score` is no score; with what there is.
    """
    named = (("choose", sweep.choose, (_deciding(sweep),)), ("plot.score", sweep.layout.score, SPLITS))
    for key, score, splits in named:
        if score is None:
            continue
        asked = SPLITS if score == MEAN else splits
        judges = {name for split in asked for name in sweep.judges.get(split, {})}
        wanted = judges if score == MEAN else judges & {judge_in(score)}
        there = _directions(sweep, finished, asked)
        if not there or score in there or not wanted <= {judge_in(name) for name in there}:
            continue
        at = sweep.places.at(*key.split("."))
        if score == MEAN:
            raise RecipeError(f"{at}: there is no mean of {_ways(there)}; name one of the scores")
        raise RecipeError(f"{at}: {score!r} is not a score{suggest_score(score, [*there], 'there are')}")


def unlike(sweep: Sweep, directions: Mapping[str, bool | None]) -> str:
    """Judges whose first scores do not point one way have no mean: by what is compared then, and what to write."""
    firsts: dict[str, str] = {}
    for name in directions:
        firsts.setdefault(judge_in(name), name)
    if sweep.choose or MEAN in directions or len(firsts) < 2:
        return ""
    by, *others = firsts.values()
    return (
        f"settings are compared by {by} alone, the first judge's: there is no mean of {_ways(directions)}. Write "
        f"which score counts: choose: {others[0]}, for example, or choose: {by} to leave it so"
    )


def _ways(directions: Mapping[str, bool | None]) -> str:
    """Each judge's first score, and which way it is better."""
    ways = {True: "higher is better", False: "lower is better", None: "neither way is better"}
    firsts = {judge_in(name): name for name in reversed([*directions]) if name != MEAN}
    return ", ".join(f"{name} ({ways[directions[name]]})" for name in directions if name in firsts.values())


def unlike_of(sweep: Sweep, finished: Sequence[Finished]) -> str | None:
    """`unlike` of the cells that are there, as soon as every judge has spoken in one; None before."""
    directions = _directions(sweep, finished)
    judges = {name for named in sweep.judges.values() for name in named}
    return unlike(sweep, directions) if judges <= {judge_in(name) for name in directions} else None


def _directions(sweep: Sweep, finished: Sequence[Finished], splits: Sequence[str] = SPLITS) -> dict[str, bool | None]:
    """Score -> whether more is better, of all that cells have on these splits; with their mean, where they have one."""
    found: dict[str, bool | None] = {}
    first: dict[str, bool | None] = {}
    order = dict.fromkeys(name for judges in sweep.judges.values() for name in judges)
    for judge in order:
        for one in finished:
            for scores in (one.outcome.scores.get(split, {}) for split in splits):
                mine = {name: value["higher_is_better"] for name, value in scores.items() if judge_in(name) == judge}
                if mine and one.outcome.status == OK:
                    first.setdefault(judge, next(iter(mine.values())))
                    found |= mine
    if len(first) > 1 and len({*first.values()}) == 1 and None not in first.values():
        return {MEAN: next(iter(first.values())), **found}
    return found


def _rows(sweep: Sweep, finished: Sequence[Finished], directions: Mapping[str, bool | None]) -> list[Row]:
    groups: dict[Any, list[Finished]] = {}
    for one in finished:
        cell = one.cell
        key = (cell.kind if cell.kind in ("single", "base") else "grid", tuple(cell.at.items()),
               tuple(e.model for e in cell.recipe.models), cell.judges)  # fmt: skip
        # The seeds of a setting stand together; what was added undropped has none.
        groups.setdefault((*key, cell.kind == "undropped"), []).append(one)
    return [_row(sweep, group, directions) for group in groups.values()]


def _row(sweep: Sweep, group: Sequence[Finished], directions: Mapping[str, bool | None]) -> Row:
    good = [one for one in group if one.outcome.status == OK]
    scores: dict[str, dict[str, Statistic]] = {}
    for split in SPLITS:
        values: dict[str, list[float]] = {}
        for one in good:
            found = one.outcome.scores.get(split, {})
            for name, score in found.items():
                values.setdefault(name, []).append(score["value"])
            if MEAN in directions and found:
                values.setdefault(MEAN, []).append(mean_of(found))
        if values:
            scores[split] = {name: _statistic(values[name]) for name in directions if name in values}
    cell = group[0].cell
    return Row(
        cell.kind, cell.at, tuple(e.model for e in cell.recipe.models), cell.judges, scores, len(group) - len(good),
        tuple(dict.fromkeys(line for one in group for line in one.outcome.warnings)), is_single(cell.recipe),
        cell.beside, tuple(group),
    )  # fmt: skip


def mean_of(scores: Mapping[str, Mapping[str, Any]]) -> float:
    """Over the judges, of each one's first score."""
    first: dict[str, float] = {}
    for name, score in scores.items():
        first.setdefault(judge_in(name), score["value"])
    return fmean(first.values())


def _statistic(values: Sequence[float]) -> Statistic:
    return Statistic(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def _best(rows: Iterable[Row], split: str, score: str, higher: bool) -> Row | None:
    """The first of the best; a setting of which a seed failed is not chosen."""
    able = [row for row in rows if not row.failed and score in row.scores.get(split, {})]
    return max(able, key=lambda row: (1 if higher else -1) * row.scores[split][score].mean, default=None)


# --- words ---

_TITLES = {
    DROP_RATE: "drop rate p",
    "sparsify.window": "window",
    "sparsify.method": "sparsifier",
    "parameters.lambda": "lambda",
    "parameters.keep": "keep",
    "merge_method": "merge method",
}


def title_of(axis: str, models: Sequence[str] = ()) -> str:
    """What people call an axis. `models`: the short names of a recipe's, where they are the same everywhere.

    >>> title_of("models.0.parameters.weight", ["math", "chat"])
    "math's weight"
    """
    if models and axis.startswith("models.") and not axis.endswith(".model"):
        return spoken(axis, models)
    return _TITLES.get(axis, axis.removeprefix("parameters.").removeprefix("sparsify."))


def said(axis: str, value: Any, models: Sequence[str] = ()) -> str:
    """A place on an axis: `drop rate p 0.9`; a name stands for itself."""
    return value if isinstance(value, str) else f"{title_of(axis, models)} {shown_label(value)}"


def shown_label(value: Any) -> str:
    """A point's label as text."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def shown(statistic: Statistic | None) -> str:
    """`0.987 ± 0.004`; the deviation only where there were several runs."""
    if statistic is None:
        return ""
    spread = "" if statistic.deviation is None else f" ± {_number(statistic.deviation)}"
    return _number(statistic.mean) + spread


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


# --- curves ---


@dataclass(frozen=True)
class Line:
    """One curve: places on the x axis with mean and deviation (None: one run); `rows`: the setting of each."""

    name: str
    points: tuple[tuple[Any, float, float | None], ...]
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Panel:
    """The curves that are compared; `levels`: what they are compared with, name -> value."""

    title: str
    lines: tuple[Line, ...]
    levels: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Figure:
    """One plot. `across`: what people call the x axis; `ticks`: its labels, in order."""

    title: str
    x: str
    across: str
    y: str
    lines: str
    ticks: tuple[Any, ...]
    panels: tuple[Panel, ...]
    runs: int


def figure_of(sweep: Sweep, summary: Summary, split: str) -> Figure | None:
    """The chosen score over the x axis: a line for each point of the lines' axis, a panel for each of the rest."""
    score = sweep.layout.score or summary.score
    x, lines = roles_of(sweep)
    if x is None:
        return None
    rows = [r for r in summary.rows if r.kind == "grid" and x.name in r.at and score in r.scores.get(split, {})]
    if not rows:
        return None
    rest = [axis for axis in sweep.axes if axis not in (x, lines)]
    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault(tuple(row.at.get(axis.name) for axis in rest), [])
    # What an axis does not concern is compared with everything along it, and has a panel only where there is no other.
    whole = [place for place in panels if None not in place]
    panels = {place: [] for place in whole or panels}
    for row in rows:
        for place, members in panels.items():
            if all(row.at.get(axis.name, value) == value for axis, value in zip(rest, place, strict=True)):
                members.append(row)
    drawn = []
    for place, members in panels.items():
        names = list(dict.fromkeys(row.at.get(lines.name) if lines else None for row in members))
        groups = {name: [r for r in members if (r.at.get(lines.name) if lines else None) == name] for name in names}
        curves = tuple(
            Line(
                shown_label(name) if name is not None else "",
                tuple((r.at[x.name], r.scores[split][score].mean, r.scores[split][score].deviation) for r in group),
                tuple(group),
            ) for name, group in groups.items()
        )  # fmt: skip
        title = ", ".join(
            said(axis.name, value, summary.models)
            for axis, value in zip(rest, place, strict=True) if value is not None and len(axis.points) > 1
        )  # fmt: skip
        drawn.append(Panel(title, curves, _levels(summary, members, split, score)))
    runs = max(row.scores[split][score].runs for row in rows)
    return Figure(
        sweep.layout.title or sweep.name, x.name, title_of(x.name, summary.models), f"{score} on {split}",
        title_of(lines.name, summary.models) if lines else "", tuple(point.label for point in x.points), tuple(drawn),
        runs,
    )  # fmt: skip


def roles_of(sweep: Sweep) -> tuple[Axis | None, Axis | None]:
    """The axes along which, and for which, lines are drawn."""
    wide = [axis for axis in sweep.axes if len(axis.points) > 1]
    by_name = {axis.name: axis for axis in sweep.axes}
    numeric = [
        a for a in wide
        if a.name == DROP_RATE or (a.setting is not None and all(isinstance(p.label, int | float) for p in a.points))
    ]  # fmt: skip
    x = by_name.get(sweep.layout.x or "") or next((a for a in numeric if a.name == DROP_RATE), None)
    x = x or next(iter(numeric), None) or next(iter(wide), None)
    others = [axis for axis in wide if axis is not x]
    lines = by_name.get(sweep.layout.lines or "") or next((a for a in others if a.setting is None), None)
    return x, lines or next(iter(others), None)


def _levels(summary: Summary, members: Sequence[Row], split: str, score: str) -> tuple[tuple[str, float], ...]:
    """The base and the best single model, on the judges that this panel's rows were asked by."""
    judges = {row.judges for row in members}
    models = {model for row in members for model in row.models}
    found = []
    sign = 1 if summary.directions.get(score) is not False else -1
    for kind, word in (("single", "best single model"), ("base", "base")):
        rows = [
            r for r in summary.rows
            if r.kind == kind and r.judges in judges and score in r.scores.get(split, {})
            and (kind == "base" or r.models[0] in models)
        ]  # fmt: skip
        if rows and kind == "base":
            found.append((word, fmean(row.scores[split][score].mean for row in rows)))
        elif rows:
            # Chosen as settings are: on validation where there is one.
            by = "validation" if all(score in row.scores.get("validation", {}) for row in rows) else split
            best = max(rows, key=lambda row: sign * row.scores[by][score].mean)
            found.append((word, best.scores[split][score].mean))
    return tuple((word, value) for word, value in found if math.isfinite(value))
