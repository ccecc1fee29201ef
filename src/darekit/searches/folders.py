# SPDX-License-Identifier: Apache-2.0
"""A search's folder: what was asked, a line for all that was judged, and each one's answers item by item."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darekit.errors import OutputError
from darekit.searches.asking import COMPLETE, FAILED, STOPPED, Answer
from darekit.searches.sheets import Sheet, from_bytes, to_bytes
from darekit.trials.files import append, unwritable, write_whole, write_whole_bytes

RECORD, TRIALS, SUMMARY, BEST, TESTS = "search.json", "trials.jsonl", "summary.json", "best.yaml", "tests.jsonl"
JOURNAL, ITEMS, LEASES, MODELS = "journal.log", "items", "leases", "models"
FORMAT = "darekit-search-1"
TRIAL, BASELINE = "trial", "baseline"
GOALS = ("choose", "limits")  # in the record: what candidates are held against


@dataclass(frozen=True)
class Line:
    """One line of `trials.jsonl`: a candidate or a baseline, and what came of it. All in JSON-able form.

    Attributes:
        kind: trial or baseline.
        trial: the trial's number; None of a baseline.
        name: of a baseline; None of a trial.
        state: complete, stopped or failed.
        params: what the sampler chose.
        recipe: as data.
        rungs: how it stood, rung by rung.
        scores: of the last rung.
        feasible: whether the constraints hold; None where there are none, or it is not known.
        items: how many were asked.
        digest: of all that decides about the scores.
        seconds: it took.
        error: why it failed; None where it did not.
        warnings: said while it was made.
    """

    kind: str
    trial: int | None
    name: str | None
    state: str
    params: Mapping[str, Any]
    recipe: Mapping[str, Any]
    rungs: Sequence[Mapping[str, Any]] = ()
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    feasible: bool | None = None
    items: int = 0
    digest: str = ""
    seconds: float = 0.0
    error: str | None = None
    warnings: Sequence[str] = ()

    @property
    def title(self) -> str:
        """For people: `trial 12`, or a baseline's name."""
        return f"trial {self.trial}" if self.kind == TRIAL else str(self.name)

    @property
    def key(self) -> str | int:
        """Its number, or its name."""
        return self.trial if self.trial is not None else str(self.name)

    def to_data(self) -> dict[str, Any]:
        """As the file has it."""
        return {
            "kind": self.kind, "trial": self.trial, "name": self.name, "state": self.state,
            "params": dict(self.params), "recipe": dict(self.recipe), "rungs": [dict(one) for one in self.rungs],
            "scores": dict(self.scores), "feasible": self.feasible, "items": self.items, "digest": self.digest,
            "seconds": round(self.seconds, 3), "error": self.error, "warnings": list(self.warnings),
        }  # fmt: skip


def line_of(
    kind: str, key: int | str, answer: Answer, params: Mapping[str, Any], recipe: Mapping[str, Any], digest: str,
    feasible: bool | None,
) -> Line:  # fmt: skip
    """What came of a candidate (`key`: its number) or of a baseline (`key`: its name)."""
    return Line(
        kind, key if isinstance(key, int) else None, key if isinstance(key, str) else None, answer.state, params,
        recipe, [one.to_data() for one in answer.rungs], answer.rungs[-1].scores if answer.rungs else {},
        feasible if answer.state == COMPLETE else None, answer.sheet.asked, digest, answer.seconds, answer.error,
        answer.warnings,
    )  # fmt: skip


