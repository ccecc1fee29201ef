# SPDX-License-Identifier: Apache-2.0
"""What decides about scores, as digests: the recipe, samples of its checkpoints, its judges with their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from darekit.checkpoints import sample_digest
from darekit.evaluation.examples import Examples
from darekit.evaluation.judges import Judge, identity_of
from darekit.inputs.statistics import open_statistics
from darekit.planning.opening import open_models
from darekit.recipe import Recipe
from darekit.recipe.essence import essence
from darekit.recipe.origins import origins_of
from darekit.recipe.stages import stored_names
from darekit.trials.judging import Specs, found_in

FORMAT = 1  # of what a digest stands for

Judged = Mapping[str, Mapping[str, Any]]  # split -> name -> what decides about a judge's scores


def digest_of(*parts: Any) -> str:
    """32 hexadecimal digits of anything JSON-able."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def trial_digest(recipe: Recipe, inputs: Mapping[str, str], judged: Judged, dtype: str | None) -> str:
    """What decides about a recipe's scores. `inputs`: as `samples_of`; `judged`: of the judges that are asked."""
    recipe = essence(recipe)
    names = stored_names(recipe)
    names += [entry.stats for entry in recipe.models if entry.stats]
    # Nothing of methods where all are built in, whose digests are of old.
    code = [one.identity() for one in origins_of(recipe)]
    return digest_of(
        FORMAT, recipe.to_data(), [inputs[name] for name in names], judged, dtype, *([code] if code else [])
    )


def samples_of(
    recipes: Sequence[Recipe], search: Sequence[Path], known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Name of each checkpoint and each file of statistics -> digest of a sample of its content. All are opened, so
    that none is missing later. `known`: those that were already."""
    found = dict(known or {})
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


def judges_identity(specs: Specs, made: Mapping[str, Mapping[str, Judge]], search: Sequence[Path]) -> Judged:
    """Judges as written and as made -> what decides about their scores."""
    return {
        split: {name: _identity(spec, made[split][name], search) for name, spec in named.items()}
        for split, named in specs.items()
    }


def _identity(spec: Any, judge: Judge, search: Sequence[Path]) -> Any:
    """What decides about a judge's scores: its words, the content of every file that they name, and what it says of
    itself (a function's modules, the tasks' own files)."""
    words = _with_files(spec, search)
    if isinstance(judge, Examples) and Path(found_in(str(spec["data"]), search)).is_file():
        return words  # the file is all that there is
    return [words, identity_of(judge)]


def _with_files(spec: Any, search: Sequence[Path]) -> Any:
    if isinstance(spec, Mapping):
        return {str(key): _with_files(value, search) for key, value in spec.items()}
    if isinstance(spec, list | tuple):
        return [_with_files(value, search) for value in spec]
    if isinstance(spec, str):
        path = Path(found_in(spec, search))
        if path.is_file():
            return [spec, digest_of(path.read_bytes().hex())]
    return spec
