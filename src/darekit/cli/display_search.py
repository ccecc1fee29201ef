# SPDX-License-Identifier: Apache-2.0
"""What `dare search` shows: how far it is while it runs, the verdict at its end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from darekit.cli import tables
from darekit.cli.display import LINES_EVERY, counted, left_told, print_table, time_of
from darekit.cli.pace import Pace

if TYPE_CHECKING:
    from darekit.searches.baselines import Baseline
    from darekit.searches.data import Knob, Search
    from darekit.searches.folders import Line
    from darekit.searches.verdicts import SearchResult
    from darekit.searches.working import Status

ENOUGH = 3  # candidates after which it can be said how long the others will take: some are stopped early, some not
_PHASES = {"baselines": "judging the baselines", "search": "searching", "test": "evaluating on test data"}
_UNITS = {"baselines": "baseline", "search": "candidate", "test": "model"}


@contextmanager
def watched(*, quiet: bool) -> Iterator[Callable[[Status], None] | None]:
    """Watch a search on standard error: a few lines that change where that is a terminal, else a line for each
    baseline, each candidate that takes the lead, and one every half minute."""
    if quiet:
        yield None
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    from rich.live import Live

    screen = _Screen()
    with Live(console=console, transient=True, refresh_per_second=4, get_renderable=screen.render):
        yield screen


class _Course:
    """How long the phase that a search is in will still take."""

    def __init__(self) -> None:
        self._phase = ""
        self._pace = Pace()
        self._ends: float | None = None

    def note(self, status: Status, now: float) -> bool:
        """Something was finished, or a phase began -> whether it is one that has not been seen."""
        new = status.phase != self._phase
        if new:
            self._phase = status.phase
            begun = status.done - (status.fresh is not None)
            self._pace = Pace(begun, status.at_once, max(ENOUGH, status.at_once))
        if status.fresh is None or status.fresh.seconds > 0:  # equal to another one, it took no time
            self._pace.note(status.done, now)
        self._ends = None if status.seconds_left is None else now + status.seconds_left
        return new

    def left(self, status: Status, now: float) -> str:
        """In words; nothing as long as it is not known."""
        found = self._pace.left(status.total - status.done, now)
        if found is not None and self._ends is not None:
            found = min(found, max(0.0, self._ends - now))
        return left_told(found)


class _Lines:
    """Where there is no terminal."""

    def __init__(self) -> None:
        self._said = time.monotonic()
        self._best: Line | None = None
        self._course = _Course()

    def __call__(self, status: Status) -> None:
        now = time.monotonic()
        line = status.fresh
        new = self._course.note(status, now)
        if line is None:
            if new and status.total:
                self._tell(f"{_PHASES[status.phase]}: {counted(status.total, _UNITS[status.phase])}", now)
            return
        if status.phase == "search":
            leads = status.best is not None and (self._best is None or status.best.key != self._best.key)
            self._best = status.best
            if not leads and now - self._said < LINES_EVERY and status.done < status.total:
                return
        told = f"{status.done}/{status.total} {line.title}: {outcome(line, status.score)}"
        if status.phase == "search" and status.best is not None:
            told += f"; best so far: {status.best.title}, {_value(status.best, status.score)}"
        self._tell(told + self._course.left(status, now), now)

    def _tell(self, text: str, now: float) -> None:
        self._said = now
        print(text, file=sys.stderr, flush=True)


class _Screen:
    """Where there is one: how far, who leads, what was saved, what came last."""

    def __init__(self) -> None:
        self._status: Status | None = None
        self._course = _Course()
        self._last: Line | None = None

    def __call__(self, status: Status) -> None:
        self._course.note(status, time.monotonic())
        self._last = status.fresh or self._last
        self._status = status

    def render(self) -> Any:
        """What is shown now."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        status = self._status
        if status is None:
            return Text("opening models")
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            _PHASES[status.phase], ProgressBar(status.total or 1, status.done, width=30),
            f"{status.done}/{counted(status.total, _UNITS[status.phase])}"
            f"{self._course.left(status, time.monotonic())}",
        )  # fmt: skip
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim")
        facts.add_column(overflow="ellipsis", no_wrap=True)
        if status.phase == "search":
            if status.best is not None:
                facts.add_row("  best", f"{status.best.title}: {_value(status.best, status.score)}")
            facts.add_row("  so far", _so_far(status.lines))
        if self._last is not None:
            facts.add_row("  last", f"{self._last.title}: {outcome(self._last, status.score)}")
        return Group(bar, facts)


