# SPDX-License-Identifier: Apache-2.0
"""How the deltas of several models stand to each other: cosine, agreement of signs, what a sum of them would cancel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from darekit.wording import brief, label

TOGETHER = 0.1  # cosine from which two deltas are said to pull one way; far above what chance makes of large tensors

CHANCE = 0.5  # share of equal signs of two independent deltas


@dataclass(frozen=True)
class Relation:
    """Two deltas in one tensor (or in all).

    Attributes:
        cosine: of the two deltas as vectors; 0 where one of them is 0.
        agreement: of the elements that both models moved, the share that they moved the same way; None where there is
            no such element.
        overlap: share of all elements that both moved.
        conflict: share of all elements that they moved in opposite ways.
    """

    cosine: float
    agreement: float | None
    overlap: float
    conflict: float


@dataclass(frozen=True)
class TensorInterference:
    """One tensor (or all): every pair of models, and all of them together.

    Attributes:
        name: the tensor.
        shape: its shape.
        parameters: its elements.
        pairs: in the order of `Comparison.pairs`.
        conflict: share of elements that some models raise and others lower.
        cancelled: 1 - sum |sum of deltas| / sum of |deltas|: how much of the models' changes a plain sum would lose.
        group: embeddings, norms, biases or heads; None: another matrix.
        chance_conflict: what `conflict` would be if signs were independent, given which elements each model moved: of
            an element that m models moved, 1 - 2^(1-m). A delta of exactly 0 takes no side.
        chance_cancelled: what `cancelled` would be of independent normal deltas of equal size, given the same: where m
            models moved an element, |sum| grows with sqrt(m) and the sum of sizes with m.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    pairs: tuple[Relation, ...]
    conflict: float
    cancelled: float
    group: str | None = None
    chance_conflict: float = 0.0
    chance_cancelled: float = 0.0

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**self.__dict__, "shape": list(self.shape), "pairs": [dict(_fields(pair)) for pair in self.pairs]}


@dataclass(frozen=True)
class Interference:
    """All tensors, their total, and the verdict on each pair in words.

    Attributes:
        models: as written.
        pairs: (i, j), places in `models`.
        tensors: each tensor.
        total: the whole deltas; in its cosine, tensors that moved far count most.
        mean_cosine: of each pair, the mean of the tensors' cosines weighted by their parameters.
        words: the verdict on each pair in a sentence.
    """

    models: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    tensors: tuple[TensorInterference, ...]
    total: TensorInterference
    mean_cosine: tuple[float, ...]
    words: tuple[str, ...]

    def __repr__(self) -> str:
        cosines = ", ".join(
            f"{self.models[i]} and {self.models[j]} {mean:.3g}"
            for (i, j), mean in zip(self.pairs, self.mean_cosine, strict=True)
        )
        return brief(self, f"mean cosine of {cosines}")

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "pairs": [
                {"models": [self.models[i], self.models[j]], "mean_cosine": mean, **dict(_fields(relation))}
                for (i, j), mean, relation in zip(self.pairs, self.mean_cosine, self.total.pairs, strict=True)
            ],
            "conflict": self.total.conflict,
            "cancelled": self.total.cancelled,
            "chance_conflict": self.total.chance_conflict,
            "chance_cancelled": self.total.chance_cancelled,
            "words": list(self.words),
            "tensors": [tensor.to_data() for tensor in self.tensors],
        }


def _fields(relation: Relation) -> Iterator[tuple[str, float | None]]:
    yield from relation.__dict__.items()


