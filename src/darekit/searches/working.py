# SPDX-License-Identifier: Apache-2.0
"""One process's part in a search: baselines, candidates in rounds, the test data; shared with others by its folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from darekit.errors import DarekitError, DataError
from darekit.pools.processes import Lost, Pool
from darekit.recipe import Recipe, read_recipe
from darekit.recipe.essence import essence
from darekit.searches.asking import COMPLETE, FAILED, Answer, Rung, Task
from darekit.searches.baselines import BASE, PLAIN, SINGLE, WRITTEN, Baseline
from darekit.searches.data import TRIALS, Search
from darekit.searches.folders import BASELINE, TRIAL, Folder, Line, line_of
from darekit.searches.goals import Known, bounds_of, goals_of, named_sheets
from darekit.searches.leases import HELD, Leases, wait_a_little
from darekit.searches.points import written_point
from darekit.searches.racing import Bound, Goal, is_feasible
from darekit.searches.sheets import Sheet, with_blends
from darekit.searches.space import Tensors, candidate
from darekit.searches.standings import Standings
from darekit.searches.studies import Study
from darekit.searches.verdicts import SearchResult, write_summary
from darekit.trials.settings import recipe_with

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
        at_once: how many are judged at the same time.
        seconds_left: until no candidate is begun any more; None: there is no such time.
    """

    phase: str
    done: int
    total: int
    lines: Sequence[Line] = ()
    best: Line | None = None
    score: str = ""
    fresh: Line | None = None
    at_once: int = 1
    seconds_left: float | None = None


Watch = Callable[[Status], None]


