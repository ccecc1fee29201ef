# SPDX-License-Identifier: Apache-2.0
"""The page of a search: was anything gained, how it went, what mattered."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from darekit.recipe.texts import recipe_text
from darekit.reports.drawing import draw_search
from darekit.reports.inspections import pulls
from darekit.reports.page import MINUS, Copy, Number, Page, Plot, Section, Table
from darekit.reports.search_folder import SearchFolder, Trial, number, read_search_folder
from darekit.reports.search_plots import (
    Found,
    by_importance,
    course,
    dimensions,
    front,
    importances,
    levels_of,
    outcome_of,
    over_depth,
    parallels,
    rungs,
    scored,
    slices,
)
from darekit.reports.sweeps import judge_words, number_of
from darekit.searches.asking import COMPLETE, FAILED, STOPPED
from darekit.searches.folders import MODELS, SUMMARY
from darekit.wording import label

_ROLES = {"best_single": "best single model", "best_plain": "best plain merge"}
_WRITTEN = "as written"


def search_page(folder: Path) -> Page:
    """A folder of `dare search` -> its page."""
    found = Found(read_search_folder(folder))
    read = found.folder
    verdict, tone, details = _verdict(read)
    state, known = "", number((read.summary.get("counts") or {}).get("trials"))
    if known < len(read.trials):
        state = (
            f"{_counted(read)} so far, and {SUMMARY} knows {known:.0f} of them: the search is still running, or "
            "was killed. The verdict is from before; run the same `dare search` again for a new one."
        )
    if not read.summary:
        state = (
            f"{_counted(read)} so far, and no {SUMMARY} yet: the search is running, or was killed. Run the same "
            "`dare search` again to continue; what follows may change."
        )
    notes = [*_failures(read.trials), *_failures(read.baselines), *map(str, read.summary.get("notes") or ())]
    return Page(
        "Search", read.name, verdict, tone, details, state, tuple(_numbers(found)), tuple(_facts(read)),
        ("The search file", read.text) if read.text else None, tuple(_sections(found, pulls(folder / MODELS))),
        tuple(notes),
    )  # fmt: skip


def draw_search_folder(folder: Path, into: Path) -> list[Path]:
    """Scores over trials, and over each setting, as PNG and SVG."""
    read = read_search_folder(folder)
    drawn: list[Path] = []
    for at, goal in enumerate(read.goals):
        stem = "trials" if at == 0 else f"trials-{at + 1}"
        points = [(one.number or 0, one.value(goal.score), one.state == COMPLETE) for one in read.trials]
        points = [point for point in points if math.isfinite(point[1])]
        if not points:
            continue
        levels = [(one.name, one.value(goal.score)) for one in levels_of(read, goal)]
        slices = []
        for name in dimensions(read):
            pairs = [(one.params[name], one.value(goal.score), one.state == COMPLETE) for one in read.trials
                     if name in one.params and math.isfinite(one.value(goal.score))]  # fmt: skip
            slices.append((read.called(name), pairs, bool(read.space.get(name, {}).get("log"))))
        drawn += draw_search(points, levels, slices, goal.score, goal.higher, into, stem)
    return drawn


# --- words ---


def _counted(read: SearchFolder) -> str:
    count = len(read.trials)
    return f"{count} trial{'' if count == 1 else 's'}"


def _verdict(read: SearchFolder) -> tuple[str, str, tuple[str, ...]]:
    words = [str(line) for line in read.summary.get("verdict") or ()]
    if not words:
        goal = read.goals[0] if read.goals else None
        able = [one for one in read.trials if goal and one.state == COMPLETE and math.isfinite(one.value(goal.score))
                and one.feasible is not False]  # fmt: skip
        if goal is None or not able:
            return "No trial is complete yet.", "plain", ()
        best = (max if goal.higher else min)(able, key=lambda one: one.value(goal.score))
        line = f"Best so far on validation: {best.title}, {goal.score} {scored(best.scores[goal.score])}."
        return line, "plain", ("Scores used for choosing are too optimistic; test scores come only at the end.",)
    better = [one.get("better") for one in read.summary.get("differences") or () if one.get("split") == "test"]
    found = (read.summary.get("best") or {}).get("trial") is not None  # else a baseline is the best of all
    tone = "bad" if False in better else "good" if found and better and all(better) else "plain"
    return words[0], tone, tuple(words[1:])


def _named(best: Mapping[str, Any]) -> str:
    """What the best is called: a trial, or a baseline that nothing beats."""
    return str(best.get("name")) if best.get("trial") is None else f"trial {best['trial']}"


def _numbers(found: Found) -> Iterator[Number]:
    read = found.folder
    best = read.summary.get("best") or {}
    plain = {str(one.get("name")): one for one in read.summary.get("baselines") or ()}
    for goal in read.goals[:1]:
        for what, scores, note in (
            ("Best", best, _named(best)),
            *((f"{role[0].upper()}{role[1:]}", plain.get(str(read.summary.get(key)), {}), str(read.summary.get(key)))
              for key, role in _ROLES.items()),
        ):  # fmt: skip
            for split in ("test", "validation"):
                text = scored((scores.get(split) or {}).get(goal.score))
                if text:
                    yield Number(f"{what}: {goal.score}, {split}", text, note)
                    break
    counts = {state: sum(one.state == state for one in read.trials) for state in (COMPLETE, STOPPED, FAILED)}
    note = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    saved = number((read.summary.get("counts") or {}).get("saved"))
    note += f"; rungs saved {100 * saved:.0f} % of the items" if saved > 0 else ""
    yield Number("Trials", f"{len(read.trials)}", note)
    volume = number(read.summary.get("hypervolume"))
    if math.isfinite(volume):
        yield Number("Hypervolume", f"{volume:.4g}", f"of {len(read.summary.get('front') or ())} on the front")


def _facts(read: SearchFolder) -> Iterator[tuple[str, str]]:
    question = read.question
    ways = {True: "higher is better", False: "lower is better"}
    if read.goals:
        yield "goals" if len(read.goals) > 1 else "goal", "; ".join(f"{g.score}, {ways[g.higher]}" for g in read.goals)
    recipe = question.get("recipe")
    if isinstance(recipe, Mapping):
        models = [one["model"] if isinstance(one, Mapping) else one for one in recipe.get("models") or ()]
        yield from [("base", str(recipe["base_model"]))] if recipe.get("base_model") else []
        yield from [("models", ", ".join(map(str, models)))] if models else []
    for one in question.get("constraints") or ():
        of = f" of {label(str(one['of']))}" if one.get("of") else ""
        yield "constraint", f"{one.get('score')} at {'least' if one.get('least') else 'most'} {one.get('bound')}{of}"
    yield from _space(read)
    for key in ("sampler", "seed"):
        if question.get(key) is not None:
            yield key, str(question[key])
    if question.get("rungs"):
        yield "rungs", ", ".join(f"{100 * number(share):.0f} %" for share in question["rungs"]) + " of the items"
    for split in ("validation", "test"):
        named = question.get(split)
        if isinstance(named, Mapping):
            yield split, "; ".join(f"{name}: {judge_words(spec)}" for name, spec in named.items())
        elif named:
            yield split, ", ".join(map(str, named))
    looks = read.summary.get("test_looks")
    if looks is not None:
        yield "test used", f"for {looks} choice{'' if looks == 1 else 's'}"


def _space(read: SearchFolder) -> Iterator[tuple[str, str]]:
    """Each dimension and its range; control points and groups of one setting, with one range, in one line."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, one in read.space.items():
        if "choices" in one:
            words = ", ".join(map(str, one["choices"]))
        else:
            extra = [f"step {one['step']:g}"] if one.get("step") else []
            extra += ["log scale"] if one.get("log") else []
            words = ", ".join([f"{one.get('low')} to {one.get('high')}".replace("-", MINUS), *extra])
        setting, bracket, part = name.partition("[")
        rows.setdefault((setting, words), []).append(part.removesuffix("]") if bracket else "")
    for (setting, words), parts in rows.items():
        points = len(parts) > 1 and all(part.isdecimal() for part in parts)
        told = f", {len(parts)} points over depth" if points else f", {', '.join(parts)}" if any(parts) else ""
        yield read.called(setting) + told.replace("][", " point "), words


