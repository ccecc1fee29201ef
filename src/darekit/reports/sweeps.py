# SPDX-License-Identifier: Apache-2.0
"""The page of a sweep: what validation chose and whether that is better than a model alone, curves, heat maps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from darekit.errors import RecipeError
from darekit.recipe.texts import recipe_text
from darekit.reports.charts import Line, Point, Square, curves, heat_map, ticks_of
from darekit.reports.page import MINUS, Copy, Key, Number, Page, Plot, Section, Table, View
from darekit.sweeps.data import SPLITS, Axis, Sweep
from darekit.sweeps.drawing import draw_sweep
from darekit.sweeps.effects import difference_of
from darekit.sweeps.folders import SweepFolder, read_sweep_folder
from darekit.sweeps.store import FAILED, OK, Finished
from darekit.sweeps.summaries import Figure, Row, Summary, figure_of, roles_of, shown_label, summarise, title_of
from darekit.trials.judging import MEAN, judge_in

_PANELS = 24  # of curves beside each other
CLEAR = 2.0  # standard errors of a difference, from which on it is called one


@dataclass(frozen=True)
class _Found:
    """A folder with what it means."""

    folder: SweepFolder
    summary: Summary
    notes: tuple[str, ...]
    _texts: dict[int, Copy] = field(default_factory=dict, repr=False)

    @property
    def sweep(self) -> Sweep:
        return self.folder.result.sweep

    @property
    def splits(self) -> list[str]:
        """Those with judges: test first, because it is what counts."""
        return [split for split in reversed(SPLITS) if split in self.sweep.judges]

    def copy(self, row: Row) -> Copy:
        """What a click on a setting copies: its recipe, with the first of its seeds. Made once: YAML is slow."""
        if id(row) not in self._texts:
            first = row.finished[0]
            self._texts[id(row)] = Copy(row.title, recipe_text(self.folder.recipes[first.cell.title, first.digest]))
        return self._texts[id(row)]


def sweep_page(folder: Path) -> Page:
    """A folder of `dare sweep` -> its page."""
    found = _read(folder)
    sweep, summary, result = found.sweep, found.summary, found.folder.result
    verdict, tone, details = _verdict(found)
    missing = found.folder.missing
    state = ""
    if missing:
        state = (
            f"{len(result.finished)} of {found.folder.total} cells are done. Run the same `dare sweep` again to "
            "continue; what follows may change."
        )
    return Page(
        "Sweep", sweep.layout.title or sweep.name, verdict, tone, details, state, _numbers(found), _facts(found),
        ("The sweep file", sweep.text), tuple(_sections(found)),
        (*_failures(result.finished), *found.notes, *(f"{note}." for note in result.notes), *_warnings(summary)),
    )  # fmt: skip


def draw_sweep_folder(folder: Path, into: Path) -> list[Path]:
    """The curves of each split, as PNG and SVG."""
    found = _read(folder)
    drawn: list[Path] = []
    for split in found.splits:
        figure = figure_of(found.sweep, found.summary, split)
        if figure is not None:
            drawn += draw_sweep(figure, into / split)
    return drawn


def _read(folder: Path) -> _Found:
    read = read_sweep_folder(folder)
    result = read.result
    try:
        return _Found(read, summarise(result.sweep, result.finished), ())
    except RecipeError as error:  # the score that is to decide is not there yet, or never
        sweep = replace(result.sweep, choose=None)
        read = replace(read, result=replace(result, sweep=sweep))
        return _Found(read, summarise(sweep, result.finished), (f"{error}.",))


# --- numbers with their errors ---


def error_of(row: Row, split: str, score: str) -> float | None:
    """Standard error of a row's mean: of the questions, which all its seeds share, and of the masks; None: unknown."""
    within = [_cell_error(one, split, score) for one in row.finished if one.outcome.status == OK]
    found = row.scores.get(split, {}).get(score)
    if found is None:
        return None
    between = None if found.deviation is None else found.deviation / math.sqrt(found.runs)
    questions = fmean(one for one in within if one is not None) if within and None not in within else None
    return None if questions is None and between is None else math.hypot(questions or 0.0, between or 0.0)


def _cell_error(one: Finished, split: str, score: str) -> float | None:
    scores = one.outcome.scores.get(split, {})
    if score != MEAN:
        return scores.get(score, {}).get("stderr")
    first: dict[str, float | None] = {}
    for name, value in scores.items():
        first.setdefault(judge_in(name), value["stderr"])
    if not first or None in first.values():
        return None
    return math.sqrt(sum((error or 0.0) ** 2 for error in first.values())) / len(first)


def number_of(value: float) -> str:
    """A score for people, with the sign that typographers use."""
    text = f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"
    return text.replace("-", MINUS)


