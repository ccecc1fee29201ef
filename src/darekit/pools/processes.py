# SPDX-License-Identifier: Apache-2.0
"""Work in this process, or in several of this machine. One that dies is told of, and replaced."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

STOP_SECONDS = 1.0

Work = Callable[[Any], Any]
Make = Callable[[], Work]


@dataclass(frozen=True)
class Lost:
    """What comes back for a task whose worker died. `why`: in words, to stand after the task's name."""

    why: str


class Pool(Protocol):
    """Workers that stay alive between runs."""

    @property
    def size(self) -> int:
        """How many tasks run at once."""

    def run(self, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """(index of the task, what the work returned or `Lost`), as tasks end. Nothing is tried again here."""
        ...


@contextmanager
def open_processes(make: Make, jobs: int) -> Iterator[Pool]:
    """A pool of that many processes; of one, this process itself. All are gone on leaving.

    Args:
        make: called once in each process, when it gets its first task; must be picklable where there are several. What
            it returns is called with one task at a time, and must not raise.
        jobs: how many.
    """
    if jobs <= 1:
        yield _Here(make)
        return
    pool = _Processes(make, jobs)
    try:
        yield pool
    finally:
        pool.close()


class _Here:
    """This process."""

    size = 1

    def __init__(self, make: Make) -> None:
        self._make = make
        self._work: Work | None = None

    def run(self, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for at, task in enumerate(tasks):
            self._work = self._work or self._make()
            yield at, self._work(task)


class _Processes:
    """Processes that wait for work."""

    def __init__(self, make: Make, jobs: int) -> None:
        self.size = jobs
        self._make = make
        self._idle: list[tuple[Any, Connection]] = []
        self._started: list[tuple[Any, Connection]] = []

    def run(self, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        waiting = list(reversed(range(len(tasks))))
        busy: dict[Connection, tuple[Any, int]] = {}
        while waiting or busy:
            while waiting and len(busy) < self.size:
                process, connection = self._idle.pop() if self._idle else self._start()
                busy[connection] = process, waiting.pop()
                with suppress(BrokenPipeError, ConnectionError):  # it died while it waited: heard of below
                    connection.send(tasks[busy[connection][1]])
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                process, at = busy.pop(ready)
                try:
                    found = ready.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    yield at, Lost(died(process.exitcode))
                    continue
                self._idle.append((process, ready))
                yield at, found

    def _start(self) -> tuple[Any, Connection]:
        context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
        here, there = context.Pipe()
        process = context.Process(target=_live, args=(there, self._make), daemon=True)
        process.start()
        there.close()
        self._started.append((process, here))
        return process, here

    def close(self) -> None:
        """End all processes."""
        for _, connection in self._started:
            connection.close()  # a worker that waits for work ends
        for process, _ in self._started:
            process.join(STOP_SECONDS if process.is_alive() else None)
            if process.is_alive():
                process.terminate()
                process.join()


def died(code: int | None) -> str:
    """A process's exit code in words."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"its process was killed by {name}{' (out of memory? use fewer --jobs)' if name == 'SIGKILL' else ''}"
    return f"its process ended with code {code}"


def _live(connection: Connection, make: Make) -> None:
    """A worker's life: tasks in, results out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    work: Work | None = None
    while True:
        try:
            task = connection.recv()
        except (EOFError, ConnectionError):
            return
        work = work or make()
        found = work(task)
        try:
            connection.send(found)
        except ConnectionError:  # the parent stopped listening: Ctrl-C, or an error that ends the run
            return
