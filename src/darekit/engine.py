# SPDX-License-Identifier: Apache-2.0
"""The engine: executes steps tile by tile, from ranged reads to positional writes, on a few threads.

For every tile: read base and models > widen > subtract base > stages > merge method > add base > round > write.
Nothing depends on the order of tiles, so threads share nothing but a queue; memory is threads x (K + 2) tiles.
Tensors with a stage that must first measure the whole tensor are run by one thread, in order.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from darekit import kernels
from darekit.digests import LEAF, TensorDigest, tensor_digest
from darekit.dtypes import Bytes, Floats
from darekit.errors import DataError
from darekit.kernels import cpu
from darekit.methods import MERGE_METHODS
from darekit.methods.merging import total_weight
from darekit.stages import Stage, build, is_trim, tile_of
from darekit.steps import Input, Step

TILE = 32768  # elements; the tiles of base + 3 models then stay in 1 MiB of L2
SPAN = 64 * LEAF  # elements of an unmeasured tensor that one thread takes at a time
FLUSH_SECONDS = 20.0
SAMPLED_TILES = 4

BASE = -1  # the base's place among digests and tallies, where models have their recipe index
OUT = -2


class Sink(Protocol):
    """Where output bytes go."""

    def write(self, buffer: Bytes, offset: int) -> None:
        """Write all of `buffer` at a byte offset; thread-safe."""


@dataclass
class Tally:
    """What went through the engine; one per thread, added up at the end."""

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


@dataclass(frozen=True)
class Execution:
    """What a run of the engine did. `records`: per finished tensor its digests and kept elements."""

    seconds: float
    bytes_read: int
    bytes_written: int
    records: Mapping[str, Mapping[str, Any]]


def default_threads() -> int:
    """The processors this process may use, 8 at most: more only fight over the disk."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, available)


