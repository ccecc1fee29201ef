# SPDX-License-Identifier: Apache-2.0
"""Optuna: candidates come from it, and it is told what came of them. Only this file imports it."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from darekit.errors import OutputError, PlanError, Unsupported
from darekit.searches.asking import COMPLETE, STOPPED, Answer
from darekit.searches.data import TRIALS, Knob, Search
from darekit.searches.folders import JOURNAL
from darekit.searches.leases import FREE, ORPHAN, Leases, wait_a_little
from darekit.searches.points import first_points
from darekit.searches.racing import Goal
from darekit.searches.space import combinations
from darekit.trials.files import lock
from darekit.trials.identities import digest_of

LARGEST_GRID = 10_000
GRACE = 60.0  # seconds within which a trial without a lease may be one that is only just beginning
GIVEN_BACK, VIOLATIONS, DIGEST, STATE = "given back", "violations", "digest", "state"


FINISHED = (ValueError, RuntimeError)  # what Optuna raises where another process was first


def require_optuna(sampler: str = "tpe") -> None:
    """Complain where it is missing.

    Raises:
        Unsupported: it is.
    """
    missing = [name for name in ("optuna", *(["cmaes"] if sampler == "cmaes" else [])) if find_spec(name) is None]
    if missing:
        raise Unsupported(f"a search needs {' and '.join(missing)}: pip install 'darekit[search]'")


def check_storage(search: Search, *, connect: bool = True) -> None:
    """Complain about a database that cannot be used, before anything is judged. `connect`: whether it is asked itself;
    else only whether it could be.

    Raises:
        PlanError: its URL is none, its kind is not known, its driver is not installed, or it does not answer.
    """
    if search.storage is None:
        return
    from optuna.storages import get_storage
    from sqlalchemy import create_engine
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    at = search.places.at("storage")
    try:
        url = create_engine(search.storage).url  # which imports the driver, and connects only when it is asked
    except NoSuchModuleError:
        kind = search.storage.partition(":")[0]
        raise PlanError(
            f"{at}: SQLAlchemy knows no database {kind!r}; write a URL such as sqlite:///search.db"
        ) from None
    except ArgumentError:
        raise PlanError(f"{at}: not a database's URL; write one such as sqlite:///search.db") from None
    except ImportError as error:
        raise PlanError(f"{at}: needs the driver {error.name}, which is not installed; install it with pip") from None
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise PlanError(f"{at}: names no file, so nothing would be kept; write sqlite:///search.db")
    if connect:
        try:
            with quiet():
                get_storage(search.storage)
        except Exception as error:  # a database's, a driver's
            raise PlanError(f"{at}: {hidden(search.storage)} cannot be used: {_reason(error)}") from error


def hidden(text: str) -> str:
    """A text without the passwords of the URLs in it, which may hold a slash or another @.

    >>> hidden("storage: postgresql://me:se/cr@et@host/searches")
    'storage: postgresql://me:***@host/searches'
    >>> hidden("storage: postgresql://host/searches?user=me&password=secret")
    'storage: postgresql://host/searches?user=me&password=***'
    """
    return re.sub(r"(://[^/\s:@]*:)\S+@|([?&]password=)[^&\s\"']+", _masked, text)


def _masked(found: re.Match[str]) -> str:
    return f"{found[1]}***@" if found[1] else f"{found[2]}***"


def _reason(error: BaseException) -> str:
    """The first line of what is behind an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna's log and its warnings about experimental arguments kept from the terminal."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)


@dataclass(frozen=True)
class Counts:
    """Trials by how they are. `done`: finished, without those given to another trial; `running`: by others."""

    done: int
    running: int
    waiting: int


