# SPDX-License-Identifier: Apache-2.0
"""Running a search: baselines first, then candidates in rounds, then the test data for what was chosen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from darekit.errors import DataError, PlanError, RecipeError
from darekit.pools.clusters import cluster_of, open_pool, require_ray
from darekit.pools.processes import Lost, Pool
from darekit.recipe import Recipe
from darekit.recipe.essence import essence
from darekit.searches.asking import COMPLETE, FAILED, STOPPED, Answer, Asker, Rung, Task
from darekit.searches.baselines import BASE, PLAIN, SINGLE, Baseline, baselines_of
from darekit.searches.data import TRIALS, Search
from darekit.searches.folders import BASELINE, LEASES, TRIAL, Folder, Line, claim, line_of, remember
from darekit.searches.leases import HELD, Leases, wait_a_little
from darekit.searches.racing import Bound, is_feasible
from darekit.searches.reading import read_search
from darekit.searches.sheets import Sheet
from darekit.searches.space import Tensors, bind, candidate, dimension_data
from darekit.searches.standings import Standings, Unasked, bounds_of, goals_of, named_sheets
from darekit.searches.studies import Study, require_optuna
from darekit.searches.verdicts import SearchResult, write_summary
from darekit.trials.identities import judges_identity, samples_of, trial_digest
from darekit.trials.judging import check_judges, make_judges, search_of
from darekit.trials.models import Place, origins_in, shared_threads
from darekit.trials.settings import data_of, recipe_with

Make = Callable[[frozenset[str]], Callable[[], Callable[[Task], Answer]]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Status:
    """How far a search is, for whoever watches.

    Attributes:
        phase: baselines, search, or test.
        done: candidates (or baselines, or models on test data) that are finished.
        total: of how many.
        lines: all that was judged so far.
        best: of these, the best; None as long as there is none.
        score: the goal by which it is.
        fresh: what has just been judged; None at the beginning of a phase.
    """

    phase: str
    done: int
    total: int
    lines: Sequence[Line] = ()
    best: Line | None = None
    score: str = ""
    fresh: Line | None = None


Watch = Callable[[Status], None]


def search(
    source: str | Path | Mapping[str, Any] | Search,
    out: str | Path,
    *,
    trials: int | None = None,
    seconds: float | None = None,
    jobs: int | None = None,
    ray: str | bool | None = None,
    gpus_per_worker: float | None = None,
    threads: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    watch: Watch | None = None,
    say: Say | None = None,
) -> SearchResult:
    """Search for the best recipe: candidates are judged in a live model, and no checkpoint is written.

    A search that was killed goes on when it is called again, and several processes may work on one folder.

    Args:
        source: a search file, its data, or a `Search`.
        out: the folder of the results. One that belongs to another search is refused.
        trials: how many candidates, all runs together; what the file says if not given.
        seconds: begin no candidate after so long.
        jobs: processes, or workers on a cluster; each holds one model. If not given one, on a cluster as many as it
            has room for.
        ray: work on a Ray cluster: its address, or True for one that is there or else a new one on this machine.
        gpus_per_worker: of a cluster; one where it has some if not given.
        threads: worker threads that merge in each process.
        device: cpu, cuda or mps; the fastest available if not given.
        dtype: number format to compute in; float32 on a CPU if not given.
        watch: called as things are judged.
        say: receives notes as they arise.

    Returns:
        What was found; `summary.json` holds the same.

    Raises:
        DarekitError: the search cannot be run. A candidate that fails is recorded, and does not stop the others.

    Examples:
        >>> search = {
        ...     "recipe": "recipe.yaml",
        ...     "space": {"parameters.lambda": {"low": 0.2, "high": 1.5}},
        ...     "validation": {"sums": {"data": "sums.jsonl"}},
        ...     "test": {"sums": {"data": "sums.jsonl"}},
        ... }
        >>> result = dk.search(search, "found", trials=3, device="cpu")
        >>> result.summary["counts"]["trials"]
        3
        >>> report = dk.merge("found/best.yaml", "best")
    """
    found = source if isinstance(source, Search) else read_search(source)
    if jobs is not None and jobs < 1:
        raise PlanError(f"jobs must be at least 1, found {jobs}")
    cluster = cluster_of(ray, gpus_per_worker, jobs)
    if cluster is not None:
        require_ray()
    require_optuna(found.sampler)
    folders = search_of(found.recipe, found.search)
    written = recipe_with(found.recipe, {}, set(), None)
    place = Place(folders, device, dtype, shared_threads(threads, jobs or 1), origins_in([written]))

    def make(whole: frozenset[str]) -> Callable[[], Callable[[Task], Answer]]:
        return partial(Asker, found.name, found.judges, found.search, place, whole)

    return run(
        found, Path(out), make=make, pool=lambda work: open_pool(work, jobs, cluster), trials=trials, seconds=seconds,
        dtype=dtype, watch=watch, say=say,
    )  # fmt: skip


def check_search(found: Search, out: Path, *, dtype: str | None = None) -> tuple[Search, tuple[Baseline, ...]]:
    """What a run would do, with every mistake that is found before a model is built: the search with all its ranges,
    and the baselines. Nothing is written, and no data of lm-eval's tasks are loaded.

    Raises:
        DarekitError: the search cannot be run.
    """
    require_optuna(found.sampler)
    folders = search_of(found.recipe, found.search)
    check_judges(found.name, found.judges, found.search)
    baselines = baselines_of(found)
    samples_of([one.recipe for one in baselines], folders)
    bound, _ = bind(found, recipe_with(found.recipe, {}, set(), None), folders)
    return bound, baselines


def run(
    found: Search,
    out: Path,
    *,
    make: Make,
    pool: Callable[[Any], AbstractContextManager[Pool]],
    trials: int | None = None,
    seconds: float | None = None,
    dtype: str | None = None,
    watch: Watch | None = None,
    say: Say | None = None,
    leases: Callable[[Path], Leases] = Leases,
) -> SearchResult:
    """`search`, with whatever judges. `make`: names of the judges that are asked as a whole -> what makes the work of
    one place; `pool`: opens the places for it."""
    began = time.perf_counter()
    folders = search_of(found.recipe, found.search)
    # Mistakes in judges are found before anything runs; each place makes its own.
    judged = judges_identity(found.judges, make_judges(found.name, found.judges, found.search), found.search)
    baselines = baselines_of(found)
    inputs = samples_of([one.recipe for one in baselines], folders)
    bound, tensors = bind(found, recipe_with(found.recipe, {}, set(), None), folders)
    if trials is not None:
        bound = replace(bound, trials=trials)
    record = claim(out, _asked(bound, inputs, judged, dtype))
    remember(out, record)
    folder = Folder(out)

    def digest(recipe: Recipe, whole: frozenset[str]) -> str:
        return trial_digest(recipe, inputs, {"judges": judged, "whole": {"names": sorted(whole)}}, dtype)

    whole = frozenset(record.get("whole", ()))
    with leases(out / LEASES) as held:
        for note in bound.notes:
            if say:
                say(note)
        while True:
            with pool(make(whole)) as places:
                work = _Work(
                    bound, tensors, folder, held, places, whole, digest, watch or _ignore, say or _ignore, began
                )
                try:
                    return work.run(baselines, seconds)
                except Unasked as missing:
                    whole |= {missing.judge}
                    remember(out, record | {"whole": sorted(whole)})


def _ignore(_: Any) -> None:
    """Nobody watches."""


def _asked(search: Search, inputs: Mapping[str, str], judged: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """What makes results go together, and what people want to read of it."""
    return {
        "name": search.name,
        "text": search.text,
        "recipe": data_of(search.recipe),
        "space": dimension_data(search.knobs),
        "choices": {knob.name: knob.choices for knob in search.knobs if knob.choices is not None},
        "weights_sum": search.weights_sum,
        "choose": list(search.goals),
        "limits": [str(limit) for limit in search.limits],
        "sampler": {"name": search.sampler, "seed": search.seed},
        "rungs": [round(share, 6) for share in search.rungs],
        "validation": search.judges["validation"],
        "test": search.judges.get("test", {}),
        "content of judges": judged,
        "content of models": dict(inputs),
        "dtype": dtype,
    }


class _Work:
    """One process's part in a search."""

    def __init__(
        self, search: Search, tensors: Tensors, folder: Folder, leases: Leases, pool: Pool, whole: frozenset[str],
        digest: Callable[[Recipe, frozenset[str]], str], watch: Watch, say: Say, began: float,
    ) -> None:  # fmt: skip
        self.search, self.tensors, self.folder, self.leases, self.pool = search, tensors, folder, leases, pool
        self.whole, self._digest, self.watch, self.say, self.began = whole, digest, watch, say, began
        self.bounds: tuple[Bound, ...] = ()
        self.reused = self.total = self._done = 0
        self._failed: set[str] = set()
        self._feasible: dict[str | int, bool | None] = {}

    def digest(self, recipe: Recipe) -> str:
        return self._digest(recipe, self.whole)

    # --- the whole of it

    def run(self, baselines: Sequence[Baseline], seconds: float | None) -> SearchResult:
        interrupted = False
        try:
            judged = self._judge_baselines(baselines)
        except KeyboardInterrupt:
            self.say("interrupted before the baselines were judged; the same command goes on")
            raise
        scores = next((line.scores for _, line in judged if line.state == COMPLETE), None)
        if scores is None:
            first = judged[0][1]
            raise DataError(f"{self.search.name}: no baseline could be judged; {first.title}: {first.error}")
        self.goals = goals_of(self.search, scores, self.whole)
        read = ((one, self.folder.sheet(line.digest)) for one, line in judged if line.state == COMPLETE)
        sheets = [(one, sheet) for one, sheet in read if sheet is not None]
        self.bounds = bounds_of(self.search, scores, self.whole, named_sheets(sheets))
        self._feasible = {one.name: is_feasible(sheet, self.bounds) for one, sheet in sheets}
        self.study = Study(self.search, self.goals, self.folder.out, self.leases)
        try:
            self._search(seconds)
        except KeyboardInterrupt:
            interrupted = True
        standings = self.standings()
        singles = standings.best_of([one.name for one in baselines if one.kind in (SINGLE, BASE)])
        plain = standings.best_of([one.name for one in baselines if one.kind == PLAIN])
        if not interrupted and "test" in self.search.judges:
            try:
                self._test([one for one in (standings.best, singles, plain) if one is not None])
            except KeyboardInterrupt:
                interrupted = True
        return write_summary(
            self.search, self.folder, standings, baselines, singles, plain, interrupted=interrupted, reused=self.reused,
            seconds=time.perf_counter() - self.began,
        )  # fmt: skip

    def standings(self) -> Standings:
        """Who leads, with what other processes have found so far."""
        lines = (
            replace(line, feasible=self._feasible.get(line.key)) if line.kind == BASELINE else line
            for line in self.folder.lines
        )
        return Standings(self.goals, self.bounds, tuple(lines))

    # --- baselines

    def _judge_baselines(self, baselines: Sequence[Baseline]) -> list[tuple[Baseline, Line]]:
        """All of them, in order. Where other processes work on some, these are waited for."""
        told = False
        while True:
            known = {line.name: line for line in self.folder.lines if line.kind == BASELINE}
            digests = {one.name: self.digest(one.recipe) for one in baselines}
            there = {n: one for n, one in known.items() if n in digests and one.digest == digests[n]}
            # One that failed is tried once more by each run: the reason may have been memory.
            left = [
                one
                for one in baselines
                if one.name not in there or (there[one.name].state == FAILED and one.name not in self._failed)
            ]
            if not left:
                return [(one, there[one.name]) for one in baselines]
            mine = [one for one in left if self.leases.take(f"baseline-{digests[one.name]}")]
            if not mine:
                if not told:
                    self.say(f"waiting for another process, which judges {left[0].name}")
                told = True
                wait_a_little()
                continue
            self._status("baselines", len(baselines) - len(left), len(baselines))
            tasks = [Task(essence(one.recipe), look=True) for one in mine]
            done = len(baselines) - len(left)
            for at, answer in self._answers(tasks):
                one = mine[at]
                line = line_of(BASELINE, one.name, answer, {}, one.recipe.to_data(), digests[one.name], None)
                self.folder.add(line, answer.sheet)
                self.leases.release(f"baseline-{digests[one.name]}")
                if line.state == FAILED:
                    self._failed.add(one.name)
                    self.say(f"{one.name} failed: {line.error}")
                for warning in line.warnings:
                    self.say(f"{one.name}: {warning}")
                done += 1
                self._status("baselines", done, len(baselines), line)

    # --- candidates

    def _search(self, seconds: float | None) -> None:
        total = self.search.trials or TRIALS
        if self.search.sampler == "grid":
            count = self.study.fill_grid()
            total = min(self.search.trials or count, count)
        told = False
        self.total = total
        while True:
            orphans = self.study.take_orphans(self._settle)
            for number in orphans:
                self.say(f"trial {number} was left by a process that died; its candidate is given again")
            counts = self.study.counts()
            left = total - counts.done - counts.running
            if seconds is not None and time.perf_counter() - self.began > seconds and counts.done:
                return
            if left > 0:
                self._round(min(left, self.search.round or self.pool.size))
                told = False
                continue
            if not counts.running:
                return
            if not told:
                self.say(f"waiting for {counts.running} trial{'s' * (counts.running > 1)} of other processes")
            told = True
            wait_a_little()

    def _round(self, size: int) -> None:
        """Candidates that are asked for at once, judged against what is known now, and told in order: so it does not
        matter how many work at the same time, nor who is first."""
        race = self.standings().race(self.folder)
        self._done = self.study.counts().done
        trials = [self.study.ask() for _ in range(size)]
        told: set[int] = set()
        try:
            found: list[tuple[Recipe | None, str, str | None]] = [self._candidate(trial.params) for trial in trials]
            known = self.folder.known()
            answers: dict[int, Answer] = {}
            todo: dict[str, int] = {}  # digest -> the first candidate of it
            for at, (_, digest, error) in enumerate(found):
                if error is not None:
                    answers[at] = Answer(FAILED, error=error)
                elif digest in known:
                    answers[at] = _again(known[digest], self.folder)
                else:
                    todo.setdefault(digest, at)
            tasks = [
                Task(essence(recipe), rungs=self.search.rungs, race=race, params=trials[at].params)
                for at in todo.values()
                if (recipe := found[at][0]) is not None
            ]
            self.reused += sum(error is None for _, _, error in found) - len(tasks)
            for i, answer in self._answers(tasks):
                at = list(todo.values())[i]
                answers[at] = answer
                self._keep(trials[at], answer, *found[at][:2])  # at once: the others may take long
            for at, trial in enumerate(trials):
                recipe, digest, _ = found[at]
                first = todo.get(digest, at)
                answer = answers[first]
                if first != at or digest not in todo:
                    self._keep(trial, answer, recipe, digest)
                self.study.tell(trial.number, answer, self._violations(answer), digest)
                told.add(trial.number)
        finally:
            for trial in trials:
                if trial.number not in told and not self._settle(trial.number):
                    self.study.give_back(trial)

    def _settle(self, number: int) -> bool:
        """Tell what is written down of a candidate that was judged, but not told -> whether there is something."""
        line = next((one for one in self.folder.lines if one.kind == TRIAL and one.trial == number), None)
        if line is None:
            return False
        answer = _again(line, self.folder)
        self.study.tell(number, answer, self._violations(answer), line.digest)
        return True

    def _candidate(self, params: Mapping[str, Any]) -> tuple[Recipe | None, str, str | None]:
        """Its recipe and digest; or why there is none."""
        try:
            recipe = candidate(self.search, params, self.tensors)
        except RecipeError as error:
            return None, "", str(error)
        return recipe, self.digest(recipe), None

    def _keep(self, trial: Any, answer: Answer, recipe: Recipe | None, digest: str) -> None:
        feasible = is_feasible(answer.sheet, self.bounds) if answer.state == COMPLETE else None
        data = {} if recipe is None else recipe.to_data()
        line = line_of(TRIAL, trial.number, answer, trial.params, data, digest, feasible)
        self.folder.add(line, answer.sheet)
        if answer.state == FAILED:
            self.say(f"trial {trial.number} failed: {answer.error}")
        self._done += 1
        self._status("search", self._done, self.total, line)

    def _violations(self, answer: Answer) -> list[float] | None:
        if not self.bounds or answer.state == FAILED:
            return None
        margins = [bound.margin(answer.sheet) for bound in self.bounds]
        return [0.0 if one is None else -one.value for one in margins]

    # --- the test data

    def _test(self, lines: Sequence[Line]) -> None:
        """Ask for what was chosen, and for what it is compared with, once each."""
        with self.leases.held("finish") as mine:
            while not mine and self.leases.state("finish") == HELD:
                wait_a_little()
            known = {one["digest"] for one in self.folder.tests()}
            todo = [one for one in {line.digest: line for line in lines}.values() if one.digest not in known]
            recipes = [essence(_recipe_of(one)) for one in todo]
            self._status("test", 0, len(todo))
            for done, (at, answer) in enumerate(self._answers([Task(recipe, "test") for recipe in recipes]), 1):
                if answer.state != COMPLETE:
                    self.say(f"{todo[at].title} failed on the test data: {answer.error}")
                    continue
                self.folder.add_test(todo[at].digest, todo[at].title, answer.sheet, todo[at] is lines[0])
                self._status("test", done, len(todo))

    # --- asking

    def _answers(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Answer]]:
        """As they come. The task of a worker that died is given to another one, once."""
        lost: list[int] = []
        for at, answer in self.pool.run(tasks):
            if not isinstance(answer, Lost):
                yield at, answer
                continue
            self.say(f"a worker was lost: {answer.why}; what it did is given to another one")
            lost.append(at)
        for i, answer in self.pool.run([tasks[at] for at in lost]):
            yield lost[i], Answer(FAILED, error=answer.why) if isinstance(answer, Lost) else answer

    def _status(self, phase: str, done: int, total: int, fresh: Line | None = None) -> None:
        if phase == "search":
            standings = self.standings()
            self.watch(Status(phase, done, total, standings.lines, standings.best, self.goals[0].score, fresh))
        else:
            self.watch(Status(phase, done, total, fresh=fresh))


def _again(line: Line, folder: Folder) -> Answer:
    """What is known of an equal candidate."""
    rungs = tuple(Rung(**one) for one in line.rungs)
    return Answer(line.state, folder.sheet(line.digest) or Sheet(), rungs, None, tuple(line.warnings), 0.0)


def _recipe_of(line: Line) -> Recipe:
    from darekit.recipe import read_recipe

    return read_recipe(line.recipe)


__all__ = ["STOPPED", "SearchResult", "Status", "check_search", "run", "search"]
