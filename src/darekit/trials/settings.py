# SPDX-License-Identifier: Apache-2.0
"""A recipe with some of its settings replaced, by dotted name, where names may fix or remove what is varied."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from darekit.recipe import Recipe, read_recipe
from darekit.recipe.documents import open_data, open_file

Source = Path | Mapping[str, Any]


def data_of(source: Source) -> Mapping[str, Any]:
    """A recipe's data, as written."""
    return (open_data(source) if isinstance(source, Mapping) else open_file(source)).data


def recipe_with(source: Source, settings: Mapping[str, Any], varied: Set[str | None], seed: int | None) -> Recipe:
    """The recipe with settings replaced; None removes a key.

    Args:
        source: a recipe's file, or its data.
        settings: dotted key -> value.
        varied: keys that are varied: where one does not concern a recipe, it needs not be in it to be taken away.
        seed: of the masks; None: the recipe's own.

    Raises:
        RecipeError: the result is no recipe.
    """
    data = data_of(source)
    kept = {key: value for key, value in settings.items() if value is not None or key not in varied or held(data, key)}
    return read_recipe(source, settings=kept, seed=seed)


def is_fixed(key: str, named: Mapping[str, Any]) -> bool:
    """Whether a name has set this setting, or has taken it (or what it stands under) away."""
    return key in named or any(value is None and key.startswith(f"{other}.") for other, value in named.items())


_NOTHING = object()


def held(data: Any, dotted: str) -> bool:
    """Whether data have a setting."""
    return value_in(data, dotted, _NOTHING) is not _NOTHING


def value_in(data: Any, dotted: str, default: Any = None) -> Any:
    """A setting's value; the default where it is not given."""
    for key in dotted.split("."):
        if isinstance(data, list) and key.isdecimal() and int(key) < len(data):
            data = data[int(key)]
        elif isinstance(data, dict) and key in data:
            data = data[key]
        else:
            return default
    return data
