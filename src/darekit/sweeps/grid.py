# SPDX-License-Identifier: Apache-2.0
"""A sweep -> its cells: every combination of its axes, and what they must be compared with."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from darekit.errors import RecipeError
from darekit.recipe import ModelEntry, Recipe
from darekit.recipe.essence import drops, essence, is_random, seed_of, single, undropped
from darekit.sweeps.data import DROP_RATE, Cell, Point, Sweep
from darekit.trials.settings import is_fixed, recipe_with


def cells_of(sweep: Sweep) -> tuple[tuple[Cell, ...], tuple[str, ...]]:
    """All cells in the order of the file, then the references; and what was added.

    The references are: nothing dropped, where the grid lacks it; each model alone; the base. Combinations whose
    settings a name on another axis fixes or removes occur once. Where nothing is drawn there is no seed.

    Raises:
        RecipeError: a combination is not a valid recipe; the message says which one.
    """
    grid: dict[Any, Cell] = {}
    for points in itertools.product(*(axis.points for axis in sweep.axes)):
        for cell in _cells_at(sweep, points):
            grid.setdefault((tuple(cell.at.items()), cell.seed), cell)
    cells = [*grid.values()]
    there = {_key(cell.recipe, cell.judges) for cell in cells}
    notes = list(sweep.notes)
    for kind, word in (
        ("undropped", "with nothing dropped, to compare with"),
        ("single", "with one of the models alone"),
        ("base", "with the base alone"),
    ):
        found = [cell for cell in _references(kind, cells) if _key(cell.recipe, cell.judges) not in there]
        fresh: dict[str, Cell] = {}
        for cell in found:
            key = _key(cell.recipe, cell.judges)
            fresh[key] = _shared(fresh.get(key, cell), cell)
        there |= {*fresh}
        cells += fresh.values()
        if fresh:
            notes.append(f"{len(fresh)} {'cell was' if len(fresh) == 1 else 'cells were'} added {word}")
    return tuple(cells), tuple(notes)


def _shared(first: Cell, second: Cell) -> Cell:
    """One cell for two places that come to the same: of what stands beside the grid, only where both are counts."""
    if not (first.beside and second.beside):
        return first
    return replace(first, at={name: label for name, label in first.at.items() if second.at.get(name) == label})


def _cells_at(sweep: Sweep, points: tuple[Point, ...]) -> Iterator[Cell]:
    named = {k: v for axis, point in zip(sweep.axes, points, strict=True) if not axis.setting
             for k, v in point.settings.items()}  # fmt: skip
    at: dict[str, Any] = {}
    settings: dict[str, Any] = dict(named)
    for axis, point in zip(sweep.axes, points, strict=True):
        if axis.setting is None:
            at[axis.name] = point.label
        elif not is_fixed(axis.setting, named):
            at[axis.name] = point.label
            settings[axis.setting] = point.settings[axis.setting]
        elif named.get(axis.setting) is not None:
            at[axis.name] = named[axis.setting]
    asked = [point.judges for point in points if point.judges is not None]
    every = dict.fromkeys(name for judges in sweep.judges.values() for name in judges)
    judges = tuple(name for name in every if all(name in names for names in asked))
    if not judges:
        raise RecipeError(
            f"{sweep.places.name}: {_titled(at)}: no judge is left: the names on its axes ask for different ones"
        )
    recipe = _recipe_at(sweep, at, settings, None)
    if not sweep.seeds or not is_random(recipe):
        yield Cell("grid", at, seed_of(recipe), recipe, judges)
        return
    for seed in sweep.seeds:
        yield Cell("grid", at, seed, _recipe_at(sweep, at, settings, seed), judges)


def _titled(at: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={label}" for name, label in at.items())


def _recipe_at(sweep: Sweep, at: Mapping[str, Any], settings: Mapping[str, Any], seed: int | None) -> Recipe:
    try:
        return recipe_with(sweep.recipe, settings, {axis.setting for axis in sweep.axes}, seed)
    except RecipeError as error:
        raise RecipeError(f"{sweep.places.name}, cell {_titled(at)}: {error}") from None


def _key(recipe: Recipe, judges: tuple[str, ...]) -> str:
    return repr((essence(recipe).to_data(), judges))


def _references(kind: str, cells: Iterable[Cell]) -> Iterator[Cell]:
    for cell in cells:
        if cell.kind != "grid":
            continue
        recipe = cell.recipe
        if kind == "undropped" and drops(recipe):
            at = {**cell.at, DROP_RATE: 0} if DROP_RATE in cell.at else dict(cell.at)
            bare = undropped(recipe)
            yield replace(cell, kind=kind, at=at, seed=seed_of(bare), recipe=bare)
        elif kind == "single":
            for k, entry in enumerate(recipe.models):
                if recipe.heads in (None, "base", entry.model):  # this cell's judges ask the head that it names
                    yield Cell(kind, {}, None, single(recipe, k), cell.judges)
        elif kind == "base" and recipe.base_model is not None and recipe.heads in (None, "base"):
            base = Recipe(None, (ModelEntry(recipe.base_model, {}),), None, "linear", {})
            yield Cell(kind, {}, None, base, cell.judges)
