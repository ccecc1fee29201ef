# SPDX-License-Identifier: Apache-2.0
"""The sweep itself: inert data that knows no file handle and no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darekit.recipe import Recipe
from darekit.recipe.documents import Places
from darekit.trials.judging import SPLITS as SPLITS

DROP_RATE = "sparsify.drop_rate"
UNDROPPED = "nothing dropped"  # what is said of a cell beside which a drop rate stands that is no axis


@dataclass(frozen=True)
class Point:
    """One place on an axis.

    Attributes:
        label: what it is called.
        settings: dotted key -> value; None removes a key.
        judges: those that are asked there; None: all.
    """

    label: Any
    settings: Mapping[str, Any]
    judges: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Axis:
    """One thing that is varied.

    Attributes:
        name: of the axis.
        points: the places on it.
        setting: the dotted key whose values its points are; None: its points have names.
    """

    name: str
    points: tuple[Point, ...]
    setting: str | None = None


@dataclass(frozen=True)
class Layout:
    """What the plot shows where; None: chosen by what the axes are.

    Attributes:
        x: the axis from left to right.
        lines: the axis with a line for each point.
        score: the score that is drawn.
        title: of the plot.
    """

    x: str | None = None
    lines: str | None = None
    score: str | None = None
    title: str | None = None


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    Attributes:
        name: of the sweep.
        recipe: a file, or a recipe's data.
        axes: every combination of their points is a cell.
        seeds: of the masks.
        judges: split (validation, test) -> name -> what judges.
        choose: the validation score by which settings are chosen.
        layout: of the plot.
        search: folders in which relative names are looked up after the working directory.
        text: the file's own text.
        notes: notes and warnings for the user.
        places: where the file has its keys, for errors.
    """

    name: str
    recipe: Path | Mapping[str, Any]
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    judges: Mapping[str, Mapping[str, Any]]
    choose: str | None
    layout: Layout
    search: tuple[Path, ...]
    text: str
    notes: tuple[str, ...] = ()
    places: Places = field(default=Places("sweep"), compare=False, repr=False)


@dataclass(frozen=True)
class Cell:
    """One combination: its place on each axis that concerns it, and the recipe that results.

    Attributes:
        kind: grid; or what was added for comparison: undropped, single, base.
        at: axis -> label.
        seed: of the masks; None where nothing is drawn.
        recipe: what is evaluated.
        judges: names of the judges that are asked.
    """

    kind: str
    at: Mapping[str, Any]
    seed: int | None
    recipe: Recipe
    judges: tuple[str, ...]

    @property
    def beside(self) -> bool:
        """Whether it was added without the drop rate that the grid's cell of the same place has."""
        return self.kind == "undropped" and DROP_RATE not in self.at

    @property
    def title(self) -> str:
        """For people: `method=DARE sparsify.drop_rate=0.9 seed=1`."""
        if self.kind in ("single", "base"):
            return f"{self.kind} {self.recipe.models[0].model}"
        parts = [f"{name}={label}" for name, label in self.at.items()]
        parts += [] if self.seed is None else [f"seed={self.seed}"]
        parts += [f"({UNDROPPED})"] if self.beside else []
        return " ".join(parts) or self.kind
