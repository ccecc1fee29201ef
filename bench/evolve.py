# SPDX-License-Identifier: Apache-2.0
"""Candidates a minute of `dare search`, each judged on all rows, by one process that replaces a live model's weights.

    python bench/evolve.py FOLDER [--trials 40] [--mergekit PATH/TO/mergekit-evolve]

FOLDER has `base`, models, and for each model M the rows `M.validation.jsonl`: what `make demo` leaves in `demo/`. With
`--mergekit`, mergekit-evolve gets the same models, rows (as tasks of lm-eval) and number of candidates, as a process of
its own; what it says is printed when it fails. It needs `mergekit[evolve]`, and for its Ray workers one GPU each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import yaml

import darekit as dk

WEIGHTS = {"low": 0.0, "high": 1.5}


def models_in(folder: Path) -> list[str]:
    """Names of the models that have rows."""
    found = sorted(path.name.partition(".")[0] for path in folder.glob("*.validation.jsonl"))
    return [name for name in found if (folder / name).is_dir()]


def searched(folder: Path, models: list[str], trials: int, out: Path) -> dict[str, float]:
    """`dare search` with CMA-ES over weights, no rungs: seconds in all and of the median candidate."""
    search = {
        "recipe": {
            "base_model": str(folder / "base"), "models": [str(folder / name) for name in models],
            "merge_method": "task_arithmetic",
        },
        "space": {"models.*.parameters.weight": WEIGHTS},
        "sampler": "cmaes", "rungs": [1],
        "validation": {name: {"data": str(folder / f"{name}.validation.jsonl")} for name in models},
    }  # fmt: skip
    began = time.perf_counter()
    found = dk.search(search, out, trials=trials, device="cpu")
    wall = time.perf_counter() - began
    lines = [json.loads(line) for line in (found.out / "trials.jsonl").read_text().splitlines()]
    seconds = sorted(line["seconds"] for line in lines if line["kind"] == "trial" and line["seconds"])
    return {"wall": wall, "candidates": len(seconds), "median": seconds[len(seconds) // 2],
            "a minute": 60 * len(seconds) / sum(seconds)}  # fmt: skip


def evolved(program: str, folder: Path, models: list[str], trials: int, scratch: Path) -> dict[str, float] | str:
    """mergekit-evolve on the same: seconds in all, or what it says."""
    tasks = scratch / "tasks"
    tasks.mkdir()
    for name in models:
        rows = {"json": str((folder / f"{name}.validation.jsonl").resolve())}
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump({
            "task": f"rows_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": rows["json"]}},
            "test_split": "test", "output_type": "loglikelihood", "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{completion}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
        }))  # fmt: skip
    config = scratch / "evolve.yaml"
    config.write_text(yaml.safe_dump({
        "genome": {"models": [str((folder / name).resolve()) for name in models],
                   "base_model": str((folder / "base").resolve()), "merge_method": "task_arithmetic"},
        "tasks": [{"name": f"rows_{name}", "metric": "acc,none", "weight": 1.0} for name in models],
    }))  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(
        [program, str(config), "--storage-path", str(scratch / "storage"), "--task-search-path", str(tasks),
         "--max-fevals", str(trials), "--in-memory", "--no-merge-cuda"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    wall = time.perf_counter() - began
    return {"wall": wall, "candidates": trials, "a minute": 60 * trials / wall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--mergekit")
    asked = parser.parse_args()
    models = models_in(asked.folder)
    scratch = Path(tempfile.mkdtemp(prefix="evolve-"))
    try:
        print("dare search", json.dumps(searched(asked.folder, models, asked.trials, scratch / "search")), flush=True)
        if asked.mergekit:
            print("mergekit-evolve", json.dumps(evolved(asked.mergekit, asked.folder, models, asked.trials, scratch)))
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
