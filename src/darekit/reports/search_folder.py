# SPDX-License-Identifier: Apache-2.0
"""A folder of `dare search`, read: its trials as far as they are written, and its summary where there is one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from darekit.errors import OutputError
from darekit.searches.folders import FORMAT, RECORD, SUMMARY, TRIALS
from darekit.trials.settings import all_spoken

_PART = re.compile(r"(.+)\[([^\]]+)\]$")


@dataclass(frozen=True)
class Goal:
    """A score that a search is to raise or lower."""

    score: str
    higher: bool


@dataclass(frozen=True)
class Trial:
    """A candidate or a baseline that was judged.

    Attributes:
        number: of a candidate; None for a baseline.
        name: of a baseline.
        state: complete, stopped or failed.
        params: dimension -> value.
        recipe: as data.
        scores: of the last rung: name -> {value, stderr, ...}.
        rungs: (share of the items, scores, goal -> difference to the opponent) of each rung.
        feasible: whether the constraints hold; None where there are none, or where it is unknown.
        error: why it failed.
    """

    number: int | None
    name: str
    state: str
    params: Mapping[str, Any]
    recipe: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, Any]]
    rungs: tuple[tuple[float, Mapping[str, Any], Mapping[str, Any]], ...]
    feasible: bool | None
    error: str | None

    @property
    def title(self) -> str:
        """What it is called."""
        return self.name if self.number is None else f"trial {self.number}"

    @property
    def share(self) -> float:
        """Of the items it was asked."""
        return self.rungs[-1][0] if self.rungs else 1.0

    def value(self, score: str) -> float:
        """A score of the last rung; NaN where there is none."""
        return number(self.scores.get(score, {}).get("value"))

    def error_of(self, score: str) -> float | None:
        """Its standard error."""
        found = self.scores.get(score, {}).get("stderr")
        return None if found is None else float(found)


@dataclass(frozen=True)
class SearchFolder:
    """What `dare search` has left in a folder so far.

    Attributes:
        name: of the search.
        trials: the candidates, by number.
        baselines: what they are compared with, in the order in which they were judged.
        goals: what was searched for; the first is drawn first.
        space: dimension -> {low, high, log, step} or {choices}.
        question: what was asked, in the words of `summary.json`.
        summary: what was found; empty while it is not written.
        text: of the search file; empty where it is not known.
        names: dimension -> what people call it; of control points and groups also their setting.
    """

    name: str
    trials: tuple[Trial, ...]
    baselines: tuple[Trial, ...]
    goals: tuple[Goal, ...]
    space: Mapping[str, Mapping[str, Any]]
    question: Mapping[str, Any]
    summary: Mapping[str, Any]
    text: str = ""
    names: Mapping[str, str] = field(default_factory=dict)

    def called(self, dimension: str) -> str:
        """What people call a dimension: `shift's weight`."""
        return self.names.get(dimension, dimension)

    def best(self) -> Trial | None:
        """The trial that validation chose."""
        chosen = (self.summary.get("best") or {}).get("trial")
        return next((one for one in self.trials if one.number == chosen), None) if chosen is not None else None


def number(value: Any) -> float:
    """A number, or NaN where a file has none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def read_search_folder(out: Path) -> SearchFolder:
    """`search.json`, `trials.jsonl` and `summary.json` -> the search so far.

    Raises:
        OutputError: a file cannot be read or is something else.
    """
    asked, summary = _json(out / RECORD), _json(out / SUMMARY)
    found = [*_trials(out / TRIALS).values()]
    question = {**asked, **(summary.get("question") or {})}
    for split in ("validation", "test"):  # with what judges, where the record has more than names
        question[split] = asked.get(split) or question.get(split)
    space = {str(key): dict(one) for key, one in dict(question.get("space") or {}).items() if isinstance(one, Mapping)}
    trials = tuple(sorted((one for one in found if one.number is not None), key=lambda one: one.number or 0))
    baselines = tuple(one for one in found if one.number is None)
    goals = tuple(
        Goal(str(one["score"]), one.get("higher_is_better") is not False)
        for one in question.get("goals") or () if isinstance(one, Mapping) and "score" in one
    )  # fmt: skip
    settings = [*space, *(name for one in trials for name in one.params)]
    settings = [*dict.fromkeys(part for name in settings for part in (name, name.partition("[")[0]))]
    names = all_spoken(settings, question.get("recipe"))
    composed = {str(one.get("name")): dict(one.get("validation") or {}) for one in summary.get("baselines") or ()}
    # Goals that are made of several scores are known when all baselines are: the summary has them.
    baselines = tuple(replace(one, scores={**composed.get(one.name, {}), **one.scores}) for one in baselines)
    name = str(summary.get("name") or asked.get("name") or asked.get("search") or out.resolve().name)
    return SearchFolder(name, trials, baselines, goals or _goals(found, question), space, question, summary,
                        str(asked.get("text") or ""), names)  # fmt: skip


def _goals(found: list[Trial], question: Mapping[str, Any]) -> tuple[Goal, ...]:
    """Where no summary says: what was asked for, as far as it has scores by that name; the mean, or the first score."""
    names: dict[str, Any] = {}
    for one in found:
        names = {**one.scores, **names}
    asked = [str(name) for name in question.get("choose") or () if name in names]
    if asked:
        return tuple(Goal(name, names[name].get("higher_is_better") is not False) for name in asked)
    name = "mean" if "mean" in names else next(iter(names), None)
    return () if name is None else (Goal(name, names[name].get("higher_is_better") is not False),)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        if found.get("format") != FORMAT:
            raise ValueError(f"format {found.get('format')}, expected {FORMAT}")
        return found
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise OutputError(f"{path} is not what `dare search` writes ({error})") from None


def _trials(path: Path) -> dict[Any, Trial]:
    """The last line of each trial and each baseline. A line that a kill cut short is none."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from None
    found: dict[Any, Trial] = {}
    for at, line in enumerate(raw[: raw.rfind(b"\n") + 1].splitlines(), 1):
        try:
            one = _trial(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(f"{path} line {at} is not a trial ({error!r}): remove that line") from None
        found[one.name if one.number is None else one.number] = one
    return found


def _trial(data: Mapping[str, Any]) -> Trial:
    rungs = tuple(
        (number(rung.get("share")), dict(rung.get("scores") or {}), dict(rung.get("differences") or {}))
        for rung in data.get("rungs") or ()
    )
    return Trial(
        None if data.get("trial") is None else int(data["trial"]), str(data.get("name") or ""), str(data["state"]),
        dict(data.get("params") or {}), dict(data.get("recipe") or {}), dict(data.get("scores") or {}), rungs,
        data.get("feasible"), data.get("error"),
    )  # fmt: skip


def parts_of(params: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Settings that vary over depth or groups of tensors: setting -> control point or group -> number.

    >>> parts_of({"models.0.parameters.weight[0]": 1.0, "models.0.parameters.weight[1]": 0.5, "seed": 3})
    {'models.0.parameters.weight': {'0': 1.0, '1': 0.5}}
    """
    found: dict[str, dict[str, float]] = {}
    for name, value in params.items():
        match = _PART.match(name)
        if match and math.isfinite(number(value)):
            found.setdefault(match[1], {})[match[2]] = float(value)
    return found
