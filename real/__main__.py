# SPDX-License-Identifier: Apache-2.0
"""From nothing to docs/real: ``python -m real [--quick]``, or ``make real``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
WORK, PAGE = HERE / "work", HERE.parent / "docs" / "real"
ROOM = 30  # times a model's bytes: four models, two states of a training, packs of three


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

    from real import informed, lessons, measuring, page, sizes, steps, training
    from real.base import layers_of, make_base
    from real.running import Run

    size = sizes.QUICK if given.quick else sizes.FULL if given.full else sizes.STANDARD
    if given.rows:
        size = replace(size, rows=sizes.rows_for(given.rows))
    work = given.work.resolve()
    base = make_base(work / "base", model=given.model, say=say)
    size = replace(size, also=given.also or size.also, depth=min(size.depth, layers_of(base)))
    lessons.write_data(
        work / "data", AutoTokenizer.from_pretrained(base), dict(size.rows), size.abilities, training=informed.ROWS
    )
    todo, names = steps.steps_of(size), steps.models_of(size)
    untrained = [one for one in names if not training.is_trained(base, work / one, *training.course_of(one))]
    jobs = given.jobs or default_jobs(given.device)
    pace = measuring.pace_of(work, size.abilities, machine(given.device), batch=size.batch, device=given.device)
    ends = None if given.minutes is None else began + 60 * given.minutes
    run = Run(work, size, pace, jobs, say, given.device, ends)
    missing = [step for step in todo if not run.seems_kept(step)]
    say("\n" + measuring.budget(missing, untrained, size, pace, jobs=jobs, kept=len(todo) - len(missing)))
    _say_room(work, base, untrained, say)
    if given.budget:
        return 0
    first = [one for one in untrained if one in size.abilities]
    later = [one for one in untrained if one not in first]
    train(work, first, jobs=jobs, say=say, device=given.device)
    run.all([step for step in todo if not {*step.needs} & {*later}])
    if ends is None or time.perf_counter() < ends:
        train(work, later, jobs=jobs, say=say, device=given.device)
        run.all([step for step in todo if {*step.needs} & {*later}])
    where = given.page or (work / "page" if given.quick else PAGE)
    page.write_page(page.results_of(run, names), where)
    say(f"written: {where / 'README.md'}")
    for line in run.failed:
        say(f"failed: {line}")
    return 1 if run.failed else 0


def default_jobs(device: str | None) -> int:
    """Processes: two where two cores are; one where all would share an accelerator's memory."""
    return 1 if accelerator(device) else min(2, os.cpu_count() or 1)


def accelerator(device: str | None) -> str | None:
    """The GPU that is used, by name; None: the processor."""
    import torch

    if device == "mps" or (device is None and not torch.cuda.is_available() and torch.backends.mps.is_available()):
        return "Apple GPU"
    if (device or "cuda").startswith("cuda") and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(device or "cuda"))
    return None


def _say_room(work: Path, base: Path, untrained: Sequence[str], say: Callable[[str], None]) -> None:
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    needed, free = ROOM * weights, shutil.disk_usage(work).free
    if untrained and needed > free:
        say(f"warning: a whole run takes about {needed / 1e9:.0f} GB in {work}, where {free / 1e9:.0f} GB are free")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m real", description="The paper's claims on a real language model.")
    parser.add_argument("--quick", action="store_true", help="one ability and few cells: 15 minutes on two quiet cores")
    parser.add_argument("--full", action="store_true", help="more drop rates and masks, and all of --also")
    parser.add_argument(
        "--also", type=_also, metavar="NAMES", default=(),
        help="loras: adapters of every model, and by energy; search: 60 merges by `dare search`; paired: differences "
        "row by row; several with commas",
    )  # fmt: skip
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
    parser.add_argument("--jobs", type=int, help="processes at once (default: 2; with a GPU 1)")
    parser.add_argument("--device", help="cpu, cuda or mps, for training and judging; default: the fastest available")
    parser.add_argument("--budget", action="store_true", help="measure, show what a run would take, and stop")
    return parser


def _also(text: str) -> tuple[str, ...]:
    from real.sizes import ALSO

    names = {name.strip() for name in text.split(",") if name.strip()}
    if odd := sorted(names - {*ALSO}):
        raise argparse.ArgumentTypeError(f"{odd[0]!r} is not known; expected some of {', '.join(ALSO)}")
    return tuple(name for name in ALSO if name in names)


def _require() -> None:
    from importlib.util import find_spec

    missing = [
        name
        for name in ("torch", "transformers", "tokenizers", "gguf", "num2words", "babel", "matplotlib")
        if not find_spec(name)
    ]
    if missing:
        raise SystemExit(f"this needs {', '.join(missing)}: pip install 'darekit[real]', or make real")


def train(
    work: Path, names: Sequence[str], *, jobs: int, say: Callable[[str], None], device: str | None = None
) -> None:
    """Fine-tune what is missing, `jobs` at a time, each in a process of its own; with one thread, but for a single one.

    Raises:
        SystemExit: one failed; what was finished is kept, and the others go on from their last state.
    """
    from real.running import threads_of

    waiting = [*names]
    running: dict[str, subprocess.Popen[bytes]] = {}
    environment = {**os.environ, **threads_of(jobs if len(names) == 1 else 1)}
    told = time.perf_counter()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                log = work / f"{name}.log"
                words = ["real.training", str(work), name, *(["--device", device] if device else [])]
                with log.open("w") as file:
                    running[name] = subprocess.Popen(
                        [sys.executable, "-m", *words], stdin=subprocess.DEVNULL, stdout=file,
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
                    raise SystemExit(f"fine-tuning {name} failed: {_why(work / f'{name}.log', code)}")
                say(f"fine-tuned {name}")
            if running and time.perf_counter() - told > 60:
                told = time.perf_counter()
                if steps := [*filter(None, (_progress(work / f"{name}.log", name) for name in running))]:
                    say("; ".join(steps))
    finally:  # one failed, or all are to stop: their last states are kept
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _why(log: Path, code: int) -> str:
    """The last that it said which is no step; or that it was killed."""
    said = [line for line in log.read_text().splitlines() if line.strip() and not line.startswith("{")]
    if code < 0:
        name = signal.Signals(-code).name
        return f"it was killed ({name}; out of memory?); run the same command to continue from its last state"
    return said[-1] if said else "it said nothing"


def _progress(log: Path, name: str) -> str | None:
    from real.measuring import shown

    one = _last(log)
    return f"{name}: step {one['step']:g} of {one['of']:g}, {shown(one['left'])} left" if one else None


def _last(log: Path) -> dict[str, float] | None:
    for line in reversed(log.read_text().splitlines()):
        if line.startswith("{"):
            found: dict[str, float] = json.loads(line)
            return found
    return None


def machine(device: str | None = None) -> str:
    """The GPU or the processor, for the page."""
    if found := accelerator(device):
        return found
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


def _interrupted(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command to continue from here")
    except OSError as problem:  # a full disk, a folder that may not be written
        sys.exit(f"{problem}; once this is mended, run the same command to continue from here")
