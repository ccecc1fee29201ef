# SPDX-License-Identifier: Apache-2.0
"""How a recipe names a model: a directory, a file, `org/name@revision`, or mergekit's mapping of these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from darekit.recipe.documents import Document, Key, fail, shown, suggest

_REFERENCE_KEYS = ("model", "lora", "override_architecture")
_PATH_KEYS = ("path", "revision")


def reference_of(document: Document, path: Key, raw: Any) -> str:
    """A model's name as text.

    Raises:
        RecipeError: it is neither text nor one of mergekit's mappings.
    """
    if isinstance(raw, dict):
        return _from_mapping(document, path, raw)
    if raw is None or raw == "":
        fail(document, path, " has no value; write a directory or a Hub id")
    if not isinstance(raw, str):
        fail(
            document,
            path,
            f"expected a directory or a Hub id, found {shown(raw)}; if that really is the model's name, put it in "
            "quotes",
        )
    return raw


def unknown_keys(path: Key, raw: Any) -> Iterator[tuple[Key, str]]:
    """What stands where a model's name does -> each key of mergekit's mappings that means nothing, and why."""
    if not isinstance(raw, dict) or not {"path", "model"} & {*raw}:
        return  # none of the mappings: refused as a whole
    known = _PATH_KEYS if "path" in raw else _REFERENCE_KEYS
    for key, value in raw.items():
        if key not in known:
            yield (*path, key), f"is not known{suggest(key, known)}"
        elif key in ("model", "lora"):
            yield from unknown_keys((*path, key), value)


def _from_mapping(document: Document, path: Key, raw: Mapping[str, Any]) -> str:
    """`{model: {path: org/name, revision: v1}, lora: {...}}` -> `org/name@v1+...`; the inner mapping alone, too."""
    if "path" in raw:
        return _path_of(document, path, raw)
    if "model" not in raw:
        fail(
            document, path,
            f"expected a directory or a Hub id as text (org/name@revision), or {{model: {{path, revision}}}}, found "
            f"the mapping {shown(raw)}",
        )  # fmt: skip
    name = _path_of(document, (*path, "model"), raw["model"])
    return name if raw.get("lora") is None else f"{name}+{_path_of(document, (*path, 'lora'), raw['lora'])}"


def _path_of(document: Document, path: Key, raw: Any) -> str:
    if not isinstance(raw, dict):
        return reference_of(document, path, raw)
    if "path" not in raw:
        fail(document, path, f"expected {{path: org/name, revision: ...}}, found {shown(raw)}")
    name = reference_of(document, (*path, "path"), raw["path"])
    return name if raw.get("revision") is None else f"{name}@{raw['revision']}"
