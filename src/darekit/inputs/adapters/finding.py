# SPDX-License-Identifier: Apache-2.0
"""Which names on this machine are those of adapters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from darekit.checkpoints.opening import places_of
from darekit.checkpoints.refusals import ADAPTER_CONFIG, ADAPTER_INDEX, is_adapter

VALUE_HEADS = ("value_head.safetensors", "value_head.bin")  # of reward models, which no language model has
# Rows of tokens that were added, as early versions of vLLM take them beside an adapter.
EMBEDDINGS = ("new_embeddings.safetensors", "new_embeddings.bin")
_WHOLE = re.compile(r"pytorch_model(?:-\d+-of-\d+)?\.bin|(?:model\.safetensors|pytorch_model\.bin)\.index\.json")


def find_adapter(ref: str | Path, search: Sequence[Path] = ()) -> Path | None:
    """A name -> what lies there on this machine, where it is an adapter: its folder, or its file of weights.

    A folder that holds a whole model, too, is the model.
    """
    for place in places_of(ref, search):
        try:
            if place.is_file():
                return place if is_adapter(place.name) else None
            if place.is_dir():
                return place if _holds_adapter(place) else None
            if place.exists():
                return None
        except OSError:  # whoever opens it says what is wrong
            return None
    return None


def _holds_adapter(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    if any(map(_is_whole, names)):  # the model that the adapter became, as a rule; its opening says so
        return False
    return ADAPTER_CONFIG in names or any(is_adapter(name) for name in names)


def _is_whole(name: str) -> bool:
    if name == ADAPTER_INDEX or name in (*VALUE_HEADS, *EMBEDDINGS):
        return False
    return (name.endswith(".safetensors") and not is_adapter(name)) or _WHOLE.fullmatch(name) is not None
