# SPDX-License-Identifier: Apache-2.0
"""A few threads, a queue of jobs, and the first error."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

Job = TypeVar("Job")


def run_all(
    jobs: Iterable[Job], work: Callable[[Job], int], *, threads: int, tell: Callable[[int], None] | None = None
) -> None:
    """Do every job on a few threads; each returns what it counts for, and `tell` hears their sum from this thread.

    The first error stops all threads and is raised here.
    """
    queue = deque(jobs)
    stop = threading.Event()
    done = [0] * threads

    def run(worker: int) -> None:
        while not stop.is_set():
            try:
                job = queue.popleft()
            except IndexError:
                return
            done[worker] += work(job)

    with ThreadPoolExecutor(threads, thread_name_prefix="darekit") as pool:
        futures = [pool.submit(run, worker) for worker in range(threads)]
        try:
            while wait(futures, timeout=0.1, return_when=FIRST_EXCEPTION).not_done:
                if any(future.done() and future.exception() for future in futures):
                    break
                if tell:
                    tell(sum(done))
        finally:
            stop.set()
        for future in futures:
            future.result()
    if tell:
        tell(sum(done))
