# SPDX-License-Identifier: Apache-2.0
"""Folders of `dare sweep` and `dare eval` with made-up scores, written by the code that writes real ones."""

import json
import math
from dataclasses import replace

import numpy as np

from darekit.evaluation.asked import ASKED, Asked
from darekit.evaluation.comparison import KEPT
from darekit.recipe import read_recipe
from darekit.sweeps.grid import cells_of
from darekit.sweeps.reading import read_sweep
from darekit.sweeps.records import record_of, write_record
from darekit.sweeps.store import FAILED, OK, Finished, Outcome, open_store
from darekit.trials.identities import digest_of

SWEEP = {
    "recipe": {"base_model": "base", "models": ["math", "code"], "sparsify": {"method": "dare"},
               "merge_method": "task_arithmetic"},
    "axes": {
        "merge": {"average": {"merge_method": "linear", "parameters.lambda": None}, "sum": None,
                  "TIES": {"merge_method": "ties"}},
        "parameters.lambda": [0.5, 1.0],
        "sparsify.drop_rate": [0, 0.5, 0.9],
    },
    "seeds": [1, 2],
    "validation": {"sums": {"data": "sums.validation.jsonl"}, "loops": {"data": "loops.validation.jsonl"}},
    "test": {"sums": {"data": "sums.test.jsonl"}, "loops": {"data": "loops.test.jsonl"}},
}  # fmt: skip


def score(rng, mean, stderr=0.02):
    value = float(np.clip(mean + rng.normal(0, 0.01), 0, 1))
    return {"value": value, "stderr": stderr, "higher_is_better": True}


def outcome(cell, rng, stderr=0.02):
    mean = {"base": 0.1, "single": 0.5}.get(cell.kind, 0.7)
    mean -= 0.3 * abs(cell.at.get("parameters.lambda", 1.0) - 1.0)
    splits = ("validation", "test")
    scores = {s: {f"{judge}/exact_match": score(rng, mean, stderr) for judge in cell.judges} for s in splits}
    return Outcome(OK, scores, (), None, 0.5)


def write_sweep(folder, data=SWEEP, keep=lambda cell: True, change=lambda cell, one: one, seed=0):
    """A folder of `dare sweep`: cells that `keep` takes, with outcomes as `change` leaves them. No model is needed."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    sweep = read_sweep(data)
    sweep = replace(sweep, judges={s: named for s, named in sweep.judges.items() if named})
    cells, _ = cells_of(sweep)
    named = [(cell, digest_of(cell.title, cell.recipe.to_data())) for cell in cells]
    with open_store(folder) as store:
        write_record(folder, record_of(sweep, named, None))
        finished = []
        for cell, digest in named:
            if keep(cell):
                found = change(cell, outcome(cell, rng))
                scores = {s: v for s, v in found.scores.items() if s in sweep.judges}
                finished.append(Finished(cell, replace(found, scores=scores), digest))
        store.add(finished)
    return folder


def failed(error):
    return Outcome(FAILED, {}, (), error, 0.1)


def write_evaluation(folder, names=("base", "math", "merged"), done=None, stderr=0.01, errors=None):
    """A folder of `dare eval --out`: the first `done` models are judged; `errors`: model -> why it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    recipes = {name: read_recipe({"models": [name], "merge_method": "linear"}).to_data() for name in names}
    asked = Asked(tuple((n, f"key of {n}", recipes[n]) for n in names), {"data": ["sums.jsonl"], "limit": 20})
    (folder / ASKED).write_text(json.dumps(asked.to_data()))
    errors, lines, evaluations = errors or {}, [], []
    for at, name in enumerate(names[: len(names) if done is None else done]):
        one = {
            "model": name, "seconds": 1.0, "kept": False, "details": {},
            "scores": {
                "sums/exact_match": {"value": 0.2 + 0.3 * at, "stderr": stderr, "higher_is_better": True},
                "sums/loss": {"value": 2.0 - 0.01 * at, "stderr": 0.05, "higher_is_better": False},
            },
        }  # fmt: skip
        if name in errors:
            one = {"model": name, "error": errors[name]}
        else:
            lines.append({"key": f"key of {name}"} | one)
        evaluations.append(one)
    (folder / KEPT).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done is None:
        (folder / "comparison.json").write_text(json.dumps({"evaluations": evaluations, "best": {}}))
    return folder


def finite(data):
    """Whether data for plotly hold no NaN."""
    if isinstance(data, dict):
        return all(map(finite, data.values()))
    if isinstance(data, list | tuple):
        return all(map(finite, data))
    return not isinstance(data, float) or math.isfinite(data)
