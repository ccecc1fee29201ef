# SPDX-License-Identifier: Apache-2.0
"""`make bench-packs`: real sizes and speeds of packs on the benchmark's family; `--write` puts them into docs/packs.md.

Sizes are those of files, with `--codec none` and with `auto`; beside them what a bitmap or int32 indices would cost for
the uncompressed values, computed. zstd of the dense delta: the same elements of the dropped model minus the base, BF16,
zeros and all, cut into byte planes and leaves as a pack's are; measured on every eighth leaf.

Speeds are medians of a few runs, each beside a run of its floor: reading both models (pack), reading the base and
writing as much as the result (unpack), reading and writing all weights in memory (Switcher). Before each of the two all
outputs of the last run are deleted, a pause of equal length follows (memory that was freed just now is cheaper than any
other on some machines), and all inputs are read once, or forgotten by the system. What is compared is the engine, from
the first read to the last write; the whole call, with planning and the wait for the disk, stands beside it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import zstandard

import darekit as dk
import family
import floor
import run
from darekit import masks
from darekit.checkpoints import open_checkpoint
from darekit.checkpoints.digests import LEAF

PAGE = run.ROOT / "docs" / "packs.md"
THREADS = 2
PAUSE = 3  # seconds
RATES = (0.5, 0.9, 0.95, 0.99)
BITS = (16, 8, 4, 2, 1)
STRIDE = 8
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


def clocked(task: Callable[[], Any]) -> tuple[Any, float]:
    """What a task returns, and its seconds."""
    began = time.perf_counter()
    found = task()
    return found, time.perf_counter() - began


def row_of(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def sizes(base: Path, model: Path, out: Path) -> list[str]:
    whole = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    parameters = whole / 2
    lines = [
        "| drop rate | bits | MB | above the formula | ratio | with auto | with a bitmap | with int32 indices |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for rate in RATES:
        for bits in BITS:
            options = {"drop_rate": rate, "bits": bits, "seed": 42, "overwrite": True, "force": True}
            small = dk.pack(base, model, out, **options).bytes if bits > 1 else 0
            report = dk.pack(base, model, out, codec="none", **options)
            size, kept = report.bytes, report.kept
            above = (size - header_of(out)) / (kept * (bits + (16 / 64 if bits < 16 else 0)) / 8) - 1
            cells = [f"{rate:g}", str(bits), f"{size / 1e6:.1f}", f"{100 * above:.1f} %", f"{whole / size:.1f}x"]
            cells += [f"{whole / (small or size):.1f}x"]
            cells += [f"{whole / (size + parameters / 8):.1f}x", f"{whole / (size + 4 * kept):.1f}x"]
            lines.append(row_of(cells))
            print(lines[-1], file=sys.stderr)
    dk.pack(base, model, out, lossless=True, overwrite=True)
    size = out.stat().st_size
    lines.append(row_of(["lossless", "", f"{size / 1e6:.1f}", "", f"{whole / size:.2f}x", "", "", ""]))
    for rate in (0.0, 0.9, 0.99):
        size = dense_delta(base, model, rate)
        name = "zstd of the dense delta" + (f", dropped at {rate:g}" if rate else "")
        lines.append(row_of([name, "16", f"{size / 1e6:.1f}", "", f"{whole / size:.2f}x", "", "", ""]))
    return lines


def header_of(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def dense_delta(base: Path, model: Path, rate: float) -> int:
    """Bytes of the whole delta as BF16 with its zeros, through zstd: what storing without a seed comes to."""
    codec = zstandard.ZstdCompressor(level=3)
    size = seen = 0
    with closing(open_checkpoint(base)) as before, closing(open_checkpoint(model)) as after:
        for name, info in before.tensors.items():
            for start in range(0, info.nbytes, STRIDE * 2 * LEAF):
                raws = np.empty((2, min(2 * LEAF, info.nbytes - start)), np.uint8)
                info.source.read_into(raws[0], start)
                after.tensors[name].source.read_into(raws[1], start)
                values = raws.view(ml_dtypes.bfloat16).astype(np.float32)
                delta = values[1] - values[0]
                if rate:
                    keep = masks.kept(42, masks.stream_of(name), start // 2, delta.size, rate)
                    delta = np.where(keep, delta / np.float32(1 - rate), np.float32(0))
                planes = delta.astype(ml_dtypes.bfloat16).view(np.uint8).reshape(-1, 2).T
                size += len(codec.compress(np.ascontiguousarray(planes).data))
                seen += raws.shape[1]
        whole = sum(info.nbytes for info in before.tensors.values())
    return round(size * whole / seen)


def shapes() -> list[str]:
    lines = [
        "",
        "| shapes, computed without codec | drop rate | bits | all tensors dropped | embeddings and norms dense |",
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
    before, after = (sorted(path.glob("*.safetensors")) for path in (base, model))
    whole = sum(path.stat().st_size for path in after)
    state = loaded(base)
    rows = [
        f"On {THREADS} threads: medians of {times} runs with the minimum in brackets, each next to a run of its floor.",
        "The floor of pack is reading both models; of unpack, reading the base and writing as much as the result; of",
        "`Switcher` (from a pack to itself, restoring the base in between), reading and writing all weights in memory.",
        "Engine time runs from the first read to the last write and, like the floor, does not wait for the disk;",
        "the whole call includes planning and waiting for the disk.",
        "*From memory*: all inputs were in the system's cache. *From disk*: none of them were.",
        "",
        "| | from memory: engine s | GB/s | floor s | engine / floor | from disk: engine s | floor s | engine / floor "
        "| whole call s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]

    def settle(inputs: list[Path], outputs: list[Path], cold: bool) -> None:
        for path in outputs:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        time.sleep(PAUSE)
        if cold:
            os.sync()
            evict(inputs)
        else:
            run.warm(inputs)

    def measure(
        inputs: list[Path], models: list[Path], out: Path, size: int, engine: Callable[[], Any], cold: bool
    ) -> tuple[float, float, float]:
        """Seconds of the engine, of the whole call, and of the floor, which reads `models` and writes `size` bytes."""
        settle(inputs, [out], cold)
        low = floor.floor(models, scrap, size, THREADS)
        settle(inputs, [], cold)
        with unsynced():
            report, _ = clocked(engine)
        if cold:
            return report.seconds, 0, low
        settle(inputs, [out], cold)
        return report.seconds, clocked(engine)[1], low

    def add(name: str, warm: list[tuple[float, float, float]], cold: list[tuple[float, float, float]]) -> None:
        engines, calls, floors = ([one[i] for one in warm] for i in range(3))
        middle, low = statistics.median(engines), statistics.median(floors)
        cells = [name, both(engines), f"{2 * whole / middle / 1e9:.1f}", both(floors), f"{middle / low:.1f}"]
        if cold:
            engines, _, floors = ([one[i] for one in cold] for i in range(3))
            ratio = statistics.median(engines) / statistics.median(floors)
            cells += [both(engines), both(floors), f"{ratio:.1f}"]
        else:
            cells += ["", "", ""]
        rows.append(row_of([*cells, both(calls)]))
        print(rows[-1], file=sys.stderr)

    for bits, codec in ((16, "none"), (16, "auto"), (4, "none"), (4, "auto")):
        options = {"drop_rate": 0.9, "bits": bits, "codec": codec, "seed": 42, "overwrite": True}
        name = f"p = 0.9, {bits} bit, codec {codec}"
        jobs: dict[str, tuple[list[Path], list[Path], Path, int, Callable[[], Any]]] = {
            "pack": (
                [*before, *after],
                [*before, *after],
                pack,
                0,
                lambda options=options: dk.pack(base, model, pack, threads=THREADS, **options),
            ),
            "unpack": (
                [*before, pack],
                before,
                unpacked,
                whole,
                lambda: dk.unpack(base, pack, unpacked, threads=THREADS, overwrite=True),
            ),
        }
        for job, arguments in jobs.items():
            found: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
            for turn in range(times + 1):
                for cold, runs in found.items():
                    seconds = measure(*arguments, cold)
                    if turn:  # the first turn compiles
                        runs.append(seconds)
            add(f"{job}, {name}", found[False], found[True])
        settle([pack], [unpacked], cold=False)
        switches = switched(state, base, pack, times, THREADS, lambda: copied(state))
        add(f"Switcher, {name}", [(call, call, low) for call, low in switches], [])
    pack.unlink()
    return rows


def switched(
    state: dict[str, Any], base: Path, pack: Path, times: int, threads: int, floor: Callable[[], None]
) -> list[tuple[float, float]]:
    """Seconds from pack to pack on a live model (the base comes back, the pack is put on it), and of the floor."""
    found = []
    with dk.Switcher(state, base, threads=threads) as switcher:
        switcher.switch(pack)
        for _ in range(times):
            run.warm([pack])
            low = clocked(floor)[1]
            found.append((clocked(lambda: switcher.switch(pack))[1], low))
    return found


def on_gpu(base: Path, model: Path, pack: Path, times: int) -> list[str]:
    """`Switcher` on a model that lies on a GPU; the floor copies all weights to the host and back."""
    import torch

    state = {
        name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).cuda() for name, array in loaded(base).items()
    }
    nbytes = sum(tensor.nbytes for tensor in state.values())
    room = torch.empty(1 << 25, dtype=torch.uint8, pin_memory=True)

    def both_ways() -> None:
        for tensor in state.values():
            flat = tensor.view(-1).view(torch.uint8)
            for at in range(0, flat.numel(), room.numel()):
                part = flat[at : at + room.numel()]
                room[: part.numel()].copy_(part)
                part.copy_(room[: part.numel()])
        torch.cuda.synchronize()

    lines = [
        f"{torch.cuda.get_device_name()}, {nbytes / 1e9:.2f} GB of weights: medians of {times} runs with the minimum",
        "in brackets. For comparison, the time to copy all weights to the host and back.",
        "",
        "| `Switcher` on a GPU | threads | s | GB/s | to the host and back, s |",
        "|---|--:|--:|--:|--:|",
    ]
    for bits, codec in ((16, "none"), (16, "auto"), (4, "auto")):
        dk.pack(base, model, pack, drop_rate=0.9, bits=bits, codec=codec, seed=42, overwrite=True)
        for threads in (2, 4, 8):
            calls, floors = zip(*switched(state, base, pack, times, threads, both_ways), strict=True)
            speed = nbytes / statistics.median(calls) / 1e9
            cells = [
                f"p = 0.9, {bits} bit, codec {codec}",
                str(threads),
                both(list(calls)),
                f"{speed:.1f}",
                both(list(floors)),
            ]
            lines.append(row_of(cells))
    return lines


def evict(paths: list[Path]) -> None:
    """Have the system forget what it knows of these files."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@contextmanager
