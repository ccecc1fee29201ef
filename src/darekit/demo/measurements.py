# SPDX-License-Identifier: Apache-2.0
"""What the demo measured, each number once, and the means that the table and the plot show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any


@dataclass(frozen=True)
class Score:
    """One model's exact match on each ability, in percent. Seeds are None where they play no part."""

    row: str
    tune_seed: int | None
    mask_seed: int | None
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """One sparsified model's exact match on its own ability, in percent."""

    method: str
    drop_rate: float
    ability: str
    mask_seed: int | None
    accuracy: float


@dataclass(frozen=True)
class Row:
    """Means over the runs of one row; spread is the standard deviation of a run's mean over the abilities."""

    title: str
    runs: int
    accuracy: tuple[float, ...]
    mean: float
    spread: float


@dataclass(frozen=True)
class DemoResult:
    """Everything that one `dare demo` found, and where it lies."""

    directory: Path
    abilities: tuple[str, ...]
    scores: tuple[Score, ...]
    controls: tuple[Score, ...]  # TIES without DARE at a larger lambda: how much of its gain is scale
    points: tuple[Point, ...]
    drop_rate: float  # of the DARE rows
    control_lambda: float
    items: int
    trained: tuple[str, ...]  # empty where every model was still there
    training_seconds: float
    measuring_seconds: float
    table: Path
    data: Path
    plot: Path

    def to_data(self) -> dict[str, Any]:
        """JSON-able form; paths relative to the directory."""
        named = {name: str(getattr(self, name).relative_to(self.directory)) for name in ("table", "data", "plot")}
        return {
            **asdict(self),
            **named,
            "directory": str(self.directory),
            "rows": [asdict(row) for row in summarise(self.scores)],
        }


def summarise(scores: Sequence[Score]) -> tuple[Row, ...]:
    """One row for each title, in order of first appearance.

    >>> a, b = Score("TIES", 0, 42, (90.0, 100.0)), Score("TIES", 0, 43, (80.0, 90.0))
    >>> summarise([a, b])
    (Row(title='TIES', runs=2, accuracy=(85.0, 95.0), mean=90.0, spread=5.0),)
    """
    groups: dict[str, list[Score]] = {}
    for score in scores:
        groups.setdefault(score.row, []).append(score)
    rows = []
    for title, runs in groups.items():
        means = [fmean(run.accuracy) for run in runs]
        columns = zip(*(run.accuracy for run in runs), strict=True)
        rows.append(Row(title, len(runs), tuple(fmean(column) for column in columns), fmean(means), pstdev(means)))
    return tuple(rows)


def curve(points: Sequence[Point], method: str) -> tuple[tuple[float, float, float, float], ...]:
    """A method's curve: (drop rate, mean, lowest, highest) over abilities and mask seeds, by rising drop rate."""
    found: dict[float, list[float]] = {}
    for point in points:
        if point.method == method:
            found.setdefault(point.drop_rate, []).append(point.accuracy)
    return tuple((rate, fmean(values), min(values), max(values)) for rate, values in sorted(found.items()))