def shown(row: Row | None, split: str, score: str) -> str:
    """`0.955 ± 0.008`: a mean and its standard error."""
    found = None if row is None else row.scores.get(split, {}).get(score)
    if row is None or found is None:
        return "failed" if row is not None and row.failed else ""
    error = error_of(row, split, score)
    return number_of(found.mean) + ("" if error is None else f" ± {number_of(error)}")


# --- the verdict ---


def _verdict(found: _Found) -> tuple[str, str, tuple[str, ...]]:
    summary, sweep = found.summary, found.sweep
    if not any(row.scores for row in summary.rows):
        failed = len(found.folder.result.failed)
        word = f"All {failed} cells that ran have failed." if failed else "No cell is finished yet."
        return word, "bad" if failed else "plain", ()
    details = [f"{summary.unlike}."] if summary.unlike else []
    if summary.chosen is None:
        if "validation" in sweep.judges:
            return "Validation cannot choose: no setting of the grid has finished with all its seeds.", "plain", ()
        details.append("What looks best below was chosen by the numbers that report it, so they are too optimistic.")
        return "Nothing is chosen: the sweep has no judges under `validation:`.", "plain", tuple(details)
    split = found.splits[0]
    chosen, single, score = summary.chosen, summary.single, summary.score
    words = f"Validation chooses {chosen.title}: {score} {shown(chosen, split, score)} on {split}."
    if split != "test":
        details.append("There are no `test:` judges: this number was used to choose, so it is too optimistic.")
    out = found.folder.result.out
    beside, tone = ("", "plain") if single is None else compared(chosen, single, split, score, summary.higher, out)
    if beside:
        details.insert(0, beside)
    return words, tone, tuple(details)


def compared(one: Row, other: Row, split: str, score: str, higher: bool, out: Path | None = None) -> tuple[str, str]:
    """Whether a setting is better than a model alone, in words, and how that is to be taken; row by row, where the
    folder has what each row of data did."""
    mine, theirs = one.scores.get(split, {}).get(score), other.scores.get(split, {}).get(score)
    if mine is None or theirs is None:
        return "", "plain"
    gain = (mine.mean - theirs.mean) * (1 if higher else -1)
    name = f"the best single model, {other.title} ({shown(other, split, score)})"
    errors = error_of(one, split, score), error_of(other, split, score)
    if None in errors:
        way = "better than" if gain > 0 else "no better than"
        return f"By this number it is {way} {name}; without standard errors nobody can say whether by chance.", "plain"
    error, how = math.hypot(*(e or 0.0 for e in errors)), ""
    paired = None if out is None else difference_of(out, one, other, split, score)
    if paired is not None and paired.paired and paired.stderr is not None:
        error, how = paired.stderr, ", row by row"
    size = f"the difference is {number_of(gain)} ± {number_of(error)}{how}"
    if gain > CLEAR * error:
        return f"It is better than {name}: {size}.", "good"
    if gain < -CLEAR * error:
        return f"It is worse than {name}: {size}.", "bad"
    return f"It is no better than {name}: {size}, which may be chance.", "plain"


def _numbers(found: _Found) -> tuple[Number, ...]:
    summary = found.summary
    if not found.splits or not summary.score:
        return ()
    split, score = found.splits[0], summary.score
    rows = [
        ("Chosen", summary.chosen),
        ("Best single model", summary.single),
        ("Base", next((row for row in summary.rows if row.kind == "base"), None)),
    ]
    numbers = [
        Number(f"{what}: {score}, {split}", text, row.title)
        for what, row in rows if row is not None and (text := shown(row, split, score))
    ]  # fmt: skip
    result = found.folder.result
    failed = f"{len(result.failed)} failed" if result.failed else "none failed"
    return (*numbers, Number("Cells", f"{len(result.finished)} of {found.folder.total}", failed))


def _facts(found: _Found) -> tuple[tuple[str, str], ...]:
    sweep, summary = found.sweep, found.summary
    facts = [
        (title_of(axis.name, summary.models), ", ".join(shown_label(point.label) for point in axis.points))
        for axis in sweep.axes
    ]
    if sweep.seeds:
        facts.append(("mask seeds", ", ".join(map(str, sweep.seeds))))
    recipes = [one.cell.recipe for one in found.folder.result.finished]
    models = list(dict.fromkeys(entry.model for recipe in recipes for entry in recipe.models))
    bases = list(dict.fromkeys(recipe.base_model for recipe in recipes if recipe.base_model))
    models = [model for model in models if model not in bases]
    facts += [("base", ", ".join(bases))] if bases else []
    facts += [("models", ", ".join(models))] if models else []
    for split in SPLITS:
        named = sweep.judges.get(split, {})
        if named:
            facts.append((split, "; ".join(f"{name}: {judge_words(spec)}" for name, spec in named.items())))
    if summary.score:
        way = "higher" if summary.higher else "lower"
        facts.append(("chosen by", f"{summary.score}, {way} is better"))
    return tuple(facts)


