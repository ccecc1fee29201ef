# SPDX-License-Identifier: Apache-2.0
"""What a folder of results was made from (`sweep.json`), so that no sweep replaces the tables of another one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darekit.errors import OutputError
from darekit.recipe.essence import essence
from darekit.sweeps.data import Cell, Sweep
from darekit.sweeps.store import CELLS, PLOTS, SUMMARY, TABLES, finished_in
from darekit.trials.files import write_whole

RECORD = "sweep.json"
SEARCHED = "search.json"  # the record of `dare search`, whose summary.json has the same name as a sweep's
FORMAT = "darekit-sweep-1"


@dataclass(frozen=True)
class Record:
    """A sweep as its folder remembers it, in words: the content of files is the cells' digests' affair.

    Attributes:
        name: of the sweep.
        text: the sweep's file.
        judges: split -> name -> what judges.
        dtype: what models computed in.
        cells: (title, the recipe it comes to, names of its judges, digest) of each.
    """

    name: str
    text: str
    judges: Mapping[str, Mapping[str, Any]]
    dtype: str | None
    cells: tuple[tuple[str, Mapping[str, Any], tuple[str, ...], str], ...]

    def to_data(self) -> dict[str, Any]:
        """What `sweep.json` holds."""
        cells = [
            {"title": title, "judges": list(names), "digest": digest, "recipe": recipe}
            for title, recipe, names, digest in self.cells
        ]
        return {"format": FORMAT, "sweep": self.name, "text": self.text, "dtype": self.dtype, "judges": self.judges,
                "cells": cells}  # fmt: skip


def record_of(sweep: Sweep, cells: Iterable[tuple[Cell, str]], dtype: str | None) -> Record:
    """A sweep, its cells with their digests, what models compute in -> what is remembered of them."""
    listed = tuple((cell.title, essence(cell.recipe).to_data(), cell.judges, digest) for cell, digest in cells)
    return Record(sweep.name, sweep.text, sweep.judges, dtype, listed)


def write_record(out: Path, record: Record) -> None:
    """Write `sweep.json`, at once or not at all."""
    write_whole(out / RECORD, json.dumps(record.to_data(), indent=1) + "\n")


def refuse_search(out: Path) -> None:
    """Refuse a search's folder, whatever may be overwritten: `summary.json` would be replaced by another kind of file.

    Raises:
        OutputError: it is one.
    """
    if (out / SEARCHED).exists():
        raise OutputError(f"{out} holds the results of `dare search`: choose another OUT")


def refuse_other(
    out: Path, sweep: Sweep, cells: Sequence[Cell], dtype: str | None, digests: Set[str] | None = None
) -> None:
    """Refuse a folder whose tables hold what this sweep's would not: its finished cells must all be among these.

    So a sweep may grow (values, seeds, judges), and may change what nothing was finished of. `digests`: of these
    cells, where they are known; a folder without a record is told by them.

    Raises:
        OutputError: the folder is another sweep's, or of something else; the message says what differs.
    """
    found = read_record(out)
    if found is None:
        foreign = [name for name in (TABLES, SUMMARY, *PLOTS) if (out / name).exists()]
        if foreign and not (out / CELLS).exists():
            raise OutputError(
                f"{out} holds {', '.join(foreign)}, which no sweep wrote: choose another OUT, or replace them with "
                "--overwrite"
            )
        there = finished_in(out / CELLS)
        if digests is not None and there and not there & digests:
            raise OutputError(
                f"{out} holds {len(there)} finished cells of another sweep, whose {RECORD} is missing: choose another "
                "OUT, or replace its tables with --overwrite"
            )
        return
    there = finished_in(out / CELLS)
    finished = [entry for entry in found.cells if entry[3] in there]
    mine: dict[str, list[Cell]] = {}
    for cell in cells:
        mine.setdefault(_key(essence(cell.recipe).to_data()), []).append(cell)
    lost = [
        (title, recipe)
        for title, recipe, names, _ in finished
        if not any({*names} <= {*cell.judges} for cell in mine.get(_key(recipe), ()))
    ]
    differ = [*_dtypes(found, dtype), *_judges(found, sweep), *_recipes(lost, len(finished), cells)]
    if finished and differ:
        other = "another sweep" if found.name == sweep.name else f"another sweep, {found.name}"
        told = "".join(f"\n  {line}" for line in differ)
        raise OutputError(
            f"{out} holds the results of {other}:{told}\nTheir tables would be replaced: choose another OUT, or "
            f"replace them with --overwrite ({CELLS} keeps all finished cells)"
        )


def _dtypes(found: Record, dtype: str | None) -> Iterator[str]:
    if found.dtype != dtype:
        yield f"dtype: {found.dtype or 'not given'} there, {dtype or 'not given'} here"


def _judges(found: Record, sweep: Sweep) -> Iterator[str]:
    for split, named in found.judges.items():
        for name, spec in named.items():
            here = sweep.judges.get(split, {}).get(name)
            if _key(here) != _key(spec):
                yield f"{split}.{name}: {spec} there, {'nothing' if here is None else here} here"


def _recipes(lost: Sequence[tuple[str, Mapping[str, Any]]], count: int, cells: Sequence[Cell]) -> Iterator[str]:
    """How many cells would be lost, and how the first one differs from the cell of its name, where there is one."""
    if not lost:
        return
    title, recipe = lost[0]
    namesake = next((cell for cell in cells if cell.title == title), None)
    differ = "" if namesake is None else _difference(recipe, essence(namesake.recipe).to_data())
    first = f"the first: {title}{f' ({differ})' if differ else ''}"
    yield f"{len(lost)} of its {count} finished cells {'is' if len(lost) == 1 else 'are'} not in this one, {first}"


def _difference(there: Any, here: Any) -> str:
    """The first setting in which two recipes differ; nothing where they are equal."""
    first, second = dict(_flat(there)), dict(_flat(here))
    for key in dict.fromkeys((*first, *second)):
        if first.get(key) != second.get(key):
            return f"{key} is {first.get(key, 'not given')} there, {second.get(key, 'not given')} here"
    return ""


def _flat(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping | list) and data:
        for key, value in data.items() if isinstance(data, Mapping) else enumerate(data):
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, data


def _key(data: Any) -> str:
    return json.dumps(data, sort_keys=True, default=str)


def read_record(out: Path) -> Record | None:
    """What the folder remembers; None where there is no record.

    Raises:
        OutputError: it is not a record.
    """
    path = out / RECORD
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(data["format"])
        cells = tuple((str(c["title"]), dict(c["recipe"]), tuple(c["judges"]), str(c["digest"])) for c in data["cells"])
        judges = {split: dict(named) for split, named in data["judges"].items()}
        return Record(str(data["sweep"]), str(data["text"]), judges, data["dtype"], cells)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}; choose another OUT") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{path} is not a record of a sweep ({error!r}): is it another program's file, or another version's? "
            "Choose another OUT, or replace it with --overwrite"
        ) from None