def outcome(line: Line, score: str) -> str:
    """What came of one, in words."""
    if line.state == "failed":
        return f"failed: {line.error.splitlines()[0].rstrip(': ') if line.error else 'no reason given'}"
    value = _value(line, score)
    if line.state == "stopped":
        return f"stopped after {line.items} items{f', {value}' if value else ''}"
    return value or "done"


def _value(line: Line, score: str) -> str:
    name = score or ("mean" if "mean" in line.scores else next(iter(line.scores), ""))
    return f"{name} {scored(line.scores[name])}" if name in line.scores else ""


def scored(score: Mapping[str, Any]) -> str:
    """A score with its standard error."""
    return f"{score['value']:.3f}" + (f" ± {score['stderr']:.3f}" if score.get("stderr") is not None else "")


def _so_far(lines: Sequence[Line]) -> str:
    trials = [line for line in lines if line.kind == "trial"]
    counts = {state: sum(line.state == state for line in trials) for state in ("complete", "stopped", "failed")}
    full = max((line.items for line in lines if line.state == "complete"), default=0)
    asked = sum(line.items for line in trials)
    saved = f", {1 - asked / (full * len(trials)):.0%} of the items saved" if trials and full else ""
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    return f"{counts['complete']} judged in full, {counts['stopped']} stopped{failed}{saved}"


def show_result(result: SearchResult, *, as_json: bool) -> None:
    """The verdict first, then the numbers behind it, and what to do with it."""
    summary = result.summary
    if as_json:
        print(json.dumps(summary))
        return
    head, *rest = summary["verdict"]
    word, _, sentence = head.partition(": ")
    better = [one["better"] for one in summary["differences"]]
    colour = "green" if better and all(better) else "yellow"
    tables.print_headline(word, sentence, colour) if sentence else print(tables.wrapped(head))
    for line in rest:
        print(tables.wrapped(line, "  ", "  "))
    print()
    _show_scores(summary)
    best = summary["best"]
    from darekit.trials.settings import all_spoken

    if best is not None and best["params"]:
        names = all_spoken([*best["params"]], summary["question"]["recipe"])
        values = "; ".join(f"{names[name]} {_number(value)}" for name, value in best["params"].items())
        tables.print_facts([("recipe", values)])
    counts = summary["counts"]
    asked = f"{counts['complete']} in full, {counts['stopped']} stopped, {counts['failed']} failed"
    reused = f", {counts['reused']} equal to others" if counts["reused"] else ""
    saved = f"; {counts['saved']:.0%} of {counts['items_without_rungs']} items saved" if counts["items"] else ""
    front = f"{len(summary['front'])} undominated candidates" if summary["front"] else ""
    volume = f", hypervolume {summary['hypervolume']:.4g}" if summary["hypervolume"] is not None else ""
    tables.print_facts([
        ("judged", f"{counted(counts['trials'], 'candidate')}: {asked}{reused}{saved}"),
        ("front", f"{front}{volume}" if front else ""),
        ("took", time_of(summary["seconds"])),
    ])  # fmt: skip
    merge = f"; dare merge {result.out / 'best.yaml'} MERGED writes the model" if best is not None else ""
    print(f"Wrote {result.out}: trials.jsonl, summary.json{merge}")


