# SPDX-License-Identifier: Apache-2.0
"""How much memory the sums of statistics may take, and which of them are made in one pass over the data."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from darekit.errors import PlanError

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
            f"{largest:,}, and one tensor's are never split; give at least that"
        )
    return memory


def free_memory(device: Any) -> int:
    """Bytes that can still be taken on a device; a guess where the system does not tell."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    free = _available()
    with suppress(OSError, ValueError):  # a container's limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        cache = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, max(0, limit - used + cache))
    return free


def _available() -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(OSError, ValueError, AttributeError):  # macOS: half of what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 8 << 30
