# SPDX-License-Identifier: Apache-2.0
"""Running a sweep: every cell's recipe goes into one live model, is judged, and is kept on disk at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from darekit.errors import PlanError
from darekit.evaluation.judges import Judge
from darekit.pools.clusters import Cluster, cluster_of, open_pool, require_ray
from darekit.pools.processes import Lost
from darekit.recipe import Recipe
from darekit.recipe.essence import essence
from darekit.sweeps.data import SPLITS, Cell, Sweep
from darekit.sweeps.effects import effects_of, put_effects
from darekit.sweeps.grid import cells_of
from darekit.sweeps.reading import read_sweep
from darekit.sweeps.records import record_of, refuse_other, refuse_search, write_record
from darekit.sweeps.store import FAILED, OK, Finished, Outcome, Store, SweepResult, open_store
from darekit.sweeps.summaries import check_scores, unlike_of
from darekit.trials.identities import judges_identity, samples_of, trial_digest
from darekit.trials.judging import asked, check_judges, make_judges, named_in, search_of
from darekit.trials.models import Bench, Place, origins_in, reason_of, shared_threads
from darekit.trials.scores import check_known


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
    jobs: int | None = None,
    ray: str | bool | None = None,
    gpus_per_worker: float | None = None,
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
        jobs: processes, or workers on a cluster; each holds one model. If not given one, on a cluster as many as it
            has room for.
        ray: work on a Ray cluster: its address, or True for one that is there or else a new one on this machine.
        gpus_per_worker: of a cluster; one where it has some if not given.
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
    if jobs is not None and jobs < 1:
        raise PlanError(f"jobs must be at least 1, found {jobs}")
    cluster = cluster_of(ray, gpus_per_worker, jobs)
    if cluster is not None:
        require_ray()
    cells, said = cells_of(found)
    notes = list(said)
    search = search_of(found.recipe, found.search)
    refuse_search(out)
    if not overwrite:
        refuse_other(out, found, cells, dtype)  # before anything that takes time
    # Mistakes in judges are found before anything runs; each process makes its own.
    units = _units(found, cells, search, dtype)
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
        origins = origins_in([unit.recipe for unit in todo])
        place = Place(search, device, dtype, shared_threads(threads, jobs or 1), origins)
        heard = [Finished(one.cells[0], outcomes[one.digest], one.digest) for one in units if one.digest in outcomes]
        check_scores(found, heard)
        warned: str | None = None
        if progress and todo:
            progress(0, len(todo))
        for done, (unit, outcome) in enumerate(_evaluated(found, place, todo, min(jobs or 1, len(todo)), cluster), 1):
            outcomes[unit.digest] = outcome
            _keep(store, unit, outcome)
            if warned is None:  # said as soon as it is known: the other cells may take hours
                heard.append(Finished(unit.cells[0], outcome, unit.digest))
                check_scores(found, heard)
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
    put_effects(store.path.parent, unit.digest, outcome.effects)  # first: a line promises them
    store.add([Finished(cell, outcome, unit.digest) for cell in unit.cells])


def check_sweep(
    sweep: Sweep, out: Path, *, dtype: str | None = None, overwrite: bool = False
) -> tuple[tuple[Cell, ...], tuple[str, ...]]:
    """What a run would do, with every mistake that is found before a model is built: its cells, and what was added.

    Nothing is written, and no data of lm-eval's tasks are loaded.

    Raises:
        DarekitError: the sweep cannot be run.
    """
    cells, notes = cells_of(sweep)
    refuse_search(out)
    if not overwrite:
        refuse_other(out, sweep, cells, dtype)
    _check_names(sweep, check_judges(sweep.places, sweep.judges, sweep.search))
    with named_in(sweep.places, "recipe"):
        samples_of([cell.recipe for cell in cells], search_of(sweep.recipe, sweep.search))
    return cells, notes


def _check_names(sweep: Sweep, judges: Mapping[str, Mapping[str, Judge]]) -> None:
    """Complain about the score by which settings are chosen, where its judge is known never to give it."""
    split = "validation" if "validation" in sweep.judges else "test"
    if sweep.choose is not None:
        check_known(f"{sweep.places.at('choose')}: {sweep.choose}", sweep.choose, judges.get(split, {}), split)


# --- what is evaluated once ---


def _units(sweep: Sweep, cells: Sequence[Cell], search: Sequence[Path], dtype: str | None) -> list[_Unit]:
    """Mistakes in judges and missing models are found here, before anything runs; each process makes its own."""
    made = make_judges(sweep.places, sweep.judges, sweep.search)
    with named_in(sweep.places, "recipe"):
        inputs = samples_of([cell.recipe for cell in cells], search)
    _check_names(sweep, made)
    judges = judges_identity(sweep.judges, made, sweep.search)
    units: dict[str, _Unit] = {}
    for cell in cells:
        judged = {split: {n: one for n, one in named.items() if n in cell.judges} for split, named in judges.items()}
        digest = trial_digest(cell.recipe, inputs, judged, dtype)
        units.setdefault(digest, _Unit(digest, essence(cell.recipe), cell.judges)).cells.append(cell)
    return [*units.values()]


# --- evaluating ---


class _Evaluator:
    """One live model whose weights are replaced, and the judges."""

    def __init__(self, sweep: Sweep, place: Place) -> None:
        self.judges = make_judges(sweep.places, sweep.judges, sweep.search)
        self.bench = Bench(place)

    def __call__(self, task: tuple[Recipe, Sequence[str]]) -> Outcome:
        """Evaluate one recipe by the judges named; whatever goes wrong is in the outcome."""
        recipe, names = task
        began = time.perf_counter()
        warnings: list[str] = []
        scores: dict[str, dict[str, dict[str, Any]]] = {}
        effects: dict[tuple[str, str], Any] = {}
        try:
            # A sweep is meant to pass the points where a merge refuses, and to show what happens there.
            live = self.bench.put(recipe, say=warnings.append)
            for split in SPLITS:
                for name in names if split in self.judges else ():
                    if name in self.judges[split]:
                        found = asked(name, self.judges[split][name], live)
                        scores.setdefault(split, {}).update((key, one.to_data()) for key, one in found.items())
                        effects |= effects_of(split, found)
        except Exception as failure:  # also a judge's, torch's, transformers': the other cells must not suffer
            self.bench.drop()
            return Outcome(FAILED, scores, tuple(warnings), reason_of(failure), time.perf_counter() - began)
        return Outcome(OK, scores, tuple(warnings), None, time.perf_counter() - began, effects)


def _evaluated(
    sweep: Sweep, place: Place, units: Sequence[_Unit], jobs: int, cluster: Cluster | None
) -> Iterator[tuple[_Unit, Outcome]]:
    """Units as they end."""
    if not units:
        return
    with open_pool(partial(_Evaluator, sweep, place), jobs, cluster) as pool:
        for at, found in pool.run([(unit.recipe, unit.judges) for unit in units]):
            yield units[at], Outcome(FAILED, {}, (), found.why) if isinstance(found, Lost) else found
