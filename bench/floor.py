# SPDX-License-Identifier: Apache-2.0
"""The I/O floor: read every input byte and write as many bytes as the output has, with threads, and nothing else."""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from collections import deque
from pathlib import Path

CHUNK = 1 << 20


def floor(inputs: list[Path], output: Path, size: int, threads: int, read: int | None = None) -> float:
    """Seconds to read `inputs` (or `read` bytes of them) and to write `size` bytes to `output`, with threads."""
    descriptors = [os.open(path, os.O_RDONLY) for path in inputs]
    jobs = deque(
        (fd, offset, False)
        for fd, path in zip(descriptors, inputs, strict=True)
        for offset in range(0, path.stat().st_size, CHUNK)
    )
    while read is not None and len(jobs) > -(-read // CHUNK) + len(inputs):  # files end in chunks that are not whole
        jobs.pop()
    target = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.ftruncate(target, size)
    # Writes are spread among reads, as a merge spreads them.
    every = max(1, len(jobs) // max(1, size // CHUNK))
    mixed: deque[tuple[int, int, bool]] = deque()
    written = 0
    for i, job in enumerate(jobs):
        mixed.append(job)
        if i % every == every - 1 and written < size:
            mixed.append((target, written, True))
            written += CHUNK
    while written < size:
        mixed.append((target, written, True))
        written += CHUNK

    def work() -> None:
        buffer = mmap.mmap(
            -1, CHUNK
        )  # begins at a page: 16 bytes behind one, some processors copy four times as slowly
        view = memoryview(buffer)
        while True:
            try:
                fd, offset, write = mixed.popleft()
            except IndexError:
                return
            if write:
                os.pwrite(fd, view[: min(CHUNK, size - offset)], offset)
            else:
                os.preadv(fd, [buffer], offset)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - began
    for fd in (*descriptors, target):
        os.close(fd)
    output.unlink()
    return seconds


if __name__ == "__main__":
    out, written, threads, read, *files = sys.argv[1:]
    print(floor([Path(p) for p in files], Path(out), int(written), int(threads), int(read)))
