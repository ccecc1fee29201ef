# SPDX-License-Identifier: Apache-2.0
"""Which names on this machine are those of adapters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from darekit.checkpoints.opening import places_of
from darekit.checkpoints.refusals import ADAPTER_CONFIG, is_adapter
from darekit.errors import CheckpointError

_WHOLE = re.compile(r"pytorch_model(?:-\d+-of-\d+)?\.bin|(?:model\.safetensors|pytorch_model\.bin)\.index\.json")


def find_adapter(ref: str | Path, search: Sequence[Path] = ()) -> Path | None:
    """A name -> what lies there on this machine, where it is an adapter: its folder, or its file of weights.

    Raises:
        CheckpointError: a folder that holds a whole model, too.
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
    weights = sorted(name for name in names if is_adapter(name) and name != ADAPTER_CONFIG)
    whole = sorted(filter(_is_whole, names))
    if whole and weights and ADAPTER_CONFIG in names:
        raise CheckpointError(
            f"{folder} holds an adapter ({weights[0]}) and a whole model ({whole[0]}), and which of them is meant is "
            f"not known: give {folder / weights[0]} for the adapter, or move one of them to a folder of its own"
        )
    if whole:
        return False
    return ADAPTER_CONFIG in names or any(is_adapter(name) for name in names)


def _is_whole(name: str) -> bool:
    return (name.endswith(".safetensors") and not is_adapter(name)) or _WHOLE.fullmatch(name) is not None
