# SPDX-License-Identifier: Apache-2.0
"""Files as this package reads and writes them: opened once, and read or written at any offset by any thread.

Ranged reads into the caller's buffer, and no mmap: mapped pages count as the process's memory, and a file that
shrinks under a map kills the process with SIGBUS where a read reports an error.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt

from darekit.errors import CheckpointError, OutputError

Bytes = npt.NDArray[np.uint8]

BINARY = getattr(os, "O_BINARY", 0)  # Windows translates line ends without it
POSITIONAL = hasattr(os, "preadv") and hasattr(os, "pwrite")  # Windows has neither
CLOSED = -1  # in place of a descriptor: no call of the system takes it for a file
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


class InputFile:
    """A file opened for reading; many threads may read it at the same time. Once closed it refuses every read.

    Attributes:
        path: where it was opened, symbolic links unresolved (the Hub's cache is made of them).
        size: bytes at opening.
        mtime_ns: time of last change at opening.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = _open(path)
        status = os.fstat(self._fd)
        self.size, self.mtime_ns = status.st_size, status.st_mtime_ns
        self._inode = (status.st_dev, status.st_ino)
        self._lock = threading.Lock()

    def read_into(self, buffer: Bytes, offset: int) -> None:
        """(n,) uint8, filled with the n bytes that begin at `offset`.

        Raises:
            CheckpointError: the file was closed, it ends before, or the disk fails.
        """
        if self._fd == CLOSED:
            raise CheckpointError(
                f"{self.path} is closed, and was to be read: read tensors before their checkpoint, pack or plan is "
                "closed (the files of a plan are open inside `with dk.plan(recipe) as plan:`)"
            )
        view = buffer.data
        done = 0
        while done < len(view):  # the kernel may return less than asked, and never returns more than 2 GiB
            try:
                got = self._read_at(view[done:], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: reading {len(view)} bytes at {offset} failed: {error.strerror or error}"
                ) from error
            if got == 0:
                raise CheckpointError(
                    f"{self.path} ends at byte {offset + done}, but had {self.size} bytes when it was opened: the file "
                    "shrank or was truncated while it was read. Run again when nothing writes to it"
                )
            done += got

    def read(self, offset: int, count: int) -> bytes:
        """The `count` bytes that begin at `offset`."""
        if POSITIONAL and self._fd != CLOSED:  # a small piece, as headers and samples are, comes in one call
            try:
                found = os.pread(self._fd, count, offset)
            except OSError:
                found = b""
            if len(found) == count:
                return found
        buffer = np.empty(count, np.uint8)
        self.read_into(buffer, offset)
        return buffer.tobytes()

    def changed(self) -> bool:
        """Whether the path now leads to something else than what was opened: size, time or inode differ."""
        try:
            now = self.path.stat()
        except OSError:
            return True
        return self._differs(now)

    def reopen(self) -> None:
        """Open a closed file again; does nothing where it is open.

        Raises:
            CheckpointError: it is gone, or is no longer the file that was opened first.
        """
        if self._fd != CLOSED:
            return
        fd = _open(self.path)
        if self._differs(os.fstat(fd)):
            os.close(fd)
            raise CheckpointError(
                f"{self.path} has changed since it was first opened, so what is known about it no longer holds. Plan "
                "again"
            )
        self._fd = fd

    def close(self) -> None:
        """Give the descriptor back; a second call does nothing."""
        # The number goes first: the system gives it to the next file that anyone opens.
        fd, self._fd = self._fd, CLOSED
        if fd != CLOSED:
            os.close(fd)

    def _differs(self, status: os.stat_result) -> bool:
        now = status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino)
        return now != (self.size, self.mtime_ns, self._inode)

    def _read_at(self, view: memoryview, offset: int) -> int:
        if POSITIONAL:
            return os.preadv(self._fd, [view], offset)
        with self._lock:  # seek and read must not be torn apart by another thread
            os.lseek(self._fd, offset, os.SEEK_SET)
            data = os.read(self._fd, len(view))
        view[: len(data)] = data
        return len(data)


