# SPDX-License-Identifier: Apache-2.0
"""`dare extract` beside plain products of the same shapes: how much of the machine's GEMM rate it reaches.

    python bench/extract.py SCRATCH [--energy 0.5] [--pairs 3]

The yardstick multiplies each matrix of the family (float32, in memory) with as many columns, as many times, as the
range finder does, on as many threads with BLAS to themselves. It reads and writes nothing, takes no inner products and
computes no small decomposition: all of that counts against `dare extract`. Both run in turn; minima are compared, of
the time on the clock and of that of the processors, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

import family
from darekit.extraction.factors import OVERSAMPLING, POWERS, flops, svd_flops

PROGRAM = """
import json, sys, time
import darekit as dk
base, model, out, threads, word, amount = sys.argv[1:]
began = time.process_time()
kept = {word: int(amount) if word == "rank" else float(amount)}
report = dk.extract(base, model, out, save=[], threads=int(threads), **kept)
found = {"seconds": report.seconds, "processors": time.process_time() - began, "peak": report.peak_rss_bytes}
print(json.dumps(found | {"error": report.error}))
"""


def shapes() -> list[tuple[int, int]]:
    """(out, in) of every module of the family."""
    return [
        (one.shape[0], one.shape[1]) for one in family.tensors(1) if len(one.shape) == 2 and "embed" not in one.name
    ]


def products(rank: int, threads: int) -> tuple[float, float]:
    """Seconds for the products that `of_rank` and `residual` take of all modules: on the clock, and of processors."""
    rng, columns = np.random.default_rng(0), rank + OVERSAMPLING
    matrices = {shape: rng.standard_normal(shape, np.float32) * np.float32(5e-4) for shape in set(shapes())}

    def work(shape: tuple[int, int]) -> None:
        matrix = matrices[shape]
        right, left = np.ones((shape[1], columns), np.float32), np.ones((shape[0], columns), np.float32)
        for _ in range(1 + POWERS):
            matrix @ right
            matrix.T @ left
        left[:, :rank] @ right[:, :rank].T

    began = time.perf_counter(), time.process_time()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, sorted(shapes(), reverse=True)))
    return time.perf_counter() - began[0], time.process_time() - began[1]


def extract(folder: Path, threads: int, word: str, amount: float) -> dict[str, float]:
    """What `PROGRAM` prints, in a process of its own, and `whole`: seconds of the process."""
    out = folder / "adapter"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", PROGRAM, str(folder / "base"), str(folder / "math"), str(out), str(threads), word]
    began = time.perf_counter()
    done = subprocess.run([*command, str(amount)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout) | {"whole": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--energy", type=float, help="also run a budget, on one layer and the head")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--products", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.products:  # in a process of its own: a child's peak memory is at least its parent's
        print(*products(given.rank, given.threads))
        return
    folder = given.scratch / "family"
    family.build(folder)
    alone = [sys.executable, __file__, str(given.scratch), "--products", "--rank", str(given.rank),
             "--threads", str(given.threads)]  # fmt: skip
    total = sum(flops(shape, given.rank) for shape in shapes())
    plain, found = [], []
    extract(folder, given.threads, "rank", given.rank)  # compiles the kernels, if need be
    for _ in range(given.pairs):
        told = subprocess.run(alone, capture_output=True, text=True, check=True).stdout.split()
        plain.append(tuple(map(float, told)))
        found.append(extract(folder, given.threads, "rank", given.rank))
    clock, work = map(min, zip(*plain, strict=True))
    seconds, processors, whole = (min(one[key] for one in found) for key in ("seconds", "processors", "whole"))
    peak, error = max(one["peak"] for one in found), found[0]["error"]
    pace = total / clock / 1e9
    print(f"rank {given.rank}: products alone {clock:.2f} s, {pace:.0f} GFLOP/s; {work:.2f} s of processors")
    print(
        f"extract {seconds:.2f} s ({clock / seconds:.0%} of that rate), {processors:.2f} s of processors "
        f"({work / processors:.0%}), whole command {whole:.2f} s, peak {peak / 1e6:.0f} MB, error {error:.3f}"
    )
    if given.energy:
        # All singular values of the whole family take minutes of processor time: one layer of it, and its largest
        # matrix, the head, tell the same.
        family.LAYERS = 1
        family.build(given.scratch / "layer-and-head")
        flop = sum(svd_flops(shape) for shape in shapes())
        for word, amount in (("rank", given.rank), ("energy", given.energy)):
            one = extract(given.scratch / "layer-and-head", given.threads, word, amount)
            told = f", about {flop / one['seconds'] / 1e9:.0f} GFLOP/s" if word == "energy" else ""
            print(
                f"one layer and the head, {word} {amount}: {one['seconds']:.1f} s{told}, {one['processors']:.1f} s of "
                f"processors, peak {one['peak'] / 1e6:.0f} MB"
            )


if __name__ == "__main__":
    main()
