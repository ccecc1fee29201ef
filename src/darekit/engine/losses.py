# SPDX-License-Identifier: Apache-2.0
"""What rounding into the output's format leaves of the merged changes, counted while a tensor is merged.

In one block of 1024 elements in `SAMPLED`, from a tensor's first on: how many changes are not 0, how many of those are
stored as the base all the same, both of each model, too, and sums of squares. (To count everywhere took 10 % of a
merge's time.) Blocks are those of masks, so nothing depends on tiles or threads: what is cut is added up by the
element's index, and blocks exactly (`fsum`). Over tensors, each sample stands for its tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from darekit.dtypes import Floats
from darekit.kernels import rounding
from darekit.kernels.lanes import SAMPLED, SUM_LANES
from darekit.masks import BLOCK

Counts = npt.NDArray[np.int64]
Sums = npt.NDArray[np.float64]
Piece = tuple[Floats, Floats, Floats, Floats, Floats]


@dataclass(frozen=True)
class BlockLosses:
    """What rounding did to the merged changes of a piece of a tensor.

    Attributes:
        counts: (2,) int64; the elements whose change is not 0, and those of them where the result is the base's.
        touched: (K, 2) int64; of each model the elements that its delta and the merge change, and those of them
            where the result is nevertheless the base's.
        squares: (3,) float64: ||stored - base - change||^2, ||change||^2 and <stored - base, change>, over the
            elements whose change is not 0.
    """

    counts: Counts
    touched: Counts
    squares: Sums


def losses_of(base: Floats, origin: Floats, change: Floats, stored: Floats, deltas: Floats) -> BlockLosses:
    """(n,) each and (K, n), n <= 1024, elements of one block -> what rounding did to them; `add_losses` is its twin.

    Args:
        base: what was added to.
        origin: the same in the output's format, to nearest.
        change: lambda times the merged delta, before anything was rounded.
        stored: what the output holds.
        deltas: of the models, as they went into the merge.

    Differences are taken in the arithmetic's own precision; squares and sums in float64, spread over 32 lanes by the
    element's index and added in order.
    """
    with np.errstate(invalid="ignore"):
        applied = np.where(change != 0, stored - base, 0)
    error = applied - change
    lost = (stored == origin) & (change != 0)
    touched = np.array(
        [[np.count_nonzero((d != 0) & (change != 0)), np.count_nonzero((d != 0) & lost)] for d in deltas], np.int64
    ).reshape(len(deltas), 2)
    counts = np.array([np.count_nonzero(change != 0), np.count_nonzero(lost)], np.int64)
    squares = [_lane_sum(one, other) for one, other in ((error, error), (change, change), (applied, change))]
    return BlockLosses(counts, touched, np.array(squares))


def _lane_sum(one: Floats, other: Floats) -> float:
    padded = np.zeros(BLOCK)
    padded[: one.size] = one.astype(np.float64) * other.astype(np.float64)
    lanes = padded.reshape(-1, SUM_LANES)
    total = np.zeros(SUM_LANES)
    for row in lanes:
        total = total + row
    found = 0.0
    for lane in total.tolist():
        found += lane
    return found


class Losses:
    """Of one step, or a part of it that begins with a block. `owners`: the models of its deltas."""

    def __init__(self, owners: Sequence[int]) -> None:
        self.owners = tuple(owners)
        self.elements = 0  # that were looked at
        self.counts: Counts = np.zeros(2, np.int64)
        self.touched: Counts = np.zeros((len(self.owners), 2), np.int64)
        self.blocks: dict[int, Sums] = {}
        self._lanes: Sums = np.zeros((3, SUM_LANES))
        self._flags = np.empty(BLOCK, np.uint32)
        self._open: int | None = None

    def add_blocks(self, start: int, count: int, counts: Counts, touched: Counts, squares: Sums) -> None:
        """What was found in the sampled ones of the blocks of `count` elements from `start`, a block's first, on: (2,),
        (K, 2) and (blocks, 3)."""
        self.counts += counts
        self.touched += touched
        for block, sums in zip(_sampled(start, count), squares, strict=False):
            self.elements += min(BLOCK, start + count - block * BLOCK)
            self.blocks[block] = sums

    def add_sample(self, start: int, count: int, piece_of: Callable[[slice], Piece]) -> None:
        """What lies in sampled blocks, of `count` elements from `start` on. `piece_of`: some of them -> base, base in
        the output's format, change, what is stored, and (K, n) deltas."""
        for block in _sampled(start, count):
            low, high = max(block * BLOCK, start), min((block + 1) * BLOCK, start + count)
            base, origin, change, stored, deltas = piece_of(slice(low - start, high - start))
            self._begin(block)
            self.elements += high - low
            rounding.add_losses(
                base, origin, change, stored, np.ascontiguousarray(deltas), low - block * BLOCK, self.counts,
                self.touched, self._lanes, self._flags,
            )  # fmt: skip

    def _begin(self, block: int | None) -> None:
        if self._open is not None and self._open != block:
            sums = np.empty(3)
            rounding.end_block(self._lanes, sums)
            self.blocks[self._open] = sums
        self._open = block

    def finish(self) -> Losses:
        """Everything was added."""
        self._begin(None)
        return self


