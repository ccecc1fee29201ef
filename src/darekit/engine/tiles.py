# SPDX-License-Identifier: Apache-2.0
"""The way of one tile: read base and models > widen > subtract base > stages > merge > add base > round > write."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from darekit import kernels
from darekit.checkpoints.digests import TensorDigest
from darekit.dtypes import Bytes, DType, Floats, narrow
from darekit.engine.contracts import Stage
from darekit.engine.fused import FEW, TILES, Blocks, FusedStep, aligned, fuse, widened
from darekit.engine.fused_surveys import FusedSurvey, fuse_survey
from darekit.engine.informed import Combine, informed_combiner
from darekit.engine.known import known_of
from darekit.engine.losses import Losses, Piece
from darekit.engine.measuring import ByColumn, Doubles, merge_rows
from darekit.engine.selection import Select
from darekit.engine.stages import build, scope_of, tile_of
from darekit.engine.steps import Input, Merge, Step, is_counted, is_per_row
from darekit.engine.surveying import Surveyor, WholeSurveyor, surveyor_of
from darekit.kernels import cpu
from darekit.masks import BLOCK, stream_of
from darekit.methods import MERGE_METHODS
from darekit.methods.merging import total_weight

TILE = 65536  # elements

SAMPLED_PIECES = 16  # of a quarter of a tile each

BASE = -1  # the base's place among digests and tallies, where models have their recipe index

OUT = -2


class Sink(Protocol):
    """Where output bytes go."""

    def write(self, buffer: Bytes, offset: int) -> None:
        """Write all of `buffer` at a byte offset; thread-safe."""


@dataclass
class Tally:
    """What went through: one per thread, added up at the end."""

    bytes_read: int = 0
    bytes_written: int = 0
    nonfinite: Counter[tuple[int, str]] = field(default_factory=Counter)
    overflow: Counter[str] = field(default_factory=Counter)
    differing: Counter[tuple[int, str]] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Add another thread's tally to this one."""
        self.bytes_read += other.bytes_read
        self.bytes_written += other.bytes_written
        self.nonfinite += other.nonfinite
        self.overflow += other.overflow
        self.differing += other.differing

    @property
    def failed(self) -> bool:
        """Whether nothing may be published."""
        return bool(self.nonfinite or self.overflow or self.differing)


class Scratch:
    """The buffers of one tile of one kind of step."""

    def __init__(self, models: int, count: int, number: type[np.floating]) -> None:
        self.base_raw: Bytes = np.empty(count * 8, np.uint8)
        self.raw: Bytes = np.empty(count * 8, np.uint8)
        self.out: Bytes = np.empty(count * 8, np.uint8)
        self.base: Floats = np.empty(count, number)
        self.zeros: Floats = np.zeros(count, number)
        self.merged: Floats = np.empty(count, number)
        self.deltas: Floats = np.empty((models, count), number)


