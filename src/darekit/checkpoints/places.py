# SPDX-License-Identifier: Apache-2.0
"""Where the elements of a gathered tensor lie in the stored one: masks follow the stored element."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

ELSEWHERE = -1  # a row that the stored tensor does not have


@dataclass(frozen=True, eq=False)
class Places:
    """One axis of a tensor, (outer, n, inner) elements, gathered from the stored one, (outer, stored, inner).

    An element has the place, and through it the mask, that it has in the stored tensor. What is not in there has a
    place behind all that is, as if rows of the view were appended to the stored tensor: its mask is nothing else's.

    Attributes:
        rows: (n,) int64, for each index along the axis the one in the stored tensor, `ELSEWHERE` for none.
        stored: length of the stored tensor's axis.
        outer: elements of the axes before it, in all.
        inner: elements of the axes behind it, in all.
        alike: (n,) bool, which rows of the view are the base's own there, so that their delta is 0 under any mask;
            None: nobody knows.

    Examples:
        >>> swapped = Places(np.array([1, 0, ELSEWHERE]), stored=2, inner=4)
        >>> list(swapped.runs(2, 8))  # 2 elements of row 1, all of row 0, 2 of a row from elsewhere
        [(0, 2, 6), (2, 4, 0), (6, 2, 16)]
    """

    rows: Rows
    stored: int
    outer: int = 1
    inner: int = 1
    alike: npt.NDArray[np.bool_] | None = None

    def of_deltas(self) -> Places:
        """The same, where only deltas to the base are dropped: rows without one take the mask that is at hand, so that
        the fast lane, whose kernel knows one place for all models, can have them."""
        if self.alike is None or self.outer != 1:
            return self
        here = np.arange(self.rows.size)
        return Places(np.where(self.alike, here, self.rows), max(self.stored, here.size), self.outer, self.inner)

    @cached_property
    def _ends(self) -> Rows:
        """(runs,): indices along the axis at which a run of neighbours ends."""
        return run_ends(self.rows, self.rows >= 0)

    def runs(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Elements start .. start + count in runs of neighbours: (offset from `start`, elements, the first's place)."""
        behind = self.outer * self.stored * self.inner
        for offset, many, outer, row, column in split(self._ends, self.inner, start, count):
            found = int(self.rows[row])
            if found == ELSEWHERE:
                yield offset, many, behind + start + offset
            else:
                yield offset, many, (outer * self.stored + found) * self.inner + column

    def stay(self, start: int, count: int) -> bool:
        """Whether elements start .. start + count are where they are in the stored tensor."""
        return all(start + offset == place for offset, _, place in self.runs(start, count))


def run_ends(rows: Rows, counted: npt.NDArray[np.bool_]) -> Rows:
    """(n,) rows, (n,) whether each is the number of a row -> (runs,): where runs end, the last at n.

    A run is numbers that follow each other, or others that are all alike.

    >>> run_ends(np.array([4, 5, 7, -1, -1]), np.array([True, True, True, False, False])).tolist()
    [2, 3, 5]
    """
    if not rows.size:
        return np.zeros(0, np.int64)
    steps = np.diff(rows)
    both = counted[1:] & counted[:-1]
    neighbours = (both & (steps == 1)) | (~counted[1:] & ~counted[:-1] & (steps == 0))
    return np.append(np.flatnonzero(~neighbours) + 1, rows.size).astype(np.int64)


def split(ends: Rows, inner: int, start: int, count: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Elements of an (outer, n, inner) tensor, cut where runs of rows end: (offset, elements, outer, row, column)."""
    whole = int(ends[-1]) if ends.size else 0
    at = start
    while at < start + count:
        outer, rest = divmod(at, whole * inner)
        row, column = divmod(rest, inner)
        end = int(ends[np.searchsorted(ends, row, side="right")])
        many = min(start + count - at, (end - row) * inner - column)
        yield at - start, many, outer, row, column
        at += many
