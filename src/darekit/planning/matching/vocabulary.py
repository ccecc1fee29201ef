# SPDX-License-Identifier: Apache-2.0
"""Vocabularies of other sizes: which axis counts tokens, how many the output has, what config.json says of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from darekit.architectures.families import VOCAB_KEYS, Facts
from darekit.checkpoints import TensorInfo
from darekit.planning.matching.naming import Roles, View
from darekit.wording import label


def tokens_axis(info: TensorInfo, found: Sequence[TensorInfo], roles: Roles) -> int | None:
    """The axis along which tensors of other vocabularies differ, and nothing else; None: they differ otherwise.

    Before it there may be axes of one element only: BART's `final_logits_bias` is (1, tokens).
    """
    axis = roles.of(info.name, info.shape).token_axis
    if axis is None or math.prod(info.shape[:axis]) != 1:
        return None
    rests = {(*other.shape[:axis], *other.shape[axis + 1 :]) for other in found if len(other.shape) == len(info.shape)}
    return axis if len(rests) == 1 and all(len(other.shape) == len(info.shape) for other in found) else None


def rows_told(name: str, axis: int, found: Iterable[tuple[View, TensorInfo]]) -> str:
    """Who has how many rows of a tensor."""
    return f"{name}: " + ", ".join(f"{info.shape[axis]} rows in {label(view.ref)}" for view, info in found)


def sizes_for_config(facts: Facts, rows: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Name of a tensor -> (axis, rows) of the output -> the config keys that count them, with dots."""
    sizes: dict[str, int] = {}
    for name, (axis, count) in rows.items():
        key = facts.counted(name).get(axis)
        if key is None and facts.is_input_embedding(name):
            key = VOCAB_KEYS[0]
        if key is not None:
            sizes[key] = max(count, sizes.get(key, 0))
    return sizes
