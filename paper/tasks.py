# SPDX-License-Identifier: Apache-2.0
"""Tasks that wait for each other, a few at a time: first the one with the longest chain behind it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """`run` may begin when the tasks named in `needs` have ended, well or not. `seconds`: about how long it takes."""

    name: str
    run: Callable[[], None]
    seconds: float
    needs: frozenset[str] = frozenset()


def chains(tasks: Collection[Task]) -> dict[str, float]:
    """Name -> seconds from a task's beginning to the end of the longest chain of tasks that wait for it."""
    found: dict[str, float] = {}

    def chain(task: Task) -> float:
        if task.name not in found:
            behind = [chain(other) for other in tasks if task.name in other.needs]
            found[task.name] = task.seconds + max(behind, default=0.0)
        return found[task.name]

    for task in tasks:
        chain(task)
    return found


def run_tasks(tasks: Iterable[Task], *, processes: int) -> None:
    """Run them all; the first exception ends it, once what runs has ended."""
    waiting = list(tasks)
    length = chains(waiting)
    waiting.sort(key=lambda task: -length[task.name])
    known, ended = {task.name for task in waiting}, set[str]()
    running: dict[Future[None], Task] = {}
    with ThreadPoolExecutor(processes) as pool:
        while waiting or running:
            ready = [task for task in waiting if task.needs & known <= ended]
            for task in ready[: processes - len(running)]:
                waiting.remove(task)
                running[pool.submit(task.run)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                ended.add(running.pop(future).name)
                future.result()
