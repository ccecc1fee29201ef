# SPDX-License-Identifier: Apache-2.0
"""The recipe: which models, sparsified how, merged how. Inert data (`data`), and the strict reading of it.

`documents` turns YAML into plain data with the line of every key, `words` knows which keys go where, `reading` reads.
Names and ranges of parameters come from the table of methods, never from here.
"""

from __future__ import annotations

from darekit.recipe.data import ModelEntry, Recipe, Slice, Sparsify, TokenRow, Tokens
from darekit.recipe.reading import read_recipe
from darekit.recipe.values import AUTO, Filtered, Filters, Gradient, Place, Value, is_exact, resolve
from darekit.recipe.words import TOP_KEYS

__all__ = [
    "AUTO",
    "TOP_KEYS",
    "Filtered",
    "Filters",
    "Gradient",
    "ModelEntry",
    "Place",
    "Recipe",
    "Slice",
    "Sparsify",
    "TokenRow",
    "Tokens",
    "Value",
    "is_exact",
    "read_recipe",
    "resolve",
]
