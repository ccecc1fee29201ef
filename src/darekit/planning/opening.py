# SPDX-License-Identifier: Apache-2.0
"""Open everything that a recipe names, and plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from darekit.checkpoints import Checkpoint, open_checkpoint
from darekit.inputs.opening import open_model
from darekit.planning.plan import SHARD_SIZE, Plan, make_plan
from darekit.recipe import Recipe

if TYPE_CHECKING:
    from darekit.inputs.statistics import Statistics


@contextmanager
def open_plan(recipe: Recipe, *, search: Sequence[Path] = (), shard_size: int = SHARD_SIZE) -> Iterator[Plan]:
    """Open the recipe's checkpoints (headers only) and plan; the files are closed on leaving."""
    opened: list[Checkpoint] = []
    statistics: list[Statistics] = []
    try:
        if recipe.base_model is not None:
            opened.append(open_checkpoint(recipe.base_model, search=search))
        base = opened[0] if opened else None
        for entry in recipe.models:
            opened.append(open_model(entry.model, base, search=search))
        models = tuple(opened[1:] if base else opened)
        for entry in recipe.models:
            if entry.stats is not None:
                from darekit.inputs.statistics import open_statistics

                statistics.append(open_statistics(entry.stats, search=search))
        yield make_plan(recipe, base, models, statistics=statistics, shard_size=shard_size)
    finally:
        for checkpoint in opened:
            checkpoint.close()
        for found in statistics:
            found.close()
