# SPDX-License-Identifier: Apache-2.0
"""What a search has found, in numbers and in words: chosen on validation, reported on test, compared item by item."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from darekit.recipe import Recipe, read_recipe
from darekit.searches.asking import COMPLETE, FAILED, STOPPED
from darekit.searches.baselines import BASE, Baseline
from darekit.searches.blends import Blend, Difference
from darekit.searches.data import TRIALS as DEFAULT
from darekit.searches.data import Search
from darekit.searches.folders import BEST, FORMAT, SUMMARY, TRIAL, Folder, Line
from darekit.searches.racing import Goal
from darekit.searches.sheets import difference
from darekit.searches.space import dimension_data
from darekit.searches.standings import Standings, hypervolume
from darekit.trials.files import write_whole
from darekit.trials.judging import asked_again, found_in, search_of
from darekit.trials.settings import data_of
from darekit.wording import and_, brief
from darekit.wording.notebooks import shown_as_html

INTERVAL = 1.959963984540054  # standard errors: 95 %, two-sided

AS_WRITTEN = "recipe as written"
ROLES = ("best single model", "best plain merge", AS_WRITTEN)


@dataclass(frozen=True)
class SearchResult:
    """What a search has found.

    Attributes:
        out: the folder of the results.
        summary: what `summary.json` holds.
        best: the best recipe; None where nothing could be chosen.
        interrupted: whether it was stopped before its end.
    """

    out: Path
    summary: Mapping[str, Any]
    best: Recipe | None
    interrupted: bool

    def __repr__(self) -> str:
        return brief(self, f"{self.summary['name']}, {self.summary['verdict'][0]}")

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdict, and the best beside the baselines."""
        best = self.summary["best"]
        rows = [("best", best)] if best else []
        rows += [(one["name"], one) for one in self.summary["baselines"]]
        columns = [
            (goal["score"], split) for goal in self.summary["question"]["goals"] for split in ("validation", "test")
        ]
        shown = [(name, *(_shown((one.get(split) or {}).get(score)) for score, split in columns)) for name, one in rows]
        return shown_as_html(
            self.summary["verdict"][0], [("results", str(self.out)), ("page", f'dk.report("{self.out}")')],
            header=("recipe", *(f"{score}, {split}" for score, split in columns)), rows=shown,
            notes=self.summary["verdict"][1:],
        )  # fmt: skip


def write_summary(
    search: Search, folder: Folder, standings: Standings, baselines: Sequence[Baseline],
    rivals: tuple[Line | None, Line | None, Line | None], *, interrupted: bool, reused: int, seconds: float,
) -> SearchResult:  # fmt: skip
    """Work out what was found, and write `summary.json` and `best.yaml`. `rivals`: with whom the best is compared, in
    the order of `ROLES`."""
    best = standings.best
    single, plain, _ = rivals
    found = _Found(search, folder, standings, best, rivals, interrupted)
    summary = {
        "format": FORMAT,
        "name": search.name,
        "question": _question(search, standings),
        "counts": _counts(search, standings, folder, reused),
        "baselines": [found.baseline(one) for one in baselines],
        "best": None if best is None else found.candidate(best) | {"test": found.tested(best)},
        "front": [found.candidate(one) for one in standings.front] if len(standings.goals) > 1 else [],
        "hypervolume": _hypervolume(standings) if len(standings.goals) > 1 else None,
        "best_single": None if single is None else single.name,
        "best_plain": None if plain is None else plain.name,
        "differences": found.differences(),
        "verdict": found.verdict(),
        "test_looks": sum(bool(one.get("chosen")) for one in folder.tests()),
        "notes": list(search.notes),
        "seconds": round(seconds, 3),
    }
    write_whole(folder.out / SUMMARY, json.dumps(summary, indent=1) + "\n")
    recipe = None
    if best is not None:
        recipe = read_recipe(best.recipe)
        write_whole(folder.out / BEST, _best_text(search, folder, best, summary))
    return SearchResult(folder.out, summary, recipe, interrupted)


def _question(search: Search, standings: Standings) -> dict[str, Any]:
    return {
        "recipe": data_of(search.recipe),
        "space": dimension_data(search.knobs),
        "goals": [{"score": goal.score, "higher_is_better": goal.higher} for goal in standings.goals],
        "constraints": [
            {"score": bound.score, "bound": bound.limit.factor, "of": bound.limit.of, "least": bound.limit.least}
            for bound in standings.bounds
        ],
        "sampler": search.sampler,
        "seed": search.seed,
        "rungs": [round(share, 4) for share in search.rungs],
        "trials": search.trials or DEFAULT,
        "validation": [*search.judges["validation"]],
        "test": [*search.judges.get("test", {})],
    }


