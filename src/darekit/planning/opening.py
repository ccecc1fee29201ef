# SPDX-License-Identifier: Apache-2.0
"""Open everything that a command or a recipe names: every command opens models through here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from darekit.checkpoints import Checkpoint
from darekit.inputs import opening
from darekit.inputs.kinds import Opener
from darekit.inputs.opening import OPENERS
from darekit.machine import without_collector
from darekit.planning.nested import opener_of, result_of
from darekit.planning.plan import SHARD_SIZE, Plan, make_plan
from darekit.recipe import Recipe

if TYPE_CHECKING:
    from darekit.inputs.statistics import Statistics


@contextmanager
def open_models(
    base: str | Path | None,
    models: Sequence[str | Path],
    *,
    search: Sequence[Path] = (),
    openers: Sequence[Opener] | None = None,
) -> Iterator[tuple[Checkpoint | None, tuple[Checkpoint, ...]]]:
    """Open a base, where there is one, and models (headers only); the files are closed on leaving."""
    openers = (opener_of(None, (), _open_recipe), *OPENERS) if openers is None else openers
    with ExitStack() as opened:
        origin = None
        if base is not None:
            origin = opened.enter_context(closing(opening.open_base(base, search=search, openers=openers)))
        yield (
            origin,
            tuple(
                opened.enter_context(closing(opening.open_model(model, origin, search=search, openers=openers)))
                for model in models
            ),
        )


def only_on_base(ref: str | Path) -> tuple[str, str | Path] | None:
    """Of what is a model only on top of its base: its kind, and what was found under the name; None of all else."""
    return opening.only_on_base(ref, openers=OPENERS)


@contextmanager
def open_plan(
    recipe: Recipe,
    *,
    search: Sequence[Path] = (),
    shard_size: int = SHARD_SIZE,
    verbatim: bool = False,
    above: Sequence[str] = (),
) -> Iterator[Plan]:
    """Open the recipe's checkpoints (headers only) and plan; the files are closed on leaving.

    `verbatim`: tied copies and buffers are tensors like others, where all checkpoints store the same names. `above`:
    the recipes that this one is a model of.
    """
    openers = (opener_of(recipe, above, _open_recipe), *OPENERS)
    names = [entry.model for entry in recipe.models]
    with ExitStack() as opened:
        with without_collector():
            base, models = opened.enter_context(open_models(recipe.base_model, names, search=search, openers=openers))
            statistics: list[Statistics] = []
            for entry in recipe.models:
                if entry.stats is not None:
                    from darekit.inputs.statistics import open_statistics

                    statistics.append(opened.enter_context(closing(open_statistics(entry.stats, search=search))))
            others = {}
            for name in recipe.tokens.models if recipe.tokens else ():
                if name not in names and not (name == "base" and base is not None):
                    model = opening.open_model(name, base, search=search, openers=openers)
                    others[name] = opened.enter_context(closing(model))
            bases = _bases_of(recipe, base, models, search, openers, opened)
            plan = make_plan(
                recipe,
                base,
                models,
                statistics=statistics,
                others=others,
                bases=bases,
                shard_size=shard_size,
                verbatim=verbatim,
            )
        yield plan


def _open_recipe(recipe: Recipe, ref: str, search: Sequence[Path], above: Sequence[str]) -> Checkpoint:
    """A recipe's result; closing it closes the files of its plan."""
    with open_plan(recipe, search=search, above=above) as plan:
        found = result_of(plan, ref)
    plan.__enter__()  # its files, again: they stay open as long as the result is
    return found


def _bases_of(
    recipe: Recipe,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    search: Sequence[Path],
    openers: Sequence[Opener],
    opened: ExitStack,
) -> dict[str, Checkpoint]:
    """The bases that slices name, open, by name: the recipe's own, its models, or others."""
    known: dict[str, Checkpoint] = {entry.model: model for entry, model in zip(recipe.models, models, strict=True)}
    known |= {} if recipe.base_model is None or base is None else {recipe.base_model: base}
    found = {}
    for name in dict.fromkeys(one.base[0] for one in recipe.slices if one.base):
        found[name] = known.get(name) or opened.enter_context(
            closing(opening.open_base(name, search=search, openers=openers))
        )
    return found
