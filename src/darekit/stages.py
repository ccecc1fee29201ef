# SPDX-License-Identifier: Apache-2.0
"""Stages: sparsifiers (and TIES' trim) cut into tiles.

A stage sees one model's delta of one tensor, tile by tile and in order. It may first ask for measuring passes over
the whole tensor; then it is applied in place. What a stage computes is defined by the functions in
`darekit.methods.sparsifiers`; the tests hold each stage to them, bit for bit.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from darekit.dtypes import Bytes, DType
from darekit.kernels import cpu
from darekit.masks import BLOCK, DROP_ALL, stream_of, threshold_of
from darekit.methods import MERGE_METHODS, SPARSIFIERS
from darekit.methods.sparsifiers import (
    L1_LANES,
    breadcrumb_counts,
    dropped_to_density,
    l1_factor,
    largest,
    paper_factor,
    survivor_factor,
)
from darekit.steps import StageSpec, Step

Tile = npt.NDArray[np.floating]

# The stages that belong to a merge method: per tensor; per model, before and after its threshold is known.
TRIM, TRIM_MODEL, TRIM_AT = "trim", "trim_model", "trim_at"


class Stage(Protocol):
    """One operation on one delta, tile by tile; as it stands here it needs no measuring."""

    ordered: bool = False  # tiles must come in order, from the tensor's first on

    @property
    def ready(self) -> bool:
        """False: wants a(nother) measuring pass."""
        return True

    @property
    def sampling(self) -> bool:
        """Whether that pass may skip most tiles."""
        return False

    def begin(self) -> None:
        """A pass over the tensor starts."""
        return

    def measure(self, delta: Tile, start: int) -> None:
        """One tile of a measuring pass; may overwrite it."""
        return

    def settle(self) -> None:
        """A measuring pass is over."""
        return

    def take(self, raw: Bytes, dtype: DType, base: Tile, delta: Tile, start: int) -> tuple[int, int] | None:
        """Make the delta from raw bytes and sparsify it in one go, where there is a kernel for that.

        Returns how many elements of the delta are NaN or Inf (`delta` is then worthless) and how many survive.
        """
        return None

    def apply(self, delta: Tile, start: int) -> int:
        """Sparsify one tile in place; returns how many elements survive."""
        ...


def build(spec: StageSpec, step: Step) -> Stage:
    """Spec and step -> a fresh stage, ready for the step's first pass."""
    p = spec.parameters
    if spec.method == TRIM_AT:
        return Select.at(step.count, p["low"], p["low_left"])
    if step.wide:
        return Whole(spec, step)
    if spec.method == TRIM:
        return Select(step.count, 0, p["keep_count"])
    if spec.method == TRIM_MODEL:  # not settled yet: stands for a stage that will have to measure
        return Select(step.count, 0, int(p["keep"] * step.count))
    rate, rescale = p["drop_rate"], p.get("rescale", "none")
    stage: Stage
    match spec.method:
        case "dare" | "drop_only":
            stage = RandomDrop(spec.seed, stream_of(step.name), rate, survivor_factor(rate, rescale, p.get("q", 0.0)))
        case "della":
            stage = RankedDrop(spec, step, rescale == "paper")
        case "magnitude":
            stage = Select(step.count, 0, dropped_to_density(step.count, rate))
        case "breadcrumbs":
            stage = Select(step.count, *breadcrumb_counts(step.count, p["keep_count"], p["gamma"]))
        case _:
            return Whole(spec, step)
    if rescale == "l1":
        return RestoreL1(stage)
    if rescale == "paper" and spec.method in ("magnitude", "breadcrumbs"):
        return Scale(stage, paper_factor(rate))
    return stage


class RandomDrop(Stage):
    """`dare` and `drop_only`: needs nothing but the element's index."""

    def __init__(self, seed: int, stream: int, drop_rate: float, factor: np.float32) -> None:
        self.seed, self.stream = np.uint64(seed), np.uint64(stream)
        self.threshold = threshold_of(drop_rate)
        self.factor = factor

    def take(self, raw: Bytes, dtype: DType, base: Tile, delta: Tile, start: int) -> tuple[int, int] | None:
        if dtype.name != "BF16" or self.threshold == DROP_ALL:
            return None
        bad, kept = cpu.random_difference_bf16(
            raw.view(np.uint16), base, self.seed, self.stream, start, self.threshold, self.factor, delta
        )
        return int(bad), int(kept)

    def apply(self, delta: Tile, start: int) -> int:
        if self.threshold == DROP_ALL:
            delta[...] = 0
            return 0
        return int(cpu.random_drop(delta, self.seed, self.stream, start, self.threshold, self.factor))