def _failures(trials: Sequence[Trial]) -> Iterator[str]:
    errors: dict[str, list[str]] = {}
    for one in trials:
        if one.state == FAILED:
            errors.setdefault(one.error or "no reason given", []).append(one.title)
    for error, titles in errors.items():
        more = "" if len(titles) == 1 else f" and {len(titles) - 1} more"
        yield f"Failed: {titles[0]}{more}: {error}"


def _sections(found: Found, together: Sequence[Plot | Table]) -> Iterator[Section]:
    read = found.folder
    gained = [table for table in (_compared(found), _differences(read)) if table]
    if gained:
        yield Section("What was gained", tuple(gained))
    if not read.trials:
        return
    went = [plot for plot in (course(found), rungs(found)) if plot]
    if went:
        yield Section("How it went", tuple(went))
    ahead = front(found) if len(read.goals) > 1 else None
    if ahead:
        yield Section("Several goals", (ahead,))
    plot, measured, lead = importances(found)
    names = by_importance(found, measured)
    parts = [one for one in (plot, slices(found, names), parallels(found, names)) if one]
    if parts:
        yield Section("What mattered", tuple(parts), lead)
    depth = list(over_depth(found))
    if depth:
        yield Section("Over depth and groups", tuple(depth))
    if together:
        yield Section("How the models pull against each other", tuple(together))
    yield Section("Every trial", (_all(found),))


