# SPDX-License-Identifier: Apache-2.0
"""`make bench`: the numbers in docs/speed.md. Prints a table; `--write` puts it there.

Machines are noisy: all files are warmed, merge and I/O floor run in turn, and
minima are compared. MERGEKIT=path/to/mergekit-yaml adds a comparison on the same recipe files.

A merge brings its output to the disk before it says that it is done (fsync), and the disk's share varies most of all.
Neither the I/O floor nor mergekit waits for the disk: what is compared with them does not either (`UNSYNCED`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import family
from costs import mergekit

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "speed.md"
DARE = Path(sys.executable).with_name("dare")
# The same command, which leaves it to the system when bytes go from the page cache to the disk.
UNSYNCED = "import os; os.fsync = os.fdatasync = lambda fd: None; from darekit.cli import main; main()"


@dataclass(frozen=True)
class Case:
    """A row of the table. The I/O floor reads the inputs as often as the method must."""

    title: str
    each: dict[str, float | list[float]] = field(default_factory=dict)  # parameters of each model
    shared: dict[str, object] = field(default_factory=dict)
    models: tuple[str, ...] = family.MODELS
    passes: int = 1
    method: str | None = None  # the case's name, where None
    keys: dict[str, str] = field(default_factory=dict)  # more of the recipe
    family: str = "family"  # the folder of the models
    base: bool = True
    stacked: bool = False  # all layers of the models, one upon the other

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("base", *self.models) if self.base else self.models


BY_LAYER = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]


CASES = {
    "dare_linear": Case("DARE p = 0.9, linear", {"weight": 1.0, "density": 0.1}),
    "dare_ties": Case("DARE p = 0.9, TIES without trim", {"weight": 1.0, "density": 0.1}),
    "ties": Case("TIES, keep 0.2", {"weight": 1.0, "density": 0.2}),
    "ties_gradients": Case(
        "TIES, density and weight gradients", {"weight": [0.3, 1.0, 0.6], "density": [0.1, 0.4, 0.2]}, method="ties"
    ),
    "union": Case(
        "DARE p = 0.9, linear, union of tokenizers (100 new tokens)",
        {"weight": 1.0, "density": 0.1},
        method="dare_linear",
        keys={"tokenizer_source": "union"},
        family="union",
    ),
    "lora_linear": Case(
        "base + 3 adapters of rank 16, linear",
        {"weight": 1.0},
        models=family.ADAPTERS,
        method="linear",
        family="adapters",
    ),
    "lora_task_arithmetic": Case(
        "base + 3 adapters of rank 16, task arithmetic",
        {"weight": 0.5},
        models=family.ADAPTERS,
        method="task_arithmetic",
        family="adapters",
    ),
    "lora_dare": Case(
        "base + 3 adapters of rank 16, DARE p = 0.9, linear",
        {"weight": 0.5, "density": 0.1},
        models=family.ADAPTERS,
        method="dare_linear",
        family="adapters",
    ),
    "passthrough": Case("passthrough, two models stacked", models=family.MODELS[:2], base=False, stacked=True),
    "slerp": Case("slerp of two models, gradients", shared={"t": BY_LAYER}, models=family.MODELS[:1], passes=2),
    "model_stock": Case("Model Stock, base and 3", passes=2),
    "karcher": Case("Karcher mean of 3", passes=2, base=False),
    # Two passes: these deltas are below the floor of its energies, as most are, and nobody adds them up.
    "sce": Case("SCE, 0.1 of base and 3", shared={"select_topk": 0.1}, passes=2),
}


def recipe(folder: Path, name: str) -> Path:
    """A mergekit recipe, which both tools read."""
    case = CASES[name]
    models = [{"model": str(folder / model), "parameters": case.each} for model in case.models]
    data: dict[str, object] = {"merge_method": case.method or name, "dtype": "bfloat16", **case.keys}
    layers = {"layer_range": [0, family.LAYERS]}
    data |= {"slices": [{"sources": [model | layers]} for model in models]} if case.stacked else {"models": models}
    data |= {"base_model": str(folder / "base")} if case.base else {}
    data |= {"parameters": case.shared} if case.shared else {}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(data))  # JSON is YAML
    return path


def warm(files: list[Path]) -> None:
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def timed(command: list[str], **options: object) -> tuple[float, str]:
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - began, done.stdout


def merge(path: Path, out: Path, *more: str, synced: bool = True, keep: bool = False) -> tuple[float, dict[str, float]]:
    """Whole command and its own report; `keep`: the output stays."""
    shutil.rmtree(out, ignore_errors=True)
    program = [str(DARE)] if synced else [sys.executable, "-c", UNSYNCED]
    seconds, text = timed([*program, "merge", str(path), str(out), "--seed", "42", "--json", *more])
    report = json.loads(text)
    if not keep:
        shutil.rmtree(out)
    return seconds, report


def floor(files: list[Path], out: Path, size: int, threads: int, read: int) -> float:
    script = Path(__file__).with_name("floor.py")
    numbers = map(str, (size, threads, read))
    return float(timed([sys.executable, str(script), str(out), *numbers, *map(str, files)])[1])


# Three merges: two, and a third of their results.
STAGES: dict[str, dict[str, object]] = {
    "first": {
        "merge_method": "dare_linear", "base_model": "base", "parameters": {"weight": 1.0, "density": 0.1},
        "models": [{"model": "math"}, {"model": "code"}],
    },
    "second": {
        "merge_method": "slerp", "base_model": "base", "models": [{"model": "chat"}], "parameters": {"t": 0.4},
    },
    "both": {
        "merge_method": "linear", "models": [{"model": "first"}, {"model": "second"}], "parameters": {"weight": 0.5},
    },
}  # fmt: skip


def nested(folder: Path, pairs: int, threads: int) -> str:
    """One recipe of three merges, against these three one after another, with checkpoints in between."""
    folder = folder.resolve()
    files = [path for model in ("base", *family.MODELS) for path in sorted((folder / model).glob("*.safetensors"))]
    whole = folder / "nested.yaml"
    stages = [{"name": name, **data, "dtype": "bfloat16"} for name, data in STAGES.items()]
    del stages[-1]["name"]
    whole.write_text("\n---\n".join(map(json.dumps, stages)))
    merge(whole, folder / "nested-out")  # compiles the kernels, if need be
    together, apart, memory = [], [], 0.0
    for _ in range(pairs):
        warm(files)
        report = merge(whole, folder / "nested-out", "--threads", str(threads), synced=False)[1]
        together.append(report["seconds"])
        memory = max(memory, report["peak_rss_bytes"])
        seconds = 0.0
        for name, data in STAGES.items():
            path = folder / f"{name}.yaml"
            path.write_text(json.dumps(data | {"dtype": "bfloat16"}))
            warm([*files, *(file for made in STAGES for file in (folder / made).glob("*.safetensors"))])
            seconds += merge(path, folder / name, "--threads", str(threads), synced=False, keep=True)[1]["seconds"]
        apart.append(seconds)
        for name in STAGES:
            shutil.rmtree(folder / name)
    ratio = min(together) / min(apart)
    return (
        f"A recipe of three merges (DARE and linear; slerp; the mean of both) takes {min(together):.2f} s of engine "
        f"time, its parts one after another {min(apart):.2f} s and twice the output's size of disk: {ratio:.2f} of it, "
        f"{memory / 1e6:.0f} MB at most."
    )


def run(scratch: Path, pairs: int, threads: int, program: str | None, runs: int, only: list[str]) -> list[list[str]]:
    # Installed code has its bytecode beside it; with this variable a checkout is compiled anew in every run.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    rows = []
    for name, case in CASES.items():
        if only and name not in only:
            continue
        folder = scratch / case.family
        if case.family == "union":
            family.build_union(folder, scratch / "family")
        if case.family == "adapters":
            family.build_adapters(folder, scratch / "family")
        path = recipe(folder, name)
        files = [path for model in case.inputs for path in sorted((folder / model).glob("*.safetensors"))]
        merge(path, folder / "out")  # compiles the kernels, if need be
        engines, wholes, synced, floors, memory, moved = [], [], [], [], 0.0, 0.0
        for _ in range(pairs):
            warm(files)
            synced.append(merge(path, folder / "out", "--threads", str(threads))[0])
            warm(files)
            whole, report = merge(path, folder / "out", "--threads", str(threads), synced=False)
            wholes.append(whole)
            engines.append(report["seconds"])
            memory = max(memory, report["peak_rss_bytes"])
            # A stack reads one embedding and one head, not all of its models' files.
            read = case.passes * sum(file.stat().st_size for file in files)
            read = int(report["bytes_read"]) if case.stacked else read
            moved = read + report["bytes_written"]
            warm(files)
            written = int(report["bytes_written"])
            floors.append(floor(files * case.passes, folder / "floor.out", written, threads, read))
        engine, whole, least = min(engines), min(wholes), min(floors)
        row = [
            case.title, f"{engine:.2f}", f"{moved / engine / 1e9:.1f}", f"{least:.2f}", f"{engine / least:.2f}",
            f"{whole:.2f}", f"{min(synced):.2f}", f"{memory / 1e6:.0f}",
        ]  # fmt: skip
        if program and case.family == "adapters":  # mergekit has PEFT write each merged model first: another comparison
            row += ["", "", ""]
        elif program:
            warm(files)
            costs = [mergekit(program, path, folder / "mk") for _ in range(runs)]
            shutil.rmtree(folder / "mk")
            theirs = min(cost.seconds for cost in costs)
            row += [f"{theirs:.1f}", f"{theirs / whole:.0f}x", f"{max(cost.memory for cost in costs) / 1e6:.0f}"]
        rows.append(row)
        print(row, file=sys.stderr)
    return rows


def table(rows: list[list[str]], with_mergekit: bool) -> str:
    heads = [
        "merge",
        "engine s",
        "GB/s",
        "I/O floor s",
        "engine / floor",
        "whole command s",
        "and on the disk s",
        "peak RSS MB",
    ]
    heads += ["mergekit s", "mergekit / darekit", "mergekit RSS MB"] if with_mergekit else []
    lines = ["| " + " | ".join(heads) + " |", "|" + "|".join(["---"] + ["--:"] * (len(heads) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def first_run(path: Path, out: Path) -> float:
    """Whole command with an empty kernel cache."""
    with tempfile.TemporaryDirectory() as cache:
        shutil.rmtree(out, ignore_errors=True)
        command = [str(DARE), "merge", str(path), str(out), "--json"]
        seconds, _ = timed(command, env={**os.environ, "NUMBA_CACHE_DIR": cache})
        shutil.rmtree(out)
    return seconds


def put(text: str, page: Path, part: str) -> None:
    """Replace the text between the page's markers of this part."""
    begin, end = f"<!-- {part}:begin -->", f"<!-- {part}:end -->"
    old = page.read_text(encoding="utf-8")
    before, after = old.index(begin) + len(begin), old.index(end)
    page.write_text(f"{old[:before]}\n{text}\n{old[after:]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, default=ROOT / "bench" / "scratch")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--mergekit-runs", type=int, default=2)
    parser.add_argument(
        "--only", nargs="*", default=[], choices=[*CASES, "nested"], help="these cases alone, and nothing written"
    )
    parser.add_argument("--large", action="store_true", help="also the memory of a family four times larger")
    parser.add_argument("--write", action="store_true", help="put the table into docs/speed.md")
    arguments = parser.parse_args()
    folder = arguments.scratch.resolve() / "family"
    print("building the family (once) ...", file=sys.stderr)
    family.build(folder)
    program = os.environ.get("MERGEKIT")
    rows = run(
        arguments.scratch.resolve(),
        arguments.pairs,
        arguments.threads,
        program,
        arguments.mergekit_runs,
        arguments.only,
    )
    text = table(rows, bool(program)) if rows else ""
    if not arguments.only or "nested" in arguments.only:
        text += f"\n\n{nested(folder, arguments.pairs, arguments.threads)}"
    if arguments.only:
        print(text)
        return
    path = folder / "dare_linear.yaml"
    warm_whole = min(merge(path, folder / "out")[0] for _ in range(3))
    help_seconds = min(timed([str(DARE), "--help"])[0] for _ in range(5))
    text += (
        f"\n\nFirst run with an empty kernel cache: {first_run(path, folder / 'out') - warm_whole:.1f} s more. "
        f"`dare --help`: {help_seconds:.2f} s."
    )
    if arguments.large:
        large = arguments.scratch.resolve() / "family4"
        family.build(large, 4)
        peak = merge(recipe(large, "dare_linear"), large / "out")[1]["peak_rss_bytes"]
        text += f" Peak RSS of DARE + linear on a family four times larger: {peak / 1e6:.0f} MB."
    print(text)
    if arguments.write:
        put(text, PAGE, "bench")


if __name__ == "__main__":
    main()
