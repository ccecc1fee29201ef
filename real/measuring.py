# SPDX-License-Identifier: Apache-2.0
"""What this machine manages, measured before anything runs: in which number format, and how long a run will take."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from real.lessons import ABILITIES, PROSE
from real.sizes import Size, Step
from real.training import COURSES

ROWS = 12  # of each file, in each format
TRAINING = 4.5  # a training step's row costs as much as so many that are judged: backwards, and its part of AdamW
SLOWER = 3.5  # a step in float32, where bfloat16 is faster
ALONE = 2.0  # seconds of a cell beside judging: its weights, its record


@dataclass(frozen=True)
class Pace:
    """Seconds for a row of each ability and of prose; the format in which they were measured."""

    dtype: str
    seconds: Mapping[str, float]


def pace_of(work: Path, abilities: Sequence[str], machine: str, *, batch: int, device: str | None = None) -> Pace:
    """Measured once on a machine for a base, so that a run that goes on keeps its number format."""
    path, made = work / "pace.json", work / "base.json"
    base = json.loads(made.read_text())["source"] if made.is_file() else None
    with suppress(OSError, ValueError, KeyError):
        found = json.loads(path.read_text())
        same = found["machine"] == machine and found.get("base", base) == base
        if same and {*abilities} < found["seconds"].keys():
            return Pace(found["dtype"], found["seconds"])
    pace = measure(work, abilities, batch=batch, device=device)
    path.write_text(json.dumps({"machine": machine, "base": base, "dtype": pace.dtype, "seconds": pace.seconds}) + "\n")
    return pace


def measure(work: Path, abilities: Sequence[str] = ABILITIES, *, batch: int = 32, device: str | None = None) -> Pace:
    """Judge some rows with the base model in both formats, and keep the faster: bfloat16 where the processor
    multiplies it (AVX512_BF16, AMX, a GPU), else float32."""
    import torch

    from darekit.evaluation.judges import judge_of
    from darekit.live.models import open_live

    best: Pace | None = None
    for dtype in ("bfloat16", "float32"):
        with open_live(work / "base", device=device, dtype=dtype) as live, torch.inference_mode():
            seconds: dict[str, float] = {}
            for name in (*abilities, PROSE):
                spec = {"data": str(work / f"data/{name}.test.jsonl"), "limit": ROWS, "batch_size": min(batch, ROWS)}
                judge = judge_of(spec)
                if not seconds:
                    judge(live)  # the first pass is slower
                began = time.perf_counter()
                judge(live)
                seconds[name] = (time.perf_counter() - began) / ROWS
                if best and sum(seconds.values()) > 2 * sum(best.seconds.values()):
                    return best
            pace = Pace(dtype, seconds)
            if best is None or sum(pace.seconds.values()) < sum(best.seconds.values()):
                best = pace
    assert best is not None
    return best


def seconds_of(step: Step, size: Size, pace: Pace) -> float:
    """How long a step takes in one process."""
    found = step.seconds
    for count, judges in step.cells:
        each = ALONE
        for judge in judges:
            name, _, split = judge.partition("/")
            rows = size.rows[PROSE] if name == PROSE else size.rows["validation" if split == "validation" else "test"]
            rows = min(rows, int(split)) if split.isdecimal() else rows
            slower = SLOWER if step.dtype and step.dtype != pace.dtype else 1.0
            each += slower * rows * pace.seconds[name]
        found += count * each
    return found


def training_seconds(ability: str, pace: Pace) -> float:
    """How long a fine-tuning takes with one thread."""
    course = COURSES[ability]
    return TRAINING * course.steps * course.batch * pace.seconds[ability]


MADE = {"pack": "packs", "prune": "packs", "lora": "adapters"}  # steps that are one line of the budget for each model


def shown(seconds: float) -> str:
    """Time for people.

    >>> shown(40), shown(200), shown(4000)
    ('40 s', '3 min', '1 h 7 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def budget(steps: Sequence[Step], untrained: Sequence[str], size: Size, pace: Pace, *, jobs: int, kept: int = 0) -> str:
    """The table that is printed first: what will be judged, and how long that takes in `jobs` processes. `kept`: so
    many other steps have their results from before."""
    rows = {f"fine-tuning {one}": (0, training_seconds(one.partition("-")[0], pace)) for one in untrained}
    for step in steps:
        kind = step.name.partition("-")[0]
        title = f"{MADE[kind]} of {step.needs[0]}: making them" if kind in MADE else step.title
        before, seconds = rows.get(title, (0, 0.0))
        rows[title] = (before + sum(count for count, _ in step.cells), seconds + seconds_of(step, size, pace))
    width = max(map(len, rows), default=0)
    lines = [f"  {title:<{width}}  {cells or '':>5}  {shown(one):>10}" for title, (cells, one) in rows.items()]
    rate = ", ".join(f"{name} {1 / seconds:.0f}" for name, seconds in pace.seconds.items())
    total = sum(seconds for _, seconds in rows.values())
    there = [f"  {kept} other steps have their results from before"] if kept else []
    return "\n".join([
        f"rows judged in a second, in {pace.dtype}: {rate}",
        f"  {'':<{width}}  cells     one core",
        *lines,
        *there,
        f"about {shown(total / jobs)} with {jobs} process{'es' if jobs > 1 else ''}, if nothing else uses the cores",
    ])  # fmt: skip
