# SPDX-License-Identifier: Apache-2.0
"""A folder of results, read again: the sweep that it was made from, its finished cells, and those still to come."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from darekit.errors import OutputError, RecipeError
from darekit.recipe import ModelEntry, Recipe, Sparsify, read_recipe
from darekit.sweeps.data import Cell, Sweep
from darekit.sweeps.reading import read_sweep
from darekit.sweeps.records import RECORD, Record, read_record
from darekit.sweeps.store import CELLS, OK, SUMMARY, Finished, SweepResult, entries_of


@dataclass(frozen=True)
class SweepFolder:
    """What `dare sweep` has left in a folder so far.

    Attributes:
        result: the cells with an outcome, in the order of the grid.
        recipes: (title, digest) of a cell -> its recipe as data.
        missing: titles of the cells without one.
        kept: lines of cells that this sweep no longer has.
    """

    result: SweepResult
    recipes: Mapping[tuple[str, str], Mapping[str, Any]]
    missing: tuple[str, ...]
    kept: int

    @property
    def total(self) -> int:
        """How many cells the sweep has."""
        return len(self.result.finished) + len(self.missing)


def read_sweep_folder(out: Path) -> SweepFolder:
    """`sweep.json` and `cells.jsonl` -> the sweep and its outcomes. No model, recipe file or judge is opened.

    Raises:
        OutputError: there is no record of a sweep, or it cannot be read.
    """
    record = read_record(out)
    if record is None:
        raise OutputError(f"{out} has no {RECORD}, so what its cells were made from is unknown: run `dare sweep` again")
    sweep = replace(_sweep_of(record, out), name=record.name, text=record.text)
    lines = _lines(out / CELLS)
    finished, missing = [], []
    recipes: dict[tuple[str, str], Mapping[str, Any]] = {}
    for title, _, judges, digest in record.cells:
        found = lines.pop((title, digest), None)
        if found is None:
            missing.append(title)
            continue
        cell, outcome, recipe = found
        finished.append(Finished(replace(cell, judges=judges), outcome, digest))
        recipes[title, digest] = recipe
    seconds = {one.digest: one.outcome.seconds for one in finished}
    result = SweepResult(sweep, out, tuple(finished), _notes(out), sum(seconds.values()))
    return SweepFolder(result, recipes, tuple(missing), len(lines))


def _sweep_of(record: Record, out: Path) -> Sweep:
    try:
        data = yaml.safe_load(record.text)
        return read_sweep(data if isinstance(data, dict) else {})
    except (yaml.YAMLError, RecipeError) as error:
        raise OutputError(f"{out / RECORD}: the text of the sweep cannot be read: {error}") from None


def _lines(path: Path) -> dict[tuple[str, str], tuple[Cell, Any, Mapping[str, Any]]]:
    """(title, digest) -> cell, outcome and recipe: the last that did not fail, else the last that did."""
    found: dict[tuple[str, str], tuple[Cell, Any, Mapping[str, Any]]] = {}
    for line, outcome in entries_of(path):
        try:
            recipe = dict(line["recipe"])
            cell = Cell(str(line["kind"]), dict(line["at"]), line["seed"], _recipe_of(recipe), tuple(line["judges"]))
            key = cell.title, str(line["digest"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise OutputError(f"{path} holds a line that is not a finished cell ({error!r}): remove it") from None
        if key not in found or outcome.status == OK or found[key][1].status != OK:
            found[key] = cell, outcome, recipe
    return found


def _recipe_of(data: Mapping[str, Any]) -> Recipe:
    """A finished cell's recipe; where it names a method that is not registered here, something as unlike its models."""
    try:
        return read_recipe(data)
    except RecipeError:
        models = tuple(ModelEntry(str(entry["model"]), {}) for entry in data["models"])
        return Recipe(data.get("base_model"), models, Sparsify("dare", {"drop_rate": 0.5}), "task_arithmetic", {})


def _notes(out: Path) -> tuple[str, ...]:
    """What the last complete run had to say."""
    try:
        return tuple(map(str, json.loads((out / SUMMARY).read_text(encoding="utf-8"))["notes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return ()
