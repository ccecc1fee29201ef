# SPDX-License-Identifier: Apache-2.0
"""Merge methods that survey a tensor first, cut into tiles: selection by scores, sums over the survivors, the merge.

What they compute is defined in `darekit.methods.surveyed`. Tiles come in order. Scores are selected by as magnitudes
are (`darekit.engine.selection`); sums are those of products: in float64, leaf by leaf, so that tiles do not matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from darekit.dtypes import Floats
from darekit.engine.contracts import Stage, Tile
from darekit.engine.measuring import Doubles, Products, add_leaves
from darekit.engine.selection import Select, ShareOf
from darekit.engine.steps import Merge
from darekit.kernels import cpu
from darekit.methods import MERGE_METHODS
from darekit.methods.kinds import Survey, passes_before
from darekit.methods.surveyed import DIVISOR_TINY, agreeing_mean, amplified, index_of, shared_and_unique, variance

Mask = npt.NDArray[np.bool_]

# Times what float32 adds up to, and so much for each element: no less than the sum of the squares, denormal ones too.
SURELY, AT_LEAST = 1.001, 1e-36


def _variance(deltas: Floats) -> Floats:
    found = np.empty(deltas.shape[1], np.float32)
    cpu.variance(deltas, found)
    return found


def _agreeing_mean(deltas: Floats, weights: Doubles) -> Floats:
    found = np.empty(deltas.shape[1], np.float32)
    cpu.agreeing_mean(deltas, weights.astype(np.float32), np.float32(DIVISOR_TINY), found)
    return found


def _shared_and_unique(deltas: Floats, *, epsilon: float) -> Floats:
    found = np.empty((2 * len(deltas), deltas.shape[1]), np.float32)
    cpu.shared_and_unique(deltas, np.float32(epsilon), found)
    return found


def _amplified(deltas: Floats, factors: Doubles, *, epsilon: float) -> Floats:
    found = np.empty(deltas.shape[1], np.float32)
    cpu.changed_mean(deltas, factors.astype(np.float32), np.float32(epsilon), found)
    return found


# Fast twins of parts of surveys, to the bit, on float32.
TWINS: dict[Callable[..., Any], Callable[..., Any]] = {
    variance: _variance, agreeing_mean: _agreeing_mean, shared_and_unique: _shared_and_unique, amplified: _amplified,
}  # fmt: skip


class Highest(ShareOf):
    """A number of elements with the highest scores, which follows from how many have one at all."""

    @property
    def lowest(self) -> float | None:
        """The lowest score that survives; None where none does."""
        return float(np.uint32(self.low).view(np.float32)) if self.keep else None

    def tell(self, scores: Tile, start: int) -> Mask:
        """(n,) scores, which are overwritten -> whether each survives."""
        self.apply(scores, start)
        survives: Mask = scores != 0
        return survives


class AtLeast(Stage):
    """All elements whose score reaches a threshold that follows from quantiles."""

    def __init__(self, count: int, quantiles: tuple[float, ...], threshold: Callable[..., float]) -> None:
        ranks = [count - index_of(quantile, count) for quantile in quantiles] if count else []
        self._selects = [Select(count, 0, rank, boundary=True) for rank in ranks]
        self._threshold, self._low = threshold, np.float32(0)
        self._conclude()

    @property
    def ready(self) -> bool:
        return all(select.ready for select in self._selects)

    @property
    def sampling(self) -> bool:
        return all(select.sampling for select in self._selects if not select.ready)

    def begin(self) -> None:
        for select in self._selects:
            select.begin()

    def measure(self, scores: Tile, start: int) -> None:
        for select in self._selects:
            if not select.ready:
                select.measure(scores, start)

    def settle(self) -> None:
        for select in self._selects:
            if not select.ready:
                select.settle()
        self._conclude()

    def _conclude(self) -> None:
        if self._selects and self.ready:
            found = np.array([select.low for select in self._selects], np.uint32).view(np.float32)
            self._low = np.float32(self._threshold(*found.tolist()))

    @property
    def lowest(self) -> float | None:
        """The threshold."""
        return float(self._low)

    def tell(self, scores: Tile, start: int) -> Mask:
        """(n,) scores -> whether each survives."""
        survives: Mask = scores >= self._low
        return survives

    def apply(self, delta: Tile, start: int) -> int:
        mask = self.tell(delta, start)
        delta *= mask
        return int(np.count_nonzero(mask))


class Surveyor:
    """One step whose method surveys it: what was found out so far."""

    def __init__(self, step: Merge, survey: Survey) -> None:
        self.step = step
        bound = partial(_bound, parameters=step.parameters)
        self._scores, self._squares, self._lines = bound(survey.scores), bound(survey.squares), survey.lines
        self._weights, self._alike, self._merge = bound(survey.weights), bound(survey.alike), bound(survey.merge)
        self._known = np.full(-(-step.count // max(1, step.row)) if survey.lines else 0, np.nan)
        self.total, self.seen = 0.0, 0  # of a pass that selects: the deltas' squares, and elements
        self.survivors: Highest | AtLeast | None = None
        if survey.threshold is not None:
            self.survivors = AtLeast(step.count, survey.quantiles, survey.threshold)
        elif survey.keeps is not None:
            keeps = bound(survey.keeps)
            if keeps(step.count) is not None:
                self.survivors = Highest(step.count, keeps)
        self.found: tuple[Doubles, ...] | None = None if survey.squares and step.count else ()
        self.parts: list[Products] = []

    @property
    def ready(self) -> bool:
        """False: wants a(nother) measuring pass."""
        return self._selected and self.found is not None

    @property
    def sampling(self) -> bool:
        """Whether that pass may skip most tiles."""
        return self.survivors is not None and not self._selected and self.survivors.sampling

    @property
    def needs_base(self) -> bool:
        """Whether `measure` must see the base."""
        return self._lines is not None

    @property
    def _selected(self) -> bool:
        return self.survivors is None or self.survivors.ready

    def begin(self) -> None:
        """A pass over the tensor starts."""
        if self.survivors is not None:
            self.survivors.begin()
        self.parts = []
        self.total, self.seen = 0.0, 0

    def measure(self, base: Floats, deltas: Floats, start: int) -> None:
        """One tile of a measuring pass, (n,) and (K, n); may overwrite the deltas."""
        if not self._selected:
            assert self.survivors is not None
            if self._alike is not None:
                self.take_squares(float(np.square(deltas, dtype=np.float64).sum()), deltas.shape[1])
            self.survivors.measure(self._scored(base, deltas, start), start)
            return
        assert self._squares is not None
        self._drop(base, deltas, start)
        rows = self._squares(deltas)
        self.parts = self.parts or [Products(1, 0, self.step.count) for _ in rows]
        for part, row in zip(self.parts, rows, strict=True):
            part.add(row[None], start)

    def take_squares(self, total: float, count: int) -> None:
        """What the squares of the survivors among `count` elements add up to at most."""
        self.total += total
        self.seen += count

    def settle(self) -> None:
        """A measuring pass is over."""
        if not self._selected:
            assert self.survivors is not None
            self.survivors.settle()
            whole = self._selected and self.seen == self.step.count
            most = SURELY * self.total + AT_LEAST * self.seen
            if whole and self._alike is not None and self._alike(most, self.step.count):
                self.found = (self._weights(np.zeros(len(self.step.models)), self.step.count),)
        else:
            sums = np.array([add_leaves(part.finish())[0] for part in self.parts])
            self.found = (self._weights(sums, self.step.count),)

    def merge(self, base: Floats, deltas: Floats, start: int) -> tuple[Floats, int]:
        """One tile, (n,) and (K, n), whose deltas are overwritten -> merged (n,), and how many elements survive."""
        kept = self._drop(base, deltas, start)
        merged: Floats = self._merge(deltas, *(self.found or ()))
        return merged, kept

    @property
    def facts(self) -> dict[str, Any]:
        """What was found out, JSON-able: the lowest score that survives, and what the merge knows of each model."""
        found: dict[str, Any] = {}
        if self.survivors is not None and self.survivors.lowest is not None:
            found["threshold"] = self.survivors.lowest
        for weights in self.found or ():
            found["weights"] = weights.tolist()
        return found

    def _scored(self, base: Floats, deltas: Floats, start: int) -> Tile:
        if self._lines is None:
            scores: Tile = self._scores(deltas)
            return scores
        shape = (-1, max(1, self.step.row))
        rows = deltas.reshape(len(deltas), *shape)
        first = start // max(1, self.step.row)
        known = self._known[first : first + rows.shape[1]]
        if np.isnan(known).any():
            known[...] = self._lines(np.where(np.isfinite(base), base, 0).reshape(shape), rows)
        found: Tile = self._scores(rows, known).reshape(-1)
        return found

    def _drop(self, base: Floats, deltas: Floats, start: int) -> int:
        if self.survivors is None:
            return int(deltas.shape[1])
        mask = self.survivors.tell(self._scored(base, deltas, start), start)
        cpu.keep_where(deltas, mask.view(np.uint8))
        return int(np.count_nonzero(mask))


class WholeSurveyor:
    """A float64 tensor, in one tile: the method's definition itself."""

    ready, sampling, needs_base = True, False, False

    def __init__(self, step: Merge) -> None:
        self.step, self._function = step, MERGE_METHODS[step.method].function
        self._with_base = "base" in inspect.signature(self._function).parameters

    def begin(self) -> None:
        """Nothing to begin."""

    def measure(self, base: Floats, deltas: Floats, start: int) -> None:
        """Nothing to measure."""

    def settle(self) -> None:
        """Nothing to settle."""

    @property
    def facts(self) -> dict[str, Any]:
        """The definition does not tell."""
        return {}

    def merge(self, base: Floats, deltas: Floats, start: int) -> tuple[Floats, int]:
        """The tensor, (n,) and (K, n) -> merged (n,), and how many elements survive."""
        shape = (-1, max(1, self.step.row))
        more = (base.reshape(shape),) if self._with_base else ()
        merged: Floats = self._function(deltas.reshape(len(deltas), *shape), *more, **self.step.parameters)
        return merged.reshape(-1), int(np.count_nonzero(merged))


def surveyor_of(step: Merge) -> Surveyor | WholeSurveyor | None:
    """Who surveys a step; None where its method asks for nothing."""
    survey = MERGE_METHODS[step.method].survey
    if survey is None:
        return None
    return WholeSurveyor(step) if step.wide else Surveyor(step, survey)


def passes_of(step: Merge) -> int:
    """How often all of a step is read before it is merged (samples not counted)."""
    return 0 if step.wide else passes_before(MERGE_METHODS[step.method].survey)


def _bound(part: Callable[..., Any] | None, parameters: Mapping[str, Any]) -> Any:
    """A part of a survey, or its fast twin, with those of the method's parameters that it takes."""
    if part is None:
        return None
    return partial(
        TWINS.get(part, part),
        **{name: parameters[name] for name in inspect.signature(part).parameters if name in parameters},
    )
