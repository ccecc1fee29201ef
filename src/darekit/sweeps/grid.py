# SPDX-License-Identifier: Apache-2.0
"""A sweep -> its cells: every combination of its axes, and what they must be compared with."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from darekit.dtypes import NEAREST, STOCHASTIC
from darekit.errors import RecipeError
from darekit.methods import MERGE_METHODS, SPARSIFIERS
from darekit.recipe import ModelEntry, Recipe, Tokens, Value, read_recipe
from darekit.recipe.documents import open_data, open_file
from darekit.recipe.values import scalars_of
from darekit.sweeps.data import DROP_RATE, Axis, Cell, Point, Sweep


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
        elif not _is_fixed(axis, named):
            at[axis.name] = point.label
            settings[axis.setting] = point.settings[axis.setting]
        elif named.get(axis.setting) is not None:
            at[axis.name] = named[axis.setting]
    asked = [point.judges for point in points if point.judges is not None]
    every = dict.fromkeys(name for judges in sweep.judges.values() for name in judges)
    judges = tuple(name for name in every if all(name in names for names in asked))
    if not judges:
        raise RecipeError(
            f"{sweep.name}: {_titled(at)}: no judge is left: the names on its axes ask for different ones"
        )
    recipe = _recipe_at(sweep, at, settings, None)
    if not sweep.seeds or not is_random(recipe):
        yield Cell("grid", at, seed_of(recipe), recipe, judges)
        return
    for seed in sweep.seeds:
        yield Cell("grid", at, seed, _recipe_at(sweep, at, settings, seed), judges)


def _is_fixed(axis: Axis, named: Mapping[str, Any]) -> bool:
    """Whether a name on another axis has set this axis' setting, or has taken it (or what it stands under) away."""
    assert axis.setting is not None
    return axis.setting in named or any(
        value is None and axis.setting.startswith(f"{key}.") for key, value in named.items()
    )


def _titled(at: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={label}" for name, label in at.items())


def _recipe_at(sweep: Sweep, at: Mapping[str, Any], settings: Mapping[str, Any], seed: int | None) -> Recipe:
    source = sweep.recipe
    try:
        data = (open_data(source) if isinstance(source, Mapping) else open_file(source)).data
        axes = {axis.setting for axis in sweep.axes}
        # An axis that does not concern this cell needs not be in the recipe to be taken away.
        kept = {k: v for k, v in settings.items() if v is not None or k not in axes or _holds(data, k)}
        return read_recipe(source, settings=kept, seed=seed)
    except RecipeError as error:
        raise RecipeError(f"{sweep.name}, cell {_titled(at)}: {error}") from None


def _holds(data: Any, dotted: str) -> bool:
    for key in dotted.split("."):
        if isinstance(data, list) and key.isdecimal() and int(key) < len(data):
            data = data[int(key)]
        elif isinstance(data, dict) and key in data:
            data = data[key]
        else:
            return False
    return True


# --- what a recipe amounts to ---


def drops(recipe: Recipe) -> bool:
    """Whether any element of any delta is dropped."""
    if recipe.sparsify is None:
        return False
    rates = [recipe.sparsify.parameters.get("drop_rate"), *(e.parameters.get("drop_rate") for e in recipe.models)]
    return any(value for rate in rates for value in scalars_of(rate))


def is_random(recipe: Recipe) -> bool:
    """Whether its result depends on the seed."""
    return draws_masks(recipe) or recipe.rounding == STOCHASTIC


def draws_masks(recipe: Recipe) -> bool:
    """Whether elements are dropped at random."""
    return recipe.sparsify is not None and SPARSIFIERS[recipe.sparsify.method].random and drops(recipe)


def seed_of(recipe: Recipe) -> int | None:
    """The recipe's seed, where its result depends on one."""
    if draws_masks(recipe):
        assert recipe.sparsify is not None
        return recipe.sparsify.seed
    return recipe.rounding_seed if is_random(recipe) else None


def essence(recipe: Recipe) -> Recipe:
    """The simplest recipe with the same result: without a sparsifier that drops nothing, without seeds that draw
    nothing, and one untouched model as itself. Cells of one essence are evaluated once."""
    if recipe.sparsify is not None and not drops(recipe) and (recipe.sparsify.on == "delta" or len(recipe.models) == 1):
        recipe = undropped(recipe)
    if recipe.sparsify is not None and not draws_masks(recipe):
        entries = tuple(replace(e, parameters=_without(e.parameters, ("seed",))) for e in recipe.models)
        recipe = replace(recipe, models=entries, sparsify=replace(recipe.sparsify, seed=0))
    if recipe.sparsify is None and len(recipe.models) == 1 and _is_untouched(recipe):
        recipe = single(recipe, 0)
    return replace(recipe, notes=(), text="")


def _is_untouched(recipe: Recipe) -> bool:
    method = MERGE_METHODS[recipe.merge_method]
    own, shared = recipe.models[0].parameters, recipe.parameters
    weight = own.get("weight", shared.get("weight", 1.0))
    normalize = shared.get(
        "normalize", method.parameters["normalize"].default if "normalize" in method.parameters else 0
    )
    return (
        method.keeps_one
        and (weight == 1.0 or (bool(normalize) and isinstance(weight, float | int) and weight > 0))
        and shared.get("lambda", 1.0) == 1.0
        and own.get("keep", shared.get("keep", 1.0)) == 1.0
    )


def undropped(recipe: Recipe) -> Recipe:
    """The same without its sparsifier."""
    if recipe.sparsify is None:
        return recipe
    names = ({*SPARSIFIERS[recipe.sparsify.method].parameters} | {"density", "seed"}) - {"weight"}
    entries = tuple(replace(entry, parameters=_without(entry.parameters, names)) for entry in recipe.models)
    return replace(recipe, models=entries, sparsify=None)


def is_single(recipe: Recipe) -> bool:
    """Whether it comes to one of its models as it is."""
    return len(recipe.models) == 1 and essence(recipe) == single(recipe, 0)


def single(recipe: Recipe, model: int) -> Recipe:
    """One of its models as it is."""
    entry = ModelEntry(recipe.models[model].model, {})
    source = recipe.tokenizer_source if recipe.tokenizer_source in (None, "base", entry.model) else "base"
    heads = recipe.heads if recipe.heads in (None, "base") else entry.model
    tokens = None if recipe.tokens is None else Tokens(entry.model)
    return replace(
        recipe, models=(entry,), sparsify=None, merge_method="linear", parameters={},
        tokenizer_source=source if tokens is None else entry.model, tokens=tokens, chat_template=None,
        heads=heads, rounding=NEAREST, rounding_seed=0, notes=(), text="",
    )  # fmt: skip


def _without(parameters: Mapping[str, Value], names: Iterable[str]) -> dict[str, Value]:
    return {name: value for name, value in parameters.items() if name not in names}


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