def execute(
    steps: Sequence[Step],
    outputs: Sequence[Sink],
    *,
    names: Sequence[str],
    threads: int | None = None,
    tile: int = TILE,
    finished: Container[str] = (),
    allow_nonfinite: bool = False,
    on_tensor: Callable[[str, Mapping[str, Any]], None] | None = None,
    flush: Callable[[], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Execution:
    """Run all steps whose tensor is not in `finished`.

    Args:
        steps: the plan's steps; several of one tensor stand side by side, in order.
        outputs: one sink per output file.
        names: what to call each model in errors.
        threads: worker threads.
        tile: elements per tile; the result does not depend on it.
        finished: names of tensors that an earlier run has already written.
        allow_nonfinite: where an input has NaN or Inf, take the base's element instead of failing.
        on_tensor: called once per finished tensor with its record.
        flush: called now and then from this thread, so that finished tensors survive a kill.
        progress: called with the bytes read so far.

    Raises:
        DataError: NaN or Inf in an input (all are listed), overflow of the output format, or integer tensors that
            differ. Nothing of what was written may be published then.
    """
    threads = threads or default_threads()
    began = time.perf_counter()
    jobs = [Job(group, tile) for group in _by_tensor(steps) if group[0].name not in finished]
    queue = deque(_spans_in_order(jobs, threads))
    records: dict[str, Mapping[str, Any]] = {}
    stop = threading.Event()
    broken = threading.Event()  # bad values were found: go on reading, to list them all, but write no more
    workers = [Worker(outputs, tile, allow_nonfinite, broken) for _ in range(threads)]

    def work(worker: Worker) -> None:
        while not stop.is_set():
            try:
                job, begin, end = queue.popleft()
            except IndexError:
                return
            worker.run(job, begin, end, stop)
            record = job.close(begin, worker.tally)
            if record is not None and not broken.is_set():
                records[job.name] = record
                if on_tensor:
                    on_tensor(job.name, record)

    with ThreadPoolExecutor(threads, thread_name_prefix="darekit") as pool:
        futures = [pool.submit(work, worker) for worker in workers]
        try:
            flushed = time.perf_counter()
            while wait(futures, timeout=0.1, return_when=FIRST_EXCEPTION).not_done:
                if any(future.done() and future.exception() for future in futures):
                    break
                if progress:
                    progress(sum(worker.tally.bytes_read for worker in workers))
                if flush and time.perf_counter() - flushed > FLUSH_SECONDS:
                    flush()
                    flushed = time.perf_counter()
        finally:
            stop.set()
        for future in futures:
            future.result()
    tally = Tally()
    for worker in workers:
        tally.add(worker.tally)
    if progress:
        progress(tally.bytes_read)
    if tally.failed:
        raise DataError(_explain(tally, names))
    return Execution(time.perf_counter() - began, tally.bytes_read, tally.bytes_written, records)


def _by_tensor(steps: Sequence[Step]) -> list[list[Step]]:
    groups: list[list[Step]] = []
    for step in steps:
        if groups and groups[-1][0].name == step.name:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _spans_in_order(jobs: Sequence[Job], threads: int) -> list[tuple[Job, int, int]]:
    """Jobs that one thread must do alone come first, largest first, so that none is left over at the end."""
    alone = sorted((job for job in jobs if len(job.spans) == 1), key=lambda job: -job.cost)
    shared = [job for job in jobs if len(job.spans) > 1]
    return [(job, begin, end) for job in (*alone, *shared) for begin, end in job.spans]


class Job:
    """One output tensor on its way: its steps, how it may be cut, and what its finished parts add up to."""

    def __init__(self, steps: Sequence[Step], tile: int) -> None:
        self.steps = tuple(steps)
        self.name = steps[0].name
        self.cost = sum(step.count * (1 + len(step.models)) for step in steps)
        whole = [(0, sum(step.count for step in steps))]
        self.spans = whole
        if len(steps) == 1 and self._can_be_cut(steps[0], tile):
            count = steps[0].count
            self.spans = [(begin, min(begin + SPAN, count)) for begin in range(0, count, SPAN)] or whole
        self._lock = threading.Lock()
        self._open = len(self.spans)
        self._leaves: dict[int, dict[int, list[bytes]]] = {}
        self._kept: Counter[int] = Counter()

    @staticmethod
    def _can_be_cut(step: Step, tile: int) -> bool:
        if tile_of(step, tile) != tile or SPAN % tile:
            return False
        stages = [build(spec, step) for chain in step.chains for spec in chain]
        return all(stage.ready and not stage.ordered for stage in stages)

    def add(self, begin: int, digests: Mapping[int, TensorDigest], kept: Counter[int]) -> None:
        """Take what one span found out."""
        with self._lock:
            for key, digest in digests.items():
                self._leaves.setdefault(key, {})[begin] = digest.finish()
            self._kept.update(kept)

    def close(self, begin: int, tally: Tally) -> dict[str, Any] | None:
        """One span is done; the tensor's record if it was the last."""
        with self._lock:
            self._open -= 1
            if self._open:
                return None
        digests = {
            key: tensor_digest(leaf for begin in sorted(parts) for leaf in parts[begin])
            for key, parts in self._leaves.items()
        }
        owners = sorted(key for key in digests if key >= 0)
        return {
            "output": digests.get(OUT),
            "base": digests.get(BASE),
            "models": {str(owner): digests[owner] for owner in owners},
            "kept": {str(owner): self._kept[owner] for owner in owners},
        }


class Worker:
    """One thread's buffers and tally, and the way of a tile through them."""

    def __init__(self, outputs: Sequence[Sink], tile: int, allow_nonfinite: bool, broken: threading.Event) -> None:
        self.outputs, self.tile = outputs, tile
        self.allow_nonfinite, self.broken = allow_nonfinite, broken
        self.tally = Tally()
        self._scratch: dict[tuple[str, Any], npt.NDArray[Any]] = {}

    def _buffer(self, role: str, size: int, dtype: Any) -> npt.NDArray[Any]:
        key = role, np.dtype(dtype)
        buffer = self._scratch.get(key)
        if buffer is None or buffer.size < size:
            buffer = self._scratch[key] = np.empty(size, dtype)
        return buffer[:size]

    def run(self, job: Job, begin: int, end: int, stop: threading.Event) -> None:
        """All tiles begin .. end of one tensor, measuring passes first."""
        self.digests: dict[int, TensorDigest] = {}
        self.kept: Counter[int] = Counter()
        for step in job.steps:
            if step.count == 0:
                keys = {OUT: step.dtype, **dict(zip(step.owners, (m.dtype for m in step.models), strict=True))}
                keys |= {BASE: step.base.dtype} if step.base else {}
                self.digests = {key: TensorDigest(dtype.itemsize) for key, dtype in keys.items()}
                continue
            if step.kind == "copy":
                self._copy(step, stop)
                continue
            tile = tile_of(step, self.tile)
            last = min(end, step.count) if len(job.steps) == 1 else step.count
            first = begin if len(job.steps) == 1 else 0
            starts = range(first, last, tile)
            chains = [[build(spec, step) for spec in chain] for chain in step.chains]
            while not self.broken.is_set() and any(not stage.ready for chain in chains for stage in chain):
                self.measure(step, chains, starts, tile, last, stop)
            for chain in chains:
                for stage in chain:
                    stage.begin()
            for start in starts:
                if stop.is_set():
                    return
                self._merge(step, chains, start, min(tile, last - start))
            if tile > 16 * self.tile:
                self._scratch.clear()  # a whole tensor's buffers are not for keeping
        self._digest_rest(job)
        job.add(begin, self.digests, self.kept)

    def measure(
        self, step: Step, chains: list[list[Stage]], starts: range, tile: int, last: int, stop: threading.Event
    ) -> None:
        """One pass in which each model's first stage that is not ready measures what the ones before it leave."""
        waiting = [next((i for i, stage in enumerate(chain) if not stage.ready), None) for chain in chains]
        busy = [(k, i) for k, i in enumerate(waiting) if i is not None]
        for k, i in busy:
            for stage in chains[k][: i + 1]:
                stage.begin()
        if all(chains[k][i].sampling for k, i in busy):
            starts = starts[:: max(1, len(starts) // SAMPLED_TILES)]
        for start in starts:
            if stop.is_set():
                return
            count = min(tile, last - start)
            deltas = self.load(step, start, count, only=[k for k, _ in busy])
            for k, i in busy:
                for stage in chains[k][:i]:
                    stage.apply(deltas[k], start)
                chains[k][i].measure(deltas[k], start)
        for k, i in busy:
            chains[k][i].settle()

    def _read(self, entry: Input, start: int, count: int, role: str) -> Bytes:
        """Raw bytes of elements start .. start + count, as far as the input has them."""
        size = entry.dtype.itemsize
        count = max(0, min(count, entry.count - start))
        raw = self._buffer(role, count * size, np.uint8)
        if count:
            entry.source.read_into(raw, start * size)
            self.tally.bytes_read += raw.size
        return raw

    def _feed(self, key: int, entry_itemsize: int, raw: Bytes) -> None:
        digest = self.digests.get(key)
        if digest is None:
            digest = self.digests[key] = TensorDigest(entry_itemsize)
        digest.update(raw)

    def load(
        self, step: Step, start: int, count: int, *, only: Sequence[int] | None = None, final: bool = False
    ) -> Floats:
        """(K, count): the models' deltas of one tile (their values, where there is no base or `on_weights`)."""
        number = np.float64 if step.wide else np.float32
        deltas = self._buffer("deltas", len(step.models) * count, number).reshape(len(step.models), count)
        self.base = self._buffer("base", count, number)
        self.base_raw: Bytes = self._buffer("base_raw", 0, np.uint8)
        at = step.begin + start
        if step.base is not None and (final or not step.on_weights):
            self.base_raw = self._read(step.base, at, count, "base_raw")
            if final:
                self._feed(BASE, step.base.dtype.itemsize, self.base_raw)
            kernels.widen(self.base_raw, step.base.dtype, self.base)
        origin = self.base
        if step.base is None or step.on_weights:
            origin = self._buffer("zeros", count, number)
            origin[:] = 0
        bad_at: npt.NDArray[np.bool_] | None = None
        for k, model in enumerate(step.models):
            if only is not None and k not in only:
                continue
            self.raw = self._read(model, at, count, "raw")
            if final:
                self._feed(step.owners[k], model.dtype.itemsize, self.raw)
            have = self.raw.size // model.dtype.itemsize
            bad = kernels.difference(self.raw, model.dtype, origin[:have], deltas[k, :have])
            deltas[k, have:] = 0
            if bad:
                bad_at = self._blame(step, k, start, deltas[k], bad_at, final)
        if bad_at is not None and self.allow_nonfinite:
            deltas[:, bad_at] = 0
        self.bad_at = bad_at
        return deltas

    def _blame(
        self, step: Step, k: int, start: int, delta: Floats, known: npt.NDArray[np.bool_] | None, final: bool
    ) -> npt.NDArray[np.bool_]:
        """Find out which input a NaN or Inf came from; returns where this tile has any."""
        bad_at = ~np.isfinite(delta)
        values = self._buffer("blame", self.raw.size // step.models[k].dtype.itemsize, delta.dtype)
        kernels.widen(self.raw, step.models[k].dtype, values)
        if final and not self.allow_nonfinite:
            self.broken.set()
            in_model = kernels.count_nonfinite(values)
            in_base = kernels.count_nonfinite(self.base) if self.base_raw.size else 0
            if in_model:
                self.tally.nonfinite[step.owners[k], step.name] += in_model
            if in_base and known is None:
                self.tally.nonfinite[BASE, step.name] += in_base
            if not in_model and not in_base:
                self.tally.overflow[step.name] += int(np.count_nonzero(bad_at))
        return bad_at if known is None else bad_at | known

    def _merge(self, step: Step, chains: list[list[Stage]], start: int, count: int) -> None:
        """One tile, from disk to disk."""
        deltas = self.load(step, start, count, final=True)
        if self.broken.is_set():
            return
        for k, chain in enumerate(chains):
            kept = count
            for spec, stage in zip(step.chains[k], chain, strict=True):
                left = stage.apply(deltas[k], start)
                kept = kept if is_trim(spec) else left
            self.kept[step.owners[k]] += kept
        size = step.dtype.itemsize
        out: Bytes = self._buffer("out", count * size, np.uint8)
        if step.verbatim:
            overflowed = self._verbatim(step, deltas, out)
        else:
            merged = self._combine(step, deltas, count)
            if step.base is None or step.on_weights:
                overflowed = kernels.round_to(merged, step.dtype, out)
            else:
                overflowed = kernels.add_round(
                    self.base_raw, step.base.dtype, self.base, merged, step.factor, step.dtype, out
                )
        self._write(step, out, start, overflowed)

    def _combine(self, step: Step, deltas: Floats, count: int) -> Floats:
        method = MERGE_METHODS[step.method]
        weights = np.array(step.weights)
        if step.wide or step.method not in ("linear", "task_arithmetic", "ties"):
            result: Floats = method.function(deltas, weights, **step.parameters)
            return result
        merged = self._buffer("merged", count, np.float32)
        if step.method == "ties":
            cpu.elect(deltas, weights.astype(np.float32), step.parameters["normalize"], merged)
        else:
            divisor = total_weight(weights) if step.parameters["normalize"] else 1.0
            cpu.weighted_sum(deltas, weights.astype(np.float32), np.float32(divisor), merged)
        return merged

    def _verbatim(self, step: Step, deltas: Floats, out: Bytes) -> int:
        dtype = step.models[0].dtype
        if self.bad_at is not None and step.base is not None:  # allowed, or we would not be here
            return kernels.add_round(self.base_raw, step.base.dtype, self.base, deltas[0], 1.0, step.dtype, out)
        if dtype.name == step.dtype.name:
            out[:] = self.raw
            return 0
        values = self._buffer("base", deltas.shape[1], deltas.dtype)
        kernels.widen(self.raw, dtype, values)
        return kernels.round_to(values, step.dtype, out)

    def _write(self, step: Step, out: Bytes, start: int, overflowed: int) -> None:
        if overflowed:
            self.tally.overflow[step.name] += overflowed
            self.broken.set()
            return
        self._feed(OUT, step.dtype.itemsize, out)
        self.outputs[step.output].write(out, step.offset + (step.begin + start) * step.dtype.itemsize)
        self.tally.bytes_written += out.size

    def _copy(self, step: Step, stop: threading.Event) -> None:
        """Integer and bool tensors: the base's bytes, when all agree."""
        first, *others = [step.base, *step.models] if step.base else [*step.models]
        keys = [BASE, *step.owners] if step.base else [*step.owners]
        assert first is not None
        for start in range(0, step.count, self.tile):
            if stop.is_set():
                return
            count = min(self.tile, step.count - start)
            raw = self._read(first, step.begin + start, count, "base_raw")
            self._feed(keys[0], step.dtype.itemsize, raw)
            for key, model in zip(keys[1:], others, strict=True):
                assert model is not None
                other = self._read(model, step.begin + start, count, "raw")
                self._feed(key, step.dtype.itemsize, other)
                if other.size != raw.size or not np.array_equal(raw, other):
                    self.tally.differing[key, step.name] += 1
                    self.broken.set()
            if not self.broken.is_set():
                self._write(step, raw, start, 0)
        for key in keys:
            self.kept[key] += step.count

    def _digest_rest(self, job: Job) -> None:
        """Rows that no step wanted (a vocabulary cut to the base's) still belong to the input's digest."""
        if len(job.spans) > 1:
            return
        last = job.steps[-1]
        inputs = dict(zip(last.owners, last.models, strict=True))
        for step in job.steps:
            inputs.update(zip(step.owners, step.models, strict=True))
        for key, entry in inputs.items():
            done = sum(step.count for step in job.steps if key in step.owners)
            for start in range(done, entry.count, self.tile):
                self._feed(key, entry.dtype.itemsize, self._read(entry, start, self.tile, "raw"))


def _explain(tally: Tally, names: Sequence[str]) -> str:
    lines = []
    if tally.nonfinite:
        lines.append("NaN or Inf in the input; nothing was published:")
        lines += _listed(tally.nonfinite, names, "values")
        lines.append("Repair or leave out these models, or take the base's elements there: --allow-nonfinite")
    if tally.differing:
        lines.append("Integer tensors differ from the base's and cannot be merged (is the model quantised?):")
        lines += _listed(tally.differing, names, "tiles")
    if tally.overflow:
        lines.append("Results do not fit the output's number format; nothing was published:")
        lines += [f"  {name}: {count} values" for name, count in sorted(tally.overflow.items())[:10]]
        lines.append("Write a wider format (dtype: bfloat16 or float32), or use a smaller weight or lambda")
    return "\n".join(lines)


def _listed(counter: Counter[tuple[int, str]], names: Sequence[str], unit: str) -> list[str]:
    rows = sorted(counter.items())
    lines = [f"  {'base' if key == BASE else names[key]}: {name}: {count} {unit}" for (key, name), count in rows[:20]]
    return lines + ([f"  ... and {len(rows) - 20} more tensors"] if len(rows) > 20 else [])