def _counts(search: Search, standings: Standings, folder: Folder, reused: int) -> dict[str, Any]:
    """How many candidates there were, and how many items they were asked. Equal candidates are asked once."""
    lines = [line for line in standings.lines if line.kind == TRIAL]
    there = {line.digest for line in standings.lines if line.kind != TRIAL and line.state == COMPLETE}
    once = {line.digest: line for line in lines if line.state in (COMPLETE, STOPPED) and line.digest not in there}
    items = sum(line.items for line in once.values())
    full = max((line.items for line in standings.lines if line.state == COMPLETE), default=0)
    return {
        "trials": len(lines),
        **{state: sum(line.state == state for line in lines) for state in (COMPLETE, STOPPED, FAILED)},
        "reused": len(lines) - len(once) - sum(line.state == FAILED for line in lines),
        "items": items,
        "items_without_rungs": full * len(once),
        "saved": round(1 - items / (full * len(once)), 4) if full and once else 0.0,
    }


def _hypervolume(standings: Standings) -> float | None:
    """Of the front, above the base (without one, above the worst that was judged)."""
    signs = [1 if goal.higher else -1 for goal in standings.goals]

    def point(line: Line) -> tuple[float, ...]:
        return tuple(s * standings.value(line, goal) for s, goal in zip(signs, standings.goals, strict=True))

    complete = standings.judged
    if not complete:
        return None
    base = next((point(one) for one in complete if one.name == BASE), None)
    worst = base or tuple(min(values) for values in zip(*map(point, complete), strict=True))
    return float(hypervolume([point(one) for one in standings.front], worst))


