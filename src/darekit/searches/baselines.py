# SPDX-License-Identifier: Apache-2.0
"""What a search must beat: the base, each model alone, plain merges, and the recipe as it was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from darekit.recipe import ModelEntry, Recipe
from darekit.recipe.essence import essence, single
from darekit.searches.data import Search
from darekit.trials.settings import recipe_with
from darekit.wording import distinct_labels

BASE, SINGLE, PLAIN, WRITTEN = "base", "single", "plain", "written"


@dataclass(frozen=True)
class Baseline:
    """One of them. `kind`: base, single, plain or written; `model`: of a single one, as the recipe names it."""

    kind: str
    name: str
    recipe: Recipe
    model: str | None = None


def baselines_of(search: Search) -> tuple[Baseline, ...]:
    """All of them, in the order in which they are judged; of equal ones the first.

    The plain ones are those that need no tuning: the average of all models, the base with the mean of all deltas
    (lambda 1/K), and with their sum (lambda 1). Layers are as the recipe puts them; nothing is dropped.
    """
    written = recipe_with(search.recipe, {}, set(), None)
    found: dict[str, Baseline] = {}
    for one in _all(written):
        found.setdefault(repr(essence(one.recipe).to_data()), one)
    return tuple(found.values())


def _all(written: Recipe) -> Iterator[Baseline]:
    stacked = bool(written.slices)
    names = distinct_labels([entry.model for entry in written.models])
    if written.base_model is not None and not stacked:
        yield Baseline(BASE, "base", Recipe(None, (ModelEntry(written.base_model, {}),), None, "linear", {}))
    if not stacked:
        for k, name in enumerate(names):
            yield Baseline(SINGLE, f"single {name}", single(written, k), written.models[k].model)
    count = len(written.models)
    plain = replace(
        written, models=tuple(ModelEntry(entry.model, {}) for entry in written.models), sparsify=None,
        merge_method="linear", parameters={}, notes=(), text="",
    )  # fmt: skip
    if count > 1 and not stacked:
        yield Baseline(PLAIN, "average", plain)
    if written.base_model is not None and count > 1 and not stacked:
        summed = replace(plain, merge_method="task_arithmetic")  # lambda is 1 where nothing is said
        yield Baseline(PLAIN, "task arithmetic, 1/K", replace(summed, parameters={"lambda": 1 / count}))
        yield Baseline(PLAIN, "task arithmetic", summed)
    yield Baseline(WRITTEN, "as written", written)
