# SPDX-License-Identifier: Apache-2.0
"""Tensors that are computed when they are read: the result of one recipe as an input of another.

A source here is a tensor's steps. Whoever reads a range gets the bytes that a merge would have written, rounded to
their own format, a tile at a time; nothing is kept but the last tile. What must be measured first is measured when a
tensor is first read. Steps whose tiles need no order may be read by several threads; others are read from the first
element on, and say so (`Traits.ordered`).
"""

from __future__ import annotations

import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from darekit.checkpoints import Traits, traits_of
from darekit.checkpoints.digests import TensorDigest
from darekit.checkpoints.sources import refuse_outside
from darekit.dtypes import Bytes
from darekit.engine.copying import copy
from darekit.engine.costs import bytes_to_read
from darekit.engine.execution import Worker, explain, settle_run, span_of
from darekit.engine.measuring import measure, settled
from darekit.engine.stages import tile_of
from darekit.engine.steps import TRIM_MODEL, Copy, Merge, Step, is_measured
from darekit.engine.tiles import TILE, StepRun
from darekit.engine.trimming import settle_model_trim
from darekit.errors import DataError

ACTIVE = 4  # tensors whose runs are kept: outer steps read a few inputs at a time

_NEVER = threading.Event()


class _NoDigest(TensorDigest):
    def __init__(self) -> None:
        super().__init__(1)

    def update(self, data: Bytes) -> None:
        """Nobody asks for the digest of what goes through here: readers take their own."""


class _NoDigests(dict[int, TensorDigest]):
    """A digest for every input, which is none."""

    def __missing__(self, key: int) -> TensorDigest:
        return _NO_DIGEST

    def setdefault(self, key: int, default: TensorDigest | None = None) -> TensorDigest:
        return _NO_DIGEST


_NO_DIGEST = _NoDigest()


class _Window:
    """Where the engine's bytes go: the part of a tensor that was asked for. `begin`: its first byte."""

    def __init__(self) -> None:
        self.target: Bytes = np.empty(0, np.uint8)
        self.begin = 0

    def write(self, buffer: Bytes, offset: int) -> None:
        """Put a tile where it belongs."""
        at = offset - self.begin
        self.target[at : at + buffer.size] = buffer


class Workshop:
    """What the tensors of one recipe share: its steps, and a thread's tools.

    Args:
        steps: all steps of the recipe's plan.
        names: what to call its models in errors.
        ref: the recipe, as the user wrote it.
    """

    def __init__(self, steps: Sequence[Step], names: Sequence[str], ref: str) -> None:
        self.ref, self._names = ref, tuple(names)
        self._allow_nonfinite = False
        self._steps: dict[str, list[Step]] = {}
        for step in steps:
            self._steps.setdefault(step.name, []).append(replace(step, output=0, offset=0))
        merged = [step for step in steps if isinstance(step, Merge)]
        self._trims = any(spec.method == TRIM_MODEL for step in merged for chain in step.chains for spec in chain)
        self._lock = threading.Lock()
        self._local = threading.local()
        self._active: OrderedDict[str, Computed] = OrderedDict()

    def allow_nonfinite(self) -> None:
        """Take the base's element where an input has NaN or Inf; what was begun begins anew."""
        self._allow_nonfinite, self._local = True, threading.local()

    def steps_of(self, name: str) -> list[Step]:
        """A tensor's steps; thresholds of whole models are found when the first of them is asked for."""
        with self._lock:
            if self._trims:
                every = [step for steps in self._steps.values() for step in steps]
                found: dict[str, list[Step]] = {}
                for step in settle_model_trim(every, threads=1, tile=TILE, allow_nonfinite=self._allow_nonfinite):
                    found.setdefault(step.name, []).append(step)
                self._steps, self._trims = found, False
            return self._steps[name]

    def planned(self, name: str) -> list[Step]:
        """A tensor's steps as they were planned."""
        return self._steps[name]

    def hands(self) -> tuple[Worker, _Window]:
        """This thread's worker, and where it writes."""
        if not hasattr(self._local, "hands"):
            window = _Window()
            worker = Worker([window], TILE, self._allow_nonfinite, threading.Event())
            self._local.hands = worker, window
            self._local.runs = OrderedDict()
        found: tuple[Worker, _Window] = self._local.hands
        return found

    def run_of(self, key: str, step: Merge) -> StepRun:
        """This thread's run of a step whose tiles need no order."""
        worker, _ = self.hands()
        runs: OrderedDict[str, StepRun] = self._local.runs
        if key not in runs:
            runs[key] = StepRun(step, worker, _NoDigests(), Counter())
            while len(runs) > ACTIVE * 4:
                runs.popitem(last=False)
        runs.move_to_end(key)
        return runs[key]

    def use(self, computed: Computed) -> None:
        """A tensor that keeps what it has computed is read; those that were not read for long let go of theirs."""
        gone: list[Computed] = []
        with self._lock:
            self._active[computed.name] = computed
            self._active.move_to_end(computed.name)
            while len(self._active) > ACTIVE:
                gone.append(self._active.popitem(last=False)[1])
        for one in gone:
            one.forget()

    def refuse_failed(self, worker: Worker) -> None:
        """What an engine's run would end with.

        Raises:
            DataError: NaN, Inf, overflow, or integers that differ.
        """
        if worker.tally.failed:
            raise DataError(f"{self.ref}: {explain(worker.tally, self._names)}")


