# SPDX-License-Identifier: Apache-2.0
"""What is finished, on disk: one JSON line per cell, appended as cells end, found again by digest after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darekit.errors import OutputError
from darekit.sweeps.data import SPLITS, Cell, Sweep
from darekit.trials.files import lock
from darekit.wording import brief

CELLS, TABLES, SUMMARY = "cells.jsonl", "tables.md", "summary.json"
PLOTS = tuple(f"{split}.{suffix}" for split in SPLITS for suffix in ("png", "svg"))
OK, FAILED = "ok", "failed"


@dataclass(frozen=True)
class Outcome:
    """The outcome of one evaluation.

    Attributes:
        status: ok or failed.
        scores: split -> name -> {value, stderr, higher_is_better}.
        warnings: notes and warnings given during the run.
        error: why it failed; None where it did not.
        seconds: of the evaluation.
    """

    status: str
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]]
    warnings: tuple[str, ...] = ()
    error: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Finished:
    """A cell and its outcome.

    Attributes:
        cell: its place in the grid, and its recipe.
        outcome: its scores, or why it failed.
        digest: of all that decides about the scores; cells of one digest are evaluated once.
    """

    cell: Cell
    outcome: Outcome
    digest: str

    def to_data(self) -> dict[str, Any]:
        """One line of `cells.jsonl`."""
        cell, outcome = self.cell, self.outcome
        return {
            "kind": cell.kind,
            "at": dict(cell.at),
            "seed": cell.seed,
            "status": outcome.status,
            **{split: outcome.scores[split] for split in SPLITS if split in outcome.scores},
            "error": outcome.error,
            "warnings": list(outcome.warnings),
            "seconds": round(outcome.seconds, 3),
            "judges": list(cell.judges),
            "recipe": cell.recipe.to_data(),
            "digest": self.digest,
        }


class Store:
    """The file of finished cells, open for appending. `known`: digest -> outcome, of those that did not fail."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor
        self.known: dict[str, Outcome] = {}
        self.lines: set[str] = set()
        self.dropped = self._read()

    def _read(self) -> bool:
        """Fill `known`; a last line without its end (a kill in the middle of it) is cut off: whether there was one."""
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            os.ftruncate(self.descriptor, whole)
        for found, outcome in _lines(self.path, raw[:whole]):
            if outcome.status == OK:
                self.known[found["digest"]] = outcome
                self.lines.add(self._name(found["kind"], found["at"], found["seed"], found["digest"]))
        return whole < len(raw)

    @staticmethod
    def _name(kind: str, at: Mapping[str, Any], seed: int | None, digest: str) -> str:
        return json.dumps([kind, dict(at), seed, digest], sort_keys=True)

    def add(self, finished: Sequence[Finished]) -> None:
        """Append cells that are not there yet; on the disk when this returns."""
        text = b""
        for one in finished:
            name = self._name(one.cell.kind, one.cell.at, one.cell.seed, one.digest)
            if name in self.lines:
                continue
            text += json.dumps(one.to_data(), allow_nan=False).encode() + b"\n"
            if one.outcome.status == OK:
                self.known[one.digest] = one.outcome
                self.lines.add(name)
        if text:
            os.write(self.descriptor, text)
            os.fsync(self.descriptor)


def _lines(path: Path, raw: bytes) -> Iterator[tuple[dict[str, Any], Outcome]]:
    """Each line and the outcome in it.

    Raises:
        OutputError: a line is not a cell.
    """
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            found = json.loads(line)
            scores = {split: found[split] for split in SPLITS if split in found}
            outcome = Outcome(
                found["status"], scores, tuple(found["warnings"]), found["error"], float(found["seconds"])
            )
            dict(found["at"]), found["kind"], found["seed"], found["digest"]
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{path} line {number} is not a finished cell ({error!r}): is this another program's file? Choose "
                "another OUT, or remove that line"
            ) from None
        yield found, outcome


def entries_of(path: Path) -> Iterator[tuple[dict[str, Any], Outcome]]:
    """Each whole line of a file and the outcome in it; none where there is no file.

    Raises:
        OutputError: it cannot be read, or a line is not a cell.
    """
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}; choose another OUT") from None
    yield from _lines(path, raw[: raw.rfind(b"\n") + 1])


def finished_in(path: Path) -> frozenset[str]:
    """Digests of the cells that a file holds and that did not fail; none where there is no file."""
    return frozenset(found["digest"] for found, outcome in entries_of(path) if outcome.status == OK)


@contextmanager
def open_store(out: Path) -> Iterator[Store]:
    """OUT/cells.jsonl, made where it is missing, for one run at a time.

    Raises:
        OutputError: it cannot be written, is something else, or another run has it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / CELLS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    except FileExistsError:
        raise OutputError(f"{out} is a file, but OUT must be a directory: choose another name") from None
    except OSError as error:
        raise OutputError(f"cannot write {out / CELLS}: {error.strerror}; choose another OUT") from None
    try:
        if not lock(descriptor):
            raise OutputError(f"another run of this sweep is writing to {out}; wait for it, or choose another OUT")
        yield Store(out / CELLS, descriptor)
    finally:
        os.close(descriptor)


def _number(outcome: Outcome, split: str, name: str) -> str:
    score = outcome.scores.get(split, {}).get(name)
    if score is None:
        return ""
    error = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
    return f"{score['value']:.3f}{error}"


@dataclass(frozen=True)
class SweepResult:
    """All cells of a sweep with their outcomes.

    Attributes:
        sweep: what was run.
        out: the directory of the results.
        finished: the cells, in the order of the grid.
        notes: what was added, reused or dropped.
        seconds: of the whole run.
    """

    sweep: Sweep
    out: Path
    finished: tuple[Finished, ...]
    notes: tuple[str, ...]
    seconds: float

    def __repr__(self) -> str:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return brief(self, f"{self.sweep.name}, {len(self.finished)} cells{failed}, results in {self.out}")

    def _repr_html_(self) -> str:
        """What a notebook shows: each cell with its scores."""
        from darekit.wording.notebooks import shown_as_html

        names = dict.fromkeys(
            (split, name) for split in reversed(SPLITS) for one in self.finished
            for name in one.outcome.scores.get(split, {})
        )  # fmt: skip
        rows = [
            (one.cell.title, one.outcome.status, *(_number(one.outcome, split, name) for split, name in names))
            for one in self.finished
        ]
        header = ("cell", "", *(f"{name}, {split}" for split, name in names))
        return shown_as_html(
            f"Sweep {self.sweep.name}: {len(self.finished)} cells, {len(self.failed)} failed",
            [("results", str(self.out)), ("page", f'dk.report("{self.out}")')],
            header=header, rows=rows, words=2, notes=self.notes,
        )  # fmt: skip

    @property
    def failed(self) -> tuple[Finished, ...]:
        """The cells that failed."""
        return tuple(one for one in self.finished if one.outcome.status == FAILED)
