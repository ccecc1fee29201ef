# SPDX-License-Identifier: Apache-2.0
"""The run itself: tasks and data, machine, time, commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from real import claims
from real.lessons import PROSE
from real.measuring import shown
from real.page.results import Results, size_of
from real.page.words import SOURCES, TASKS, table
from real.sizes import Step
from real.steps import steps_of


def run(results: Results, page: Path) -> Iterator[str]:
    """Machine, trainings, seconds, commands."""
    settings = results["settings"]
    yield (
        f"{settings['machine']}, {settings['jobs']} process{'es' if settings['jobs'] > 1 else ''} with one thread each; torch {settings['torch']}, "
        f"transformers {settings['transformers']}; models are judged in {settings['dtype']}. "
        f"Base: {settings['base']}."
    )
    rows = [
        (
            name,
            str(one["course"]["steps"]),
            str(one["course"]["batch"]),
            f"{one['course']['rate']:g}",
            one["precision"],
            shown(one["seconds"]),
        )
        for name, one in results["trainings"].items()
    ]
    yield "Fine-tuning: full, AdamW with float32 masters, loss on the answer alone, saved in bfloat16."
    yield table(("model", "steps", "rows a step", "rate", "products in", "time"), rows)
    groups: dict[str, float] = {}
    for name, seconds in results["seconds"].items():
        kind = re.sub(r"^(pack|prune|packs|inspect|recommend|similarity|again)-.*", r"\1", name)
        groups[kind] = groups.get(kind, 0.0) + seconds
    yield "Seconds of the steps: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in groups.items()) + "."
    with suppress(KeyError):
        speed = results["steps"]["speed"]
        yield (
            f"Judging: `dare` {speed['dare']:.1f} rows a second, a plain loop of transformers in batches on the same {_threads(speed)} "
            f"{speed['plain']:.1f}: {speed['ratio']:.2f}x. Replacing all weights between two cells takes {speed['replace_seconds']:.2f} s."
        )
    shown_steps = [
        step for step in steps_of(size_of(results)) if step.program == "dare" and step.name in results["steps"]
    ]
    lines = [shlex.join(["dare", *step.words]) for step in shown_steps if _is_shown(step, settings["abilities"][0])]
    yield "The commands, in the folder `real/work` (those of the first model, where each has its own):"
    yield "```console\n" + "\n".join(lines) + "\n```"
    if results["left_out"]:
        yield "Left out, since there was no time for more: " + "; ".join(results["left_out"]) + "."
    if results["failed"]:
        yield "Failed: " + "; ".join(results["failed"]) + "."


def _is_shown(step: Step, first: str) -> bool:
    """One of a kind is enough."""
    kind = step.words[0]
    return kind in ("sweep", "similarity") or (first in step.needs and (kind != "pack" or "p = .9" in step.name))


def _threads(speed: Mapping[str, Any]) -> str:
    return "thread" if speed["threads"] == 1 else f"{speed['threads']} threads"


def data(results: Results, page: Path) -> Iterator[str]:
    """Tasks, and what the rows are."""
    counts = results["settings"]["counts"]
    yield (
        "Exact match: every token of the answer and its end is the likeliest one, which is what greedy decoding gives. Rows are in the model's own chat form. "
        "Training, validation and test share nothing: no number, name, place, day, sentence, module. The base answers none of "
        "them. Made by `real/lessons.py` from seeds and packages:"
    )
    rows = [
        (f"`{one}`", TASKS[one], SOURCES[one], f"{counts['validation'][one]}", f"{counts['test'][one]}")
        for one in claims.abilities(results)
    ]
    rows.append(
        (
            "`prose`",
            "general language: perplexity",
            SOURCES[PROSE],
            "",
            f"{counts['test'][PROSE]}",
        )
    )
    yield table(("", "task", "from", "validation", "test"), rows, words=3)
    lines = []
    for one in claims.abilities(results):
        user, answer = results["settings"]["examples"][one]
        lines.append(f"- {one}: {user} -> `{answer}`")
    yield "\n".join(lines)