def _show_scores(summary: Mapping[str, Any]) -> None:
    """Baselines, and what was chosen: the goals on both splits, then every judge's first score on validation."""
    goals = [goal["score"] for goal in summary["question"]["goals"]]
    rows = [(one["name"], one["validation"], one["test"], one["error"]) for one in summary["baselines"]]
    best = summary["best"]
    if best is not None and best["trial"] is not None:
        rows.append((f"trial {best['trial']}", best["validation"], best["test"], None))
    tested = any(test for _, _, test, _ in rows)
    places = [(goal, split) for goal in goals for split in (("validation", "test") if tested else ("validation",))]
    firsts = dict.fromkeys(name for _, scores, _, _ in rows for name in _firsts(scores))
    places += [(name, "validation") for name in firsts if name not in goals]
    heads = [f"{name}, {split}" if name in goals else name for name, split in places]
    cells = []
    for title, validation, test, error in rows:
        found = {"validation": validation or {}, "test": test or {}}
        values = [scored(found[split][name]) if name in found[split] else "" for name, split in places]
        cells.append((title, *(["failed", *values[1:]] if error else values)))
    for part in tables.side_by_side(["", *heads], cells):
        print_table(part)
        print()


def _firsts(scores: Mapping[str, Any]) -> list[str]:
    found: dict[str, str] = {}
    for name in scores:
        found.setdefault(name.partition("/")[0], name)
    return [*found.values()]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_space(search: Search, baselines: Sequence[Baseline], *, as_json: bool) -> None:
    """What a search would do."""
    from darekit.searches.points import first_points
    from darekit.searches.space import dimension_data
    from darekit.trials.settings import data_of, models_in

    space = dimension_data(search.knobs)
    written, given, spread = first_points(search)
    if as_json:
        print(json.dumps({
            "space": space, "baselines": [one.name for one in baselines], "goals": list(search.goals),
            "constraints": [str(limit) for limit in search.limits], "sampler": search.sampler,
            "notes": list(search.notes), "first": [*written, *given, *spread],
        }))  # fmt: skip
        return
    print(f"Dry run, nothing is written: {len(space)} dimensions, searched by {search.sampler}")
    for note in search.notes:
        print(tables.wrapped(f"note: {note}", "  "))
    print()
    models = models_in(data_of(search.recipe))
    rows = [(_setting(knob, models), _range(space[knob.dimensions[0]])) for knob in search.knobs]
    print_table(tables.table_of(("setting", "range"), rows, 2))
    print()
    own = f"{counted(len(given), 'candidate')} of the file" if given else ""
    others = f"{len(spread)} spread over the space" if spread else ""
    tables.print_facts([
        ("baselines", "; ".join(one.name for one in baselines)),
        ("first", ", ".join(filter(None, ("the recipe as written" if written else "", own, others)))),
        ("goals", ", ".join(search.goals) or _goal_of(search)),
        ("constraints", "; ".join(limit.told for limit in search.limits)),
        ("rungs", ", ".join(f"{share:.0%}" for share in search.rungs)),
    ])  # fmt: skip


def _setting(knob: Knob, models: Sequence[str]) -> str:
    """A line of the space, and how many dimensions it has."""
    from darekit.trials.settings import spoken

    groups = f", each of {', '.join(knob.groups)}" if knob.groups else ""
    return f"{spoken(knob.name, models)}{groups}" + (f", {knob.layers} points over depth" if knob.layers else "")


def _goal_of(search: Search) -> str:
    """What candidates are chosen by where the file does not say."""
    judges = list(search.judges["validation"])
    if len(judges) == 1:
        return f"the first score of {judges[0]}"
    return f"mean, of the first scores of {', '.join(judges)}"


def _range(one: Mapping[str, Any]) -> str:
    if "choices" in one:
        return " | ".join(one["choices"])
    more = f", in steps of {one['step']:g}" if one["step"] else ", logarithmic" if one["log"] else ""
    return f"{one['low']:g} to {one['high']:g}{more}"