class RankedDrop(Stage):
    """`della`: ranks within rows. Keep probability and factor depend on the rank alone, so both are tables."""

    def __init__(self, spec: StageSpec, step: Step, rescale: bool) -> None:
        self.seed, self.stream, self.row = np.uint64(spec.seed), np.uint64(stream_of(step.name)), step.row
        rate, window = spec.parameters["drop_rate"], spec.parameters["window"]
        ranks = np.arange(self.row, dtype=np.float64)
        keep = (1.0 - rate) - window / 2 + window * ranks / (self.row - 1) if self.row > 1 else np.full(1, 1.0 - rate)
        self.limits = np.rint((1.0 - keep) * 4294967296.0).astype(np.uint64)
        with np.errstate(divide="ignore"):
            self.factors = (1.0 / keep).astype(np.float32) if rescale else np.ones(self.row, np.float32)

    def apply(self, delta: Tile, start: int) -> int:
        rows = delta.reshape(-1, self.row)
        # Magnitude above, index below: one vectorised sort gives ranks with ties by index.
        keys = (delta.view(np.uint32) & np.uint32(0x7FFFFFFF)).astype(np.uint64).reshape(rows.shape)
        keys <<= np.uint64(32)
        keys |= np.arange(self.row, dtype=np.uint64)
        keys.sort(axis=1)
        order = (keys & np.uint64(0xFFFFFFFF)).astype(np.intp)
        draws = np.empty(delta.size, np.uint32)
        cpu.draws(self.seed, self.stream, start, draws)
        ranked_draws = np.take_along_axis(draws.reshape(rows.shape), order, axis=1)
        mask = ranked_draws >= self.limits
        ranked = np.take_along_axis(rows, order, axis=1)
        np.put_along_axis(rows, order, np.where(mask, ranked * self.factors, np.float32(0)), axis=1)
        return int(np.count_nonzero(mask))


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
        self._exact = window is not None

    def count(self, delta: Tile) -> None:
        """Take one tile."""
        if self._exact:
            self.above += int(cpu.count_window(delta, self.first, self.counts))
        else:
            cpu.count_coarse(delta, self.counts)

    def count_bf16(self, base_raw: Bytes, raw: npt.NDArray[np.uint16], delta: Tile) -> bool:
        """Take BF16 elements of base and model, (2n,) uint8 and (n,) uint16, in one kernel; `delta` is scratch of
        1024 elements, or becomes the (n,) difference where all are counted by their upper bits.

        False where a difference is NaN or Inf, and this census is then worthless.
        """
        if self._exact:
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

    def __init__(self, count: int, top: int, keep: int) -> None:
        self.count, self.top, self.keep = count, top, keep
        self.low, self.low_left = (1 << 31, 0) if keep == 0 else (0, count)
        self.high, self.high_left = 1 << 31, 0
        # Descending ranks of the last element kept and of the last one dropped at the top.
        self.wanted = {"low": top + keep} if 0 < keep < count else {}
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

    def apply(self, delta: Tile, start: int) -> int:
        kept, self.lows, self.highs = cpu.select(delta, self.low, self.lows, self.high, self.highs)
        return int(kept)


class Scale(Stage):
    """A stage whose survivors are multiplied by a constant."""

    ordered: bool = True

    def __init__(self, inner: Stage, factor: np.float32) -> None:
        self.inner, self.factor = inner, factor

    @property
    def ready(self) -> bool:
        return self.inner.ready

    @property
    def sampling(self) -> bool:
        return self.inner.sampling

    def begin(self) -> None:
        self.inner.begin()

    def measure(self, delta: Tile, start: int) -> None:
        self.inner.measure(delta, start)

    def settle(self) -> None:
        self.inner.settle()

    def apply(self, delta: Tile, start: int) -> int:
        kept = self.inner.apply(delta, start)
        cpu.scale(delta, self.factor)
        return kept


