# SPDX-License-Identifier: Apache-2.0
"""Running a sweep: every cell's recipe goes into one live model, is judged, and is kept on disk at once."""

from __future__ import annotations

import gc
import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from darekit.checkpoints import sample_digest
from darekit.checkpoints.tokenizers import files_digest
from darekit.errors import DarekitError, DataError, PlanError
from darekit.evaluation.examples import Examples
from darekit.evaluation.judges import Judge, check_judge, identity_of, judge_of
from darekit.inputs.statistics import open_statistics
from darekit.live.models import LiveModel, build
from darekit.machine import default_threads
from darekit.planning import checks
from darekit.planning.opening import open_models, open_plan
from darekit.planning.plan import Plan
from darekit.planning.travel.beside import companions_of
from darekit.recipe import Recipe
from darekit.recipe.origins import Origin, origins_of, require, used_by
from darekit.recipe.stages import stored_names
from darekit.sweeps.data import SPLITS, Cell, Sweep
from darekit.sweeps.grid import cells_of, essence
from darekit.sweeps.reading import found_in, read_sweep
from darekit.sweeps.records import record_of, refuse_other, write_record
from darekit.sweeps.store import FAILED, OK, Finished, Outcome, Store, SweepResult, digest_of, open_store
from darekit.sweeps.summaries import unlike_of

FORMAT = 1  # of what a digest stands for

STOP_SECONDS = 1.0


@dataclass
class _Unit:
    """What is evaluated once: one recipe, judged by some, for all cells that come to the same."""

    digest: str
    recipe: Recipe
    judges: tuple[str, ...]
    cells: list[Cell] = field(default_factory=list)