def judge_words(spec: Any) -> str:
    """A judge in a line."""
    if isinstance(spec, dict):
        return ", ".join(f"{v}" if k in ("data", "python", "command") else f"{k} {v}" for k, v in spec.items())
    return str(spec)


def _failures(finished: Sequence[Finished]) -> Iterator[str]:
    errors: dict[str, list[str]] = {}
    for one in finished:
        if one.outcome.status == FAILED:
            errors.setdefault(one.outcome.error or "no reason given", []).append(one.cell.title)
    for error, titles in errors.items():
        more = "" if len(titles) == 1 else f" and {len(titles) - 1} more"
        yield f"Failed: {titles[0]}{more}: {error}"


def _warnings(summary: Summary) -> Iterator[str]:
    """Each warning once, with the first setting that it was given for."""
    warned: dict[str, list[str]] = {}
    for row in summary.rows:
        for line in row.warnings:
            warned.setdefault(line, []).append(row.title)
    for line, titles in warned.items():
        more = "" if len(titles) == 1 else f" and {len(titles) - 1} more"
        yield f"Warning: {titles[0]}{more}: {line}"


# --- plots and tables ---


def _sections(found: _Found) -> Iterator[Section]:
    summary = found.summary
    drawn = _curves(found)
    if drawn is not None:
        yield Section("Curves", (drawn,))
    if summary.chosen is not None:
        yield Section("The choice", (_choice_table(found),))
    maps = list(_maps(found))
    if maps:
        yield Section("Two settings at once", tuple(maps))
    yield Section("Every setting", (_all(found),))


def _views(found: _Found) -> list[tuple[str, str]]:
    """(score, split) that there are numbers of; the one that decides first."""
    names = list(dict.fromkeys([found.summary.score, *found.summary.scores]))
    return [
        (score, split) for score in names for split in found.splits
        if score and any(score in row.scores.get(split, {}) for row in found.summary.rows)
    ]  # fmt: skip


def _curves(found: _Found) -> Plot | None:
    views, more = [], 0
    for score, split in _views(found):
        sweep = replace(found.sweep, layout=replace(found.sweep.layout, score=score))
        figure = figure_of(sweep, found.summary, split)
        if figure is not None:
            more = max(more, len(figure.panels) - _PANELS)
            figure = replace(figure, panels=figure.panels[:_PANELS])
            views.append(_curves_view(found, figure, score, split))
    if not views:
        return None
    how = "Bars are one standard error, of the questions and of the masks together."
    if more:
        how += f" {_PANELS} of {_PANELS + more} panels are drawn; the table below has all settings."
    x, lines = roles_of(found.sweep)
    assert x is not None
    models = found.summary.models
    title = f"Scores over {title_of(x.name, models)}"
    title += f", a line for each {title_of(lines.name, models)}" if lines else ""
    return Plot(title, how, tuple(views), pointer="Point at a setting for its recipe, click to copy it.")


def _curves_view(found: _Found, figure: Figure, score: str, split: str) -> View:
    names = list(dict.fromkeys(line.name for panel in figure.panels for line in panel.lines))
    levels = list(dict.fromkeys(name for panel in figure.panels for name, _ in panel.levels))
    looks = {name: i for i, name in enumerate([*names, *levels])}
    places, ticks = ticks_of(figure.ticks, [shown_label(tick) for tick in figure.ticks])
    drawn, heights = [], []
    for panel in figure.panels:
        lines = []
        for line in panel.lines:
            points = [
                Point(places[x], mean, says(found, row), found.copy(row), error_of(row, split, score))
                for (x, mean, _), row in zip(line.points, line.rows, strict=True) if x in places
            ]  # fmt: skip
            points.sort(key=lambda point: point.x)
            heights += [point.y + sign * (point.error or 0) for point in points for sign in (-1, 1)]
            lines.append(Line(line.name, tuple(points), looks[line.name]))
        heights += [height for _, height in panel.levels]
        drawn.append((panel, lines))
    y = {"title": f"{score}, {split}", "range": range_of(heights)}
    panels = tuple(
        (panel.title, curves(lines, {"title": figure.across, **ticks}, y,
                             [(name, height, looks[name]) for name, height in panel.levels]))
        for panel, lines in drawn
    )  # fmt: skip
    keys = tuple(Key(name, look, name in names) for name, look in looks.items() if name)
    return View(f"{score}, {split}", panels, keys if len(keys) > 1 else ())


