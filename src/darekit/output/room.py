# SPDX-License-Identifier: Apache-2.0
"""Whether an output can be written where it is to go, asked before there is one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from darekit.errors import OutputError
from darekit.output.staging import refuse_taken
from darekit.wording import size_of


def output_problems(out: Path, needed: int) -> list[OutputError]:
    """What is in the way of `needed` bytes at `out`: something that is there, no permission, too little room."""
    found: list[OutputError] = []
    try:
        refuse_taken(out)
    except OutputError as error:
        found.append(error)
    folder = next((one for one in out.expanduser().absolute().parents if one.exists()), None)
    if folder is None:
        return found
    if not os.access(folder, os.W_OK | os.X_OK):
        found.append(OutputError(f"{out} cannot be written: no permission to write into {folder}; choose another OUT"))
    free = shutil.disk_usage(folder).free
    if free < needed:
        found.append(
            OutputError(
                f"{out} needs {size_of(needed)}, but only {size_of(free)} are free on its disk: free some space, or "
                "write to another disk"
            )
        )
    return found