def sweep(
    source: str | Path | Mapping[str, Any] | Sweep,
    out: str | Path,
    *,
    jobs: int = 1,
    threads: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    plots: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> SweepResult:
    """Evaluate every cell of a sweep without writing a checkpoint; finished cells are kept and not repeated.

    Args:
        source: a sweep file, its data, or a `Sweep`.
        out: directory for `cells.jsonl`, `tables.md`, `summary.json` and the plots. One that holds finished cells of
            another sweep is refused.
        jobs: processes; each holds one model.
        threads: worker threads that merge in each process.
        device: cpu, cuda or mps; the fastest available if not given.
        dtype: number format to compute in; float32 on a CPU if not given.
        plots: draw them (needs matplotlib).
        overwrite: replace another sweep's tables; its cells stay.
        progress: called with (evaluations done, evaluations in all), without those found on disk.
        say: receives notes as they arise.

    Returns:
        Every cell and its outcome.

    Raises:
        DarekitError: the sweep cannot be run. A cell that fails is recorded, and does not stop the others.

    Examples:
        >>> sweep = {
        ...     "recipe": "recipe.yaml",
        ...     "axes": {"sparsify.drop_rate": [0.5, 0.9]},
        ...     "seeds": [1],
        ...     "validation": {"sums": {"data": "sums.jsonl"}},
        ... }
        >>> result = dk.sweep(sweep, "rates", device="cpu", plots=False)
        >>> for one in result.finished:
        ...     print(one.cell.title, one.outcome.status)
        sparsify.drop_rate=0 ok
        sparsify.drop_rate=0.5 seed=1 ok
        sparsify.drop_rate=0.9 seed=1 ok
        single math ok
        single code ok
        base base ok

        Every score is there, and in `rates/tables.md`:

        >>> sorted(result.finished[0].outcome.scores["validation"])
        ['sums/exact_match', 'sums/loss']
    """
    from darekit.sweeps.reports import write_reports

    began = time.perf_counter()
    found = source if isinstance(source, Sweep) else read_sweep(source)
    out, tell = Path(out), say or (lambda line: None)
    if jobs < 1:
        raise PlanError(f"jobs must be at least 1, found {jobs}")
    cells, said = cells_of(found)
    notes = list(said)
    search = search_of(found)
    if not overwrite:
        refuse_other(out, found, cells, dtype)  # before anything that takes time
    # Mistakes in judges are found before anything runs; each process makes its own.
    units = _units(found, cells, search, dtype, judges_of(found))
    by_cell = {id(cell): unit.digest for unit in units for cell in unit.cells}
    with open_store(out) as store:
        if not overwrite:
            refuse_other(out, found, cells, dtype, {*by_cell.values()})  # now that no other run can write there
        write_record(out, record_of(found, ((cell, by_cell[id(cell)]) for cell in cells), dtype))
        if store.dropped:
            notes.append(f"{store.path}: dropped an incomplete last line left by an interrupted run")
        todo = [unit for unit in units if unit.digest not in store.known]
        if len(todo) < len(units):
            notes.append(f"{_evaluations(len(units) - len(todo))} of {len(units)} found in {store.path}")
        for note in notes:
            tell(note)
        outcomes: dict[str, Outcome] = {}
        for unit in units:
            if unit.digest in store.known:
                outcomes[unit.digest] = store.known[unit.digest]
                _keep(store, unit, outcomes[unit.digest])
        shared = max(1, default_threads() // jobs)
        origins = tuple(dict.fromkeys(one for unit in todo for one in origins_of(unit.recipe)))
        workplace = _Workplace(found, search, device, dtype, threads or shared, origins)
        heard: list[Finished] = []
        warned: str | None = None
        if progress and todo:
            progress(0, len(todo))
        for done, (unit, outcome) in enumerate(_evaluated(workplace, todo, min(jobs, len(todo))), 1):
            outcomes[unit.digest] = outcome
            _keep(store, unit, outcome)
            if warned is None:  # said as soon as it is known: the other cells may take hours
                heard.append(Finished(unit.cells[0], outcome, unit.digest))
                warned = unlike_of(found, heard)
                if warned:
                    tell(warned)
            if outcome.error:
                tell(f"{unit.cells[0].title} failed: {outcome.error}")
            if progress:
                progress(done, len(todo))
    finished = tuple(Finished(cell, outcomes[by_cell[id(cell)]], by_cell[id(cell)]) for cell in cells)
    result = SweepResult(found, out, finished, tuple(notes), time.perf_counter() - began)
    write_reports(result, plots=plots)
    return result


def _evaluations(count: int) -> str:
    return "1 evaluation" if count == 1 else f"{count} evaluations"


def _keep(store: Store, unit: _Unit, outcome: Outcome) -> None:
    store.add([Finished(cell, outcome, unit.digest) for cell in unit.cells])


def search_of(sweep: Sweep) -> tuple[Path, ...]:
    """Where a sweep's relative names are looked up after the working directory."""
    folders = sweep.search
    if isinstance(sweep.recipe, Path):
        folders = (sweep.recipe.resolve().parent, *folders)
    return tuple(dict.fromkeys(folders))


def judges_of(sweep: Sweep) -> dict[str, dict[str, Judge]]:
    """Split -> name -> judge.

    Raises:
        DarekitError: a judge cannot be made; the message says which.
    """
    made: dict[str, dict[str, Judge]] = {}
    for split, named in sweep.judges.items():
        for name, spec in named.items():
            with _named(sweep, split, name):
                made.setdefault(split, {})[name] = judge_of(spec, search=sweep.search)
    return made


@contextmanager
def _named(sweep: Sweep, split: str, name: str) -> Iterator[None]:
    """Errors say which judge they are about."""
    try:
        yield
    except DarekitError as error:
        raise type(error)(f"{sweep.name}: {split}.{name}: {error}") from error


def check_sweep(
    sweep: Sweep, out: Path, *, dtype: str | None = None, overwrite: bool = False
) -> tuple[tuple[Cell, ...], tuple[str, ...]]:
    """What a run would do, with every mistake that is found before a model is built: its cells, and what was added.

    Nothing is written, and no data of lm-eval's tasks are loaded.

    Raises:
        DarekitError: the sweep cannot be run.
    """
    cells, notes = cells_of(sweep)
    if not overwrite:
        refuse_other(out, sweep, cells, dtype)
    for split, named in sweep.judges.items():
        for name, spec in named.items():
            with _named(sweep, split, name):
                check_judge(spec, search=sweep.search)
    _inputs([cell.recipe for cell in cells], search_of(sweep))
    return cells, notes


# --- what is evaluated once ---


def _units(
    sweep: Sweep, cells: Sequence[Cell], search: Sequence[Path], dtype: str | None, made: Mapping[str, Any]
) -> list[_Unit]:
    inputs = _inputs([cell.recipe for cell in cells], search)
    judges = {
        split: {name: _identity(spec, made[split][name], sweep.search) for name, spec in named.items()}
        for split, named in sweep.judges.items()
    }
    units: dict[str, _Unit] = {}
    for cell in cells:
        recipe = essence(cell.recipe)
        names = stored_names(recipe)
        names += [entry.stats for entry in recipe.models if entry.stats]
        asked = {split: {n: one for n, one in named.items() if n in cell.judges} for split, named in judges.items()}
        # Nothing of methods where all are built in, whose digests are of old.
        code = [one.identity() for one in origins_of(recipe)]
        digest = digest_of(
            FORMAT, recipe.to_data(), [inputs[name] for name in names], asked, dtype, *([code] if code else [])
        )
        units.setdefault(digest, _Unit(digest, recipe, cell.judges)).cells.append(cell)
    return [*units.values()]


def _inputs(recipes: Sequence[Recipe], search: Sequence[Path]) -> dict[str, str]:
    """Name of each checkpoint and each file of statistics -> digest of a sample of its content. All are opened, so
    that none is missing later."""
    found: dict[str, str] = {}
    for recipe in recipes:
        for stats in (entry.stats for entry in recipe.models if entry.stats and entry.stats not in found):
            with closing(open_statistics(stats, search=search)) as statistics:
                found[stats] = statistics.fingerprint()
        stored = stored_names(recipe)
        missing = [name for name in dict.fromkeys(stored) if name not in found and name != recipe.base_model]
        origin = recipe.base_model if recipe.base_model in stored else None
        if not missing and (origin is None or origin in found):
            continue
        layouts = {entry.model: entry.experts_layout for entry in recipe.models}
        with open_models(origin, missing, search=search, layouts=layouts) as (base, models):
            if base is not None and origin is not None:
                found[origin] = sample_digest(base).hex()
            found |= {name: sample_digest(model).hex() for name, model in zip(missing, models, strict=True)}
    return found


def _identity(spec: Any, judge: Judge, search: tuple[Path, ...]) -> Any:
    """What decides about a judge's scores: its words, the content of every file that they name, and what it says of
    itself (a function's modules, the tasks' own files)."""
    words = _with_files(spec, search)
    if isinstance(judge, Examples) and Path(found_in(str(spec["data"]), search)).is_file():
        return words  # the file is all that there is
    return [words, identity_of(judge)]


def _with_files(spec: Any, search: tuple[Path, ...]) -> Any:
    if isinstance(spec, Mapping):
        return {str(key): _with_files(value, search) for key, value in spec.items()}
    if isinstance(spec, list | tuple):
        return [_with_files(value, search) for value in spec]
    if isinstance(spec, str):
        path = Path(found_in(spec, search))
        if path.is_file():
            return [spec, digest_of(path.read_bytes().hex())]
    return spec


# --- evaluating ---


@dataclass(frozen=True)
class _Workplace:
    """What a process needs to evaluate anything of one sweep."""

    sweep: Sweep
    search: tuple[Path, ...]
    device: str | None
    dtype: str | None
    threads: int
    origins: tuple[Origin, ...]  # of methods that are not built in


class _Evaluator:
    """One live model whose weights are replaced, and the judges. Never more than one model in memory."""

    def __init__(self, workplace: _Workplace) -> None:
        self.workplace = workplace
        self.judges = judges_of(workplace.sweep)
        self.live: LiveModel | None = None
        self.kind: Any = None

    def __call__(self, recipe: Recipe, names: Sequence[str]) -> Outcome:
        """Evaluate one recipe; whatever goes wrong is in the outcome."""
        began = time.perf_counter()
        warnings: list[str] = []
        scores: dict[str, dict[str, dict[str, Any]]] = {}
        error = None
        try:
            require(one for one in self.workplace.origins if one.name in used_by(recipe))
            with open_plan(recipe, search=self.workplace.search) as plan:
                # A sweep is meant to pass the points where a merge refuses, and to show what happens there.
                checks.check(plan, force=True, say=warnings.append)
                live = self._put(plan)
            for split in SPLITS:
                for name in names if split in self.judges else ():
                    if name in self.judges[split]:
                        scores.setdefault(split, {}).update(_scores(name, self.judges[split][name], live))
        except DarekitError as failure:
            error = str(failure)
        except Exception as failure:  # a judge's, torch's, transformers': the other cells must not suffer
            error = f"{type(failure).__name__}: {failure}"
        if error is not None:
            self.live, self.kind = None, None  # its weights may be half replaced
            return Outcome(FAILED, scores, tuple(warnings), error, time.perf_counter() - began)
        return Outcome(OK, scores, tuple(warnings), None, time.perf_counter() - began)

    def _put(self, plan: Plan) -> LiveModel:
        kind = _kind(plan)
        if self.live is None or kind != self.kind:
            self.live = None
            gc.collect()  # the old model goes before the new one comes
            self.live = build(plan, device=self.workplace.device, dtype=self.workplace.dtype)
            self.kind = kind
        else:
            self.live.put(plan, threads=self.workplace.threads)
        return self.live


def _kind(plan: Plan) -> Any:
    """Plans of one kind fill the same live model: equal shapes, config and tokenizer."""
    companions = companions_of(plan)
    shapes = tuple((place.name, place.shape, place.dtype) for shard in plan.shards for place in shard.placements)
    return shapes, companions.config, files_digest(companions.files), sorted(companions.files)


def _scores(name: str, judge: Judge, live: LiveModel) -> dict[str, dict[str, Any]]:
    found = {}
    for metric, score in judge(live).items():
        if not math.isfinite(score.value):
            raise DataError(f"{name}/{metric} is {score.value}")
        found[f"{name}/{metric}"] = score.to_data()
    return found


def _evaluated(workplace: _Workplace, units: Sequence[_Unit], jobs: int) -> Iterator[tuple[_Unit, Outcome]]:
    """Units as they end."""
    if jobs <= 1:
        evaluate = _Evaluator(workplace) if units else None
        for unit in units:
            assert evaluate is not None
            yield unit, evaluate(unit.recipe, unit.judges)
        return
    waiting = list(reversed(units))
    workers: dict[Connection, tuple[Any, _Unit]] = {}
    with _workers(workplace) as start:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                process, connection = start()
                workers[connection] = process, waiting.pop()
                connection.send((workers[connection][1].recipe, workers[connection][1].judges))
            for ready in wait(list(workers)):
                assert isinstance(ready, Connection)
                process, unit = workers.pop(ready)
                try:
                    outcome = ready.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    yield unit, Outcome(FAILED, {}, (), _died(process.exitcode))
                    continue
                yield unit, outcome
                if waiting:
                    workers[ready] = process, waiting.pop()
                    ready.send((workers[ready][1].recipe, workers[ready][1].judges))


def _died(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"its process was killed by {name}{' (out of memory? use fewer --jobs)' if name == 'SIGKILL' else ''}"
    return f"its process ended with code {code}"


@contextmanager
def _workers(workplace: _Workplace) -> Iterator[Callable[[], tuple[Any, Connection]]]:
    """Starts processes; all are gone on leaving."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    started: list[tuple[Any, Connection]] = []

    def start() -> tuple[Any, Connection]:
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, workplace), daemon=True)
        process.start()
        there.close()
        started.append((process, here))
        return process, here

    try:
        yield start
    finally:
        for _, connection in started:
            connection.close()  # a worker that waits for work ends
        for process, _ in started:
            process.join(STOP_SECONDS if process.is_alive() else None)
            if process.is_alive():
                process.terminate()
                process.join()


def _work(connection: Connection, workplace: _Workplace) -> None:
    """A worker's life: recipes in, outcomes out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    evaluate = None
    while True:
        try:
            recipe, names = connection.recv()
        except (EOFError, ConnectionError):
            return
        evaluate = evaluate or _Evaluator(workplace)
        connection.send(evaluate(recipe, names))
