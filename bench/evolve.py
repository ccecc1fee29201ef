# SPDX-License-Identifier: Apache-2.0
"""Candidates a minute of `dare search` and of mergekit-evolve: the same models, rows and number of candidates, CMA-ES.

    python bench/evolve.py FOLDER [--mergekit PATH/TO/mergekit-evolve] [--trials 42] [--rounds 3] [--limit ROWS]

FOLDER has `base`, models, and for each model M the rows `M.validation.jsonl`: what `make demo` leaves in `demo/`. Both
search the models' weights of task arithmetic, and each is a process of its own with one thread, in turn. Prints a table
of medians over rounds, with the least and the most:

- dare search, `rows`: the files of rows are its judges, in batches of 16;
- dare search, `tasks`: lm-eval's tasks of the same rows are, in batches of 8;
- dare search, `one by one`: the same, but for batches of 1, as mergekit-evolve asks a model in memory;
- mergekit-evolve, in memory: one live model; the same tasks.

`steady` is from the end of the first 7 candidates (a generation) to that of the last; `whole` is the process from its
start to its end: with imports, and the baselines and the look at the models that `dare search` adds to the candidates.
Wall time depends on what else runs, processor seconds less so. `best` is the best mean on validation.

mergekit-evolve needs an environment of its own. These versions run together, without vLLM and without a GPU; why others
do not: docs/decisions/0067-beside-mergekit-evolve.md.

    python -m venv ENV && ENV/bin/pip install torch==2.13.0
    ENV/bin/pip install torch==2.13.0 mergekit==0.1.4 lm-eval==0.4.9.1 "transformers<5" cma ray pandas

Its workers are declared with one GPU each, so its Ray cluster is told that there is one; it computes on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

WEIGHTS = {"low": 0.0, "high": 1.5}
GENERATION = 7  # of CMA-ES with three dimensions
LOOKS = 0.2  # seconds between two looks at a process
COLUMNS = ("steady, a minute", "steady, a minute of processor", "whole, seconds", "whole, processor seconds", "best")


@dataclass(frozen=True)
class Side:
    """What is compared.

    Attributes:
        command: of the process.
        environment: what it has beside this one's.
        done: what it has written so far -> candidates that are finished.
        progress: where it writes that; None: to its output.
        best: the same at the end -> the best mean of scores on validation.
    """

    command: list[str]
    environment: dict[str, str]
    done: Callable[[str], int]
    best: Callable[[str], float]
    progress: Path | None = None


def models_in(folder: Path) -> list[str]:
    """Names of the models that have rows."""
    found = sorted(path.name.partition(".")[0] for path in folder.glob("*.validation.jsonl"))
    return [name for name in found if (folder / name).is_dir()]


def write_tasks(folder: Path, models: list[str], tasks: Path) -> None:
    """lm-eval's tasks of the same rows: is the completion the likeliest?"""
    tasks.mkdir()
    for name in models:
        rows = str((folder / f"{name}.validation.jsonl").resolve())
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump({
            "task": f"rows_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": rows}},
            "test_split": "test", "output_type": "loglikelihood", "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{completion}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
        }))  # fmt: skip


