# SPDX-License-Identifier: Apache-2.0
"""All that is wrong with a recipe at once: the strict reading, again and again, each time without what was refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from darekit.errors import RecipeError
from darekit.recipe.data import Recipe
from darekit.recipe.documents import Document, Key
from darekit.recipe.ignored import without
from darekit.recipe.reading import read_document, read_with

MOST = 100  # errors that are looked for


def read_collecting(
    source: str | Path | Mapping[str, Any],
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    lenient: bool = False,
    stage: str | None = None,
) -> tuple[Recipe | None, list[RecipeError]]:
    """As `read_recipe`, but every error is found and none raised.

    A key that is refused is taken away, and the rest is read again: what is wrong elsewhere comes out then. What is
    missing only because a key was taken away is no error. A stage that is wrong is the last that is looked at.

    Returns:
        the recipe, None where there are errors; and the errors, in the order in which reading meets them.
    """
    errors: list[RecipeError] = []

    def reader(document: Document, search: Sequence[Path]) -> Recipe:
        found = _collect(document, search, lenient, errors)
        if found is None:
            raise errors[0]
        return found

    try:
        return read_with(reader, source, settings, seed, stage, lenient=lenient), []
    except RecipeError as error:
        return None, errors or [error]


def _collect(document: Document, search: Sequence[Path], lenient: bool, errors: list[RecipeError]) -> Recipe | None:
    gone: list[Key] = []
    while len(errors) < MOST:
        try:
            found = read_document(document, search, lenient=lenient)
        except RecipeError as error:
            if any(_follows(key, str(error), gone) for key in error.keys or ((),)):
                break
            errors.append(error)
            if not error.keys or not all(_is_removable(document, key) for key in error.keys):
                break
            document = without(document, error.keys)
            gone += error.keys
        else:
            return None if gone else found
    return None


def _follows(key: Key, message: str, gone: Sequence[Key]) -> bool:
    """Whether an error may come from nothing but a key that was taken away: it is about what was around that key, or it
    names it, or what it may be a misspelling of."""
    words = re.findall(r"\w+", message)
    return any(
        one[: len(key)] == key or (key[-1:] != one[-1:] and get_close_matches(str(one[-1]), words, 1, 0.75))
        for one in gone
    )


def _is_removable(document: Document, key: Key) -> bool:
    """Whether a key of a mapping stands there: an entry of a list cannot go, since those behind it would move."""
    here: Any = document.data
    for part in key:
        inside = part in here if isinstance(here, dict) else isinstance(here, list) and part in range(len(here))
        if not inside:
            return False
        last, here = here, here[part]
    return bool(key) and isinstance(last, dict)
