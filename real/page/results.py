# SPDX-License-Identifier: Apache-2.0
"""All that the page is made of, as one file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from real import lessons
from real.lessons import PROSE
from real.sizes import Size

if TYPE_CHECKING:
    from real.running import Run

RESULTS = "results.json"
Results = Mapping[str, Any]


def results_of(run: Run, models: Sequence[str]) -> dict[str, Any]:
    """All that the page needs, of a run."""
    import torch
    import transformers

    from real.__main__ import machine
    from real.running import slim

    size: Size = run.size
    trainings = {}
    for name in models:
        with suppress(OSError):
            found = json.loads((run.work / name / "training.json").read_text())
            trainings[name] = {key: found[key] for key in ("course", "seconds", "precision", "device", "threads")}
    made = json.loads((run.work / "base.json").read_text())
    counts = {split: {} for split in ("validation", "test")}  # type: dict[str, dict[str, int]]
    for split, own in counts.items():
        for name in (*size.abilities, *([PROSE] if split == "test" else [])):
            text = (run.work / "data" / f"{name}.{split}.jsonl").read_text()
            own[name] = len(text.splitlines())
    return {
        "settings": {
            "base": made["source"], "abilities": [*size.abilities], "rows": dict(size.rows), "counts": counts, "examples": {one: _example(one) for one in size.abilities},
            "seeds": [*size.seeds], "other_seeds": [*size.other_seeds], "rates": [*size.rates],
            "headline": [*size.headline],
            "batch": size.batch,
            "again": size.again, "also": [*size.also], "depth": size.depth,
            "other_rates": [*size.other_rates], "dtype": run.pace.dtype, "jobs": run.jobs, "machine": machine(),
            "torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__,
        },
        "trainings": trainings,
        "steps": {name: slim(result) for name, result in run.results.items()},
        "seconds": {name: round(value, 1) for name, value in run.seconds.items()},
        "failed": sorted(run.failed),
        "left_out": [*run.left_out],
    }  # fmt: skip


def _example(ability: str) -> list[str]:
    """The first of test: another Python has other docstrings, so the page cannot ask."""
    first = next(lessons.examples(ability, "test"))
    return [first.user, first.answer]


def size_of(results: Results) -> Size:
    """What was measured."""
    settings = results["settings"]
    return Size(
        tuple(settings["abilities"]), settings["rows"], tuple(settings["seeds"]), tuple(settings["other_seeds"]),
        tuple(settings["rates"]), tuple(settings["headline"]), tuple(settings["other_rates"]), settings["batch"],
        settings["again"], tuple(settings.get("also", ())), settings.get("depth", 4),
    )  # fmt: skip


def lines_of(results: Results) -> str:
    """JSON with a line for each row and each step: differences can be read."""
    text = json.dumps(results, sort_keys=True, separators=(",", ":"))
    return (
        re.sub(r'(\{"at":|"(?:steps|settings|seconds|trainings|failed)":|"[\w -]+":\{"failed")', r"\n\1", text) + "\n"
    )