# --- tables ---


def _compared(found: Found) -> Table | None:
    """The best beside every baseline."""
    read = found.folder
    best = read.summary.get("best")
    rows: list[tuple[str, Mapping[str, Any], Any]] = [("best", best, best.get("recipe"))] if best else []
    rows += [(str(one.get("name")), one, one.get("recipe")) for one in read.summary.get("baselines") or ()]
    if not rows:
        rows = [(one.name, {"validation": one.scores, "error": one.error}, one.recipe) for one in read.baselines]
    if not rows:
        return None
    goals = [goal.score for goal in read.goals]
    names = dict.fromkeys(
        name for _, one, _ in rows for split in ("test", "validation") for name in one.get(split) or {}
    )
    firsts = [name for name in names if name in goals]
    columns = [
        (name, split) for name in [*firsts, *(n for n in names if n not in firsts)] for split in ("test", "validation")
        if any(scored((one.get(split) or {}).get(name)) for _, one, _ in rows)
    ]  # fmt: skip
    lines = tuple(
        (f"best: {_named(one)}" if one is best else name,
         *("failed" if one.get("error") else scored((one.get(split) or {}).get(score)) for score, split in columns))
        for name, one, _ in rows
    )  # fmt: skip
    copies = tuple(Copy(line[0], recipe_text(recipe)) if recipe else None for line, (*_, recipe) in
                   zip(lines, rows, strict=True))  # fmt: skip
    title = "The best and what it is compared with; ± is one standard error"
    header = ("recipe", *(f"{score}, {split}" for score, split in columns))
    return Table(title, header, lines, 1, copies, (0,) if best else (), False)


def _differences(read: SearchFolder) -> Table | None:
    rows = []
    for one in read.summary.get("differences") or ():
        ends = [number(end) for end in one.get("interval") or ()]
        better = {True: "better", False: "worse", None: "may be chance"}[one.get("better")]
        interval = f"{number_of(ends[0])} to {number_of(ends[1])}" if len(ends) == 2 else ""
        role = _ROLES.get(str(one.get("role")), str(one.get("role") or ""))
        rows.append((str(one.get("against")), role, str(one.get("score")), str(one.get("split")), better,
                     scored(one), interval))  # fmt: skip
    if not rows:
        return None
    title = "The best minus each baseline, item by item"
    header = ("against", "", "score", "split", "the best is", "difference", "95 % interval")
    return Table(title, header, tuple(rows), 5, (), (), False)


def _all(found: Found) -> Table:
    read = found.folder
    names = dimensions(read)
    chosen = (read.summary.get("best") or {}).get("trial")
    rows = tuple(
        (one.title, outcome_of(one) + (", breaks a constraint" if one.feasible is False else ""),
         *(scored(one.scores.get(goal.score)) for goal in read.goals), *(_setting(one.params.get(n)) for n in names))
        for one in read.trials
    )  # fmt: skip
    strong = tuple(i for i, one in enumerate(read.trials) if one.number == chosen)
    header = ("trial", "outcome", *(f"{goal.score}, validation" for goal in read.goals), *map(read.called, names))
    copies = tuple(found.copy(one) for one in read.trials)
    return Table("Every trial; ± is one standard error", header, rows, 2, copies, strong)


def _setting(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}".replace("-", MINUS) if isinstance(value, float) else str(value)
