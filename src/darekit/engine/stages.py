# SPDX-License-Identifier: Apache-2.0
"""Stages: sparsifiers (and TIES' trim) cut into tiles.

A stage sees one model's delta of one tensor, tile by tile and in order. It may first ask for measuring passes over
the whole tensor; then it is applied in place. What a stage computes is defined by the functions in
`darekit.methods.sparsifiers`; the tests hold each stage to them, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from darekit.checkpoints import Places
from darekit.dtypes import Bytes, DType
from darekit.engine.contracts import Stage, Tile
from darekit.engine.selection import Select
from darekit.engine.steps import TRIM, TRIM_AT, TRIM_MODEL, Merge, StageSpec, Step, is_per_row, is_trim
from darekit.kernels import cpu
from darekit.masks import DROP_ALL, stream_of, threshold_of
from darekit.methods import MERGE_METHODS, SPARSIFIERS, Scope
from darekit.methods.sparsifiers import (
    L1_LANES,
    l1_factor,
    largest,
    paper_factor,
    survivor_factor,
)


def build(spec: StageSpec, step: Merge) -> Stage:
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
    entry, rate, rescale = SPARSIFIERS[spec.method], p["drop_rate"], p.get("rescale", "none")
    stage: Stage
    match entry.kernel:
        case "drop":
            factor = survivor_factor(rate, rescale, p.get("q", 0.0))
            stage = RandomDrop(spec.seed, _stream(spec, step), rate, factor, spec.places)
        case "rank":
            stage = RankedDrop(spec, step, rescale == "paper")
        case "select" if entry.selects is not None:
            stage = Select(step.count, *entry.selects(p, step.count))
        case _:
            return Whole(spec, step)
    if rescale == "l1":
        return RestoreL1(stage)
    if rescale == "paper" and entry.kernel == "select":
        return Scale(stage, paper_factor(rate))
    return stage


def _stream(spec: StageSpec, step: Merge) -> int:
    return stream_of(spec.stream or step.name)


def _runs(places: Places | None, start: int, count: int) -> Iterable[tuple[int, int, int]]:
    """Elements of a tile in runs that have one piece of a mask: (offset, elements, place in the mask)."""
    return ((0, count, start),) if places is None else places.runs(start, count)


def _draws(spec: StageSpec, step: Merge, start: int, count: int) -> npt.NDArray[np.uint32]:
    """(count,) draws of the elements from `start` on."""
    seed, stream, found = np.uint64(spec.seed), np.uint64(_stream(spec, step)), np.empty(count, np.uint32)
    for offset, many, place in _runs(spec.places, start, count):
        cpu.draws(seed, stream, place, found[offset : offset + many])
    return found


class RandomDrop(Stage):
    """`dare` and `drop_only`: needs nothing but the element's place in the mask."""

    def __init__(
        self, seed: int, stream: int, drop_rate: float, factor: np.float32, places: Places | None = None
    ) -> None:
        self.seed, self.stream, self.places = np.uint64(seed), np.uint64(stream), places
        self.threshold = threshold_of(drop_rate)
        self.factor = factor

    def take(self, raw: Bytes, dtype: DType, base: Tile, delta: Tile, start: int) -> tuple[int, int] | None:
        if dtype.name != "BF16" or self.threshold == DROP_ALL or not self.in_place(start, delta.size):
            return None
        kept = np.zeros(1, np.int64)
        bad = cpu.random_difference_bf16(
            raw.view(np.uint16), base, self.seed, self.stream, start, self.threshold, self.factor, delta, kept
        )
        return bad, int(kept[0])

    def apply(self, delta: Tile, start: int) -> int:
        if self.threshold == DROP_ALL:
            delta[...] = 0
            return 0
        return sum(
            int(cpu.random_drop(delta[at : at + many], self.seed, self.stream, place, self.threshold, self.factor))
            for at, many, place in _runs(self.places, start, delta.size)
        )

    def in_place(self, start: int, count: int) -> bool:
        """Whether elements from `start` on have the piece of the mask that begins there."""
        return self.places is None or self.places.stay(start, count)


class RankedDrop(Stage):
    """`della`: ranks within rows. Keep probability and factor depend on the rank alone, so both are tables."""

    def __init__(self, spec: StageSpec, step: Merge, rescale: bool) -> None:
        self.spec, self.step, self.row = spec, step, step.row
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
        draws = _draws(self.spec, self.step, start, delta.size)
        ranked_draws = np.take_along_axis(draws.reshape(rows.shape), order, axis=1)
        mask = ranked_draws >= self.limits
        ranked = np.take_along_axis(rows, order, axis=1)
        # A rank that is never kept has the factor Inf, which makes NaN of a delta of 0.
        changed = np.multiply(ranked, self.factors, where=mask, out=np.zeros_like(ranked))
        np.put_along_axis(rows, order, changed, axis=1)
        return int(np.count_nonzero(mask))


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

    def __init__(self, spec: StageSpec, step: Merge) -> None:
        self.spec, self.step = spec, step

    def apply(self, delta: Tile, start: int) -> int:
        if self.spec.method == TRIM:
            mask = largest(np.abs(delta), self.spec.parameters["keep_count"])
            delta[~mask] = 0
            return int(np.count_nonzero(mask))
        entry = SPARSIFIERS[self.spec.method]
        draws = _draws(self.spec, self.step, start, delta.size)
        arguments: dict[str, Any] = {
            name: self.spec.parameters[name] for name in entry.parameters if name in self.spec.parameters
        }
        # An element-scoped method does not care, and its tiles need not be whole rows.
        rows = delta.reshape(1 if entry.scope == "element" else -1, -1 if entry.scope == "element" else self.step.row)
        rows[...] = entry.function(rows, draws.reshape(rows.shape), **arguments)
        return int(np.count_nonzero(delta))


def tile_of(step: Step, wanted: int) -> int:
    """Elements per tile of a step: `wanted`, whole rows, or the whole tensor, as its stages' scopes ask.

    Where the merge method takes a number of rows of its own, that many, or the whole tensor.
    """
    if not isinstance(step, Merge):
        return wanted
    scope, method = scope_of(step), MERGE_METHODS[step.method]
    if scope == "tensor":
        return max(1, step.count)
    if method.rows:
        return max(1, min(step.count, method.rows(step.row) * step.row))
    if scope == "row":
        return max(1, wanted // max(1, step.row)) * max(1, step.row)
    return wanted


def scope_of(step: Merge) -> Scope:
    """How much of a tensor a step's stages and its method must see at once."""
    method = MERGE_METHODS[step.method]
    scopes: list[str] = ["tensor" if step.transposed else "row" if is_per_row(step) else method.scope]
    if method.survey and not step.wide:
        scopes = ["row" if method.survey.lines else "element"]
    for chain in step.chains:
        for spec in chain:
            entry = SPARSIFIERS.get(spec.method)
            scope = entry.scope if entry else "tensor"
            if step.wide and spec.parameters.get("rescale") == "l1":
                scope = "tensor"
            streamed = not step.wide and (is_trim(spec) or (entry is not None and entry.kernel == "select"))
            scopes.append("element" if streamed else scope)
    return "tensor" if "tensor" in scopes else "row" if "row" in scopes else "element"