def unsynced() -> Iterator[None]:
    """As the floor, not waiting for the disk: unpacking flushes while it works."""
    kept = os.fsync, os.fdatasync
    os.fsync = os.fdatasync = lambda _: None
    try:
        yield
    finally:
        os.fsync, os.fdatasync = kept


def both(seconds: list[float]) -> str:
    """Median and least."""
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f})"


def loaded(base: Path) -> dict[str, np.ndarray]:
    """The base in memory."""
    found = {}
    with closing(open_checkpoint(base)) as checkpoint:
        for name, info in checkpoint.tensors.items():
            raw = np.empty(info.nbytes, np.uint8)
            info.source.read_into(raw, 0)
            found[name] = raw.view(ml_dtypes.bfloat16).reshape(info.shape)
    return found


def copied(state: dict[str, np.ndarray]) -> None:
    """The floor of a switch: every tensor read and written once, on two threads, through a buffer that is warm."""
    size = 1 << 21

    def copy(array: np.ndarray) -> None:
        raw, buffer = array.reshape(-1).view(np.uint8), np.empty(size, np.uint8)
        for at in range(0, raw.size, size):
            part = raw[at : at + size]
            buffer[: part.size] = part
            part[...] = buffer[: part.size]

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(copy, state.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, default=run.ROOT / "bench" / "scratch")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/packs.md")
    parser.add_argument(
        "--only", choices=("sizes", "speeds", "gpu"), help="run only this part; gpu runs only when named here"
    )
    arguments = parser.parse_args()
    folder = arguments.scratch.resolve() / "family"
    family.build(folder)
    base, model = folder / "base", folder / family.MODELS[0]
    out = folder / "sizes.safetensors"
    parts = {
        "sizes": lambda: [*sizes(base, model, out), *shapes()],
        "speeds": lambda: speeds(base, model, folder, arguments.times),
        "gpu": lambda: on_gpu(base, model, out, arguments.times),
    }
    for part, measure in parts.items():
        if arguments.only != part and (arguments.only or part == "gpu"):
            continue
        lines = measure()
        print("\n".join(lines))
        if arguments.write:
            run.put("\n".join(lines), PAGE, part)
    out.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
