# SPDX-License-Identifier: Apache-2.0
"""Values that mergekit takes and that are more likely slips: refused, unless a recipe is read leniently. Then each
means what it means in mergekit, with a warning that says what that is. docs/mergekit.md lists them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from darekit.architectures.templates import CHAT_TEMPLATES
from darekit.methods import Number
from darekit.recipe.documents import Document, Key, shown
from darekit.recipe.tokens import is_template
from darekit.recipe.words import Words

Range = tuple[float, float]

_SHARE: Range = (0.0, 1.0)
_NATIVE: Mapping[str, Range] = {
    **dict.fromkeys(("drop_rate", "density", "keep", "select_topk"), _SHARE),
    "gamma": (-math.inf, 1.0),
}


def as_in_mergekit(document: Document, words: Words) -> tuple[Document, Words]:
    """A recipe with what mergekit makes of its values, and a warning for each; in native words only gradients may
    reach beyond a parameter's range, as a recipe has them that was made of one of mergekit's. And its words, of which
    `slerp`'s t is any number."""
    if words.method == "slerp":
        far = words.shared["t"]
        assert isinstance(far.kind, Number)
        far = replace(far, kind=replace(far.kind, low=-math.inf, high=math.inf))
        words = replace(words, shared={**words.shared, "t": far})
    if words.sparsify is not None:
        return replace(document, clipped=_NATIVE), words
    clipped = {**_NATIVE, **_clipped(words)}
    numbers = {name for name, one in {**words.shared, **words.model}.items() if isinstance(one.kind, Number)}
    notes: list[str] = []

    def say(path: Key, what: str) -> None:
        notes.append(f"WARNING: {'.'.join(map(str, path))} is {what}, as in mergekit (--lenient)")

    def value_of(value: Any, path: Key, within: Range, *, gradient: bool = False) -> Any:
        if isinstance(value, dict):
            return {k: value_of(one, (*path, k), within) if k == "value" else one for k, one in value.items()}
        if isinstance(value, list):
            return [
                value_of(one, (*path, i), within, gradient=not isinstance(one, dict)) for i, one in enumerate(value)
            ]
        if isinstance(value, bool):
            say(path, f"{str(value).lower()}, which counts as {int(value)}")
            return float(value)
        try:
            number = float(value)  # also in quotes
        except (TypeError, ValueError, OverflowError):
            return value
        if not math.isfinite(number) or within[0] <= number <= within[1]:
            return value
        end = within[0] if number < within[0] else within[1]
        if gradient:
            say(path, f"{value}: where the gradient passes {end:g} it counts as {end:g}")
            return value
        say(path, f"{value}, which counts as {end:g}")
        return end

    def walk(value: Any, path: Key) -> Any:
        if isinstance(value, list):
            return [walk(one, (*path, i)) for i, one in enumerate(value)]
        if not isinstance(value, dict):
            return value
        found: dict[str, Any] = {}
        for key, one in value.items():
            here = (*path, key)
            if path[-1:] == ("parameters",) and key in numbers:
                if one == []:
                    say(here, "an empty list: as if it were not there")
                    continue
                found[key] = value_of(one, here, clipped.get(key, (-math.inf, math.inf)))
            elif key == "layer_range" and _runs_backwards(one):
                say(here, f"{shown(one)}, which runs backwards: no layers")
                found[key] = [one[0], one[0]]
            else:
                found[key] = walk(one, here)
        return found

    data = walk(document.data, ())
    template = data.get("chat_template")
    if template is not None and not is_template(template):
        notes.append(
            f"WARNING: chat_template {shown(template)} is neither {', '.join(CHAT_TEMPLATES)}, auto nor a template's "
            "text: ignored (--lenient)"
        )
        del data["chat_template"]
    return replace(document, data=data, notes=(*document.notes, *notes), clipped=clipped), words


def _clipped(words: Words) -> dict[str, Range]:
    """mergekit's parameter -> the range whose nearest end counts for what is beyond it. An end that is infinite is
    none: what is beyond the parameter's own range there stays refused."""
    random = words.method.startswith("dare")
    return {
        "density": (-math.inf if random else 0.0, 1.0),  # mergekit cannot draw with a density below 0
        "gamma": (-math.inf, 1.0),
        "t": (0.0, math.inf) if words.method == "nearswap" else (-math.inf, math.inf),
    }


def _runs_backwards(raw: Any) -> bool:
    whole = isinstance(raw, list) and len(raw) == 2 and all(type(one) is int for one in raw)
    return whole and 0 <= raw[0] > raw[1]