@dataclass(frozen=True)
class _Found:
    """Numbers and words about one choice."""

    search: Search
    folder: Folder
    standings: Standings
    best: Line | None
    rivals: tuple[Line | None, Line | None, Line | None]
    interrupted: bool

    @property
    def split(self) -> str:
        """What the report is about: the test data, as soon as the choice was asked them and they tell of each goal."""
        tested = None if self.best is None else self.tested(self.best)
        return "validation" if tested is None or self._untold(tested) else "test"

    def _untold(self, tested: Mapping[str, Any]) -> list[str]:
        """Goals of which the test judges gave no score: they may name their scores differently."""
        return [goal.score for goal in self.standings.goals if goal.score not in tested]

    def candidate(self, line: Line) -> dict[str, Any]:
        return {"trial": line.trial, "name": line.name, "params": dict(line.params), "recipe": dict(line.recipe),
                "validation": dict(line.scores)}  # fmt: skip

    def baseline(self, one: Baseline) -> dict[str, Any]:
        line = next((x for x in self.standings.lines if x.name == one.name), None)
        scores = dict(line.scores) if line else {}
        return {"name": one.name, "kind": one.kind, "recipe": one.recipe.to_data(), "validation": scores,
                "test": self.tested(line) if line else None, "error": line.error if line else None}  # fmt: skip

    def tested(self, line: Line) -> dict[str, Any] | None:
        """A candidate's scores on the test data; None where it was not asked them."""
        sheet = self.folder.sheet(line.digest, "test")
        blends = [goal.blend for goal in self.standings.goals if goal.blend is not None]
        return None if sheet is None else sheet.scores(self.search.judges.get("test", {}), blends)

    def compared(self, other: Line, score: str | Blend) -> Difference | None:
        """The best minus another, in one score."""
        assert self.best is not None
        first, second = (self.folder.sheet(one.digest, self.split) for one in (self.best, other))
        return None if first is None or second is None else difference(first, second, score)

    def differences(self) -> list[dict[str, Any]]:
        if self.best is None:
            return []
        found = []
        for role, other in zip(ROLES, self.rivals, strict=True):
            for goal in self.standings.goals if other is not None and other.digest != self.best.digest else ():
                assert other is not None
                one = self.compared(other, goal.measure)
                if one is not None:
                    found.append({
                        "against": other.name, "role": role, "score": goal.score, "split": self.split,
                        "value": one.value, "stderr": one.stderr, "interval": _interval(one),
                        "better": _better(one, goal),
                    })  # fmt: skip
        return found

    def _reported(self) -> Mapping[str, Any]:
        """The best's scores on the split that the report is about."""
        assert self.best is not None
        tested = self.tested(self.best) if self.split == "test" else None
        return self.best.scores if tested is None else tested

    # --- words

    def verdict(self) -> list[str]:
        """The headline, then what belongs to it."""
        lines = [line for line in self.standings.lines if line.kind == TRIAL]
        count = f"{len(lines)} candidate{'s' * (len(lines) != 1)}"
        if self.best is None:
            why = " keeps the constraints" if self.standings.bounds else " could be judged in full"
            none = f"Nothing was chosen: of {count} and the baselines, none{why}."
            return [none, *self._failures(lines), *self._limits()]
        head = self._opening(count)
        head += self._abilities()
        head += [self._sentence(one) for one in self.differences()]
        tested = self.tested(self.best)
        if tested is not None and self._untold(tested):
            head.append(
                f"The judges under `test:` give no {and_(self._untold(tested))}, only {and_([*tested])}: what was "
                "chosen cannot be reported. Validation scores flatter what was chosen by them."
            )
        elif self.split == "validation" and "test" in self.search.judges:
            head.append("The test data have not been used yet. Validation scores flatter what was chosen by them.")
        elif self.split == "test" and set(self.search.judges["test"]) <= {*asked_again(self.search.judges)}:
            head.append("`test:` asks just what `validation:` asks: these scores flatter what was chosen by them.")
        elif self.split == "validation":
            head.append("There are no judges under `test:`: validation scores flatter what was chosen by them.")
        looks = sum(bool(one.get("chosen")) for one in self.folder.tests())
        if looks > 1:
            head.append(
                f"The test data were used for {looks} choices, as the search went on after a report: the more often, "
                "the less they say."
            )
        head += self._failures(lines)
        if self.interrupted:
            head.append(f"Interrupted after {count}; run the same command to continue.")
        return [*head, *self._limits()]

    def _failures(self, lines: Sequence[Line]) -> list[str]:
        """How many candidates failed, and why the first did."""
        failed = [line for line in lines if line.state == FAILED]
        if not failed:
            return []
        why = (failed[0].error or "no reason given").splitlines()[0].rstrip(":. ")
        many = f"{len(failed)} candidates failed; the first, trial {failed[0].trial}"
        return [
            f"{many if len(failed) > 1 else f'Trial {failed[0].trial} failed'}: {why}. trials.jsonl has each reason."
        ]

    def _opening(self, count: str) -> list[str]:
        """What was chosen, or that there was nothing to choose by."""
        assert self.best is not None
        who = f"trial {self.best.trial}" if self.best.kind == TRIAL else str(self.best.name)
        if self.best is self.rivals[ROLES.index(AS_WRITTEN)]:
            who = f"the {AS_WRITTEN}"
        judged = self.standings.judged
        trials = [line for line in judged if line.kind == TRIAL]
        stopped = any(line.state == STOPPED for line in self.standings.lines)  # by scores that were worse
        if self._same(judged) and not stopped:
            counts = [(len(trials), "candidate"), (len(judged) - len(trials), "baseline")]
            told = " and ".join(f"{number} {word}{'s' * (number > 1)}" for number, word in counts if number)
            return [
                f"Nothing was found: the scores do not tell {told} apart. All have {self._values(judged[0])} on "
                "validation.",
                f"best.yaml holds {who}, for want of a better one.", self._suspicion(),
            ]  # fmt: skip
        head = [self._headline(who)]
        if self.best.kind != TRIAL:
            head = [f"None of {count} beats {who}. {head[0]}", "The space, or the number of trials, may be too small."]
        if self._same(trials) and not stopped:
            head.append(f"All candidates have {self._values(trials[0])}: what was varied makes no difference.")
        return head

    def _same(self, lines: Sequence[Line]) -> bool:
        """Whether several candidates have the same scores."""
        return len(lines) > 1 and len({tuple(self.standings.values(line).values()) for line in lines}) == 1

    def _values(self, line: Line) -> str:
        return ", ".join(f"{name} {value:.3f}" for name, value in self.standings.values(line).items())

    def _suspicion(self) -> str:
        """What to look at where all scores are equal."""
        assert self.best is not None
        scores = [self.best.scores[goal.score] for goal in self.standings.goals]
        if all(score["value"] == 0 and score["higher_is_better"] for score in scores):
            return (
                "Not even a model alone does anything right: does the judge ask as these models were trained to be "
                "asked? `dare eval MODEL --samples DIR` shows their answers."
            )
        return (
            "A judge that gives all models the same score asks for what all of them can do, or does not look at them."
        )

    def _headline(self, who: str) -> str:
        scores = self._reported()
        told = ", ".join(f"{goal.score} {_shown(scores[goal.score])}" for goal in self.standings.goals)
        found = [one for one in self.differences() if one["score"] == self.standings.goals[0].score]
        on = f"on {self.split}: {told}"
        if self.split == "validation":  # by which it was chosen: no comparison there is fair
            return f"Best on validation: {who}, {told}."
        worse = [one for one in found if one["better"] is False]
        unclear = [one for one in found if one["better"] is None]
        if len(self.standings.goals) > 1:
            return f"Best compromise: {who}, {on}."
        if worse:
            return f"Best on validation: {who}, but it is worse than {_rival(worse[0])} {on}."
        if unclear:
            names = " or ".join(dict.fromkeys(_rival(one) for one in unclear))
            return f"Best: {who}, {on}. It is no better than {names}, as far as these data can tell."
        if not found:
            return f"Best: {who}, {on}."
        return f"Best: {who}, {on}. It is better than {and_(list(dict.fromkeys(map(_rival, found))))}."

    def _abilities(self) -> list[str]:
        """Each judge's first score, where the goal is made of several: a mean hides one that is lost."""
        scores = self._reported()
        names = [name for goal in self.standings.goals if goal.blend is not None for name in goal.blend.units]
        told = [f"{name} {_shown(scores[name])}" for name in dict.fromkeys(names) if name in scores]
        return [f"One by one on {self.split}: {', '.join(told)}."] if told else []

    def _sentence(self, one: Mapping[str, Any]) -> str:
        sign = "+" if one["value"] >= 0 else ""
        role = f" ({one['role']})" if one["role"] != AS_WRITTEN else ""
        text = f"Against {_rival(one)}{role}: {one['score']} {sign}{one['value']:.3f}"
        if one["interval"] is None:
            return f"{text}, with an unknown error."
        low, high = one["interval"]
        words = {True: "better", False: "worse", None: "no better, as far as these data can tell"}[one["better"]]
        return f"{text} (95 % interval {low:+.3f} to {high:+.3f}, item by item): {words}."

    def _limits(self) -> list[str]:
        """Which constraints nobody, or not even the choice, keeps for sure."""
        found = []
        for bound in self.standings.bounds:
            told = []
            for split in ("validation", "test") if bound.of is None else ("validation",):
                sheet = None if self.best is None else self.folder.sheet(self.best.digest, split)
                margin = None if sheet is None else bound.margin(sheet)
                if margin is not None:
                    error = f" ± {margin.stderr:.3f}" if margin.stderr is not None else ""
                    kept = "kept" if margin.value >= 0 else "missed"
                    told.append(f"{kept} on {split}, by {abs(margin.value):.3f}{error}")
            found.append(
                f"Constraint {bound.limit.told}: {'; '.join(told)}." if told else f"Constraint: {bound.limit.told}."
            )
        return found


