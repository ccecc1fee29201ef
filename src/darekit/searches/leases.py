# SPDX-License-Identifier: Apache-2.0
"""Who works on what, where several processes share a folder: a file for each thing in work, touched while its owner
lives. Optuna's journal has no such thing: a trial whose process was killed would run in it for ever."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from darekit.errors import OutputError
from darekit.trials.files import unwritable

BEAT = 5.0  # seconds between two touches
DEAD = 60.0  # seconds without one after which the owner is taken for dead

FREE, MINE, HELD, ORPHAN = "free", "mine", "held", "orphan"


class Leases:
    """A folder of leases, and this process's own, which a thread keeps alive.

    On this machine a dead owner is noticed at once, by its process; elsewhere, and where its number was given to
    another process, by its silence. Ages are differences between times of the folder's own file system, so it does not
    matter whether the clocks of machines agree.
    """

    def __init__(self, folder: Path, *, beat: float = BEAT, dead: float = DEAD) -> None:
        self.folder, self.beat, self.dead = folder, beat, dead
        self._owner = {"host": _host(), "pid": os.getpid(), "token": os.urandom(8).hex()}
        self._held: set[str] = set()
        self._stop = threading.Event()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._clock = folder / f".clock-{self._owner['token']}"
            self._clock.touch()
            for path in folder.glob(".clock-*"):  # of processes that were killed
                if self._clock.stat().st_mtime - path.stat().st_mtime > 100 * dead:
                    path.unlink(missing_ok=True)
        except FileExistsError:
            raise OutputError(f"{folder.parent} is a file, but OUT must be a directory: choose another name") from None
        except OSError as error:
            raise unwritable(folder, error) from None
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        for name in [*self._held]:
            self.release(name)
        self._clock.unlink(missing_ok=True)

    def take(self, name: str) -> bool:
        """Take what is free, or an orphan -> whether it was."""
        path = self.folder / name
        for _ in range(2):
            try:
                file = path.open("x", encoding="utf-8")
            except FileExistsError:
                if self.state(name) != ORPHAN:
                    return name in self._held
                # Renamed before it is removed: of two processes that see the same orphan, one gets it.
                gone = self.folder / f".{name}-{self._owner['token']}"
                with suppress(OSError):
                    path.rename(gone)
                    gone.unlink()
                continue
            except OSError as error:
                raise unwritable(path, error) from None
            try:
                with file:
                    json.dump(self._owner, file)
            except OSError as error:  # the disk is full: an empty one would be nobody's for a minute
                path.unlink(missing_ok=True)
                raise unwritable(path, error) from None
            self._held.add(name)
            return True
        return False

    def release(self, name: str) -> None:
        """Give back what is this process's own; others' and what is free are left alone."""
        if name in self._held:
            self._held.discard(name)
            (self.folder / name).unlink(missing_ok=True)

    @contextmanager
    def held(self, name: str) -> Iterator[bool]:
        """Take it, if it can be had, and give it back afterwards."""
        taken = self.take(name)
        try:
            yield taken
        finally:
            if taken:
                self.release(name)

    def state(self, name: str) -> str:
        """free: nobody has it; mine; held: by a living process; orphan: its owner is dead."""
        if name in self._held:
            return MINE
        path = self.folder / name
        try:
            age = self._now() - path.stat().st_mtime
            owner = _owner_of(path)
        except FileNotFoundError:
            return FREE
        return ORPHAN if age > self.dead or _is_dead(owner) else HELD

    def others(self) -> int:
        """How many things living processes other than this one hold."""
        names = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
        return sum(self.state(name) == HELD for name in names)

    def orphans(self) -> list[str]:
        """What belongs to processes that are dead."""
        names = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
        return [name for name in names if self.state(name) == ORPHAN]

    def _now(self) -> float:
        """The time by the clock that stamps files here."""
        self._clock.touch()
        return self._clock.stat().st_mtime

    def _beat(self) -> None:
        while not self._stop.wait(self.beat):
            for name in [*self._held]:
                with suppress(OSError):
                    os.utime(self.folder / name)


def _host() -> str:
    """This machine, or the container: process numbers mean something within it only."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        space = boot = ""
    return f"{socket.gethostname()} {boot} {space}"


def _owner_of(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # it is being written at this moment
        return None


def _is_dead(owner: Any) -> bool:
    """Whether the owner was a process of this machine that is no more."""
    if not isinstance(owner, dict) or owner.get("host") != _host() or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return _is_zombie(owner["pid"])


def _is_zombie(pid: int) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0] == "Z"
        )
    except (OSError, IndexError):
        return False


def wait_a_little(seconds: float = 0.5) -> None:
    """Between two looks at what others do."""
    time.sleep(seconds)
