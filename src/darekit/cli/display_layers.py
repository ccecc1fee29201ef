# SPDX-License-Identifier: Apache-2.0
"""A stack of layers as a picture: which layers of which models the output's are, and where in their models they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from darekit.cli import tables
from darekit.wording import label

if TYPE_CHECKING:
    from darekit.planning.plan import Plan
    from darekit.planning.stacks.stack import Origin, Tower

WIDTH = 24  # characters of a whole model, or of a gradient
LEVELS = " ▁▂▃▄▅▆▇█"
INSIDE, OUTSIDE = "█", "·"


@dataclass(frozen=True)
class Run:
    """Layers of the output that are consecutive layers of one model. `first`: of the output; `start`: of the model."""

    slice: int
    ref: str
    first: int
    start: int
    many: int
    count: int
    is_base: bool

    @property
    def picture(self) -> str:
        """Where they lie among the model's layers."""
        return picture_of(self.start, self.start + self.many, self.count)


def picture_of(start: int, end: int, count: int) -> str:
    """Layers start .. end - 1 of so many, as a bar of at most `WIDTH` characters.

    >>> picture_of(2, 4, 6)
    '··██··'
    """
    width = max(1, min(WIDTH, count))
    low, high = start * width // max(1, count), -(-end * width // max(1, count))
    return OUTSIDE * low + INSIDE * (high - low) + OUTSIDE * (width - high)


def spark(values: Sequence[float]) -> str:
    """Numbers along the layers as small bars, the largest the full height; at most `WIDTH` of them.

    >>> spark([0, 0.5, 1])
    ' ▄█'
    """
    last = len(values) - 1
    shown = [values[round(i * last / (WIDTH - 1))] for i in range(WIDTH)] if len(values) > WIDTH else list(values)
    top = max((abs(value) for value in shown), default=0) or 1
    return "".join(LEVELS[round(abs(value) / top * (len(LEVELS) - 1))] for value in shown)


def runs_of(tower: Tower) -> Iterator[Run]:
    """Every part of every slice, in the order of the output's layers."""
    at = 0
    for index, group in groupby(zip(tower.slices, tower.layers, strict=True), key=lambda one: one[0]):
        layers = [origins for _, origins in group]
        for column in zip(*layers, strict=True):
            one: Origin = column[0]
            ref = label(one.checkpoint.ref)
            yield Run(index, ref, at, one.index, len(layers), one.count, one.member is None)
        at += len(layers)


def layers_data(plan: Plan) -> list[dict[str, Any]]:
    """Where each layer comes from, in JSON-able form."""
    return [
        {
            "stack": tower.name,
            "layers": [
                [{"model": one.checkpoint.ref, "layer": one.index, "base": one.member is None} for one in origins]
                for origins in tower.layers
            ],
        }
        for tower in plan.towers
    ]


def rows_of(tower: Tower) -> list[tuple[str, ...]]:
    """The picture's rows: layers of the output, the model, its layers, and where they lie."""
    rows: list[tuple[str, ...]] = []
    before: int | None = None
    for run in runs_of(tower):
        output = f"{run.first}-{run.first + run.many - 1}" if run.slice != before else ""
        own = f"{run.start}-{run.start + run.many - 1} of {run.count}"
        name = f"{tables.shorten(run.ref, tables.LONGEST)}{' (base)' if run.is_base else ''}"
        rows.append((output, name, own, run.picture))
        before = run.slice
    return rows