def _sampled(start: int, count: int) -> range:
    """The blocks, of those that hold any of these elements, that are looked at."""
    return range(-(-(start // BLOCK) // SAMPLED) * SAMPLED, -(-(start + count) // BLOCK), SAMPLED)


def record_of(parts: Iterable[Losses], count: int) -> dict[str, Any]:
    """All parts of a tensor of `count` elements -> its record, JSON-able; empty where nothing was looked at."""
    found = [part for part in parts if part.elements]
    if not found:
        return {}
    models: dict[int, Counts] = {}
    for part in found:
        for owner, touched in zip(part.owners, part.touched, strict=True):
            models[owner] = models.get(owner, np.zeros(2, np.int64)) + touched
    changed, swallowed = sum((part.counts for part in found), np.zeros(2, np.int64)).tolist()
    return {
        "elements": count,
        "sampled": sum(part.elements for part in found),
        "changed": changed,
        "swallowed": swallowed,
        "models": {str(owner): touched.tolist() for owner, touched in sorted(models.items())},
        "squares": [math.fsum(float(sums[i]) for part in found for sums in part.blocks.values()) for i in range(3)],
    }


def summary_of(records: Iterable[Mapping[str, Any]], models: Sequence[str]) -> dict[str, Any] | None:
    """Tensors' records -> what rounding did in all, JSON-able; None where no change was seen.

    `models`: what to call each, in order of the recipe. `share`: of the changes that are not 0, those that are stored
    as the base; `models`: the same of the changes that a model has a part in, None where it has none. `error`:
    ||stored - base - change|| / ||change||; `scale`: <stored - base, change> / ||change||^2.
    """
    found = [record["rounding"] for record in records if record.get("rounding")]

    def total(value: Callable[[Mapping[str, Any]], float]) -> float:
        return math.fsum(one["elements"] / one["sampled"] * value(one) for one in found)

    changed, change = total(lambda one: one["changed"]), total(lambda one: one["squares"][1])
    if not changed:
        return None
    own = {}
    for k, name in enumerate(models):
        touched, lost = (total(lambda one, k=k, i=i: one["models"].get(str(k), (0, 0))[i]) for i in range(2))  # type: ignore[misc]
        own[name] = lost / touched if touched else None
    return {
        "share": total(lambda one: one["swallowed"]) / changed,
        "models": own,
        "error": math.sqrt(total(lambda one: one["squares"][0]) / change) if change else 0.0,
        "scale": total(lambda one: one["squares"][2]) / change if change else 1.0,
        "sampled": sum(one["sampled"] for one in found),
    }
