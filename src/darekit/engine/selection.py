# SPDX-License-Identifier: Apache-2.0
"""Selection by magnitude: exactly the k largest of a whole tensor, found by counting bit patterns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from darekit.dtypes import Bytes
from darekit.engine.contracts import Stage, Tile
from darekit.kernels import cpu
from darekit.masks import BLOCK

Bounds = npt.NDArray[np.int64]


class Census:
    """One pass' counts of magnitudes: by their upper 16 bits, or exactly inside a window of bit patterns."""

    _GROUP = 1024  # places that are added up first when a rank is looked for

    def __init__(self, window: tuple[int, int] | None, count: int) -> None:
        """`count`: elements that may come, so many that one place may hold."""
        self.first = window[0] if window else 0
        self.above = 0
        # Half the bytes are half the page faults, and more of them stay in the caches.
        width = np.uint32 if count < 1 << 32 else np.int64
        self.counts: npt.NDArray[np.integer] = np.zeros(window[1] if window else 1 << 15, width)
        self.exact = window is not None

    def count(self, delta: Tile) -> None:
        """Take one tile."""
        if self.exact:
            self.above += int(cpu.count_window(delta, self.first, self.counts))
        else:
            cpu.count_coarse(delta, self.counts)

    def count_bf16(self, base_raw: Bytes, raw: npt.NDArray[np.uint16], delta: Tile) -> bool:
        """Take BF16 elements of base and model, (2n,) uint8 and (n,) uint16, in one kernel; `delta` is scratch of
        1024 elements, or becomes the (n,) difference where all are counted by their upper bits.

        False where a difference is NaN or Inf, and this census is then worthless.
        """
        if self.exact:
            above = int(cpu.survey_bf16(base_raw.view(np.uint16), raw, self.first, self.counts, delta))
            self.above += max(above, 0)
            return above >= 0
        return not cpu.sample_bf16(base_raw.view(np.uint16), raw, self.counts, delta)

    def add(self, other: Census) -> None:
        """Take another census of the same pass."""
        self.above += other.above
        self.counts += other.counts

    def at_rank(self, rank: int) -> tuple[int, int, int] | None:
        """The place of the `rank`-th largest (from 1), how many are there, and how many of those have that rank or a
        larger magnitude's; None where it lies outside the window."""
        rest = rank - self.above
        counts = self.counts  # no sum of them is more than their dtype holds
        sums = counts.reshape(-1, self._GROUP).sum(axis=1, dtype=counts.dtype).astype(np.int64)
        above = np.cumsum(sums[::-1])[::-1] - sums  # how many are above each group of places
        if not 1 <= rest <= int(above[0] + sums[0]):
            return None
        group = int(np.searchsorted(-above, -rest, side="right"))
        counts = counts[group * self._GROUP : (group + 1) * self._GROUP]
        rest -= int(above[group])
        upto = np.cumsum(counts[::-1], dtype=np.int64)[::-1]  # how many of this group are at a place or above it
        place = int(np.searchsorted(-upto, -rest, side="right")) - 1
        here = int(counts[place])
        return self.first + group * self._GROUP + place, here, rest - int(upto[place]) + here


