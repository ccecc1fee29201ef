# SPDX-License-Identifier: Apache-2.0
"""Judging item by item: a model can be asked for some of the items, and two models are compared on the same ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from darekit.evaluation.scores import Floats, Score
from darekit.live.models import LiveModel


@dataclass(frozen=True, eq=False)
class Items:
    """(n,) float64 each: what a model made of n items, for one score. The score is sum(sums) / sum(weights): of a share
    the weights are 1, of a loss per token they are the tokens.

    Attributes:
        sums: of each item.
        weights: of each item.
        higher_is_better: None where it is neither.
        group: which of the judge's groups of items they are.
    """

    sums: Floats
    weights: Floats
    higher_is_better: bool | None = True
    group: str = ""

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def value(self) -> float:
        """The score."""
        return math.fsum(self.sums) / math.fsum(self.weights)

    @property
    def influence(self) -> Floats:
        """(n,) how far each item moves the score, times n: their mean is 0, and the score's variance is that of their
        mean (Cochran, Sampling Techniques, section 2.11, for a ratio)."""
        return (self.sums - self.value * self.weights) / float(np.mean(self.weights))

    @property
    def score(self) -> Score:
        """Value and standard error."""
        return Score(self.value, spread(self.influence), self.higher_is_better)

    def __add__(self, other: Items) -> Items:
        """These items, then those."""
        return Items(
            np.concatenate([self.sums, other.sums]), np.concatenate([self.weights, other.weights]),
            self.higher_is_better, self.group,
        )  # fmt: skip

    def first(self, count: int) -> Items:
        """The first so many."""
        return Items(self.sums[:count], self.weights[:count], self.higher_is_better, self.group)


def spread(influence: Floats) -> float | None:
    """(n,) -> the standard error of their mean, whose mean is 0; None of a single one.

    >>> spread(np.array([-0.5, 0.5, 0.5, -0.5]))
    0.288675...
    """
    n = len(influence)
    return math.sqrt(math.fsum(influence * influence) / (n * (n - 1))) if n > 1 else None


@runtime_checkable
class Itemised(Protocol):
    """A judge that can be asked for some of its items."""

    def sizes(self) -> Mapping[str, int]:
        """Group of items (a task of several, say) -> how many there are; empty: it must be asked as a whole."""
        ...

    def ask(self, live: LiveModel, places: Mapping[str, Sequence[int]], /) -> Mapping[str, Items]:
        """Group -> which items -> score's name -> what the model makes of these items, in the order given. A score that
        is no mean over items is left out."""
        ...


def sizes_of(judge: Any) -> Mapping[str, int]:
    """A judge's groups of items; empty where it can only be asked as a whole."""
    return judge.sizes() if isinstance(judge, Itemised) else {}
