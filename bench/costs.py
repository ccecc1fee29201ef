# SPDX-License-Identifier: Apache-2.0
"""What a command costs that writes a folder: as a whole process, of darekit or of another tool."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Cost:
    """Of one command or several: seconds, bytes that were written, and the largest resident memory of a process."""

    seconds: float = 0.0
    written: int = 0
    memory: int = 0

    def add(self, other: Cost) -> None:
        """One after the other."""
        self.seconds += other.seconds
        self.written += other.written
        self.memory = max(self.memory, other.memory)


def cost_of(command: list[str], out: Path) -> Cost:
    """Run a command that writes the folder `out`, which stays. Its memory is at least what this process has."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr:
        text = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text[-3000:]}")
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Cost(seconds, written, usage.ru_maxrss * 1024)


def mergekit(program: str, recipe: Path, out: Path) -> Cost:
    """One merge by mergekit, whose `mergekit-yaml` is `program`."""
    return cost_of([program, str(recipe), str(out), "--random-seed", "42", "--no-copy-tokenizer"], out)
