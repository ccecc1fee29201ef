# SPDX-License-Identifier: Apache-2.0
"""Replacing all weights of a live model, against the engine alone and against a merge to disk, in interleaved rounds.

    python bench/replacing.py SCRATCH [--rounds 9] [--threads 2] [--json]

The model is the benchmarks' family in BF16: 0.57e9 parameters, base and three models, DARE before task arithmetic. What
a candidate of a search costs beside its judging is `replace`: its plan is opened, and its weights go where the last
candidate's were. `engine` is the same plan into a sink that throws the bytes away, `merge` the engine's seconds of
`dare merge` to a file. Files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import darekit as dk
import family
from darekit.dtypes import Bytes
from darekit.engine import execution, tiles
from darekit.engine.trimming import settle_model_trim
from darekit.live.models import open_live
from darekit.planning.opening import open_plan
from darekit.recipe import Recipe, read_recipe


class Nothing:
    """A sink that throws the bytes away."""

    def write(self, buffer: Bytes, offset: int) -> None:
        pass


def recipe_of(folder: Path, seed: int) -> Recipe:
    return read_recipe({
        "base_model": str(folder / "base"), "models": [str(folder / name) for name in family.MODELS],
        "merge_method": "task_arithmetic", "parameters": {"lambda": 0.4},
        "sparsify": {"method": "dare", "drop_rate": 0.9, "seed": seed},
    })  # fmt: skip


def measure(folder: Path, rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of each kind, round by round; a first round warms everything up and is not counted."""
    found: dict[str, list[float]] = {"replace": [], "engine": [], "merge": []}
    with open_live(recipe_of(folder, 0), dtype="bfloat16") as live:
        for at in range(rounds + 1):
            recipe = recipe_of(folder, at)
            begin = time.perf_counter()
            with open_plan(recipe) as plan:
                live.put(plan, threads=threads)
                replaced = time.perf_counter() - begin
                steps = settle_model_trim(plan.steps, threads=threads, tile=tiles.TILE)
                begin = time.perf_counter()
                execution.execute(
                    steps, [Nothing() for _ in plan.shards], names=[one.ref for one in plan.models], threads=threads
                )
                engine = time.perf_counter() - begin
            out = folder / "replaced"
            shutil.rmtree(out, ignore_errors=True)
            merged = dk.merge(recipe, out, threads=threads).seconds
            shutil.rmtree(out)
            if at:
                for name, seconds in (("replace", replaced), ("engine", engine), ("merge", merged)):
                    found[name].append(seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    folder = args.scratch / "family"
    family.build(folder)
    found = measure(folder, args.rounds, args.threads)
    ratios = {
        other: [mine / theirs for mine, theirs in zip(found["replace"], found[other], strict=True)]
        for other in ("engine", "merge")
    }
    if args.json:
        print(json.dumps({"seconds": found, "ratios": ratios}))
        return
    for name, seconds in found.items():
        print(f"{name:8} median {statistics.median(seconds):.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})")
    for other, values in ratios.items():
        print(f"replace / {other}: median {statistics.median(values):.2f}  ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