class PairCounts:
    """What the tiles of K deltas add up to; tensors add up to the total in the same way."""

    def __init__(self, models: int) -> None:
        self.pairs = tuple(combinations(range(models), 2))
        self.dots = np.zeros((len(self.pairs), 3))  # d_i . d_j, |d_i|^2, |d_j|^2
        self.same = np.zeros(len(self.pairs), np.int64)
        self.opposite = np.zeros(len(self.pairs), np.int64)
        self.counts = np.zeros(len(self.pairs), np.int64)
        self.conflicts = self.count = 0
        self.movers = np.zeros(models + 1, np.int64)  # at m: elements that m models moved
        self.sums = np.zeros(2)  # sum |sum_k d_k|, sum_k sum |d_k|

    def take(self, deltas: Sequence[npt.NDArray[np.float32]]) -> None:
        """K deltas of one tile, each (n,) float32; where vocabularies differ some are shorter, down to (0,)."""
        wide = [delta.astype(np.float64) for delta in deltas]
        up, down = [delta > 0 for delta in deltas], [delta < 0 for delta in deltas]
        for at, (i, j) in enumerate(self.pairs):
            n = min(deltas[i].size, deltas[j].size)
            x, y = wide[i][:n], wide[j][:n]
            self.dots[at] += x @ y, x @ x, y @ y
            self.same[at] += np.count_nonzero(up[i][:n] & up[j][:n]) + np.count_nonzero(down[i][:n] & down[j][:n])
            self.opposite[at] += np.count_nonzero(up[i][:n] & down[j][:n]) + np.count_nonzero(down[i][:n] & up[j][:n])
            self.counts[at] += n
        n = max(delta.size for delta in deltas)
        raised, lowered, total = np.zeros(n, bool), np.zeros(n, bool), np.zeros(n)
        movers = np.zeros(n, np.uint16)
        for one, u, d in zip(wide, up, down, strict=True):
            raised[: u.size] |= u
            lowered[: d.size] |= d
            movers[: u.size] += u | d
            total[: one.size] += one
        self.conflicts += int(np.count_nonzero(raised & lowered))
        self.count += n
        self.movers += np.bincount(movers, minlength=self.movers.size)
        self.sums += np.abs(total).sum(), sum(float(np.abs(one).sum()) for one in wide)

    def add(self, other: PairCounts) -> None:
        """Add another tensor's."""
        for name in ("dots", "same", "opposite", "counts", "conflicts", "count", "movers", "sums"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def report(self, name: str, shape: tuple[int, ...]) -> TensorInterference:
        """The sums as shares."""
        relations = []
        for (dot, x, y), same, opposite, count in zip(self.dots, self.same, self.opposite, self.counts, strict=True):
            both = int(same + opposite)
            cosine = float(dot) / math.sqrt(float(x) * float(y)) if x and y else 0.0
            relations.append(
                Relation(
                    max(-1.0, min(1.0, cosine)),
                    int(same) / both if both else None,
                    both / max(1, int(count)),
                    int(opposite) / max(1, int(count)),
                )
            )
        net, gross = (float(one) for one in self.sums)
        return TensorInterference(
            name, shape, self.count, tuple(relations), self.conflicts / max(1, self.count),
            max(0.0, 1 - net / gross) if gross else 0.0, None, *_chances(self.movers),
        )  # fmt: skip


def _chances(movers: npt.NDArray[np.int64]) -> tuple[float, float]:
    """(K + 1,) int64: elements that 0, 1, ..., K models moved -> conflict and cancelled of independent deltas.

    >>> three = np.array([0, 0, 0, 10])
    >>> [round(one, 3) for one in _chances(three)]
    [0.75, 0.423]
    """
    many = np.arange(1, movers.size)
    moved = int(movers[1:] @ many)
    conflict = float(movers[1:] @ (1 - 0.5 ** (many - 1))) / max(1, int(movers.sum()))
    return conflict, 1 - float(movers[1:] @ np.sqrt(many)) / moved if moved else 0.0


def judged(
    models: Sequence[str], pairs: Sequence[tuple[int, int]], tensors: Sequence[TensorInterference],
    total: TensorInterference,
) -> Interference:  # fmt: skip
    """Reports -> the whole, with means and words."""
    parameters = sum(tensor.parameters for tensor in tensors)
    means = tuple(
        sum(tensor.pairs[at].cosine * tensor.parameters for tensor in tensors) / max(1, parameters)
        for at in range(len(pairs))
    )
    words = [
        _words(label(models[i]), label(models[j]), relation)
        for (i, j), relation in zip(pairs, total.pairs, strict=True)
    ]
    words.append(
        f"Together: signs conflict in {_percent(total.conflict)} of the elements, and a plain sum would cancel "
        f"{_percent(total.cancelled)} of the deltas' size (independent ones of equal size that "
        f"move the same elements: {_percent(total.chance_conflict)} and {_percent(total.chance_cancelled)})"
    )
    return Interference(tuple(models), tuple(pairs), tuple(tensors), total, means, tuple(words))


def _words(one: str, other: str, relation: Relation) -> str:
    names = f"{one} and {other}"
    if relation.agreement is None:
        return f"{names} changed no element in common: they do not affect each other"
    signs = f"cosine {relation.cosine:.2f}, equal signs in {_percent(relation.agreement)} of what both moved"
    if relation.cosine > 1 - 1e-6:
        return f"{names} have the same delta except for its scale ({signs}): is it the same model twice?"
    if relation.cosine > TOGETHER:
        return (
            f"{names} pull the same way ({signs}; chance would be {_percent(CHANCE)}): summed, what they share doubles"
        )
    if relation.cosine < -TOGETHER:
        return f"{names} pull against each other ({signs}): summed, each cancels part of the other"
    return f"{names} are nearly independent ({signs})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
