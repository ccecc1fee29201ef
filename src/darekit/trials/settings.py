# SPDX-License-Identifier: Apache-2.0
"""A recipe with some of its settings replaced, by dotted name, where names may fix or remove what is varied."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from darekit.recipe import Recipe, read_recipe
from darekit.recipe.documents import open_data, open_file
from darekit.wording import distinct_labels

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


# --- what people call a setting ---

_OF_MODEL = re.compile(r"models\.(\d+)\.(?:parameters\.)?")
_PART = re.compile(r"\[([^\]]+)\]")
_WORDS = {"sparsify.method": "sparsifier", "sparsify.seed": "mask seed"}


def models_in(data: Any) -> list[str]:
    """Short names of a recipe's models, in order; of one that is a model's name as written, or a mapping."""
    models = data.get("models") if isinstance(data, Mapping) else None
    names = [one.get("model") if isinstance(one, Mapping) else one for one in models or ()]
    return distinct_labels([str(name) for name in names])


def spoken(key: str, models: Sequence[str]) -> str:
    """What people call a setting or a dimension of a search.

    >>> spoken("models.1.parameters.weight[mlp][2]", ["math", "chat"])
    "chat's weight, mlp, point 3"
    >>> spoken("sparsify.drop_rate", [])
    'drop rate'
    """
    name, _, rest = key.partition("[")
    parts = [f"point {int(part) + 1}" if part.isdecimal() else part for part in _PART.findall(f"[{rest}")]
    match = _OF_MODEL.match(name)
    whose = ""
    if match is not None and int(match[1]) < len(models):
        whose, name = f"{models[int(match[1])]}'s ", name[match.end() :]
    word = _WORDS.get(name) or name.removeprefix("parameters.").removeprefix("sparsify.").replace("_", " ")
    return ", ".join([f"{whose}{word}", *parts])


def all_spoken(keys: Sequence[str], data: Any) -> dict[str, str]:
    """Key -> what people call it, for the settings of a recipe's data; the key itself where two would be called the
    same."""
    models = models_in(data)
    found = {key: spoken(key, models) for key in keys}
    told = [*found.values()]
    return {key: word if told.count(word) == 1 else key for key, word in found.items()}
