# SPDX-License-Identifier: Apache-2.0
"""Running a search: baselines first, then candidates in rounds, then the test data for what was chosen."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from darekit.analysis.inspection import VOCABULARIES, inspect
from darekit.analysis.records import RECORD, write_inspection
from darekit.errors import DarekitError, PlanError, RecipeError
from darekit.live.models import require_torch
from darekit.pools.clusters import cluster_of, open_pool, require_ray
from darekit.pools.processes import Pool
from darekit.recipe import Recipe
from darekit.searches.asking import Answer, Asker, Task
from darekit.searches.baselines import Baseline, baselines_of
from darekit.searches.data import Search
from darekit.searches.folders import LEASES, MODELS, Folder, claim, forget_goals, remember
from darekit.searches.goals import Unasked, check_goals
from darekit.searches.leases import Leases
from darekit.searches.points import check_points
from darekit.searches.reading import read_search
from darekit.searches.space import Tensors, bind, choice_recipes, dimension_data
from darekit.searches.studies import check_storage, hidden, require_optuna
from darekit.searches.verdicts import SearchResult
from darekit.searches.working import Say, Watch, Work
from darekit.trials.identities import digest_of, judges_identity, samples_of, trial_digest
from darekit.trials.judging import check_judges, found_in, make_judges, named_in, search_of
from darekit.trials.models import Place, origins_in, shared_threads
from darekit.trials.settings import data_of, recipe_with

CROWD = 4  # jobs for each core, above which they only wait for each other

Make = Callable[[frozenset[str]], Callable[[], Callable[[Task], Answer]]]


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
    if cluster is None:  # else the workers' machines need it
        require_torch()
    cores = os.cpu_count() or 1
    if cluster is None and jobs is not None and jobs > CROWD * cores and say:
        say(f"{jobs} jobs on {cores} cores: each is a process with a model of its own; --jobs {cores} is as fast")
    folders = search_of(found.recipe, found.search)
    written = recipe_with(found.recipe, {}, set(), None)
    place = Place(
        folders, device, dtype, shared_threads(threads, jobs or 1), origins_in([written, *choice_recipes(found)])
    )

    def make(whole: frozenset[str]) -> Callable[[], Callable[[Task], Answer]]:
        return partial(Asker, found.places, found.judges, found.search, place, whole)

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
    made = check_judges(found.places, found.judges, found.search)
    baselines = baselines_of(found)
    check_goals(found, made, baselines)
    _sampled(found, baselines, folders)
    check_storage(found, connect=False)
    return _bound(found, folders)[0], baselines


def _sampled(found: Search, baselines: Sequence[Baseline], folders: Sequence[Path]) -> dict[str, str]:
    """All models, of the recipe and of the choices, are opened, so that none is missing later -> what is in them."""
    with named_in(found.places, "recipe"):
        inputs = samples_of([one.recipe for one in baselines], folders)
    with named_in(found.places, "space"):
        return samples_of(choice_recipes(found), folders, inputs)


def _bound(found: Search, folders: Sequence[Path]) -> tuple[Search, Tensors]:
    """The search with all its ranges.

    Raises:
        PlanError: a candidate of the file is outside one.
    """
    bound, tensors = bind(found, recipe_with(found.recipe, {}, set(), None), folders)
    check_points(bound)
    return bound, tensors


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
    made = make_judges(found.places, found.judges, found.search)
    judged = judges_identity(found.judges, made, found.search)
    baselines = baselines_of(found)
    check_goals(found, made, baselines)
    inputs = _sampled(found, baselines, folders)
    check_storage(found)
    bound, tensors = _bound(found, folders)
    if trials is not None:
        bound = replace(bound, trials=trials)
    record = claim(out, _asked(bound, inputs, judged, dtype))
    remember(out, record)
    folder = Folder(out)
    mark = digest_of({key: value for key, value in record.items() if key not in ("name", "text", "whole")})[:12]

    def digest(recipe: Recipe, whole: frozenset[str]) -> str:
        inputs.update(samples_of([recipe], folders, inputs))  # of choices that go together there may be new models
        return trial_digest(recipe, inputs, {"judges": judged, "whole": {"names": sorted(whole)}}, dtype)

    whole = frozenset(record.get("whole", ()))
    with leases(out / LEASES) as held:
        for note in bound.notes:
            if say:
                say(note)
        while True:
            with pool(make(whole)) as places:
                work = Work(
                    mark, bound, tensors, folder, held, places, whole, digest, watch or _ignore, say or _ignore, began
                )
                try:
                    result = work.run(baselines, seconds)
                    with held.held(MODELS) as mine:  # of several processes one
                        if mine and not result.interrupted:
                            look_at_models(recipe_with(found.recipe, {}, set(), None), folders, out, say or _ignore)
                    return result
                except Unasked as missing:
                    if say:
                        say(f"{missing}; {missing.judge} is asked as a whole, and the baselines are judged again")
                    whole |= {missing.judge}
                    remember(out, record | {"whole": sorted(whole)})
                except RecipeError:  # a goal, or a constraint, that no judge can give
                    forget_goals(folder, record)
                    raise


def look_at_models(recipe: Recipe, folders: Sequence[Path], out: Path, say: Say) -> None:
    """Once, how the models' deltas stand to each other, for the page: `models/inspection.json`."""
    models = tuple(dict.fromkeys(found_in(entry.model, folders) for entry in recipe.models))
    if recipe.base_model is None or len(models) < 2 or recipe.slices or (out / MODELS / RECORD).exists():
        return
    try:
        vocab = recipe.vocab if recipe.vocab in VOCABULARIES else "base"
        first, second, *more = models
        write_inspection(inspect(found_in(recipe.base_model, folders), first, second, *more, vocab=vocab), out / MODELS)
    except KeyboardInterrupt:
        return  # all else is written
    except DarekitError as error:
        say(f"the page will not show how the models pull against each other: {error}")


def _ignore(_: Any) -> None:
    """Nobody watches."""


def _asked(search: Search, inputs: Mapping[str, str], judged: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """What makes results go together, and what people want to read of it."""
    return {
        "name": search.name,
        "text": hidden(search.text),
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