class RestoreL1(Stage):
    """A stage whose survivors are scaled so that the tensor keeps its L1 norm: mergekit's `rescale`."""

    ordered: bool = True

    def __init__(self, inner: Stage) -> None:
        self.inner = inner
        self.factor: np.float32 | None = None
        self.before, self.after = np.zeros(L1_LANES), np.zeros(L1_LANES)

    @property
    def ready(self) -> bool:
        return self.factor is not None

    @property
    def sampling(self) -> bool:
        return not self.inner.ready and self.inner.sampling

    def begin(self) -> None:
        self.inner.begin()

    def measure(self, delta: Tile, start: int) -> None:
        if not self.inner.ready:
            self.inner.measure(delta, start)
            return
        cpu.add_l1(delta, start, self.before)
        self.inner.apply(delta, start)
        cpu.add_l1(delta, start, self.after)

    def settle(self) -> None:
        if not self.inner.ready:
            self.inner.settle()
        else:
            self.factor = l1_factor(float(sum(self.before.tolist())), float(sum(self.after.tolist())))

    def apply(self, delta: Tile, start: int) -> int:
        kept = self.inner.apply(delta, start)
        cpu.scale(delta, self.factor)
        return kept


class Whole(Stage):
    """Any sparsifier through its definition: float64 tensors, and methods without a kernel of their own.

    The step's tiles are then as large as the method's scope asks for (`tile_of`).
    """

    def __init__(self, spec: StageSpec, step: Step) -> None:
        self.spec, self.step = spec, step

    def apply(self, delta: Tile, start: int) -> int:
        if self.spec.method == TRIM:
            mask = largest(np.abs(delta), self.spec.parameters["keep_count"])
            delta[~mask] = 0
            return int(np.count_nonzero(mask))
        entry = SPARSIFIERS[self.spec.method]
        draws = np.empty(delta.size, np.uint32)
        cpu.draws(np.uint64(self.spec.seed), np.uint64(stream_of(self.step.name)), start, draws)
        arguments: dict[str, Any] = {
            name: self.spec.parameters[name] for name in entry.parameters if name in self.spec.parameters
        }
        # An element-scoped method does not care, and its tiles need not be whole rows.
        rows = delta.reshape(1 if entry.scope == "element" else -1, -1 if entry.scope == "element" else self.step.row)
        rows[...] = entry.function(rows, draws.reshape(rows.shape), **arguments)
        return int(np.count_nonzero(delta))


def _share_from(delta: Tile, pattern: int) -> float:
    """(n,) float32 -> which part of the magnitudes has this bit pattern or a larger one."""
    return float(np.count_nonzero((delta.view(np.uint32) & np.uint32(0x7FFFFFFF)) >= np.uint32(pattern)) / delta.size)


def is_trim(spec: StageSpec) -> bool:
    """Whether a stage belongs to the merge method rather than to the sparsifier."""
    return spec.method in (TRIM, TRIM_MODEL, TRIM_AT)


def tile_of(step: Step, wanted: int) -> int:
    """Elements per tile of a step: `wanted`, whole rows, or the whole tensor, as its stages' scopes ask.

    Where the merge method takes a number of rows of its own, that many, or the whole tensor.
    """
    method = MERGE_METHODS[step.method]
    scopes: list[str] = ["tensor" if step.transposed else method.scope]
    for chain in step.chains:
        for spec in chain:
            entry = SPARSIFIERS.get(spec.method)
            scope = entry.scope if entry else "tensor"
            if step.wide and spec.parameters.get("rescale") == "l1":
                scope = "tensor"
            streamed = not step.wide and (is_trim(spec) or spec.method in ("magnitude", "breadcrumbs"))
            scopes.append("element" if streamed else scope)
    if "tensor" in scopes:
        return max(1, step.count)
    if method.rows:
        return max(1, min(step.count, method.rows(step.row) * step.row))
    if "row" in scopes:
        return max(1, wanted // max(1, step.row)) * max(1, step.row)
    return wanted
