# SPDX-License-Identifier: Apache-2.0
"""How much memory the sums of statistics may take, and which of them are made in one pass over the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from darekit.errors import PlanError
from darekit.machine import free_memory

ITEM = 4  # bytes of a float32


def bytes_of_sums(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of all the sums of these shapes."""
    return sum(ITEM * math.prod(shape) for shape in shapes.values())


def grouped(shapes: Mapping[str, tuple[int, ...]], memory: int) -> list[dict[str, tuple[int, ...]]]:
    """Sums in order -> groups of neighbours that fit into `memory` bytes; one that is larger is alone."""
    groups: list[dict[str, tuple[int, ...]]] = []
    filled = 0
    for name, shape in shapes.items():
        size = ITEM * math.prod(shape)
        if not groups or filled + size > memory:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size
    return groups


def settled(memory: int | None, shapes: Mapping[str, tuple[int, ...]], device: Any) -> int:
    """The bytes that were asked for, or else half of what is free on the device (batches need memory too).

    Raises:
        PlanError: less than the largest sum takes.
    """
    name = max(shapes, key=lambda name: math.prod(shapes[name]))
    largest = ITEM * math.prod(shapes[name])
    if memory is None:
        return max(largest, free_memory(device) // 2)
    if memory < largest:
        raise PlanError(
            f"--memory of {memory:,} bytes is too little: the sums of {name} {list(shapes[name])} alone take "
            f"{largest:,}, and the sums of one tensor cannot be split; use at least that much"
        )
    return memory