class Folder:
    """OUT, shared by all processes that work on one search."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._lines: dict[tuple[str, str | int], Line] = {}
        self._read = 0
        try:
            (out / ITEMS).mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise OutputError(f"{out} is a file, but OUT must be a directory: choose another name") from None
        except OSError as error:
            raise unwritable(out, error) from None

    @property
    def lines(self) -> list[Line]:
        """All that was judged so far, by whichever process: the last line of each."""
        path = self.out / TRIALS
        try:
            with path.open("rb") as file:
                file.seek(self._read)
                raw = file.read()
        except FileNotFoundError:
            return [*self._lines.values()]
        whole = raw[: raw.rfind(b"\n") + 1]
        self._read += len(whole)
        for text in whole.splitlines():
            found = _line(path, text)
            if found is not None:
                self._lines[found.kind, found.key] = found
        return [*self._lines.values()]

    def add(self, line: Line, sheet: Sheet | None) -> None:
        """Keep what came of one; on the disk when this returns. The sheet comes first: a line promises it."""
        if sheet is not None and line.state != FAILED:
            self.put_sheet(line.digest, "validation", sheet)
        append(self.out / TRIALS, json.dumps(line.to_data(), allow_nan=False) + "\n")

    def known(self) -> dict[str, Line]:
        """Digest -> what came of it, of all that did not fail."""
        lines = self.lines
        stopped = {one.digest: one for one in lines if one.state == STOPPED}
        return stopped | {one.digest: one for one in lines if one.state == COMPLETE}

    def put_sheet(self, digest: str, split: str, sheet: Sheet) -> None:
        """Keep the answers of one."""
        write_whole_bytes(self.out / ITEMS / f"{digest}.{split}", to_bytes(sheet))

    def sheet(self, digest: str, split: str = "validation") -> Sheet | None:
        """The answers of one; None where there are none."""
        path = self.out / ITEMS / f"{digest}.{split}"
        try:
            return from_bytes(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise OutputError(
                f"{path} is damaged ({error}); remove it, and what it belongs to is judged again"
            ) from None

    def tests(self) -> list[dict[str, Any]]:
        """For whom the test data were used, in order: {digest, title}."""
        try:
            text = (self.out / TESTS).read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        found = []
        for line in text.splitlines():
            try:
                found.append(dict(json.loads(line)))
            except ValueError:  # cut short by a kill
                continue
        return found

    def add_test(self, digest: str, title: str, sheet: Sheet, chosen: bool) -> None:
        """Keep what one made of the test data, and that they were used."""
        self.put_sheet(digest, "test", sheet)
        append(self.out / TESTS, json.dumps({"digest": digest, "title": title, "chosen": chosen}) + "\n")


def _line(path: Path, text: bytes) -> Line | None:
    try:
        found = json.loads(text)
    except ValueError:  # cut short by a kill: its trial is given again
        return None
    try:
        return Line(**found)
    except TypeError as error:
        raise OutputError(f"{path} holds what no search wrote ({error}): choose another OUT") from None


# --- what was asked ---

_TELLING = (TRIALS, SUMMARY, JOURNAL, "cells.jsonl", "config.json")  # what says best whose folder it is


def claim(out: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Make a folder this search's, or find that it is -> what it remembers.

    Args:
        out: the folder.
        asked: what must be the same for results to go together; in JSON-able form.

    Raises:
        OutputError: it is another search's, or of something else; the message says what differs.
    """
    path = out / RECORD
    wanted = json.loads(json.dumps({"format": FORMAT, **asked}))
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(there, dict) or there.get("format") != FORMAT:
            raise ValueError
    except FileNotFoundError:
        there_is = {one.name for one in out.iterdir() if one.name[0] != "."} if out.is_dir() else set()
        others = sorted(there_is - {ITEMS, LEASES})
        others = [*dict.fromkeys((*(name for name in others if name in _TELLING), *others))][:3]
        if others:
            raise OutputError(
                f"{out} holds {', '.join(others)}, which is not of this search: choose another OUT"
            ) from None
        return dict(wanted)
    except NotADirectoryError:
        raise OutputError(f"{out} is a file, but OUT must be a directory: choose another name") from None
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}; choose another OUT") from None
    except ValueError:
        raise OutputError(f"{path} is not the record of a search: choose another OUT") from None
    there |= {key: wanted[key] for key in GOALS if key not in there}
    differ = [
        f"{at}: {_brief(old)} there, {_brief(new)} here"
        for key in wanted
        if key not in ("name", "text")
        for at, old, new in _differences(key, there.get(key), wanted[key])
    ]
    if differ:
        told = "".join(f"\n  {line}" for line in differ)
        raise OutputError(f"{out} holds the results of another search:{told}\nChoose another OUT")
    return there


def forget_goals(folder: Folder, record: Mapping[str, Any]) -> None:
    """Goals or constraints have turned out to be a mistake: once corrected, they are this search's, and the baselines
    that were judged are not judged again. Where there are candidates, nothing is forgotten: they followed the goals."""
    if not any(line.kind == TRIAL for line in folder.lines):
        remember(folder.out, {key: value for key, value in record.items() if key not in (*GOALS, "whole")})


def remember(out: Path, record: Mapping[str, Any]) -> None:
    """Write `search.json`; OUT is made where it is missing."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from None
    write_whole(out / RECORD, json.dumps(record, indent=1) + "\n")


def _differences(at: str, there: Any, here: Any) -> Iterator[tuple[str, Any, Any]]:
    """(where, there, here) of whatever differs, as deep as both have the same key."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            yield from _differences(f"{at}: {key}", there.get(key), here.get(key))
    elif there != here:
        yield at, there, here


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