class Select(Stage):
    """Exactly `keep` elements of largest magnitude after the `top` largest: `magnitude`, `breadcrumbs`, the trim.

    Magnitudes order like their bit patterns, so selection is counting. A pass over a few pieces guesses where the
    boundary lies, and how sure that is; a pass over all counts exactly in a window around it, and what is above. Only
    a bad guess (or a second boundary) costs more passes. Of equals at a boundary the lower index survives: passes run
    in order, and the kernel counts equals down.
    """

    ordered: bool = True
    BUCKET = 1 << 16  # bit patterns that share their upper 16 bits: 0.4 to 0.8 % of a magnitude
    WIDEST = 16  # buckets in the window around a guess, at most
    SURE = 4.0  # standard errors of the guess that the window reaches to both sides
    SAMPLE_FROM = 1 << 20  # elements from which a sampling pass pays

    def __init__(self, count: int, top: int, keep: int, *, boundary: bool = False) -> None:
        """`boundary`: find the last magnitude that is kept, even where all are."""
        self.count, self.top, self.keep = count, top, keep
        self.low, self.low_left = (1 << 31, 0) if keep == 0 else (0, count)
        self.high, self.high_left = 1 << 31, 0
        # Descending ranks of the last element kept and of the last one dropped at the top.
        self.wanted = {"low": top + keep} if 0 < keep < count + boundary else {}
        if self.wanted and top:
            self.wanted["high"] = top
        self.found: dict[str, tuple[int, int, int]] = {}
        self.windows: dict[str, tuple[int, int]] = {}
        self._sampling = bool(self.wanted) and count >= self.SAMPLE_FROM
        self._pieces: list[Tile] = []  # of a sampling pass

    @classmethod
    def at(cls, count: int, low: int, low_left: int) -> Select:
        """A selection whose threshold is already known."""
        select = cls(count, 0, count)
        select.low, select.low_left = low, low_left
        return select

    @property
    def ready(self) -> bool:
        return not self.wanted

    @property
    def sampling(self) -> bool:
        return self._sampling

    def census(self) -> Census:
        """An empty census of the kind that the coming pass needs."""
        return Census(next((self.windows[name] for name in self.wanted if name in self.windows), None), self.count)

    def begin(self) -> None:
        self.lows, self.highs = self.low_left, self.high_left
        self._pieces = []
        if not self.ready:
            self.counted = self.census()

    def measure(self, delta: Tile, start: int) -> None:
        self.counted.count(delta)
        if self._sampling:
            self._pieces.append(delta.copy())

    def measure_bf16(self, base_raw: Bytes, raw: npt.NDArray[np.uint16]) -> bool:
        """`measure` from raw bytes, as `Census.count_bf16` takes them; False: measure again, the general way."""
        delta = np.empty(BLOCK if self.windows else raw.size, np.float32)
        finite = self.counted.count_bf16(base_raw, raw, delta)
        if self._sampling:
            self._pieces.append(delta)
        return finite

    def settle(self) -> None:
        if not self.windows:
            self._place_windows()
            return
        name, rank = next(iter(self.wanted.items()))
        found = self.counted.at_rank(rank)
        if found is None:  # the sample misled us: count all by bucket, and then the right one
            self.windows = {}
            return
        self.found[name] = found
        del self.wanted[name]
        if not self.wanted:
            self._conclude()

    def _place_windows(self) -> None:
        total = int(self.counted.counts.sum())
        for name, rank in self.wanted.items():
            if self._sampling:
                first, last = self._window(rank / self.count, total)
            else:
                found = self.counted.at_rank(rank)
                assert found is not None
                first = last = found[0]
            self.windows[name] = first * self.BUCKET, (last - first + 1) * self.BUCKET
        self._sampling = False
        self._pieces = []

    def _window(self, share: float, total: int) -> tuple[int, int]:
        """First and last bucket around the sample's boundary below the largest `share` of magnitudes.

        Rows differ more than elements, so the error of the guess is estimated from how much the pieces disagree.
        """

        def bucket(at: float) -> int:
            found = self.counted.at_rank(min(total, max(1, round(at * total))))
            assert found is not None
            return found[0]

        guess = bucket(share)
        if not self._pieces:  # counted elsewhere, as over a whole model
            return max(0, guess - self.WIDEST // 4), guess + self.WIDEST // 4 - 1
        above = np.array([_share_from(piece, guess << 16) for piece in self._pieces])
        error = self.SURE * float(above.std()) / max(1, above.size) ** 0.5 + 1 / total
        first, last = bucket(share + error), bucket(share - error)
        first, last = max(first, guess - self.WIDEST // 2), min(last, guess + self.WIDEST // 2 - 1)
        return max(0, first), max(0, last)

    def _conclude(self) -> None:
        self.low, _, self.low_left = self.found["low"]
        if "high" in self.found:
            self.high, equal, dropped = self.found["high"]
            self.high_left = equal - dropped
            if self.high == self.low:  # one class of equals: `keep` of them survive, nothing above does
                self.low_left, self.high, self.high_left = self.keep, self.low + 1, 0

    @property
    def bounds(self) -> Bounds:
        """What `cpu.select` takes, (4,) int64: both boundaries, and of the elements equal to them how many are left."""
        return np.array([self.low, self.lows, self.high, self.highs], np.int64)

    @bounds.setter
    def bounds(self, after: Bounds) -> None:
        self.lows, self.highs = int(after[1]), int(after[3])

    def apply(self, delta: Tile, start: int) -> int:
        bounds = self.bounds
        kept = int(cpu.select(delta, bounds))
        self.bounds = bounds
        return kept


class ShareOf(Select):
    """A number of largest elements that follows from how many are not 0: `keeps` of that number survive, which are
    fewer. The first pass guesses both."""

    def __init__(self, count: int, keeps: Callable[[int], int]) -> None:
        super().__init__(count, 0, min(1, count))
        self.keeps = keeps
        self.wanted = {"low": 1} if count else {}
        self._sampling = count >= self.SAMPLE_FROM
        self.nonzero = self.seen = 0

    def begin(self) -> None:
        super().begin()
        self.nonzero = self.seen = 0

    def measure(self, delta: Tile, start: int) -> None:
        super().measure(delta, start)
        self.nonzero += int(np.count_nonzero(delta))
        self.seen += delta.size

    def take_counts(self, scores: Tile, above: int, nonzero: int, count: int) -> None:
        """`count` elements that a kernel has counted in this pass' census: so many above its window, so many not 0.

        `scores`: they themselves, where they are counted by their upper bits.
        """
        self.counted.above += above
        self.nonzero += nonzero
        self.seen += count
        if self._sampling:
            self._pieces.append(scores)

    def settle(self) -> None:
        whole = self.seen == self.count
        self.keep = self.keeps(self.nonzero if whole else round(self.nonzero * self.count / max(1, self.seen)))
        self.wanted["low"] = max(1, self.keep)
        if whole and self.keep == 0:
            self.wanted = {}
            self.low, self.low_left = 1 << 31, 0
            return
        super().settle()


def _share_from(delta: Tile, pattern: int) -> float:
    """(n,) float32 -> which part of the magnitudes has this bit pattern or a larger one."""
    return float(np.count_nonzero((delta.view(np.uint32) & np.uint32(0x7FFFFFFF)) >= np.uint32(pattern)) / delta.size)
