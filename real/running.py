# SPDX-License-Identifier: Apache-2.0
"""Running the steps: each is a call that a user could type, printed before it runs, and kept when it has ended.

What a step gave is in WORK/results; it is not run again while its words, its sweep file, its models and its data are
the same. A sweep that was stopped goes on with its next cell, a training with its next state.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from real.measuring import Pace, seconds_of, shown
from real.sizes import Size, Step
from real.steps import AGAIN_THREADS

Say = Callable[[str], None]
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Run:
    """One run in the folder `work`.

    Attributes:
        results: a step's name -> what it gave, condensed.
        seconds: a step's name -> how long it took when it was run.
        failed: a line for each step that ended with an error.
        ends: when (by `time.perf_counter`) nothing more may run; what does not fit before it is left out.
        left_out: titles of these.
    """

    work: Path
    size: Size
    pace: Pace
    jobs: int
    say: Say
    device: str | None = None
    ends: float | None = None
    results: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def all(self, steps: Sequence[Step]) -> None:
        """Run what is not there yet, and say how long the rest takes."""
        planned = {step.name: seconds_of(step, self.size, self.pace) / self._processes(step) for step in steps}
        to_come = {step.name: 0.0 if self.seems_kept(step) else planned[step.name] for step in steps}
        slower = 1.0  # than planned, so far
        spent = foreseen = 0.0
        for number, step in enumerate(steps, 1):
            left = sum(to_come[later.name] for later in steps[number - 1 :])
            self.say(f"{number}/{len(steps)} {step.title}; about {shown(slower * left)} left")
            began = time.perf_counter()
            late = self.ends is not None and began + slower * planned[step.name] > self.ends
            if self.step(step, late=late) and step.cells:  # the others are mostly start-up
                spent, foreseen = spent + time.perf_counter() - began, foreseen + planned[step.name]
                slower = spent / foreseen if spent > 60 else 1.0

    def seems_kept(self, step: Step) -> bool:
        """Whether there is a result: that it is of these very models is only known when its turn comes."""
        return self._kept(step).is_file() and self._is_there(step)

    def step(self, step: Step, *, late: bool = False) -> bool:
        """Run one, or find it; whether it ran. `late`: there is no time to run it."""
        try:
            document = None if step.file is None else step.file(self.results)
        except KeyError as error:  # it reads what a failed step did not give
            if self.left_out:  # that, too
                self.left_out.append(step.title)
            else:
                self.failed.append(f"{step.title}: not run, {error.args[0]} is missing")
            return False
        key = self._key(step, document)
        kept = self._kept(step)
        if (found := _read(kept)) and found["key"] == key and self._is_there(step):
            self.results[step.name], self.seconds[step.name] = found["result"], found["seconds"]
            return False
        if late:
            if not step.makes:  # what is made for another step goes without saying
                self.left_out.append(step.title)
            return False
        if document is not None:
            files = {step.name: document} if step.is_grid else document
            (self.work / "steps").mkdir(exist_ok=True)
            for name, content in files.items():
                path = self.work / "steps" / f"{name}.yaml"
                path.write_text(yaml.safe_dump(content, sort_keys=False, width=120))
        if step.makes:
            (self.work / step.makes).parent.mkdir(parents=True, exist_ok=True)
            if step.makes.endswith(".yaml"):
                (self.work / step.makes).unlink(missing_ok=True)
        if step.folder is not None:
            self._clear(step.folder, key)
        words = [*step.words, *self._options(step)]
        self.say(f"$ {_line(step, words)}")
        began = time.perf_counter()
        code, out, said = call(words, self.work, program=step.program, threads=self._threads(step))
        seconds = time.perf_counter() - began
        if code == 130:
            raise KeyboardInterrupt
        result = self._result(step, out)
        if result is None or code not in (0, 1) or (code and step.words[0] != "sweep"):
            self.failed.append(f"{step.title}: `{_line(step, words)[:80]}` ended with {code}: {said}")
            self.say(f"  failed: {said}")
            return True
        self.results[step.name], self.seconds[step.name] = result, seconds
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps({"key": key, "seconds": round(seconds, 1), "result": result}) + "\n")
        return True

    def _clear(self, folder: str, key: str) -> None:
        """Empty a folder that belongs to another question: `dare search` refuses it, as it should."""
        mark = self.work / f"{folder}.key"
        if _text(mark) != key:
            shutil.rmtree(self.work / folder, ignore_errors=True)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(key)

    def _kept(self, step: Step) -> Path:
        return self.work / "results" / f"{_flat(step.name)}.json"

    def _options(self, step: Step) -> list[str]:
        """What depends on the machine."""
        found = []
        if step.device:
            found += ["--dtype", step.dtype or self.pace.dtype, *(("--device", self.device) if self.device else ())]
        if self._processes(step) > 1:
            found += ["--jobs", str(self.jobs)]
        return found

    def _processes(self, step: Step) -> int:
        """Sweeps and searches have processes; two threads are measured in one."""
        return self.jobs if step.is_grid and step.name != "again-threads" else 1

    def _threads(self, step: Step) -> int:
        """One in each process of a sweep; a command of one process has them all. Speed is measured with one."""
        if step.name == "again-threads":
            return AGAIN_THREADS
        return 1 if self._processes(step) > 1 or step.is_grid or step.program != "dare" else self.jobs

    def _result(self, step: Step, out: str) -> Any:
        if step.is_grid:
            summary = _read(self.work / step.words[2] / "summary.json")
            return None if summary is None else condensed(summary)
        try:
            return condensed(json.loads(out))
        except ValueError:
            return None

    def _is_there(self, step: Step) -> bool:
        return step.makes is None or (self.work / step.makes).exists()

    def _key(self, step: Step, document: Any) -> str:
        """Digest of all that decides about a step's result, but for the machine and the package itself."""
        models = [_read(self.work / name / "training.json") for name in step.needs]
        data = hashlib.blake2b(digest_size=16)
        for path in sorted((self.work / "data").glob("*.jsonl")):
            data.update(path.read_bytes())
        prints = [model and model["fingerprint"] for model in models]
        base = _read(self.work / "base.json")
        parts = [
            step.words,
            document,
            prints,
            base,
            data.hexdigest(),
            (step.dtype or self.pace.dtype) if step.device else None,
        ]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def call(words: Sequence[str], folder: Path, *, program: str = "dare", threads: int = 1) -> tuple[int, str, str]:
    """Exit code, standard output, and the last line of standard error, which is shown as it comes."""
    begin = ["-m", "darekit"] if program == "dare" else ["-m", program]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment |= threads_of(threads)
    last = ""
    with subprocess.Popen(
        [sys.executable, *begin, *words], cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        out: list[str] = []
        reader = threading.Thread(target=lambda: out.append(process.stdout.read()))  # type: ignore[union-attr]
        reader.start()
        try:
            for line in process.stderr:
                if line.strip():
                    last = line.strip()
                    sys.stderr.write(line)
                    sys.stderr.flush()
        except KeyboardInterrupt:  # from a terminal the command had it, too; from elsewhere it did not
            stop(process)
            raise
        finally:
            reader.join()
    return process.returncode, "".join(out), last or "it printed nothing"


def threads_of(count: int) -> dict[str, str]:
    """What tells torch how many threads to have. Several wait asleep: where others use the cores too, threads that spin
    until the last one is there take its time away."""
    return {"OMP_NUM_THREADS": str(count), **({"OMP_WAIT_POLICY": "passive"} if count > 1 else {})}


PATIENCE = 20.0  # seconds that a command has to keep what it has


def stop(process: subprocess.Popen[Any]) -> None:
    """Ask a process to stop as Ctrl-C does, and wait until it is gone: what is kept is then whole."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _line(step: Step, words: Sequence[str]) -> str:
    """As it is typed."""
    return shlex.join([*(["dare"] if step.program == "dare" else ["python", "-m", step.program]), *words])


def _flat(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "-" for c in name)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def condensed(data: Mapping[str, Any]) -> Any:
    """What the page needs of a command's JSON: the rest can be had by running the command again."""
    if "rows" in data and "choose" not in data and isinstance(data["rows"], list):
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
                        if score.endswith(("/exact_match", "/perplexity"))
                    }
                    for split, scores in row["scores"].items()
                },
            }
            for row in data["rows"]
        ]
        return {"rows": rows, "failed": data["failed"], "seconds": data.get("seconds")}
    found = slim(data)
    if data.get("best") and "recipe" in data["best"] and "question" in data:  # a search: its best is merged again
        found["best"]["merge"] = data["best"]["recipe"]
    return found


BULKY = ("tensors", "modules", "histogram", "dense", "recipe")  # a line for every tensor


def slim(data: Any) -> Any:
    """JSON without what is as long as the model has tensors, or a model's own report within one of several."""
    if isinstance(data, Mapping):
        whole = {key: value for key, value in data.items() if key not in BULKY}
        if whole.get("interference"):
            whole.pop("models", None)
        return {key: slim(value) for key, value in whole.items()}
    return [slim(one) for one in data] if isinstance(data, list) else data


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