def _rival(one: Mapping[str, Any]) -> str:
    """With whom something is compared, in a sentence."""
    return f"the {AS_WRITTEN}" if one["role"] == AS_WRITTEN else str(one["against"])


def _interval(one: Difference) -> list[float] | None:
    return None if one.stderr is None else [one.value - INTERVAL * one.stderr, one.value + INTERVAL * one.stderr]


def _better(one: Difference, goal: Goal) -> bool | None:
    interval = _interval(one)
    if interval is None or interval[0] <= 0 <= interval[1]:
        return None
    return (one.value > 0) == goal.higher


def _shown(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    return f"{score['value']:.3f}" + (f" ± {score['stderr']:.3f}" if score["stderr"] is not None else "")


# --- best.yaml ---


def _best_text(search: Search, folder: Folder, best: Line, summary: Mapping[str, Any]) -> str:
    """The recipe, with what it is in comments. Models on this machine are named by their whole paths, so that the file
    means the same from everywhere."""
    who = f"trial {best.trial}" if best.kind == TRIAL else f"the baseline {best.name}"
    notes = [f"{who} of {search.name}, chosen on validation", *summary["verdict"]]
    notes += [f"{name} = {value}" for name, value in best.params.items()]
    for split in ("validation", "test"):
        for name, score in (summary["best"][split] or {}).items():
            notes.append(f"{split}: {name} {_shown(score)}")
    comments = "".join(f"# {line}\n" for note in notes for line in note.splitlines())
    data = _located(dict(best.recipe), [*search_of(search.recipe, search.search)])
    return comments + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)


_NAMES = ("model", "base_model", "stats")
_SOURCES = ("tokenizer_source", "heads", "source")  # which may also be one of these words:
_WORDS = ("base", "union")


def _located(data: Any, folders: Sequence[Path], stages: tuple[str, ...] = ()) -> Any:
    """A recipe's data with the whole paths of models that are here. `stages`: names of other recipes in it."""
    if isinstance(data, list):
        return [_located(value, folders, stages) for value in data]
    if not isinstance(data, Mapping):
        return data
    stages += tuple(data["stages"]) if isinstance(data.get("stages"), Mapping) else ()
    found = {}
    for key, value in data.items():
        if isinstance(value, str) and key in (*_NAMES, *_SOURCES):
            is_word = value in stages or (key in _SOURCES and value in _WORDS)
            found[key] = value if is_word else _place(value, folders)
        else:
            found[key] = _located(value, folders, stages)
    return found


def _place(name: str, folders: Sequence[Path]) -> str:
    found = Path(found_in(name, folders))
    return str(found.resolve()) if found.exists() else name
