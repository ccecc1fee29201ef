# SPDX-License-Identifier: Apache-2.0
"""What the machine offers: processors, free memory, the most that this process has used."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def free_memory(device: Any) -> int:
    """Bytes that can still be taken on a device; a guess where the system does not tell."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return free_host_memory()


def free_host_memory() -> int:
    """Bytes of the machine's own memory that can still be taken; a guess where the system does not tell."""
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


def default_threads() -> int:
    """The processors this process may use, 8 at most: more only fight over the disk."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, available, cpu_quota() or available))


def cpu_quota(groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """How many processors' time a container may take, rounded up (`docker run --cpus`); None: as much as there is.

    Threads beyond it do not help: the system stops all of them for the rest of each tenth of a second.
    """
    with suppress(OSError, ValueError):
        quota, period = (groups / "cpu.max").read_text().split()
        return None if quota == "max" else -(-int(quota) // int(period))
    with suppress(OSError, ValueError, ZeroDivisionError):  # version 1
        quota, period = ((groups / "cpu" / f"cpu.cfs_{word}_us").read_text() for word in ("quota", "period"))
        return -(-int(quota) // int(period)) if int(quota) > 0 else None
    return None


def threads_of(given: int | None) -> int:
    """How many threads a caller wants; `default_threads` where it does not say.

    Raises:
        TypeError: no whole number above 0.
    """
    if given is None:
        return default_threads()
    if type(given) is not int or given < 1:
        raise TypeError(f"threads must be a whole number above 0, found {given!r}")
    return given


@contextmanager
def without_collector() -> Iterator[None]:
    """No passes of Python's cycle collector meanwhile: it looks at all objects again and again, while very many are
    made of which none is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def peak_rss() -> int:
    """The process's largest resident size so far, in bytes; 0 where the system does not tell.

    On Linux `getrusage` counts what the parent had when it started this process, so a small one of a large parent would
    seem large; /proc counts this program alone.
    """
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
