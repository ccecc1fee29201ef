# SPDX-License-Identifier: Apache-2.0
"""Recipes of several stages: documents in one file, or `stages:` in data, of which some are models of others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from darekit.errors import RecipeError
from darekit.recipe.data import Recipe
from darekit.recipe.documents import Document, did_you_mean, fail, open_data, shown, suggest

LAST = None  # the stage that is meant where none is named

STAGES = "stages"


def stages_of(documents: Sequence[Document]) -> tuple[dict[str, Document], Document]:
    """The documents of a file, or the only one with its `stages:` -> the named ones, and the one that is meant.

    That is the one without a name, wherever it stands, as in mergekit-multi; the last where all have names.

    Raises:
        RecipeError: two of one name; two without any.
    """
    if len(documents) == 1:
        (document,) = documents
        return _from_data(document)
    named: dict[str, Document] = {}
    nameless = [i for i, document in enumerate(documents) if document.data.get("name") is None]
    if len(nameless) > 1:
        raise RecipeError(
            f"{documents[0].name}: documents {nameless[0] + 1} and {nameless[1] + 1} of {len(documents)} have no name; "
            "only the one that is written can do without: give the other a `name:`"
        )
    meant = nameless[0] if nameless else len(documents) - 1
    for i, document in enumerate(documents):
        name = document.data.get("name")
        if name is not None and str(name) in named:
            fail(document, ("name",), f" {shown(name)} is the name of an earlier document, too")
        rest = replace(document, data={key: value for key, value in document.data.items() if key != "name"})
        if name is not None:
            named[str(name)] = rest
        if i == meant:
            last = rest
    return named, last


def _from_data(document: Document) -> tuple[dict[str, Document], Document]:
    raw = document.data.get(STAGES)
    if raw is None:
        return {}, document
    if not isinstance(raw, dict) or not all(isinstance(one, dict) for one in raw.values()):
        fail(document, (STAGES,), f"expected a mapping of names to recipes, found {shown(raw)}")
    named = {}
    for name, data in raw.items():
        places = {path[2:]: place for path, place in document.places.items() if path[:2] == (STAGES, name)}
        named[name] = replace(open_data(data), name=f"{document.name}, stage {name}", places=places)
    return named, replace(document, data={key: value for key, value in document.data.items() if key != STAGES})


def read_stage(
    named: Mapping[str, Document], last: Document, stage: str | None, read: Callable[[Document], Recipe]
) -> Recipe:
    """One stage, with those that it is made of. `read`: of one document, which knows no other.

    Raises:
        RecipeError: there is no such stage, or stages are made of each other.
    """
    if stage is not LAST and stage not in named:
        known = list(named)
        told = suggest(stage, known, "known") if known else "; it is one recipe, without named stages"
        raise RecipeError(f"{last.name}: no stage is named {stage!r}{told}")
    done: dict[str, Recipe] = {}

    def finished(document: Document, path: tuple[str, ...]) -> Recipe:
        inner, body = _from_data(document)
        recipe = read_stage(inner, body, LAST, read) if inner else read(document)
        _refuse_misspelt(document, names_in(recipe), named)
        used = [name for name in named if name in names_in(recipe) and name not in inner]
        for name in used:
            if name in path:
                raise RecipeError(f"{document.name}: stages that contain each other: {' > '.join((*path, name))}")
            if name not in done:
                done[name] = finished(named[name], (*path, name))
        return replace(recipe, stages=(*recipe.stages, *((name, done[name]) for name in used)))

    if stage is LAST:
        own = next((name for name, document in named.items() if document is last), None)
        return finished(last, (own,) if own is not None else ())
    return finished(named[stage], (stage,))


def _refuse_misspelt(document: Document, names: set[str], stages: Iterable[str]) -> None:
    """A name of one word that is no stage and no file here can mean nothing but a stage: on the Hub are org/name."""
    known = [*stages]
    for name in sorted(names.difference(known)):
        folders = (Path(), Path(document.name).resolve().parent)
        if "/" in name or "+" in name or not (hint := did_you_mean(name, known)):
            continue
        if any(os.path.lexists(folder / name.partition("@")[0]) for folder in folders):
            continue
        raise RecipeError(f"{document.name}: there is no stage and no checkpoint {name!r}{hint}")


def names_in(recipe: Recipe) -> set[str]:
    """Every model that a recipe names."""
    names = {entry.model for entry in recipe.models} | {one.base[0] for one in recipe.slices if one.base}
    names |= set(recipe.tokens.models) if recipe.tokens else set()
    return names | ({recipe.base_model} if recipe.base_model is not None else set())


def input_names(recipe: Recipe) -> list[str]:
    """Every model that gives a recipe weights: models as listed, then bases."""
    bases = [recipe.base_model, *(one.base[0] for one in recipe.slices if one.base)]
    return [name for name in (*(entry.model for entry in recipe.models), *dict.fromkeys(bases)) if name is not None]


def stored_names(recipe: Recipe) -> list[str]:
    """Every model that a recipe and its stages name and that is no stage itself: models as listed, then bases."""
    stages = dict(recipe.stages)
    own = [name for name in input_names(recipe) if name not in stages]
    return [*own, *(name for stage in stages.values() for name in stored_names(stage))]