def range_of(heights: Sequence[float]) -> list[float]:
    """One scale for all panels; shares of 1 show all of it."""
    values = [height for height in heights if math.isfinite(height)] or [0.0, 1.0]
    low, high = min(values), max(values)
    if low > -0.05 and 0.5 < high <= 1.1:
        return [-0.03, 1.05]
    room = 0.06 * (high - low or abs(high) or 1)
    return [low - room, high + room]


def says(found: _Found, row: Row) -> tuple[str, ...]:
    """What shows at the pointer above the recipe: the setting and the scores that count."""
    lines = [row.title]
    for score in found.summary.abilities:
        values = [f"{split} {text}" for split in found.splits if (text := shown(row, split, score))]
        lines += [f"{score}: {', '.join(values)}"] if values else []
    runs = len(row.finished)
    return (*lines, f"{runs} seeds") if runs > 1 else tuple(lines)


def _maps(found: _Found) -> Iterator[Plot]:
    wide = [axis for axis in found.sweep.axes if len(axis.points) > 1]
    titles = {axis.name: title_of(axis.name, found.summary.models) for axis in wide}
    views = []
    for (one, other), (score, split) in itertools.product(itertools.combinations(wide, 2), _views(found)):
        figure = _map(found, other, one, score, split)
        if figure is not None:
            name = f"{score}, {split}" + (f": {titles[one.name]} by {titles[other.name]}" if len(wide) > 2 else "")
            views.append(View(name, (("", figure),)))
    if views:
        how = "Each square is the mean over the mask seeds."
        if len(wide) > 2:
            how = "Each square is the best of all settings that share its two values, which the pointer names."
        how += " Settings that one of the two does not concern are not in it."
        title = "Heat map" if len(wide) > 2 else f"{titles[wide[0].name]} by {titles[wide[1].name]}"
        yield Plot(title, how, tuple(views))


def _map(found: _Found, across: Axis, down: Axis, score: str, split: str) -> Any:
    higher = found.summary.directions.get(score) is not False
    best: dict[tuple[str, str], Row] = {}
    for row in found.summary.rows:
        if row.kind != "grid" or across.name not in row.at or down.name not in row.at:
            continue
        mine = row.scores.get(split, {}).get(score)
        if mine is None or not math.isfinite(mine.mean):
            continue
        place = shown_label(row.at[down.name]), shown_label(row.at[across.name])
        if place not in best or (mine.mean > best[place].scores[split][score].mean) == higher:
            best[place] = row
    if not best:
        return None
    values = [row.scores[split][score].mean for row in best.values()]
    squares = {
        place: Square(row.scores[split][score].mean, number_of(row.scores[split][score].mean), says(found, row),
                      found.copy(row))
        for place, row in best.items()
    }  # fmt: skip
    return heat_map(
        [shown_label(p.label) for p in across.points], [shown_label(p.label) for p in down.points], squares,
        title_of(across.name, found.summary.models), title_of(down.name, found.summary.models), score,
        low=min(values), high=max(values), reverse=not higher,
    )  # fmt: skip


def _choice_table(found: _Found) -> Table:
    summary = found.summary
    columns = [
        (score, split) for score in summary.abilities for split in found.splits
        if any(score in row.scores.get(split, {}) for row in summary.rows)
    ]  # fmt: skip
    assert summary.chosen is not None
    lines = [("chosen", summary.chosen)]
    lines += [("best of its kind", row) for row in summary.by_name if row is not summary.chosen]
    lines += [("best single model", summary.single)] if summary.single else []
    lines += [("nothing fine-tuned", row) for row in summary.rows if row.kind == "base"][:1]
    return Table(
        f"Chosen by {summary.score} on validation; ± is one standard error",
        ("setting", "", *(f"{score}, {split}" for score, split in columns)),
        tuple((row.title, what, *(shown(row, split, score) for score, split in columns)) for what, row in lines),
        2, tuple(found.copy(row) for _, row in lines), (0,), False,
    )  # fmt: skip


def _all(found: _Found) -> Table:
    summary = found.summary
    columns = _views(found)
    rows = []
    for row in summary.rows:
        runs = max((one.runs for scores in row.scores.values() for one in scores.values()), default=0)
        count = f"{runs}" + (f", {row.failed} failed" if row.failed else "")
        rows.append((row.title, count, *(shown(row, split, score) for score, split in columns)))
    strong = tuple(i for i, row in enumerate(summary.rows) if row is summary.chosen)
    title = "Every setting with every score; ± is one standard error"
    header = ("setting", "runs", *(f"{score}, {split}" for score, split in columns))
    return Table(title, header, tuple(rows), 1, tuple(found.copy(row) for row in summary.rows), strong)
