# SPDX-License-Identifier: Apache-2.0
"""The paper's experiments, from training to the page: ``python paper/rerun.py [--only abc]``, or ``make paper``.

Every number comes from a command that a user could type; each is printed before it runs, and runs in the folder WORK
(``paper/work``). What is finished there (models, cells of sweeps) is not done again. The page is docs/paper/README.md.

Trainings and commands are one queue for two processes, in which each waits for the models and files that it reads: see
`tasks.py`. A sweep is one process, since importing torch costs as much as twenty of its cells.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from commands import EXPERIMENTS, HERE, TRAINING, Command
from tasks import Task, run_tasks

PAGE = HERE.parent / "docs" / "paper"
PROCESSES = 2


@dataclass
class Run:
    """What the commands of a run gave, by experiment: results by name, what failed (a line each), processor seconds."""

    work: Path
    say: Callable[[str], None]
    found: dict[str, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    failed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def command(self, letter: str, command: Command) -> None:
        """Run one, and keep what it gives."""
        made = None if command.makes is None else self.work / command.makes
        if made is not None:
            if command.result is None and _is_fresh(made, self.work / str(command.of)):
                return
            made.parent.mkdir(parents=True, exist_ok=True)
            if made.is_file():
                made.unlink()
        experiments = os.path.relpath(HERE / "experiments", self.work)
        line = command.line(experiments)
        begin = ["-m", "darekit"] if command.program == "dare" else [str(HERE / command.program)]
        words = [word.replace("EXPERIMENTS", experiments) for word in command.words]
        self.say(f"$ {_short_line(line)}")
        code, out, errors, seconds = _call([sys.executable, *begin, *words], self.work)
        self.seconds[letter] += seconds
        if code == 130:
            raise KeyboardInterrupt
        if code:
            last = (errors.strip().splitlines() or ["it printed nothing"])[-1]
            self.failed[letter].append(f"`{' '.join(line.split()[:4])}` ended with {code}: {last}")
            self.say(f"  failed: {errors.strip()}")
        if command.result is None:
            return
        if command.words[0] == "sweep":
            summary = self.work / command.words[2] / "summary.json"
            if summary.is_file() and code in (0, 1):
                self.found[letter][command.result] = json.loads(summary.read_text())
        elif not code:
            self.found[letter][command.result] = json.loads(out)

    def train(self, name: str) -> None:
        """Train one line."""
        import training

        training.train_apart(self.work, name, say=self.say)


def _call(words: Sequence[str], folder: Path) -> tuple[int, str, str, float]:
    """Exit code, standard output, standard error, and seconds of a processor, descendants included."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        process = subprocess.Popen(
            words, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, errors):
            file.seek(0)
        return process.returncode, out.read(), errors.read(), usage.ru_utime + usage.ru_stime


def _short_line(line: str) -> str:
    return line if len(line) < 200 else f"{line[:120]} ... {line[-60:]}"


def _is_fresh(made: Path, model: Path) -> bool:
    weights = model / "model.safetensors"
    return made.is_file() and weights.is_file() and made.stat().st_mtime > weights.stat().st_mtime


def tasks_of(letters: Collection[str], run: Run, untrained: Collection[str]) -> list[Task]:
    """The trainings and commands of some experiments. A command needs each line of models and each file that it, or
    its sweep file, names."""
    wanted = [(letter, command) for letter in letters for command in EXPERIMENTS[letter]]
    makers = {command.makes: f"{letter}: {command.makes}" for letter, command in wanted if command.makes}
    found, lines = [], set[str]()
    for number, (letter, command) in enumerate(wanted):
        read = command.reads()
        own = {line for line in TRAINING if re.search(rf"\b{line}/", read)}
        lines |= own
        needs = own | {name for made, name in makers.items() if made in read and made != command.makes}
        name = makers.get(command.makes, f"{letter}: {number}")
        found.append(Task(name, partial(run.command, letter, command), command.seconds, frozenset(needs)))
    trained = [
        Task(line, partial(run.train, line), TRAINING[line]) for line in TRAINING if line in lines & {*untrained}
    ]
    return [*trained, *found]


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
    if kind == "searches":
        return data["q"]
    if kind == "evaluations":
        return {
            Path(one["model"]).name: one["scores"]["exact_match"]["value"]
            for one in data["evaluations"]
            if not one.get("error")
        }
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
        parser.error(f"unknown experiment {', '.join(unknown)}; choose from {', '.join(EXPERIMENTS)}")
    say = _speaker(time.perf_counter())
    given.work.mkdir(parents=True, exist_ok=True)

    import page
    import training

    training.write_lessons(given.work)
    run = Run(given.work, say)
    untrained = [line for line in training.LINES if not training.is_complete(given.work, line)]
    run_tasks(tasks_of(letters, run, untrained), processes=PROCESSES)

    results = page.read_results(given.page)
    results["settings"] = page.settings_of(training)
    for letter in letters:
        results["experiments"][letter] = {n: condense(n, data) for n, data in sorted(run.found[letter].items())}
        results["failed"][letter] = sorted(run.failed[letter])
    page.write_page(results, given.page, runs=given.work / "runs")
    say(f"written: {given.page / 'README.md'}")
    _tell_seconds(run, letters, say)
    return 1 if any(results["failed"][letter] for letter in letters) else 0


def _tell_seconds(run: Run, letters: Iterable[str], say: Callable[[str], None]) -> None:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    total, commands = usage.ru_utime + usage.ru_stime, sum(run.seconds.values())
    told = ", ".join(f"({letter}) {run.seconds[letter]:.0f}" for letter in letters)
    say(f"processor seconds: {total:.0f}; training {total - commands:.0f}, {told}")


def _speaker(began: float) -> Callable[[str], None]:
    def say(line: str) -> None:
        print(f"[{time.perf_counter() - began:5.0f} s] {line}", flush=True)

    return say


if __name__ == "__main__":
    sys.exit(main())