class Study:
    """One search's trials, shared by all processes that open it."""

    def __init__(self, search: Search, goals: Sequence[Goal], out: Path, leases: Leases, mark: str) -> None:
        """`mark`: tells searches of one name apart, which may be in one database."""
        self.search, self.goals, self.leases = search, goals, leases
        self._name = f"{search.name}-{mark}"
        self._own: set[int] = set()
        self._first: list[dict[str, Any]] = []
        with quiet():
            self._study = self._open(out)
            self._space = distributions(search.knobs)

    def _open(self, out: Path) -> Any:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        place = self.search.storage or out / JOURNAL
        try:
            path, lock_of_ours = out / JOURNAL, cast(Any, Lock(out / JOURNAL))
            where: Any = self.search.storage or JournalStorage(JournalFileBackend(str(path), lock_of_ours))
            return optuna.create_study(
                study_name=self._name,
                storage=where,
                directions=["maximize" if goal.higher else "minimize" for goal in self.goals],
                load_if_exists=True,
            )
        except Exception as error:  # a database's, a file's
            raise OutputError(f"{hidden(str(place))} cannot be used: {_reason(error)}") from error

    # --- candidates

    def ask(self) -> Any:
        """The next candidate: a trial with its `number` and `params`. Its lease is taken."""
        if self._unasked() is None:
            trial = self._ask()
        else:
            with self.alone("first"), quiet():
                first = self._unasked()
                if first is not None:
                    self._study.enqueue_trial(first)
                trial = self._ask()
        self.leases.take(lease_of(trial.number))
        self._own.add(trial.number)
        return trial

    def _ask(self) -> Any:
        with quiet():
            # A sampler of its own for each: what it draws follows from the seed and the trials so far, kill or not.
            count = len(self._alive())
            alone = self.leases.others() == 0
            self._study.sampler = sampler_of(
                self.search, digest_of(self.search.seed, count, 0 if alone else os.getpid())
            )
            return self._study.ask(fixed_distributions=self._space)

    def _alive(self) -> list[Any]:
        """All trials but those that were given to another one."""
        with quiet():
            return [one for one in self._study.get_trials(deepcopy=False) if not one.user_attrs.get(GIVEN_BACK)]

    def _unasked(self) -> Mapping[str, Any] | None:
        """Of the candidates that come first the next one; None where all were asked, or something waits before them."""
        if not self._first:
            return None
        trials = self._alive()
        if any(one.state.name == "WAITING" for one in trials):
            return None
        asked = [one.params for one in trials]
        return next((point for point in self._first if point not in asked), None)

    def tell(self, number: int, answer: Answer, violations: Sequence[float] | None, digest: str) -> None:
        """What came of a candidate; its lease is given back."""
        from optuna.trial import TrialState

        # By its number: it may be another process's, which died before it could tell.
        storage = self._study._storage
        with quiet(), suppress(*FINISHED):
            trial = storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)
            storage.set_trial_user_attr(trial, DIGEST, digest)
            storage.set_trial_user_attr(trial, STATE, answer.state)
            if violations is not None:
                storage.set_trial_user_attr(trial, VIOLATIONS, list(violations))
            values, state = _values(answer, self.goals), TrialState.COMPLETE
            if values is None:
                state = TrialState.FAIL
            elif answer.state == STOPPED and len(self.goals) == 1:
                storage.set_trial_intermediate_value(trial, round(1000 * answer.rungs[-1].share), values[0])
                values, state = None, TrialState.PRUNED
            # Optuna knows no stopped trials where there are several goals: what one has shown so far counts.
            self._study.tell(number, values, state=state, skip_if_finished=True)
        self._done(number)

    def give_back(self, trial: Any) -> None:
        """A candidate that was not judged to its end: it is failed, and queued again."""
        self._requeue(trial.number, dict(trial.params))
        self._done(trial.number)

    def _done(self, number: int) -> None:
        self._own.discard(number)
        self.leases.release(lease_of(number))

    def take_orphans(self, settle: Callable[[int], bool]) -> list[int]:
        """Candidates whose processes are dead: `settle` tells what came of one, where that was still written down; the
        others are queued again -> their numbers."""
        found = []
        with quiet():
            trials = self._study.get_trials(deepcopy=False)
            finished = {lease_of(trial.number) for trial in trials if trial.state.is_finished()}
            for name in finished & {*self.leases.orphans()}:  # told, but not given back any more
                with self.leases.held(name):
                    pass
            for trial in trials:
                if trial.state.name != "RUNNING" or trial.number in self._own:
                    continue
                state = self.leases.state(lease_of(trial.number))
                young = trial.datetime_start and (datetime.now() - trial.datetime_start).total_seconds() < GRACE
                if state == ORPHAN or (state == FREE and not young):
                    with self.leases.held(lease_of(trial.number)) as mine:
                        if mine and not settle(trial.number) and self._requeue(trial.number, dict(trial.params)):
                            found.append(trial.number)
        return found

    def _requeue(self, number: int, params: Mapping[str, Any]) -> bool:
        """Whether it was still running: of several processes that see an orphan, one queues it again."""
        from optuna.trial import TrialState

        with quiet(), suppress(*FINISHED):  # another process was first
            trial_id = self._study._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)
            if self._study._storage.get_trial(trial_id).state != TrialState.RUNNING:
                return False
            self._study._storage.set_trial_user_attr(trial_id, GIVEN_BACK, True)
            if self._study._storage.set_trial_state_values(trial_id, TrialState.FAIL):
                self._study.enqueue_trial(dict(params))
                return True
        return False

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """While no other process does the same."""
        while True:
            with self.leases.held(name) as mine:
                if mine:
                    yield
                    return
            wait_a_little()

    def fill_grid(self) -> int:
        """Queue all combinations, once -> how many there are."""
        count = 0
        with quiet(), self.alone("grid"):
            wanted = list(combinations(self.search.knobs))
            if len(wanted) > LARGEST_GRID:
                raise PlanError(
                    f"a grid of {len(wanted)} combinations; at most {LARGEST_GRID}: use larger steps, or tpe"
                )
            if not self._study.user_attrs.get("grid"):
                for params in wanted:
                    self._study.enqueue_trial(params, skip_if_exists=True)
                self._study.set_user_attr("grid", len(wanted))
            count = len(wanted)
        return count

    def remember_first(self) -> None:
        """Which candidates come first. A file's own may become more while a search goes on; those that are spread over
        the space are for a search that begins, and for a sampler that learns."""
        with quiet(), self.alone("first"):
            written, own, spread = first_points(self.search)
            given, known = [*written, *own], self._study.user_attrs.get("first")
            if known is None:
                known = given if self._study.get_trials(deepcopy=False) else [*given, *spread]
            self._first = [*known, *(point for point in given if point not in known)]
            self._study.set_user_attr("first", self._first)

    def counts(self) -> Counts:
        """How many trials are finished, running elsewhere, and queued."""
        trials = self._alive()
        done = [t for t in trials if t.state.is_finished()]
        running = [t for t in trials if t.state.name == "RUNNING" and t.number not in self._own]
        return Counts(len(done), len(running), sum(t.state.name == "WAITING" for t in trials))