@dataclass
class _Part:
    """One step of a tensor that is read in order: its run, and the first element of each of its tiles."""

    run: StepRun
    begin: int
    end: int


class Computed:
    """One tensor of a recipe's result.

    Args:
        workshop: the recipe's.
        name: the tensor's.
        identity: digest of what it is made of.
    """

    def __init__(self, workshop: Workshop, name: str, identity: bytes) -> None:
        steps = workshop.planned(name)
        self.workshop, self.name = workshop, name
        self.size = steps[0].dtype.itemsize
        self.count = math.prod(steps[0].shape)
        self.nbytes = self.count * self.size
        one = steps[0] if len(steps) == 1 else None
        self._free = one is not None and (isinstance(one, Copy) or span_of(one, TILE) is not None)
        inputs = [entry for step in steps for entry in step.inputs]
        files = tuple(dict.fromkeys(file for entry in inputs for file in traits_of(entry.source).files))
        self.traits = Traits(
            files=files, identity=identity, ordered=not self._free, grain=max(tile_of(step, TILE) for step in steps),
            cost=bytes_to_read(steps) / max(1, self.nbytes),
        )  # fmt: skip
        self._lock = threading.Lock()
        self._step: Step | None = None  # settled, where tiles need no order
        self._parts: list[_Part] | None = None  # else
        self._at = 0  # the first element that was not computed yet, where they do
        self._tile: tuple[int, Bytes] = (0, np.empty(0, np.uint8))  # the last one

    def __repr__(self) -> str:
        return f"<Computed: {self.name} of {self.workshop.ref}>"

    def read_into(self, buffer: Bytes, offset: int) -> None:
        """(n,) uint8, filled with the n bytes that begin at byte `offset` of the tensor.

        Raises:
            DataError: NaN or Inf in an input, or a value that the tensor's format cannot hold.
        """
        refuse_outside(buffer, offset, self.nbytes)
        if not buffer.nbytes:
            return
        if self._free:
            self._read_anywhere(buffer, offset)
        else:
            with self._lock:
                self.workshop.use(self)
                self._read_in_order(buffer, offset)

    def forget(self) -> None:
        """Let go of what was computed, unless it is being read: two that wait for each other's would wait forever."""
        if self._lock.acquire(blocking=False):
            try:
                self._parts, self._at, self._tile = None, 0, (0, np.empty(0, np.uint8))
            finally:
                self._lock.release()

    # --- tiles in any order

    def _settled(self) -> Step:
        with self._lock:
            if self._step is None:
                (step,) = self.workshop.steps_of(self.name)
                if is_measured(step):
                    worker, _ = self.workshop.hands()
                    run = StepRun(step, worker, _NoDigests(), Counter())
                    step, _ = settled(step, measure(run, 0, step.count, _NEVER))
                    self.workshop.refuse_failed(worker)
                self._step = step
            return self._step

    def _read_anywhere(self, buffer: Bytes, offset: int) -> None:
        step = self._settled()
        worker, window = self.workshop.hands()
        run = self.workshop.run_of(self.name, step) if isinstance(step, Merge) else None
        tile = tile_of(step, TILE) * self.size
        begin, end = offset, offset + buffer.nbytes
        first, last = -(-begin // tile) * tile, end if end == self.nbytes else end // tile * tile

        def compute(target: Bytes, at: int) -> None:
            window.target, window.begin = target, at
            low, high = at // self.size, (at + target.nbytes) // self.size
            if run is not None:
                run.merge(low, high, _NEVER)
            elif isinstance(step, Copy):
                copy(step, worker, _NoDigests(), low, high, _NEVER)
            self.workshop.refuse_failed(worker)

        if first < last:
            compute(buffer[first - begin : last - begin], first)
        for low, high in ((begin, min(first, end)), (max(first, last), end)):
            if low < high:  # a part of a tile
                at = low // tile * tile
                whole = self._part_of(at, min(tile, self.nbytes - at), compute)
                buffer[low - begin : high - begin] = whole[low - at : high - at]

    def _part_of(self, at: int, nbytes: int, compute: Callable[[Bytes, int], None]) -> Bytes:
        """A tile of which only a part is wanted: the rest is often wanted next."""
        local = self.workshop._local
        known: tuple[Computed, int, Bytes] | None = getattr(local, "tile", None)
        if known is not None and known[0] is self and known[1] == at:
            return known[2]
        whole = np.empty(nbytes, np.uint8)
        compute(whole, at)
        local.tile = self, at, whole
        return whole

    # --- tiles in order

    def _read_in_order(self, buffer: Bytes, offset: int) -> None:
        begin, end = offset, offset + buffer.nbytes
        if self._parts is None or begin < self._tile[0]:
            self._restart()
        while True:
            at, tile = self._tile
            low, high = max(begin, at), min(end, at + tile.nbytes)
            if low < high:
                buffer[low - begin : high - begin] = tile[low - at : high - at]
            if high >= end and at + tile.nbytes >= end:
                return
            self._advance()

    def _restart(self) -> None:
        worker, _ = self.workshop.hands()
        if self._parts is None:
            self._parts = []
            at = 0
            for step in self.workshop.steps_of(self.name):
                assert isinstance(step, Merge)  # a copy needs no order
                run = StepRun(step, worker, _NoDigests(), Counter())
                settle_run(run, _NEVER)
                self.workshop.refuse_failed(worker)
                self._parts.append(_Part(run, at, at + step.count))
                at += step.count
        for part in self._parts:
            part.run.begin()
        self._at, self._tile = 0, (0, np.empty(0, np.uint8))

    def _advance(self) -> None:
        """Compute the next tile."""
        assert self._parts is not None
        worker, window = self.workshop.hands()
        part = next(part for part in self._parts if self._at < part.end)
        start = self._at - part.begin
        count = min(part.run.tile, part.end - self._at)
        tile = np.empty(count * self.size, np.uint8)
        window.target, window.begin = tile, self._at * self.size
        part.run.hands = worker  # of the thread that reads now
        part.run.merge_tile(start, count)
        self.workshop.refuse_failed(worker)
        self._tile = self._at * self.size, tile
        self._at += count


def sources_of(workshop: Workshop, identities: Mapping[str, bytes]) -> Iterator[tuple[str, Any]]:
    """Each tensor of a recipe, and where its bytes come from: of one that is a model's own, from there."""
    for name, identity in identities.items():
        step, *more = workshop.planned(name)
        if isinstance(step, Merge):
            own = step.models if step.verbatim else ()
        else:
            own = step.inputs
        same = len(own) == 1 and own[0].dtype.name == step.dtype.name and own[0].count == step.count
        if same and not more and step.count == math.prod(step.shape):
            yield name, own[0].source
        else:
            yield name, Computed(workshop, name, identity)
