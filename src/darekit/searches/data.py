# SPDX-License-Identifier: Apache-2.0
"""The search itself: inert data that knows no file handle and no model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darekit.recipe.documents import Places
from darekit.wording import label

SAMPLERS = ("tpe", "cmaes", "nsga2", "random", "grid")
RUNGS = (1 / 9, 2 / 9, 1 / 3, 2 / 3, 1.0)
TRIALS = 60
AUTO = "auto"


@dataclass(frozen=True)
class Numbers:
    """A range of numbers.

    Attributes:
        low: the smallest.
        high: the largest.
        log: whether small ones are looked at more closely.
        step: the distance between two; None: none.
        whole: whether they are whole numbers.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def holds(self, value: float) -> bool:
        """Whether it is one of them."""
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return self.low <= value <= self.high and abs(steps - round(steps)) < 1e-9 and (
            not self.whole or value == round(value)
        )  # fmt: skip

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"low": self.low, "high": self.high, "log": self.log, "step": self.step}


@dataclass(frozen=True)
class Knob:
    """One line of the space.

    Attributes:
        name: the setting's dotted key; of named choices, their name.
        numbers: the range; None where there are choices, or where it is found in the models (`auto`).
        choices: name -> settings, by dotted key; None removes a key.
        layers: control points over depth; 0: one value for all layers.
        stepped: whether values jump between control points, instead of running from one to the next.
        groups: groups of tensors with a value of their own; the others keep the recipe's.
        named: whether it is no setting, but a name for several.
    """

    name: str
    numbers: Numbers | None = None
    choices: Mapping[str, Mapping[str, Any]] | None = None
    layers: int = 0
    stepped: bool = False
    groups: tuple[str, ...] = ()
    named: bool = False

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of what the sampler chooses."""
        names = [f"{self.name}[{group}]" for group in self.groups] or [self.name]
        return tuple(f"{name}[{i}]" for name in names for i in range(self.layers)) if self.layers else tuple(names)


@dataclass(frozen=True)
class Limit:
    """A constraint on a score.

    Attributes:
        score: as written.
        factor: the bound; where `of` is given, a multiple of its score.
        of: a model of the recipe, or base; None: the bound is a number.
        least: whether it is a lower bound.
    """

    score: str
    factor: float
    of: str | None
    least: bool

    def __str__(self) -> str:
        return self._words(self.of)

    @property
    def told(self) -> str:
        """For people: models by their short names."""
        return self._words(label(self.of) if self.of else None)

    def _words(self, whose: str | None) -> str:
        of = f" of {whose}" if whose else ""
        return f"{self.score} at {'least' if self.least else 'most'} {self.factor:g}{of}"


@dataclass(frozen=True)
class Search:
    """What a search file says.

    Attributes:
        name: of the search.
        recipe: a file, or a recipe's data.
        knobs: the space.
        weights_sum: what the models' weights are scaled to add up to; None: nothing.
        judges: split (validation, test) -> name -> what judges.
        goals: the scores that are to be good, as written; empty: the mean, or the first.
        limits: constraints.
        sampler: its name.
        seed: of the sampler.
        rungs: shares of the items after which hopeless candidates are stopped; the last is 1.
        round: candidates that are asked for at once; None: as many as there are workers.
        trials: how many candidates, all runs together; None: all of a grid, else `TRIALS`.
        storage: a database's URL; None: a journal in the folder.
        search: folders in which relative names are looked up after the working directory.
        text: the file's own text.
        notes: notes and warnings for the user.
        points: candidates that are asked first: dimension -> value, some left out.
        places: where the file has its keys, for errors.
    """

    name: str
    recipe: Path | Mapping[str, Any]
    knobs: tuple[Knob, ...]
    weights_sum: float | None
    judges: Mapping[str, Mapping[str, Any]]
    goals: tuple[str, ...]
    limits: tuple[Limit, ...]
    sampler: str
    seed: int
    rungs: tuple[float, ...]
    round: int | None
    trials: int | None
    storage: str | None
    search: tuple[Path, ...]
    text: str
    notes: tuple[str, ...] = ()
    points: tuple[Mapping[str, Any], ...] = ()
    places: Places = field(default=Places("search"), compare=False, repr=False)

    def place_of(self, knob: Knob) -> str:
        """File, line and key of a line of the space, for errors."""
        every = re.sub(r"^models\.\d+\.", "models.*.", knob.name)
        own = ("space", knob.name) in self.places.places or ("space", every) not in self.places.places
        return self.places.at("space", knob.name if own else every)
