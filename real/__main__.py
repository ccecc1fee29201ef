# SPDX-License-Identifier: Apache-2.0
"""From nothing to docs/real: ``python -m real [--quick]``, or ``make real``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK, PAGE = HERE / "work", HERE.parent / "docs" / "real"
STAGES = ("drop", "packs", "merges")


def main(arguments: Sequence[str] | None = None) -> int:
    """Base, data, trainings, steps, page."""
    given = _parser().parse_args(arguments)
    began = time.perf_counter()
    say = _speaker(began)
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, {"TRANSFORMERS_VERBOSITY": "error"}.get(name, "1"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _require()

    from transformers import AutoTokenizer

    from real import lessons, measuring, page, steps, training
    from real.base import make_base
    from real.running import Run

    size = steps.QUICK if given.quick else steps.FULL if given.full else steps.STANDARD
    if given.rows:
        size = replace(size, rows=steps.rows_for(given.rows))
    work = given.work.resolve()
    base = make_base(work / "base", model=given.model, say=say)
    lessons.write_data(work / "data", AutoTokenizer.from_pretrained(base), dict(size.rows), size.abilities)
    todo, names = steps.steps_of(size), steps.models_of(size)
    untrained = [one for one in names if not training.is_trained(base, work / one, *training.course_of(one))]
    pace = measuring.pace_of(work, size.abilities, machine(), batch=size.batch)
    say("\n" + measuring.budget(todo, untrained, size, pace, jobs=given.jobs))
    if given.budget:
        return 0
    first = [one for one in untrained if one in size.abilities]
    later = [one for one in untrained if one not in first]
    train(work, first, jobs=given.jobs, say=say)
    ends = None if given.minutes is None else began + 60 * given.minutes
    run = Run(work, size, pace, given.jobs, say, given.device, ends)
    run.all([step for step in todo if not {*step.needs} & {*later}])
    if ends is None or time.perf_counter() < ends:
        train(work, later, jobs=given.jobs, say=say)
        run.all([step for step in todo if {*step.needs} & {*later}])
    where = given.page or (work / "page" if given.quick else PAGE)
    page.write_page(page.results_of(run, names), where)
    say(f"written: {where / 'README.md'}")
    for line in run.failed:
        say(f"failed: {line}")
    return 1 if run.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m real", description="The paper's claims on a real language model.")
    parser.add_argument("--quick", action="store_true", help="one ability and few cells: 15 minutes on two quiet cores")
    parser.add_argument("--full", action="store_true", help="more drop rates and masks")
    parser.add_argument(
        "--model", help="a model of the Hub, or a directory, as base; default: SmolLM2-135M-Instruct of PyPI"
    )
    parser.add_argument(
        "--work", type=Path, default=WORK, help="where models and results are kept (default: real/work)"
    )
    parser.add_argument(
        "--page", type=Path, help="where the page is written; default: docs/real, with --quick WORK/page"
    )
    parser.add_argument("--rows", type=int, help="rows of each test; default: 200, with --quick 100")
    parser.add_argument("--minutes", type=float, help="begin nothing that would not end within so many")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes at once (default: 2)")
    parser.add_argument("--device", help="cpu, cuda or mps; default: the fastest available")
    parser.add_argument("--budget", action="store_true", help="measure, show what a run would take, and stop")
    return parser


def _require() -> None:
    from importlib.util import find_spec

    missing = [
        name
        for name in ("torch", "transformers", "tokenizers", "gguf", "num2words", "babel", "matplotlib")
        if not find_spec(name)
    ]
    if missing:
        raise SystemExit(f"this needs {', '.join(missing)}: pip install 'darekit[real]', or make real")


def train(work: Path, names: Sequence[str], *, jobs: int, say: Callable[[str], None]) -> None:
    """Fine-tune what is missing, `jobs` at a time, each in a process of its own; with one thread, but for a single one.

    Raises:
        SystemExit: one failed; what was finished is kept, and the others go on from their last state.
    """
    from real.measuring import shown

    waiting, running = [*names], {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(jobs if len(names) == 1 else 1)}
    told = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            log = work / f"{name}.log"
            with log.open("w") as file:
                running[name] = subprocess.Popen(
                    [sys.executable, "-m", "real.training", str(work), name], stdin=subprocess.DEVNULL, stdout=file,
                    stderr=subprocess.STDOUT, cwd=HERE.parent, env=environment,
                )  # fmt: skip
            say(f"fine-tuning {name}; steps are in {log}")
        time.sleep(1)
        for name, process in [*running.items()]:
            code = process.poll()
            if code is None:
                continue
            del running[name]
            if code:
                for other in running.values():
                    other.terminate()
                lines = (work / f"{name}.log").read_text().splitlines()
                raise SystemExit(f"fine-tuning {name} failed: {lines[-1] if lines else 'it said nothing'}")
            say(f"fine-tuned {name}")
        if running and time.perf_counter() - told > 60:
            told = time.perf_counter()
            lasts = [(name, _last(work / f"{name}.log")) for name in running]
            say(
                "; ".join(
                    f"{name}: step {one['step']} of {one['of']}, {shown(one['left'])} left"
                    for name, one in lasts
                    if one
                )
            )


def _last(log: Path) -> dict[str, float] | None:
    for line in reversed(log.read_text().splitlines()):
        if line.startswith("{"):
            found: dict[str, float] = json.loads(line)
            return found
    return None


def machine() -> str:
    """The processor, for the page."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores of {name}"


def _speaker(began: float) -> Callable[[str], None]:
    def say(line: str) -> None:
        sys.stdout.write(f"[{time.perf_counter() - began:6.0f} s] {line}\n")
        sys.stdout.flush()

    return say


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
