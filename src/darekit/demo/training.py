# SPDX-License-Identifier: Apache-2.0
"""Training the demo's family: the base in this process, its independent fine-tunings in two.

Run as ``python -m darekit.demo.training WORK`` (JSON), this module is one of those two, and prints a line for each
step. Not `multiprocessing`: its spawned children would run the caller's main module again.
"""

from __future__ import annotations

import json
import math
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from darekit.demo.family import (
    IGNORED,
    UNFINISHED,
    Family,
    Job,
    build_model,
    build_tokenizer,
    calm,
    encode,
    is_trained,
    load_model,
    load_tokenizer,
    save_model,
)
from darekit.demo.settings import Course, read_settings
from darekit.demo.tasks import Example, base_examples, held_out_words, tuning_examples
from darekit.errors import DarekitError, DataError

TrainingProgress = Callable[[str, int, int], None]  # what is under way, steps done, steps in all


def train_family(family: Family, progress: TrainingProgress) -> tuple[str, ...]:
    """Train every model that is not there yet, and say which those were."""
    base = Job()
    trained = []
    if not is_trained(family, base):
        for done in train_job(family, base):
            progress("training the base", done, family.settings.base.steps)
        trained.append(base.title)
    missing = [job for job in family.tuning_jobs() if not is_trained(family, job)]
    for done, _ in enumerate(_tune(family, missing), start=1):
        progress(f"fine-tuning {len(missing)} models", done, len(missing) * family.settings.tune.steps)
    return (*trained, *(job.title for job in missing))


def train_job(family: Family, job: Job) -> Iterator[int]:
    """Train one model and save it; yields the number of steps done.

    A fine-tuning starts from the base as it was stored, so that its delta holds no rounding of the base.
    """
    settings = family.settings
    rng = random.Random(f"{job.title} of base {settings.base_seed}")
    if job.ability is None:
        tokenizer = build_tokenizer()
        model = build_model(settings, tokenizer)
        examples = base_examples(rng, length=settings.word_length)
        course = settings.base
    else:
        tokenizer = load_tokenizer(family.base)
        model = load_model(family.base)
        examples = tuning_examples(rng, job.ability, length=settings.word_length, replay=settings.replay)
        course = settings.tune
    held_out = frozenset(held_out_words(count=settings.items, length=settings.word_length))
    yield from train(model, tokenizer, examples, course, title=job.title, held_out=held_out)
    save_model(family, job, model, tokenizer)


def train(
    model: Any, tokenizer: Any, examples: Iterator[Example], course: Course, *, title: str, held_out: frozenset[str]
) -> Iterator[int]:
    """Train in place on the answers of the examples; yields the number of steps done.

    Raises:
        DataError: the loss is not finite, or an evaluation word was trained on.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=course.rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_factor(step, course.steps))
    seen: set[str] = set()
    model.train()
    for step in range(1, course.steps + 1):
        batch = [next(examples) for _ in range(course.batch)]
        seen.update(example.word for example in batch)
        ids, targets = encode(tokenizer, batch)
        scores = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        if not math.isfinite(loss.item()):
            raise DataError(
                f"training of {title} diverged: the loss is {loss.item()} at step {step} of {course.steps}, "
                f"learning rate {course.rate:g}; nothing was saved; a lower rate usually helps"
            )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        yield step
    if leaked := sorted(seen & held_out):
        raise DataError(f"training of {title} saw {len(leaked)} evaluation words, as {leaked[0]!r}; nothing was saved")


def rate_factor(step: int, steps: int) -> float:
    """Share of the highest learning rate: a short linear rise, then half a cosine down to 0.

    >>> [round(rate_factor(step, 100), 2) for step in (0, 9, 55, 99)]
    [0.1, 1.0, 0.5, 0.0]
    """
    rise = max(1, min(steps // 10, 40))
    return min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * max(0, step - rise) / max(1, steps - rise)))


def _tune(family: Family, jobs: Sequence[Job]) -> Iterator[int]:
    """Train the jobs, in child processes where there are several; yields after each step of any."""
    count = min(family.settings.processes, len(jobs))
    if count < 2:
        for job in jobs:
            yield from train_job(family, job)
        return
    events: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()  # None: a step is done; a child: it has ended
    children: list[_Child] = []
    try:
        for number in range(count):
            children.append(_start(family, jobs[number::count]))
            threading.Thread(target=_listen, args=(children[-1], events), daemon=True).start()
        running = count
        while running:
            ended = events.get()
            if ended is None:
                yield 1
                continue
            running -= 1
            if ended.process.returncode:
                said = ended.errors.read_text().strip()
                raise DarekitError(f"fine-tuning failed: {said or f'exit code {ended.process.returncode}'}")
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
            child.errors.unlink(missing_ok=True)


@dataclass(frozen=True, eq=False)
class _Child:
    process: subprocess.Popen[str]
    errors: Path  # a file, because a pipe that nobody reads can fill up


def _start(family: Family, jobs: Sequence[Job]) -> _Child:
    descriptor, errors = tempfile.mkstemp(prefix=UNFINISHED, dir=family.directory)
    work = {
        "directory": str(family.directory),
        "settings": asdict(family.settings),
        "jobs": [asdict(job) for job in jobs],
    }
    with os.fdopen(descriptor, "w") as log:
        command = [sys.executable, "-m", "darekit.demo.training", json.dumps(work)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)
    return _Child(process, Path(errors))


def _listen(child: _Child, events: queue.SimpleQueue[_Child | None]) -> None:
    """Turn a child's lines into events, and its end into the last one."""
    assert child.process.stdout is not None
    with child.process.stdout as lines:
        for _ in lines:
            events.put(None)
    child.process.wait()
    events.put(child)


def _work(argument: str) -> int:
    """What a child process does: train its share, one line to stdout after each step."""
    work = json.loads(argument)
    family = Family(Path(work["directory"]), read_settings(work["settings"]))
    try:
        with calm():
            for job in work["jobs"]:
                for _ in train_job(family, Job(**job)):
                    sys.stdout.write(".\n")
                    sys.stdout.flush()
    except DarekitError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except BrokenPipeError:  # the parent is gone; what was finished is saved
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_work(sys.argv[1]))