@dataclass
class Work:
    """One process's part in a search.

    Attributes:
        mark: tells this search from others of its name.
        search: with all its ranges.
        tensors: what its space must know of the models.
        folder: of the results.
        leases: this process's.
        pool: who judges.
        whole: judges that are asked as a whole.
        digest_of: a recipe, and these -> what decides about its scores.
        watch: called as things are judged.
        say: receives notes.
        began: when, by `time.perf_counter`.
    """

    mark: str
    search: Search
    tensors: Tensors
    folder: Folder
    leases: Leases
    pool: Pool
    whole: frozenset[str]
    digest_of: Callable[[Recipe, frozenset[str]], str]
    watch: Watch
    say: Say
    began: float
    goals: tuple[Goal, ...] = ()
    bounds: tuple[Bound, ...] = ()
    reused: int = 0
    total: int = 0
    ends: float | None = None
    _done: int = 0
    _failed: set[str] = field(default_factory=set)
    _feasible: dict[str | int, bool | None] = field(default_factory=dict)

    def digest(self, recipe: Recipe) -> str:
        """What decides about a recipe's scores."""
        return self.digest_of(recipe, self.whole)

    # --- the whole of it

    def run(self, baselines: Sequence[Baseline], seconds: float | None) -> SearchResult:
        """All of it; errors as `search`.

        Raises:
            Unasked: a judge must be asked as a whole.
        """
        interrupted = False
        try:
            judged = self._judge_baselines(baselines)
        except KeyboardInterrupt:
            self.say("interrupted before the baselines were judged; run the same command to continue")
            raise
        if not self.goals:
            first = judged[0][1]
            raise DataError(f"{self.search.name}: no baseline could be judged; {first.title}: {first.error}")
        self._feasible = {one.name: is_feasible(sheet, self.bounds) for one, sheet in self._sheets(judged)}
        self.study = Study(self.search, self.goals, self.folder.out, self.leases, self.mark)
        try:
            self._search(seconds)
        except KeyboardInterrupt:
            interrupted = True
        standings = self.standings()
        single = standings.best_of([one.name for one in baselines if one.kind in (SINGLE, BASE)])
        plain = standings.best_of([one.name for one in baselines if one.kind == PLAIN])
        written = standings.best_of([one.name for one in baselines if one.kind == WRITTEN])
        if not interrupted and "test" in self.search.judges:
            try:
                self._test([one for one in (standings.best, single, plain, written) if one is not None])
            except KeyboardInterrupt:
                interrupted = True
        return write_summary(
            self.search, self.folder, standings, baselines, (single, plain, written), interrupted=interrupted,
            reused=self.reused, seconds=time.perf_counter() - self.began,
        )  # fmt: skip

    def standings(self) -> Standings:
        """Who leads, with what other processes have found so far."""
        blends = [goal.blend for goal in self.goals]
        lines = (
            replace(
                line, scores=with_blends(line.scores, blends, line.items or None),
                feasible=self._feasible.get(line.key) if line.kind == BASELINE else line.feasible,
            )
            for line in self.folder.lines
        )  # fmt: skip
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
            self._settle_goals(baselines, there)
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
                there[one.name] = line
                self._settle_goals(baselines, there)  # mistakes in them, before all the rest
                if line.state == FAILED:
                    self._failed.add(one.name)
                    self.say(f"{one.name} failed: {line.error}")
                for warning in line.warnings:
                    self.say(f"{one.name}: {warning}")
                done += 1
                self._status("baselines", done, len(baselines), line)

    def _settle_goals(self, baselines: Sequence[Baseline], there: Mapping[str, Line]) -> None:
        """The goals and constraints, as far as the baselines that were judged tell. `there`: their lines, by name.

        Raises:
            Unasked, RecipeError: as `goals_of` and `bounds_of`, as soon as it is known.
        """
        judged = [(one, there[one.name]) for one in baselines if one.name in there]
        complete = [(one, line) for one, line in judged if line.state == COMPLETE]
        if not complete:
            return
        known = Known(complete[0][1].scores, self.whole)
        if all(one.name in there for one in baselines if one.kind in (BASE, SINGLE)):
            singles = [line.scores for one, line in complete if one.kind == SINGLE]
            known = replace(known, singles=singles, sheets=named_sheets(self._sheets(complete)))
        self.goals = goals_of(self.search, known)
        self.bounds = bounds_of(self.search, known)

    def _sheets(self, judged: Sequence[tuple[Baseline, Line]]) -> list[tuple[Baseline, Sheet]]:
        """Of those that were judged in full, the answers."""
        read = ((one, self.folder.sheet(line.digest)) for one, line in judged if line.state == COMPLETE)
        return [(one, sheet) for one, sheet in read if sheet is not None]

    # --- candidates

    def _search(self, seconds: float | None) -> None:
        total = self.search.trials or TRIALS
        if self.search.sampler == "grid":
            count = self.study.fill_grid()
            total = min(self.search.trials or count, count)
        else:
            self.study.remember_first()
        told = False
        self.total = total
        self.ends = None if seconds is None else self.began + seconds
        done = self.study.counts().done
        if done < total:
            self._status("search", done, total)
        while True:
            orphans = self.study.take_orphans(self._settle)
            for number in orphans:
                self.say(f"trial {number} was left by a process that died; its candidate will be judged again")
            with self.study.alone("ask"):  # else two processes would both ask for the last ones
                counts = self.study.counts()
                left = max(0, total - counts.done - counts.running)
                if self.ends is not None and time.perf_counter() > self.ends and counts.done:
                    return
                trials = [self.study.ask() for _ in range(min(left, self.search.round or self.pool.size))]
            if trials:
                self._round(trials)
                told = False
                continue
            if not counts.running:
                return
            if not told:
                self.say(f"waiting for {counts.running} trial{'s' * (counts.running > 1)} of other processes")
            told = True
            wait_a_little()

    def _round(self, trials: Sequence[Any]) -> None:
        """Candidates that were asked for at once, judged against what is known now, and told in order: so it does not
        matter how many work at the same time, nor who is first."""
        race = self.standings().race(self.folder)
        self._done = self.study.counts().done
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
                    answers[at] = self._again(known[digest])
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
        answer = self._again(line)
        self.study.tell(number, answer, self._violations(answer), line.digest)
        return True

    def _candidate(self, params: Mapping[str, Any]) -> tuple[Recipe | None, str, str | None]:
        """Its recipe and digest; or why there is none."""
        try:
            if self.search.weights_sum is None and params == written_point(self.search):
                recipe = recipe_with(self.search.recipe, {}, set(), None)  # as a baseline it was judged already
            else:
                recipe = candidate(self.search, params, self.tensors)
            return recipe, self.digest(recipe), None
        except DarekitError as error:
            return None, "", str(error)

    def _again(self, line: Line) -> Answer:
        """What is known of an equal candidate, or of a baseline that is one."""
        blends = [goal.blend for goal in self.goals]
        rungs = [Rung(**one) for one in line.rungs]
        rungs = [replace(one, scores=with_blends(one.scores, blends, one.items or None)) for one in rungs]
        return Answer(line.state, self.folder.sheet(line.digest) or Sheet(), tuple(rungs), None, tuple(line.warnings))

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
            self.say(f"a worker was lost: {answer.why}; its work goes to another one")
            lost.append(at)
        for i, answer in self.pool.run([tasks[at] for at in lost]):
            yield lost[i], Answer(FAILED, error=answer.why) if isinstance(answer, Lost) else answer

    def _status(self, phase: str, done: int, total: int, fresh: Line | None = None) -> None:
        status = Status(phase, done, total, fresh=fresh, at_once=self.pool.size)
        if phase == "search":
            standings = self.standings()
            left = None if self.ends is None else max(0.0, self.ends - time.perf_counter())
            status = replace(
                status, lines=standings.lines, best=standings.best, score=self.goals[0].score, seconds_left=left
            )
        self.watch(status)


def _recipe_of(line: Line) -> Recipe:
    return read_recipe(line.recipe)