class OutputFile:
    """A file whose size is known before its first byte; many threads may write it at the same time."""

    def __init__(self, path: Path, size: int, fd: int) -> None:
        self.path = path
        self.size = size
        self._fd = fd
        self._lock = threading.Lock()
        self._closed = False

    @staticmethod
    def create(path: Path, size: int) -> OutputFile:
        """Create `path` with `size` bytes of zeros; a file that already has this size keeps its content (resume).

        Raises:
            OutputError: the disk has too little room, or the file cannot be created.
        """
        fd = None
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | BINARY, 0o666)
            status = os.fstat(fd)
            if status.st_size != size:
                if status.st_size:
                    os.ftruncate(fd, 0)  # what an unrelated file held must not show through
                os.ftruncate(fd, size)
                status = os.fstat(fd)
            held = getattr(status, "st_blocks", 0) * 512
            free = _free(path)
            if free is not None and free < size - held:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if not held:
                _reserve(fd, size)
        except OSError as error:
            if fd is not None:
                os.close(fd)
            raise OutputError(_why_unwritable(path, size, error)) from error
        return OutputFile(path, size, fd)

    def write(self, buffer: Bytes, offset: int) -> None:
        """(n,) uint8, written to the n bytes that begin at `offset`.

        Raises:
            OutputError: the disk is full or fails.
        """
        view = buffer.data
        if offset < 0 or offset + len(view) > self.size:
            raise ValueError(f"{self.path}: bytes {offset} to {offset + len(view)} lie outside its {self.size}")
        done = 0
        try:
            while done < len(view):
                done += self._write_at(view[done:], offset + done)
        except OSError as error:
            raise OutputError(_why_unwritable(self.path, self.size, error)) from error

    def sync(self) -> None:
        """Wait until the bytes are on the disk."""
        try:
            getattr(os, "fdatasync", os.fsync)(self._fd)  # macOS has no fdatasync
        except OSError as error:  # late ENOSPC (network file systems), EIO
            raise OutputError(_why_unwritable(self.path, self.size, error)) from error

    def close(self) -> None:
        """Give the descriptor back; a second call does nothing."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)

    def _write_at(self, view: memoryview, offset: int) -> int:
        if POSITIONAL:
            return os.pwrite(self._fd, view, offset)
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.write(self._fd, view)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory (new files, renames) are on the disk; nothing where that is impossible."""
    if os.name == "nt":  # directories cannot be opened there
        return
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a directory
            raise OutputError(f"{path}: cannot be synced to disk: {error.strerror or error}") from error


def _open(path: Path) -> int:
    try:
        # Asked before opening: opening a named pipe waits for a writer, for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a directory" if path.is_dir() else "not a regular file"
            raise CheckpointError(f"{path} is {kind}; expected a file of weights")
        return os.open(path, os.O_RDONLY | BINARY)
    except OSError as error:
        raise CheckpointError(_why_unreadable(path, error)) from error


def _why_unreadable(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        # A dangling link is what an interrupted or pruned download leaves in the Hub's cache.
        found = "is a link to a file that does not exist" if path.is_symlink() else "does not exist"
        return f"{path} {found}"
    if error.errno == errno.EMFILE:
        return f"{path} cannot be opened: too many open files; raise the limit with `ulimit -n 4096`"
    return f"{path} cannot be opened: {error.strerror or error}"


def _why_unwritable(path: Path, size: int, error: OSError) -> str:
    if error.errno not in FULL:
        return f"{path} cannot be written: {error.strerror or error}"
    free = _free(path)
    room = "" if free is None else f", {free:,} are free on its disk"
    what = "the disk quota is used up" if error.errno != errno.ENOSPC else "no space left on the disk"
    return f"{path} needs {size:,} bytes{room}: {what}. Free some space, or write to another disk"


def _reserve(fd: int, size: int) -> None:
    """Have the file system find places for all bytes of an empty file at once, if it can: writing them then takes a
    third less of its time than finding a place for each page, and a disk that is full says so before any work is done.

    Raises:
        OSError: the disk is full.
    """
    # Not `os.posix_fallocate`: where the file system cannot, it writes a byte into every block.
    if not sys.platform.startswith("linux") or sys.maxsize < 1 << 32 or not size:
        return
    try:
        call = ctypes.CDLL(None, use_errno=True).fallocate
    except (AttributeError, OSError):
        return
    call.argtypes = ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
    if call(fd, 0, 0, size) and ctypes.get_errno() in FULL:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _free(path: Path) -> int | None:
    """Bytes that this user may still write where `path` lies, None if the system does not tell."""
    if not hasattr(os, "statvfs"):
        return None
    try:
        status = os.statvfs(path if path.exists() else path.parent)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize if status.f_blocks else None  # some FUSE mounts report only zeros