class ScratchPool:
    """One thread's scratch, kept from step to step; tiles of a tensor's end get their own."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, int, type[np.floating]], Scratch] = {}
        self._raw: Bytes = np.empty(0, np.uint8)
        self.blocks = Blocks()

    def get(self, models: int, count: int, wide: bool) -> Scratch:
        """Scratch for a tile of `count` elements."""
        key = models, count, np.float64 if wide else np.float32
        found = self._last.get(key)
        if found is None:
            if len(self._last) > 3:  # a few shapes recur: full tiles, norms, a matrix's last tile
                self._last.clear()
            found = self._last[key] = Scratch(*key)
        return found

    def raw_only(self, models: int, count: int) -> tuple[Bytes, npt.NDArray[np.uint16], Bytes]:
        """Buffers of BF16 for the fast lane: the base's bytes, the models' elements (K, count), the output's bytes."""
        rows = self.rows(models + 2, 2 * count)
        return rows[0], rows[2:].view(np.uint16), rows[1]

    def rows(self, many: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Buffers of bytes, (many, nbytes), in the memory that the last ones had."""
        if self._raw.size < many * nbytes:
            self._raw = aligned((many * nbytes,), np.uint8)
        return self._raw[: many * nbytes].reshape(many, nbytes)


class Hands(Protocol):
    """What a step needs of the thread that runs it."""

    outputs: Sequence[Sink]
    tile: int
    tally: Tally
    scratch: ScratchPool
    allow_nonfinite: bool
    broken: threading.Event  # bad values were found: go on reading, to list them all, but write no more


class StepRun:
    """One merge being run by one thread: its stages' state, its scratch, and the digests it feeds."""

    def __init__(
        self, step: Merge, hands: Hands, digests: MutableMapping[int, TensorDigest], kept: Counter[tuple[int, int]]
    ) -> None:
        self.hands, self.kept = hands, kept
        self.tile = tile_of(step, hands.tile)
        self.chains = [[build(spec, step) for spec in chain] for chain in step.chains]
        self.become(step)
        self.known = [known_of(step, model) for model in step.models]
        # Where each row has its own: first element -> coefficients, (rows, R).
        self.coefficients: dict[int, Doubles] = {}
        self.by_column: ByColumn | None = None
        self.surveyor = surveyor_of(step)
        self.fused_survey = fuse_survey(step, self.surveyor)
        self.losses = Losses(step.owners if is_counted(step) else ())
        self._stream = np.uint64(stream_of(step.name) if step.rounding is not None else 0)
        # Of the last tile loaded: where it has NaN or Inf, and of each model's first stage, if it is already applied,
        # the survivors.
        self.bad_at: npt.NDArray[np.bool_] | None = None
        self.taken: list[int | None] = []
        if step.base is not None:
            digests.setdefault(BASE, TensorDigest(step.base.dtype.itemsize))
        for owner, model, known in zip(step.owners, step.models, self.known, strict=True):
            if known is None:  # its bytes are read
                digests.setdefault(owner, TensorDigest(model.dtype.itemsize))
        digests.setdefault(OUT, TensorDigest(step.dtype.itemsize))
        self.digests = digests

    def become(self, step: Merge) -> None:
        """Go on as this step, which has the same inputs and chains: its coefficients are known now."""
        self.step = step
        # Not `self.read`: the cycle would keep a solve's matrices in memory until Python's collector comes by.
        if step.statistics:
            self.combine = informed_combiner(step, partial(read, self.hands.tally))
        elif not (MERGE_METHODS[step.method].products or MERGE_METHODS[step.method].survey):
            self.combine = combiner(step)
        self.fused = fuse(step, self.chains)

    def settle(self, stop: threading.Event) -> None:
        """Measuring passes over the whole step, until every stage is ready."""
        while not stop.is_set() and not self.hands.broken.is_set():
            waiting = [next((i for i, stage in enumerate(chain) if not stage.ready), None) for chain in self.chains]
            busy = {k: i for k, i in enumerate(waiting) if i is not None}
            if not busy:
                break
            self._measure(busy, stop)
        while self.surveyor is not None and not self.surveyor.ready:
            if stop.is_set() or self.hands.broken.is_set():
                return
            self._survey(self.surveyor, stop)

    def _survey(self, surveyor: Surveyor | WholeSurveyor, stop: threading.Event) -> None:
        """One pass in which the merge method measures what all chains leave. NaN and Inf count as 0: the pass that
        merges lists them."""
        if self.fused_survey is not None:
            surveyor.begin()
            if self._survey_bf16(self.fused_survey, surveyor, stop):
                return
        for chain in self.chains:
            for stage in chain:
                stage.begin()
        surveyor.begin()
        starts, size = self._pieces(self.tile, surveyor.sampling)
        for start in starts:
            if stop.is_set():
                return
            scratch = self.load(start, min(size, self.step.count - start), with_base=surveyor.needs_base)
            for chain, delta in zip(self.chains, scratch.deltas, strict=True):
                for stage in chain:
                    stage.apply(delta, start)
            if self.bad_at is not None:
                scratch.deltas[~np.isfinite(scratch.deltas)] = 0
            surveyor.measure(scratch.base, scratch.deltas, start)
        surveyor.settle()

    def _survey_bf16(self, fused: FusedSurvey, surveyor: Surveyor | WholeSurveyor, stop: threading.Event) -> bool:
        """The same in the fast lane; False if a value is NaN or Inf."""
        starts, size = self._pieces(TILES * self.tile, surveyor.sampling)
        for start in starts:
            if stop.is_set():
                return True
            count = min(size, self.step.count - start)
            base_raw, raws, _ = self._read_bf16(start, count)
            if not fused.measure(base_raw, raws, start, self.hands.scratch.blocks):
                return False
        surveyor.settle()
        return True

    def _read_bf16(self, start: int, count: int) -> tuple[Bytes, npt.NDArray[np.uint16], Bytes]:
        """Elements of base and models as they are stored, (2n,) uint8 and (K, n) uint16, and room for the output's."""
        step = self.step
        base_raw, raws, out = self.hands.scratch.raw_only(len(step.models), count)
        self._read_base(start, count, base_raw)
        for model, raw in zip(step.models, raws, strict=True):
            self.read(model, step.begin + start, count, raw.view(np.uint8))
        return base_raw, raws, out

    def _read_base(self, start: int, count: int, base_raw: Bytes) -> None:
        """The base's elements as they are stored; 0 where there is no base."""
        if self.step.base is None:
            base_raw[...] = 0
        else:
            self.read(self.step.base, self.step.begin + start, count, base_raw)

    def _measure(self, busy: dict[int, int], stop: threading.Event) -> None:
        """One pass in which each model's first stage that is not ready measures what the ones before it leave."""
        for k, i in busy.items():
            for stage in self.chains[k][: i + 1]:
                stage.begin()
        stages = {k: self.chains[k][i] for k, i in busy.items()}
        sampling = all(stage.sampling for stage in stages.values())
        if self._measure_bf16(stages, sampling, stop):
            return
        starts, size = self._pieces(self.tile, sampling)
        for start in starts:
            if stop.is_set():
                return
            deltas = self.load(start, min(size, self.step.count - start), only=busy).deltas
            for k, i in busy.items():
                for stage in self.chains[k][:i]:
                    stage.apply(deltas[k], start)
                stages[k].measure(deltas[k], start)
        for stage in stages.values():
            stage.settle()

    def _pieces(self, size: int, sampling: bool) -> tuple[range, int]:
        """Where a measuring pass looks, and how many elements it takes there."""
        if not sampling:
            return range(0, self.step.count, size), size
        if scope_of(self.step) == "element":  # rows and whole tensors cannot be quartered
            size = max(1, self.tile // 4)
        starts = range(0, self.step.count, size)
        return starts[:: max(1, len(starts) // SAMPLED_PIECES)], size

    def _measure_bf16(self, stages: Mapping[int, Stage], sampling: bool, stop: threading.Event) -> bool:
        """A measuring pass in the fast lane; False if it is none for it, or a value is NaN or Inf."""
        step, selects = self.step, {k: stage for k, stage in stages.items() if isinstance(stage, Select)}
        if self.fused is None or step.base is None or len(selects) < len(stages):
            return False
        starts, size = self._pieces(TILES * self.tile, sampling)
        for start in starts:
            if stop.is_set():
                return True
            count = min(size, step.count - start)
            base_raw, raws, _ = self.hands.scratch.raw_only(1, count)
            self.read(step.base, step.begin + start, count, base_raw)
            for k, select in selects.items():
                self.read(step.models[k], step.begin + start, count, raws[0].view(np.uint8))
                if not select.measure_bf16(base_raw, raws[0]):
                    for one in selects.values():
                        one.begin()
                    return False
        for select in selects.values():
            select.settle()
        return True

    def begin(self) -> None:
        """The pass that merges starts."""
        for chain in self.chains:
            for stage in chain:
                stage.begin()
        if self.surveyor is not None:
            self.surveyor.begin()

    def merge(self, begin: int, end: int, stop: threading.Event) -> None:
        """The tiles of elements begin .. end, from disk to disk."""
        self.begin()
        merge, size = self._lane(begin)
        for start in range(begin, end, size):
            if stop.is_set():
                return
            merge(start, min(size, end - start))

    def _lane(self, begin: int) -> tuple[Callable[[int, int], None], int]:
        """What merges the elements from `begin` on, given the first and how many; and how many it takes at once."""
        in_blocks = self.tile % BLOCK == 0
        if self.fused is not None and in_blocks and begin % BLOCK == 0:
            return partial(self._absorb, self.fused), self.tile if any(self.known) else TILES * self.tile
        if self.fused_survey is not None and in_blocks:
            return partial(self._absorb_surveyed, self.fused_survey), TILES * self.tile
        return self.merge_tile, self.tile

    def _absorb_surveyed(self, fused: FusedSurvey, start: int, count: int) -> None:
        """Several tiles through the one kernel; the general way takes over where a value is NaN or Inf."""
        step, survivors = self.step, None
        base_raw, raws, out = self._read_bf16(start, count)
        if not self.hands.broken.is_set():
            survivors = fused.absorb(base_raw, raws, step.begin + start, out, self.hands.scratch.blocks, self.losses)
        if survivors is None:
            for at in range(start, start + count, self.tile):
                self.merge_tile(at, min(self.tile, start + count - at))
            return
        self.digests[BASE].update(base_raw)
        for owner, raw in zip(step.owners, raws, strict=True):
            self.digests[owner].update(raw.view(np.uint8))
            self.kept[owner, 0] += count
            self.kept[owner, 1] += survivors
        self._write(out, start, 0)

    def _absorb(self, fused: FusedStep, start: int, count: int) -> None:
        """Several tiles through the one kernel; the general way takes over where a value is NaN or Inf, and where rows
        with their masks come from another place."""
        step = self.step
        kept = None
        if fused.in_place(step.begin + start, count):
            base_raw, raws, out = self.hands.scratch.raw_only(len(step.models), count)
            deltas = self.hands.scratch.blocks.deltas(len(step.models), count if any(self.known) else 0)
            self._read_base(start, count, base_raw)
            for k, (model, known) in enumerate(zip(step.models, self.known, strict=True)):
                if known is None:
                    self.read(model, step.begin + start, count, raws[k].view(np.uint8))
                    continue
                origin = base_raw if known.delta is None else base_raw[:0]
                known.read_into(deltas[k], step.begin + start, widened(origin), on_weights=False)
                self.hands.tally.bytes_read += round(2 * count * model.cost)
            if not self.hands.broken.is_set():
                blocks = self.hands.scratch.blocks
                kept = fused.absorb(base_raw, raws, deltas, step.begin + start, out, blocks, self.losses)
        if kept is None:
            for at in range(start, start + count, self.tile):
                self.merge_tile(at, min(self.tile, start + count - at))
            return
        if step.base is not None:
            self.digests[BASE].update(base_raw)
        for k, owner in enumerate(step.owners):
            if self.known[k] is None:
                self.digests[owner].update(raws[k].view(np.uint8))
            self.kept[owner, 0] += int(kept[k])
        self._write(out, start, 0)

    def merge_tile(self, start: int, count: int) -> None:
        """One tile, whose turn it is where stages need their tiles in order."""
        step = self.step
        scratch = self.load(start, count, final=True)
        if self.hands.broken.is_set():
            return
        self._apply_chains(scratch, start, count)
        out = scratch.out[: count * step.dtype.itemsize]
        if step.verbatim and self.bad_at is None and self.known[0] is None:
            overflowed = self._verbatim(scratch, start, count, out)
        else:
            overflowed = self._round(scratch, self._merged(scratch, start), start, count, out)
        self._write(out, start, overflowed)

    def _apply_chains(self, scratch: Scratch, start: int, count: int) -> None:
        """Each model's stages, on its delta in place; what survives each of them is counted."""
        for k, (chain, owner) in enumerate(zip(self.chains, self.step.owners, strict=True)):
            taken = self.taken[k]
            for i, stage in enumerate(chain):
                if i == 0 and taken is not None:
                    self.kept[owner, i] += taken
                else:
                    self.kept[owner, i] += stage.apply(scratch.deltas[k], start)
            if not chain:
                self.kept[owner, 0] += count

    def _merged(self, scratch: Scratch, start: int) -> Floats:
        """What the merge method makes of a tile's deltas: (n,), before `lambda`."""
        step = self.step
        if is_per_row(step):
            merged, self.coefficients[start] = merge_rows(step, scratch.base, scratch.deltas, self.bad_at)
        elif self.by_column is not None:
            merged = self.by_column.merge(scratch.base, scratch.deltas, start)
        elif self.surveyor is not None:
            merged, survivors = self.surveyor.merge(scratch.base, scratch.deltas, start)
            for k, owner in enumerate(step.owners):
                self.kept[owner, max(1, len(self.chains[k]))] += survivors
        else:
            merged = self.combine(scratch.deltas, scratch.merged, start)
        if step.base_weight:
            merged += merged.dtype.type(step.base_weight) * scratch.base
        if self.bad_at is not None:  # a method that mixes columns has made something of the others
            merged[self.bad_at] = 0
        return merged

    def _round(self, scratch: Scratch, merged: Floats, start: int, count: int, out: Bytes) -> int:
        """base + lambda * merged, or merged itself, rounded to `out`; -> how many values do not fit its format."""
        step, words = self.step, self._words(start, count)
        if step.base is None or step.on_weights:
            overflowed = kernels.round_to(merged, step.dtype, out, words)
            if self.bad_at is not None and step.base is not None:
                self._put_base(scratch, self.bad_at, count, out)
        else:
            base_raw = scratch.base_raw[: count * step.base.dtype.itemsize]
            overflowed = kernels.add_round(
                base_raw, step.base.dtype, scratch.base, merged, step.factor, step.dtype, out, words
            )
        if step.base is not None:
            self._count(step.base.dtype, scratch, merged, start, count, out)
        return overflowed

    def _words(self, start: int, count: int) -> npt.NDArray[np.uint32] | None:
        """What rounds the elements from `start` on; None: to nearest."""
        if self.step.rounding is None:
            return None
        words = np.empty(count, np.uint32)
        cpu.draws(np.uint64(self.step.rounding), self._stream, self.step.begin + start, words)
        return words

    def _count(self, origin: DType, scratch: Scratch, merged: Floats, start: int, count: int, out: Bytes) -> None:
        """What rounding left of a tile's changes; where models themselves are merged, changes are differences."""
        step, base, deltas = self.step, scratch.base, scratch.deltas

        def piece_of(at: slice) -> Piece:
            raw = out[at.start * step.dtype.itemsize : at.stop * step.dtype.itemsize]
            own = base[at]
            stored, before = np.empty_like(own), own
            kernels.widen(raw, step.dtype, stored)
            if origin.name != step.dtype.name:
                before = np.empty_like(own)
                kernels.widen(kernels.in_format(own, step.dtype), step.dtype, before)
            if not step.on_weights:
                return own, before, merged.dtype.type(step.factor) * merged[at], stored, deltas[:, at]
            with np.errstate(invalid="ignore"):
                change, moved = merged[at] - own, deltas[:, at] - own
            if self.bad_at is not None:
                change[self.bad_at[at]] = 0
            return own, before, change, stored, moved

        self.losses.add_sample(step.begin + start, count, piece_of)

    def load(
        self,
        start: int,
        count: int,
        *,
        only: object = None,
        final: bool = False,
        values: bool = False,
        with_base: bool = False,
    ) -> Scratch:
        """Fill scratch with one tile: the base (`with_base`: even if nobody asks for it), and the models' deltas (their
        `values`, as where there is no base or `on_weights`); `only` these models. The final pass also feeds the digests
        and counts NaN and Inf."""
        step, on_weights = self.step, self.step.on_weights or values
        scratch = self.hands.scratch.get(len(step.models), count, step.wide)
        at = step.begin + start
        origin = scratch.zeros
        lacking = any(model.count < at + count for model in step.models)
        if step.base is not None and (final or lacking or with_base or not on_weights):
            raw = self.read(step.base, at, count, scratch.base_raw)
            if final:
                self.digests[BASE].update(raw)
            kernels.widen(raw, step.base.dtype, scratch.base)
            origin = scratch.zeros if on_weights else scratch.base
        self.bad_at = None
        self.taken = [None] * len(step.models)
        for k, model in enumerate(step.models):
            if only is not None and k not in only:  # type: ignore[operator]
                continue
            known, have = self.known[k], max(0, min(count, model.count - at))
            if values and known is not None and known.values is None:
                known = None
            raw = self.read(model, at, count if known is None else 0, scratch.raw)
            if final and known is None:
                self.digests[step.owners[k]].update(raw)
            delta = scratch.deltas[k]
            if have < count:  # rows that this model does not have are the base's: a delta of 0
                delta[have:] = scratch.base[have:] if on_weights else 0
                delta, here = delta[:have], origin[:have]
            else:
                here = origin
            if known is not None:
                self.hands.tally.bytes_read += round(have * model.dtype.itemsize * model.cost)
                known.read_into(delta, at, here, on_weights=on_weights)
                if kernels.count_nonfinite(delta):
                    self._blame(k, raw, scratch, final)
                continue
            if final and self.chains[k] and have == count and not step.wide:
                taken = self.chains[k][0].take(raw, model.dtype, here, delta, start)
                if taken is not None and not taken[0]:
                    self.taken[k] = taken[1]
                    continue
            if kernels.difference(raw, model.dtype, here, delta):
                self._blame(k, raw, scratch, final)
        if self.bad_at is not None and self.hands.allow_nonfinite:
            scratch.deltas[:, self.bad_at] = 0
        return scratch

    def read(self, entry: Input, start: int, count: int, buffer: Bytes) -> Bytes:
        """Raw bytes of elements start .. start + count, as far as the input has them."""
        return read(self.hands.tally, entry, start, count, buffer)

    def _blame(self, k: int, raw: Bytes, scratch: Scratch, final: bool) -> None:
        """Find out which input a NaN or Inf came from, and remember where this tile has any."""
        step, tally = self.step, self.hands.tally
        bad_at = ~np.isfinite(scratch.deltas[k])
        if final and not self.hands.allow_nonfinite:
            values = np.empty(raw.size // step.models[k].dtype.itemsize, scratch.deltas.dtype)
            kernels.widen(raw, step.models[k].dtype, values)
            in_model = kernels.count_nonfinite(values)
            in_base = kernels.count_nonfinite(scratch.base) if step.base and not step.on_weights else 0
            if in_model:
                tally.nonfinite[step.owners[k], step.name] += in_model
            if in_base and self.bad_at is None:
                tally.nonfinite[BASE, step.name] += in_base
            if not in_model and not in_base:
                tally.overflow[step.name] += int(np.count_nonzero(bad_at))
            self.hands.broken.set()
        self.bad_at = bad_at if self.bad_at is None else bad_at | self.bad_at

    def _put_base(self, scratch: Scratch, where: npt.NDArray[np.bool_], count: int, out: Bytes) -> None:
        """The base's elements, in the output's format: its very bits, where that is its own."""
        assert self.step.base is not None
        size, dtype = self.step.dtype.itemsize, self.step.base.dtype
        raw = scratch.base_raw[: count * dtype.itemsize]
        if dtype.name != self.step.dtype.name:
            raw = np.empty_like(out)
            convert(scratch.base, self.step.dtype, raw)
        np.copyto(out.view(f"u{size}"), raw.view(f"u{size}"), where=where)

    def _verbatim(self, scratch: Scratch, start: int, count: int, out: Bytes) -> int:
        """The one model's own bytes, in the output's format."""
        dtype = self.step.models[0].dtype
        raw = scratch.raw[: count * dtype.itemsize]
        if dtype.name == self.step.dtype.name:
            out[:] = raw
            return 0
        kernels.widen(raw, dtype, scratch.merged)
        return kernels.round_to(scratch.merged, self.step.dtype, out, self._words(start, count))

    def _write(self, out: Bytes, start: int, overflowed: int) -> None:
        put(self.step, self.hands, out, start, overflowed, self.digests[OUT])


def put(step: Step, hands: Hands, out: Bytes, start: int, overflowed: int, digest: TensorDigest | None) -> None:
    """A tile's result, from element `start` of the step on, to where it belongs; none where some of it `overflowed`."""
    if overflowed:
        hands.tally.overflow[step.name] += overflowed
        hands.broken.set()
        return
    if digest is not None:
        digest.update(out)
    hands.outputs[step.output].write(out, step.offset + (step.begin + start) * step.dtype.itemsize)
    hands.tally.bytes_written += out.size


def convert(values: Floats, dtype: DType, raw: Bytes) -> int:
    """`kernels.round_to` nearest of (n,) values of which some may be NaN or Inf, which stay so; returns how many others
    overflowed."""
    bad = kernels.count_nonfinite(values)
    return narrow(values, dtype, raw) - bad if bad else kernels.round_to(values, dtype, raw)


def read(tally: Tally, entry: Input, start: int, count: int, buffer: Bytes) -> Bytes:
    """Raw bytes of elements start .. start + count, as far as the input has them."""
    size = entry.dtype.itemsize
    raw = buffer[: max(0, min(count, entry.count - start)) * size]
    if raw.size:
        entry.source.read_into(raw, start * size)
        tally.bytes_read += round(raw.size * entry.cost)
    return raw


def combiner(step: Merge) -> Combine:
    """The step's merge method with its constants: deltas (K, n), scratch (n,), first element -> merged (n,)."""
    weights = np.array(step.weights, np.float64)
    narrow = weights.astype(np.float32)
    kernel = None if step.wide else MERGE_METHODS[step.method].kernel
    if kernel == "elect":
        normalize = bool(step.parameters["normalize"])

        few = tuple(narrow) if len(narrow) <= FEW else None

        def elect(deltas: Floats, merged: Floats, start: int) -> Floats:
            if few is None:
                cpu.elect(deltas, narrow, normalize, merged)
            else:
                cpu.elect_few(deltas, few, normalize, merged)
            return merged

        return elect
    if kernel == "sum":
        divisor = np.float32(total_weight(weights) if step.parameters.get("normalize") else 1.0)

        def add_up(deltas: Floats, merged: Floats, start: int) -> Floats:
            cpu.weighted_sum(deltas, narrow, divisor, merged)
            return merged

        return add_up
    if kernel == "changes":
        ones, epsilon = np.ones(len(weights), np.float32), np.float32(step.parameters["epsilon"])

        def average(deltas: Floats, merged: Floats, start: int) -> Floats:
            cpu.changed_mean(deltas, ones, epsilon, merged)
            return merged

        return average
    entry = MERGE_METHODS[step.method]
    function, row = entry.function, step.row if len(step.shape) > 1 else step.count
    more = (weights,) if entry.weighted else ()

    def define(deltas: Floats, merged: Floats, start: int) -> Floats:
        given = deltas.reshape(len(deltas), -1, row) if entry.shaped else deltas
        result: Floats = function(given, *more, **step.parameters)
        return result.reshape(-1)

    return define
