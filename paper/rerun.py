# SPDX-License-Identifier: Apache-2.0
"""The paper's experiments, from training to the page: ``python paper/rerun.py [--only abc]``, or ``make paper``.

Every number comes from a command that a user could type; each is printed before it runs, and runs in the folder WORK
(``paper/work``). What is finished there (models, cells of sweeps) is not done again. The page is docs/paper/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "paper"
PROCESSES = 2
DECODERS, ENCODERS = ("shift", "mirror", "rotate"), ("first", "last", "most")


@dataclass(frozen=True)
class Command:
    """One call of `dare`. `result`: the name under which its JSON is kept; `makes`: a file that it writes from `of`,
    a model, and that need not be written again."""

    words: tuple[str, ...]
    result: str | None = None
    makes: str | None = None
    of: str | None = None


def sweep(name: str) -> Command:
    """A sweep file of `experiments/`."""
    return Command(("sweep", f"EXPERIMENTS/{name}.yaml", f"runs/{name}", "--jobs", str(PROCESSES)), f"sweeps/{name}")


def inspection(base: str, model: str) -> Command:
    """What `dare inspect` says of a model and a base."""
    return Command(("inspect", base, model, "--json"), f"inspections/{model} on {base}")


def statistic(kind: str, model: str, data: str) -> Command:
    """The Fisher or the Grams of a model on its own training data."""
    out = f"statistics/{data}.{kind}.safetensors"
    words = ("stats", kind, model, "--data", f"data/{data}.training.jsonl", "--out", out)
    return Command(words, makes=out, of=model)


def similarity(base: str, model: str, data: str) -> Command:
    """Hidden states of the model against those after the drop, layer by layer, with a plot."""
    words = (
        "similarity",
        base,
        model,
        "--data",
        f"data/{data}.test.jsonl",
        "-p",
        "0.5",
        "-p",
        "0.9",
        "--seeds",
        "1,2,3",
    )
    return Command((*words, "--plot", "runs/f-similarity", "--json"), f"similarities/{model}")


def recommendation(base: str, model: str) -> Command:
    """How much may be dropped, without data."""
    return Command(("recommend", base, model, "--json"), f"recommendations/{model}")


# Within an experiment, groups run one after the other, the commands of a group two at a time; a sweep is a group of its
# own, since it uses both processors.
EXPERIMENTS: dict[str, tuple[tuple[Command, ...], ...]] = {
    "a": ((sweep("a-drop-rates"),), (sweep("a-encoders"),)),
    "b": (
        tuple(
            command
            for width in (32, 64, 128)
            for ability in ("shift", "mirror")
            for command in (
                inspection(f"w{width}/base", f"w{width}/{ability}"),
                recommendation(f"w{width}/base", f"w{width}/{ability}"),
            )
        ),
        (sweep("b-width"),),
    ),
    "c": (
        tuple(
            statistic(kind, f"{family}/{name}", name)
            for family, names in (("w128", DECODERS), ("encoder", ENCODERS))
            for name in names
            for kind in ("fisher", "gram")
        ),
        (sweep("c-two"),),
        (sweep("c-three"),),
        (sweep("c-encoders-first-last"),),
        (sweep("c-encoders-first-most"),),
        (sweep("c-encoders-last-most"),),
    ),
    "d": (
        (inspection("w64/base", "w64/continued-shift"), inspection("w64/continued", "w64/continued-shift")),
        (sweep("d-wrong-base"),),
    ),
    "e": ((sweep("e-rescale-90"),), (sweep("e-rescale-99"),)),
    "f": ((similarity("w128/base", "w128/shift", "shift"),),),
    "g": (
        (
            *(inspection("w128/base", f"w128/{ability}") for ability in DECODERS),
            inspection("w64/base", "w64/shift"),
            inspection("w64/base", "w64/continued"),
            *(inspection("encoder/base", f"encoder/{task}") for task in ENCODERS),
            Command(("inspect", "w128/base", *(f"w128/{a}" for a in DECODERS), "--plot", "runs/g-deltas", "--json")),
            Command(("inspect", "w64/base", "w64/shift", "w64/continued", "--plot", "runs/g-continued", "--json")),
        ),
    ),
    "h": ((sweep("h-della"),), (sweep("h-della-merges"),)),
    "i": ((sweep("i-seeds"),),),
}


def run_experiment(letter: str, work: Path, say: Callable[[str], None]) -> tuple[dict[str, Any], list[str]]:
    """Run one experiment's commands.

    Returns:
        What they gave, by the names of their results; and what failed, a line each.
    """
    found: dict[str, Any] = {}
    failed: list[str] = []

    def one(command: Command) -> None:
        words = [w.replace("EXPERIMENTS", os.path.relpath(HERE / "experiments", work)) for w in command.words]
        if command.makes and _is_fresh(work / command.makes, work / str(command.of)):
            return
        say(f"$ dare {shlex.join(words)}")
        if command.makes:
            (work / command.makes).parent.mkdir(parents=True, exist_ok=True)
            (work / command.makes).unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "darekit", *words],
            cwd=work, capture_output=True, text=True, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        )  # fmt: skip
        if done.returncode == 130:
            raise KeyboardInterrupt
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        if done.returncode:
            failed.append(f"`dare {shlex.join(words[:3])}` ended with {done.returncode}: {last}")
            say(f"  failed: {done.stderr.strip()}")
        if command.result is None:
            return
        if command.words[0] == "sweep":
            summary = work / command.words[2] / "summary.json"
            if summary.is_file() and (not done.returncode or done.returncode == 1):
                found[command.result] = json.loads(summary.read_text())
        elif not done.returncode:
            found[command.result] = json.loads(done.stdout)

    for group in EXPERIMENTS[letter]:
        with ThreadPoolExecutor(PROCESSES) as pool:
            list(pool.map(one, group))
    return found, failed


def _is_fresh(made: Path, model: Path) -> bool:
    weights = model / "model.safetensors"
    return made.is_file() and weights.is_file() and made.stat().st_mtime > weights.stat().st_mtime


def condense(name: str, data: Any) -> Any:
    """What the page needs of a command's JSON: the rest can be had by running the command again."""
    kind = name.partition("/")[0]
    if kind == "sweeps":
        rows = [
            {
                "kind": row["kind"],
                "at": row["at"],
                "models": row["models"],
                "judges": row["judges"],
                "scores": {
                    split: {
                        score: [_short(one["mean"]), _short(one["deviation"]), one["runs"]]
                        for score, one in scores.items()
                        if score == "mean" or score.endswith(("/exact_match", "/accuracy"))
                    }
                    for split, scores in row["scores"].items()
                },
            }
            for row in data["rows"]
        ]
        return {"rows": rows, "failed": data["failed"]}
    if kind == "inspections":
        return {key: value for key, value in data.items() if key != "tensors"}
    if kind == "recommendations":
        return {key: data[key] for key in ("tau", "drop_rate", "verdict")}
    return data


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, run, and write the page."""
    parser = argparse.ArgumentParser(description="Re-run the paper's experiments.")
    parser.add_argument("--only", default="".join(EXPERIMENTS), help="letters of the experiments to run, such as ad")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="where models and runs are kept")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the page is written")
    given = parser.parse_args(arguments)
    letters = given.only.replace(",", "").lower()
    unknown = [letter for letter in letters if letter not in EXPERIMENTS]
    if unknown:
        parser.error(f"no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    began = time.perf_counter()
    say = _speaker(began)
    given.work.mkdir(parents=True, exist_ok=True)

    import training

    training.train_all(given.work, say=say)
    import page

    results = page.read_results(given.page)
    results["settings"] = page.settings_of(training)
    for letter in letters:
        found, failed = run_experiment(letter, given.work, say)
        results["experiments"][letter] = {name: condense(name, data) for name, data in sorted(found.items())}
        results["failed"][letter] = failed
    page.write_page(results, given.page, runs=given.work / "runs")
    say(f"written: {given.page / 'README.md'}")
    return 1 if any(results["failed"][letter] for letter in letters) else 0


def _speaker(began: float) -> Callable[[str], None]:
    def say(line: str) -> None:
        print(f"[{time.perf_counter() - began:5.0f} s] {line}", flush=True)

    return say


def commands(letters: Iterable[str] = tuple(EXPERIMENTS)) -> list[Command]:
    """All commands of some experiments."""
    return [command for letter in letters for group in EXPERIMENTS[letter] for command in group]


if __name__ == "__main__":
    sys.exit(main())
