# SPDX-License-Identifier: Apache-2.0
"""`dare extract` beside plain products of the same shapes: how much of the machine's GEMM rate it reaches.

    python bench/extract.py SCRATCH [--energy 0.5] [--pairs 3]

The yardstick multiplies each matrix of the family (float32, in memory) with as many columns, as many times, as the
range finder does, on as many threads with BLAS to themselves. It reads and writes nothing, takes no inner products and
computes no small decomposition: all of that counts against `dare extract`. Both run in turn; minima are compared.
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

PROGRAM = "from darekit.cli import main; main()"


def shapes() -> list[tuple[int, int]]:
    """(out, in) of every module of the family."""
    return [
        (one.shape[0], one.shape[1]) for one in family.tensors(1) if len(one.shape) == 2 and "embed" not in one.name
    ]


def products(rank: int, threads: int) -> float:
    """Seconds for the products that `of_rank` and `residual` take of all modules."""
    rng, columns = np.random.default_rng(0), rank + OVERSAMPLING
    matrices = {shape: rng.standard_normal(shape, np.float32) * np.float32(5e-4) for shape in set(shapes())}

    def work(shape: tuple[int, int]) -> None:
        matrix = matrices[shape]
        right, left = np.ones((shape[1], columns), np.float32), np.ones((shape[0], columns), np.float32)
        for _ in range(1 + POWERS):
            matrix @ right
            matrix.T @ left
        left[:, :rank] @ right[:, :rank].T

    began = time.perf_counter()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, sorted(shapes(), reverse=True)))
    return time.perf_counter() - began


def extract(folder: Path, threads: int, *amount: str) -> tuple[float, dict[str, float]]:
    """Seconds of the whole command, and its report."""
    out = folder / "adapter"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", PROGRAM, "extract", str(folder / "base"), str(folder / "math"), str(out), *amount,
               "--threads", str(threads), "--json", "--save", "none"]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - began, json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--energy", type=float, help="also run a budget, on one layer")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--products", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.products:  # in a process of its own: a child's peak memory is at least its parent's
        print(products(given.rank, given.threads))
        return
    folder = given.scratch / "family"
    family.build(folder)
    alone = [sys.executable, __file__, str(given.scratch), "--products", "--rank", str(given.rank),
             "--threads", str(given.threads)]  # fmt: skip
    total = sum(flops(shape, given.rank) for shape in shapes())
    plain, whole, inner, peak = [], [], [], 0.0
    for _ in range(given.pairs):
        plain.append(float(subprocess.run(alone, capture_output=True, text=True, check=True).stdout))
        seconds, report = extract(folder, given.threads, "--rank", str(given.rank))
        whole.append(seconds)
        inner.append(report["seconds"])
        peak = max(peak, report["peak_rss_bytes"])
    print(f"rank {given.rank}: products alone {min(plain):.2f} s, {total / min(plain) / 1e9:.0f} GFLOP/s")
    print(
        f"extract {min(inner):.2f} s ({min(plain) / min(inner):.0%} of that rate), whole command {min(whole):.2f} s, "
        f"peak {peak / 1e6:.0f} MB, error {report['error']:.3f}"
    )
    if given.energy:
        # All singular values of the whole family take an hour of processor time: one layer of it tells the same.
        family.LAYERS, family.VOCABULARY = 1, 4096
        family.build(given.scratch / "layer")
        work = sum(svd_flops(shape) for shape in shapes())
        for word, amount in (("rank", str(given.rank)), ("energy", str(given.energy))):
            seconds, report = extract(given.scratch / "layer", given.threads, f"--{word}", amount)
            peak, pace = report["peak_rss_bytes"] / 1e6, work / report["seconds"] / 1e9
            told = f", about {pace:.0f} GFLOP/s" if word == "energy" else ""
            print(f"one layer, {word} {amount}: {report['seconds']:.1f} s{told}, peak {peak:.0f} MB")


if __name__ == "__main__":
    main()