class Lock:
    """Optuna's lock on its journal, held by the system and not by a file that is there: who is killed while he writes
    lets go of it. (Its own is a symbolic link, which stays: another process waited for more than a minute.)"""

    def __init__(self, journal: Path) -> None:
        self._path = journal.with_name(f"{journal.name}.lock")
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Wait for the lock, and take it."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        lock(descriptor, wait=True)
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Give it back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lease_of(number: int) -> str:
    """A trial's lease."""
    return f"trial-{number}"


def _values(answer: Answer, goals: Sequence[Goal]) -> list[float] | None:
    """A candidate's values for its goals; None where it failed."""
    if answer.state not in (COMPLETE, STOPPED) or not answer.rungs:
        return None
    scores = answer.rungs[-1].scores
    return [float(scores[goal.score]["value"]) for goal in goals] if all(g.score in scores for g in goals) else None


def sampler_of(search: Search, seed: str) -> Any:
    """Optuna's sampler, seeded by a digest."""
    from optuna import samplers

    number = int(seed[:8], 16)
    limits: dict[str, Any] = {"constraints_func": _violations} if search.limits else {}
    if search.sampler == "tpe":
        return samplers.TPESampler(seed=number, multivariate=True, constant_liar=True, **limits)
    if search.sampler == "cmaes":
        return samplers.CmaEsSampler(seed=number, consider_pruned_trials=True, warn_independent_sampling=False)
    if search.sampler == "nsga2":
        size = max(8, min(50, (search.trials or TRIALS) // 5))
        return samplers.NSGAIISampler(seed=number, population_size=size, **limits)
    return samplers.RandomSampler(seed=number)  # of a grid, all is queued


def _violations(trial: Any) -> Sequence[float]:
    """How far a trial is on the wrong side of each constraint; at most 0 is on the right one."""
    found: Sequence[float] = trial.user_attrs.get(VIOLATIONS, (0.0,))
    return found


def distributions(knobs: Sequence[Knob]) -> dict[str, Any]:
    """Dimension -> what Optuna draws it from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for knob in knobs:
        for name in knob.dimensions:
            if knob.choices is not None:
                found[name] = CategoricalDistribution([*knob.choices])
                continue
            assert knob.numbers is not None
            low, high, step = knob.numbers.low, knob.numbers.high, knob.numbers.step
            if knob.numbers.whole:
                found[name] = IntDistribution(int(low), int(high), step=int(step or 1))
            else:
                found[name] = FloatDistribution(low, high, log=knob.numbers.log, step=step)
    return found
