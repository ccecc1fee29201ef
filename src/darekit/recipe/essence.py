# SPDX-License-Identifier: Apache-2.0
"""What a recipe amounts to: recipes of one essence make one model, and are judged once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from darekit.dtypes import NEAREST, STOCHASTIC
from darekit.methods import MERGE_METHODS, SPARSIFIERS
from darekit.recipe.data import Recipe, Tokens
from darekit.recipe.values import Value, scalars_of


def drops(recipe: Recipe) -> bool:
    """Whether any element of any delta is dropped."""
    if recipe.sparsify is None:
        return False
    rates = [recipe.sparsify.parameters.get("drop_rate"), *(e.parameters.get("drop_rate") for e in recipe.models)]
    return any(value for rate in rates for value in scalars_of(rate))


def is_random(recipe: Recipe) -> bool:
    """Whether its result, or that of a stage of it, depends on the seed."""
    return _is_drawn(recipe) or any(is_random(stage) for _, stage in recipe.stages)


def _is_drawn(recipe: Recipe) -> bool:
    return draws_masks(recipe) or recipe.rounding == STOCHASTIC


def draws_masks(recipe: Recipe) -> bool:
    """Whether elements are dropped at random."""
    return recipe.sparsify is not None and SPARSIFIERS[recipe.sparsify.method].random and drops(recipe)


def seed_of(recipe: Recipe) -> int | None:
    """The recipe's seed, where its result depends on one."""
    if draws_masks(recipe):
        assert recipe.sparsify is not None
        return recipe.sparsify.seed
    if _is_drawn(recipe):
        return recipe.rounding_seed
    return next((seed for _, stage in recipe.stages if (seed := seed_of(stage)) is not None), None)


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
    entry = replace(recipe.models[model], parameters={}, stats=None)
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
