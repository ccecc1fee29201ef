# SPDX-License-Identifier: Apache-2.0
"""What each row of data did to a cell's scores, beside `cells.jsonl`: settings are compared row by row."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from darekit.evaluation.scores import Floats, Score
from darekit.sweeps.store import OK
from darekit.sweeps.summaries import Row, Summary
from darekit.trials.files import write_whole_bytes
from darekit.trials.judging import MEAN, judge_in

ITEMS = "items"
INTERVAL = 1.959963984540054  # standard errors: 95 %, two-sided

Effects = Mapping[tuple[str, str], Floats]  # (split, score) -> of each row, what it adds to `score - its mean`


def effects_of(split: str, scores: Mapping[str, Score]) -> dict[tuple[str, str], Floats]:
    """Of the scores whose rows are known, their effects."""
    return {(split, name): np.array(one.effects) for name, one in scores.items() if one.effects is not None}


def put_effects(out: Path, digest: str, effects: Effects) -> None:
    """Keep those of one evaluation: OUT/items/DIGEST.npz."""
    if effects:
        (out / ITEMS).mkdir(exist_ok=True)
        file = io.BytesIO()
        np.savez(file, **{f"{split}/{name}": array for (split, name), array in effects.items()})  # type: ignore[arg-type]
        write_whole_bytes(out / ITEMS / f"{digest}.npz", file.getvalue())


def effects_in(out: Path, digest: str) -> Effects:
    """Those of one evaluation; nothing where none were kept: by an earlier version, or judges that do not know rows."""
    try:
        with np.load(out / ITEMS / f"{digest}.npz", allow_pickle=False) as found:
            split = (name.partition("/") for name in found.files)
            return {(first, rest): found[f"{first}/{rest}"] for first, _, rest in split}
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}


@dataclass(frozen=True)
class Difference:
    """Of one score, a setting minus another. `stderr`: of the rows, taken in pairs, and of the masks; `paired`: whether
    the rows were known, and else they count as if both had been asked other ones; None: unknown."""

    value: float
    stderr: float | None
    paired: bool

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %, two-sided."""
        if self.stderr is None:
            return None
        return self.value - INTERVAL * self.stderr, self.value + INTERVAL * self.stderr


def difference_of(out: Path, one: Row, other: Row, split: str, score: str) -> Difference | None:
    """One setting minus another; None where one of them lacks the score.

    The error of the rows is that of their effects' differences, each setting's averaged over its seeds, which answer
    the same rows; of a mean over judges the judges' errors add up as squares. That of the masks is the deviation over
    seeds / sqrt(n), of both.
    """
    mine, theirs = one.scores.get(split, {}).get(score), other.scores.get(split, {}).get(score)
    if mine is None or theirs is None:
        return None
    rows, paired = _error_of_rows(out, one, other, split, score)
    masks = [_error_of_masks(row, split, score) for row in (one, other)]
    return Difference(mine.mean - theirs.mean, None if rows is None else math.hypot(rows, *masks), paired)


def _error_of_masks(row: Row, split: str, score: str) -> float:
    found = row.scores[split][score]
    return 0.0 if found.deviation is None else found.deviation / math.sqrt(found.runs)


def _error_of_rows(out: Path, one: Row, other: Row, split: str, score: str) -> tuple[float | None, bool]:
    names = _firsts(one, split) if score == MEAN else [score]
    mine, theirs = _averaged(out, one, split, names), _averaged(out, other, split, names)
    errors = []
    for name in names:
        first, second = mine.get(name), theirs.get(name)
        if first is None or second is None or first.size != second.size or first.size < 2:
            break
        gaps = first - second
        errors.append(math.sqrt(math.fsum(gaps * gaps) * gaps.size / (gaps.size - 1)))
    if names and len(errors) == len(names):
        return math.hypot(*errors) / len(names), True
    alone = [_stderr(row, split, name) for row in (one, other) for name in names]
    known = [error for error in alone if error is not None]
    return (math.hypot(*known) / len(names) if names and len(known) == len(alone) else None), False


def _firsts(row: Row, split: str) -> list[str]:
    found: dict[str, str] = {}
    for name in row.scores.get(split, {}):
        if name != MEAN:
            found.setdefault(judge_in(name), name)
    return [*found.values()]


def _averaged(out: Path, row: Row, split: str, names: Sequence[str]) -> dict[str, Floats]:
    """Each score's effects, averaged over the seeds; without those that a seed lacks."""
    cells = [effects_in(out, one.digest) for one in row.finished if one.outcome.status == OK]
    found = {}
    for name in names:
        arrays = [cell[split, name] for cell in cells if (split, name) in cell]
        if arrays and len(arrays) == len(cells) and len({array.size for array in arrays}) == 1:
            found[name] = np.mean(arrays, axis=0)
    return found


def _stderr(row: Row, split: str, name: str) -> float | None:
    """Of one score, the mean over seeds of the standard errors."""
    errors = [one.outcome.scores[split][name]["stderr"] for one in row.finished
              if one.outcome.status == OK and name in one.outcome.scores.get(split, {})]  # fmt: skip
    return None if None in errors or not errors else fmean(errors)


def differences_of(out: Path, summary: Summary) -> list[dict[str, object]]:
    """The chosen setting minus every other one, in the score by which it was chosen, in JSON-able form."""
    found: list[dict[str, object]] = []
    for split in summary.chosen.scores if summary.chosen is not None else ():
        for row in summary.rows:
            assert summary.chosen is not None
            one = difference_of(out, summary.chosen, row, split, summary.score) if row is not summary.chosen else None
            if one is not None:
                interval = one.interval
                found.append({
                    "against": row.title, "kind": row.kind, "at": dict(row.at), "split": split, "score": summary.score,
                    "value": one.value, "stderr": one.stderr, "paired": one.paired,
                    "interval": None if interval is None else [*interval],
                })  # fmt: skip
    return found
