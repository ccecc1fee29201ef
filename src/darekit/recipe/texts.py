# SPDX-License-Identifier: Apache-2.0
"""Recipes as text that a person reads at the pointer and `dare merge` takes from the clipboard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

# What a recipe means without them; `read_recipe` of both texts gives equal recipes.
_DEFAULTS = {"vocab": "strict", "parameters": {}}
_SPARSIFY_DEFAULTS: dict[str, Any] = {"on": "delta", "seed": 0, "keep_dense": []}


def recipe_text(data: Mapping[str, Any]) -> str:
    """A recipe's data -> YAML without what is so anyway.

    >>> full = {"models": [{"model": "math", "parameters": {}}], "merge_method": "linear", "vocab": "strict"}
    >>> print(recipe_text(full), end="")
    models: [math]
    merge_method: linear
    """
    return yaml.safe_dump(_short(data), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def _short(data: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        if key in _DEFAULTS and value == _DEFAULTS[key]:
            continue
        if key == "models":
            value = [_model(one) for one in value]
        elif key == "sparsify" and isinstance(value, Mapping):
            value = {k: v for k, v in value.items() if k not in _SPARSIFY_DEFAULTS or v != _SPARSIFY_DEFAULTS[k]}
        elif key == "stages" and isinstance(value, Mapping):
            value = {name: _short(one) for name, one in value.items()}
        found[key] = value
    return found


def _model(entry: Any) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    kept = {key: value for key, value in entry.items() if key != "parameters" or value}
    return entry["model"] if list(kept) == ["model"] else kept
