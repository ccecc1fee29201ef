# SPDX-License-Identifier: Apache-2.0
"""`make bench-packs`: real sizes and speeds of packs on the benchmark's family; `--write` puts them into docs/packs.md.

Sizes are those of files; beside them what a bitmap or int32 indices would cost for the same values, computed. Speeds
are minima of a few runs against the I/O floor: reading both models (pack), reading the base and writing (unpack).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import darekit as dk
import family
import floor
import run

RATES = (0.5, 0.9, 0.95, 0.99)
BITS = (16, 8, 4, 2, 1)
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
# Parameters: all, and those of the embeddings and norms (16 bits where they are kept dense); head counted as matrix.
SHAPES = {
    "Llama-2-7B shapes": (32, 4096, 11008, 32000, 4096),
    "Llama-3-8B shapes": (32, 4096, 14336, 128256, 1024),
}


def shape_sizes(layers: int, hidden: int, inner: int, vocabulary: int, keys: int) -> tuple[int, int]:
    """(all parameters, those of embedding and norms) of a LLaMA with an untied head."""
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    dense = vocabulary * hidden + (2 * layers + 1) * hidden
    return layers * layer + vocabulary * hidden + dense, dense


def least(task: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        task()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def row_of(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def sizes(base: Path, model: Path, out: Path) -> list[str]:
    whole = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    parameters = whole / 2
    lines = [
        "| drop rate | bits | file MB | ratio | with a bitmap | with int32 indices |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for rate in RATES:
        for bits in BITS:
            dk.pack(base, model, out, drop_rate=rate, bits=bits, seed=42, overwrite=True, force=True)
            size = out.stat().st_size
            kept = parameters * (1 - rate)
            cells = [f"{rate:g}", str(bits), f"{size / 1e6:.1f}", f"{whole / size:.1f}x"]
            cells += [f"{whole / (size + parameters / 8):.1f}x", f"{whole / (size + 4 * kept):.1f}x"]
            lines.append(row_of(cells))
            print(lines[-1], file=sys.stderr)
    dk.pack(base, model, out, lossless=True, overwrite=True)
    size = out.stat().st_size
    lines.append(row_of(["lossless", "", f"{size / 1e6:.1f}", f"{whole / size:.2f}x", "", ""]))
    return lines


def shapes() -> list[str]:
    lines = [
        "",
        "| shapes | drop rate | bits | all tensors dropped | embeddings and norms dense |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, shape in SHAPES.items():
        total, dense = shape_sizes(*shape)
        for rate, bits in ((0.9, 16), (0.9, 4), (0.99, 4)):
            stored = bits + (16 / 64 if bits < 16 else 0)
            dense_bits = max(bits, 4) + (16 / 64 if bits < 16 else 0)
            everything = 16 / ((1 - rate) * stored)
            scoped = 16 * total / ((total - dense) * (1 - rate) * stored + dense * dense_bits)
            lines.append(row_of([name, f"{rate:g}", str(bits), f"{everything:.0f}x", f"{scoped:.1f}x"]))
    return lines


def speeds(base: Path, model: Path, folder: Path, times: int) -> list[str]:
    pack, unpacked, scrap = folder / "p.safetensors", folder / "unpacked", folder / "floor.out"
    inputs = [sorted(path.glob("*.safetensors")) for path in (base, model)]
    whole = sum(path.stat().st_size for path in inputs[1])
    run.warm([*inputs[0], *inputs[1]])
    rows = ["", "| | seconds | GB/s | I/O floor s | ratio |", "|---|--:|--:|--:|--:|"]

    def unpack() -> None:
        shutil.rmtree(unpacked, ignore_errors=True)
        dk.unpack(base, pack, unpacked)

    for bits in (16, 4):
        job = lambda bits=bits: dk.pack(base, model, pack, drop_rate=0.9, bits=bits, seed=42, overwrite=True)  # noqa: E731
        job()
        seconds = least(job, times)
        low = min(floor.floor([*inputs[0], *inputs[1]], scrap, pack.stat().st_size, 2) for _ in range(times))
        rows.append(row_of([f"pack, p = 0.9, {bits} bit", f"{seconds:.2f}", f"{2 * whole / seconds / 1e9:.1f}",
                            f"{low:.2f}", f"{seconds / low:.1f}"]))  # fmt: skip
        seconds = least(unpack, times)
        low = min(floor.floor(inputs[0], scrap, whole, 2) for _ in range(times))
        rows.append(row_of([f"unpack, p = 0.9, {bits} bit", f"{seconds:.2f}", f"{2 * whole / seconds / 1e9:.1f}",
                            f"{low:.2f}", f"{seconds / low:.1f}"]))  # fmt: skip
        print(rows[-2:], file=sys.stderr)
    shutil.rmtree(unpacked, ignore_errors=True)
    pack.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, default=run.ROOT / "bench" / "scratch")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/packs.md")
    arguments = parser.parse_args()
    folder = arguments.scratch.resolve() / "family"
    family.build(folder)
    base, model = folder / "base", folder / family.MODELS[0]
    out = folder / "sizes.safetensors"
    lines = [*sizes(base, model, out), *shapes(), *speeds(base, model, folder, arguments.times)]
    out.unlink()
    print("\n".join(lines))
    if arguments.write:
        page = run.ROOT / "docs" / "packs.md"
        old = page.read_text()
        before, after = old.index(BEGIN) + len(BEGIN), old.index(END)
        page.write_text(f"{old[:before]}\n" + "\n".join(lines) + f"\n{old[after:]}")


if __name__ == "__main__":
    main()
