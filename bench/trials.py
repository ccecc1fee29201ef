# SPDX-License-Identifier: Apache-2.0
"""Memory and candidates a minute over a long search, in one process whose live model gets other weights each time.

    python bench/trials.py FOLDER [--trials 200] [--rows 20]

FOLDER has `base`, models, and for each model M the rows `M.validation.jsonl`: what `make demo` leaves in `demo/`.
Memory is that of the process after each candidate; the first 40 are left out, in which kernels are compiled and buffers
grow to their size.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

import darekit as dk
from evolve import models_in

WARM_UP = 40


def search_of(folder: Path, rows: int) -> dict[str, Any]:
    """Weights, lambda, drop rate and method, with the default rungs; each judge asks so many rows."""
    models = models_in(folder)
    judges = {name: {"data": str(folder / f"{name}.validation.jsonl"), "limit": rows} for name in models}
    return {
        "recipe": {
            "base_model": str(folder / "base"), "models": [str(folder / name) for name in models],
            "merge_method": "task_arithmetic",
            "sparsify": {"method": "dare", "drop_rate": 0.3, "keep_dense": ["embeddings", "norms"]},
        },
        "space": {
            "merge": {"sum": None, "TIES": {"merge_method": "ties", "parameters.keep": 0.2}},
            "models.*.parameters.weight": {"low": 0.0, "high": 1.5},
            "parameters.lambda": {"low": 0.5, "high": 1.5},
            "sparsify.drop_rate": {"low": 0.0, "high": 0.7},
        },
        "validation": judges,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--rows", type=int, default=20)
    asked = parser.parse_args()
    sizes: list[int] = []
    processor: list[float] = []
    clock: list[float] = []

    def watch(status: Any) -> None:
        if status.phase == "search" and status.fresh is not None:
            gc.collect()
            sizes.append(psutil.Process(os.getpid()).memory_info().rss)
            processor.append(time.process_time())
            clock.append(time.monotonic())

    out = Path(tempfile.mkdtemp(prefix="trials-"))
    try:
        found = dk.search(
            search_of(asked.folder, asked.rows), out / "search", trials=asked.trials, device="cpu", watch=watch
        )
    finally:
        shutil.rmtree(out)
    warm = sizes[WARM_UP:]
    count = len(sizes) - 1
    print(json.dumps({
        "candidates": len(sizes),
        "counts": found.summary["counts"],
        "MiB": {at: round(sizes[at - 1] / 2**20) for at in range(WARM_UP, len(sizes) + 1, 20)},
        "last against first": round(warm[-1] / warm[0], 4),
        "most against least": round(max(warm) / min(warm), 4),
        "a minute": round(60 * count / (clock[-1] - clock[0]), 1),
        "a minute of processor": round(60 * count / (processor[-1] - processor[0]), 1),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
