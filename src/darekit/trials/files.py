# SPDX-License-Identifier: Apache-2.0
"""Files that must not be lost: whole or as before, and one writer at a time."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from darekit.errors import OutputError


def unwritable(path: Path, error: OSError) -> OutputError:
    """What is said where a file of the results cannot be written."""
    hint = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "; make room, and run the same command again: what was judged is kept"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        hint = "; choose another OUT, or make this one writable"
    return OutputError(f"cannot write {path}: {error.strerror or error}{hint}")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is either as before or complete.

    Raises:
        OutputError: it cannot be written.
    """
    write_whole_bytes(path, text.encode())


def write_whole_bytes(path: Path, content: bytes) -> None:
    """The same, of bytes."""
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}")  # another process may write it at the same time
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise unwritable(path, error) from None


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file for this process until it is closed -> whether it could be. Where the system or the file
    system has no locks, it always can."""
    try:
        import fcntl
    except ImportError:  # Windows: two runs at once are the user's own affair
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def append(path: Path, text: str) -> None:
    """Append whole lines to a file that several processes append to; on the disk when this returns.

    The line that a kill cut short is ended first, so that it spoils no other.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            lock(descriptor, wait=True)
            size = os.lseek(descriptor, 0, os.SEEK_END)
            cut = False
            if size:
                os.lseek(descriptor, size - 1, os.SEEK_SET)
                cut = os.read(descriptor, 1) != b"\n"
            rest = (b"\n" if cut else b"") + text.encode()
            while rest:  # a disk that is nearly full takes a part, without an error
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unwritable(path, error) from None