def copy_for_transformers_4(folder: Path, models: list[str], out: Path) -> None:
    """The same files, and tokenizers by the name that transformers had for them before version 5."""
    for name in ("base", *models):
        (out / name).mkdir(parents=True)
        for file in (folder / name).resolve().iterdir():
            (out / name / file.name).symlink_to(file)
        written = out / name / "tokenizer_config.json"
        known = {**json.loads(written.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
        written.unlink()
        written.write_text(json.dumps(known))


def dare_side(folder: Path, models: list[str], judges: dict[str, Any], trials: int, scratch: Path) -> Side:
    """`dare search` with CMA-ES and no rungs: everybody is asked everything."""
    scratch.mkdir()
    asked = scratch / "search.yaml"
    asked.write_text(yaml.safe_dump({
        "recipe": {
            "base_model": str((folder / "base").resolve()),
            "models": [str((folder / name).resolve()) for name in models], "merge_method": "task_arithmetic",
        },
        "space": {"models.*.parameters.weight": WEIGHTS}, "sampler": "cmaes", "rungs": [1], "validation": judges,
    }))  # fmt: skip
    out = scratch / "search"
    command = [
        sys.executable, "-m", "darekit", "search", str(asked), str(out), "--trials", str(trials), "--threads", "1",
        "--device", "cpu",
    ]  # fmt: skip

    def candidates(text: str) -> Iterator[dict[str, Any]]:
        found = (json.loads(line) for line in text.splitlines() if line.endswith("}"))
        return (line for line in found if line["kind"] == "trial")

    return Side(
        command, {"OMP_NUM_THREADS": "1"}, lambda text: text.count('"kind": "trial"'),
        lambda text: max(line["scores"]["mean"]["value"] for line in candidates(text)), out / "trials.jsonl",
    )  # fmt: skip


def mergekit_side(
    program: str, folder: Path, models: list[str], tasks: Path, limit: int | None, trials: int, scratch: Path
) -> Side:
    """mergekit-evolve in memory."""
    scratch.mkdir()
    config = scratch / "evolve.yaml"
    config.write_text(yaml.safe_dump({
        "genome": {"models": [str((folder / name).resolve()) for name in models],
                   "base_model": str((folder / "base").resolve()), "merge_method": "task_arithmetic"},
        "tasks": [{"name": f"rows_{name}", "metric": "acc,none", "weight": 1 / len(models)} for name in models],
        "limit": limit, "apply_chat_template": False, "fewshot_as_multiturn": False,
    }))  # fmt: skip
    command = [
        str(Path(program).absolute()), str(config), "--storage-path", str(scratch / "storage"),
        "--task-search-path", str(tasks), "--max-fevals", str(trials), "--in-memory", "--no-merge-cuda",
        "--no-save-final-model",
    ]  # fmt: skip

    def done(text: str) -> int:
        given = [int(count) for count in re.findall(r"^Received (\d+) genotypes", text, re.M)]
        return sum(given if "OPTIMIZATION COMPLETE" in text else given[:-1])

    environment = {
        "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "RAY_OVERRIDE_RESOURCES": '{"GPU": 1}',
        "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled",
    }  # fmt: skip
    return Side(
        command, environment, done, lambda text: float(re.findall(r"New best score: ([-\d.]+)", text)[-1])
    )  # fmt: skip


def processor_seconds(process: psutil.Popen, seen: dict[tuple[int, float], float]) -> float:
    """Of a process and all that it has started; `seen` keeps what those had that have ended."""
    try:
        for one in [process, *process.children(recursive=True)]:
            with one.oneshot():
                spent = one.cpu_times()
                seen[one.pid, one.create_time()] = spent.user + spent.system
    except psutil.Error:
        pass
    return sum(seen.values())


def run(side: Side, output: Path) -> dict[str, float] | str:
    """One process: its numbers, or what it says when it fails. Files that it leaves where it runs go into scratch."""
    looks: list[tuple[float, float, int]] = []  # seconds, processor seconds, candidates that are finished
    seen: dict[tuple[int, float], float] = {}
    progress = side.progress or output
    with output.open("wb") as sink:
        began = time.perf_counter()
        process = psutil.Popen(
            side.command, stdout=sink, stderr=sink, cwd=output.parent, env={**os.environ, **side.environment}
        )
        while process.poll() is None:
            text = progress.read_text() if progress.exists() else ""
            looks.append((time.perf_counter() - began, processor_seconds(process, seen), side.done(text)))
            time.sleep(LOOKS)
        whole = time.perf_counter() - began
    if process.returncode:
        said = output.read_text().strip().splitlines()
        return next((line for line in reversed(said) if re.match(r"\S*Error\b", line)), said[-1] if said else "nothing")
    text = progress.read_text()
    first = next(look for look in looks if look[2] >= GENERATION)
    last = next((look for look in looks if look[2] >= side.done(text)), (whole, sum(seen.values()), side.done(text)))
    wall, processor, candidates = (after - before for before, after in zip(first, last, strict=True))
    return {
        "steady, a minute": 60 * candidates / wall,
        "steady, a minute of processor": 60 * candidates / processor,
        "whole, seconds": whole,
        "whole, processor seconds": sum(seen.values()),
        "best": side.best(text),
    }


def row_of(name: str, found: Sequence[dict[str, float]]) -> str:
    """The median of each number, with the least and the most."""
    cells = []
    for column in COLUMNS:
        numbers = [one[column] for one in found]
        form = ".3f" if column == "best" else ".0f"
        cells.append(f"{statistics.median(numbers):{form}} ({min(numbers):{form}} to {max(numbers):{form}})")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mergekit")
    parser.add_argument("--trials", type=int, default=6 * GENERATION)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int)
    asked = parser.parse_args()
    models = models_in(asked.folder)
    scratch = Path(tempfile.mkdtemp(prefix="evolve-"))
    tasks = scratch / "tasks"
    write_tasks(asked.folder, models, tasks)
    copies = scratch / "family"
    copy_for_transformers_4(asked.folder, models, copies)
    limit = {} if asked.limit is None else {"limit": asked.limit}
    rows = {name: {"data": str((asked.folder / f"{name}.validation.jsonl").resolve()), **limit} for name in models}
    by_task = {name: {"tasks": [f"rows_{name}"], "include": str(tasks), **limit} for name in models}
    one_by_one = {name: {**judge, "batch_size": 1} for name, judge in by_task.items()}
    found: dict[str, list[dict[str, float]]] = {}
    try:
        for turn in range(asked.rounds):
            sides = {
                f"dare search, {name}": dare_side(
                    asked.folder, models, judges, asked.trials, scratch / f"{name.split()[0]}{turn}"
                )
                for name, judges in (("rows", rows), ("tasks", by_task), ("one by one", one_by_one))
            }
            if asked.mergekit:
                sides["mergekit-evolve, in memory"] = mergekit_side(
                    asked.mergekit, copies, models, tasks, asked.limit, asked.trials, scratch / f"evolve{turn}"
                )
            for name, side in sides.items():
                numbers = run(side, scratch / "output.txt")
                print(name, json.dumps(numbers), flush=True)
                if not isinstance(numbers, str):
                    found.setdefault(name, []).append(numbers)
    finally:
        shutil.rmtree(scratch)
    print(f"\n| | {' | '.join(COLUMNS)} |\n|---{'|---:' * len(COLUMNS)}|")
    for name, rounds in found.items():
        print(row_of(name, rounds))


if __name__ == "__main__":
    main()
