# SPDX-License-Identifier: Apache-2.0
"""The engine: executes steps tile by tile, from ranged reads to positional writes, on a few threads.

Nothing depends on the order of tiles (`darekit.engine.tiles`), so threads share nothing but a queue; memory is
threads x (K + 6) tiles. A tensor with a stage that must first measure all of it is run by one thread, in order; one
whose merge method measures products goes through the threads twice.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import numpy as np
import xxhash

from darekit.checkpoints import traits_of
from darekit.checkpoints.digests import LEAF, TensorDigest, tensor_digest
from darekit.engine import tiles
from darekit.engine.copying import copy
from darekit.engine.costs import HEAVY, matrix_memory
from darekit.engine.losses import Losses, record_of
from darekit.engine.measuring import ByColumn, Doubles, measure, measure_columns, settled, told
from darekit.engine.stages import build, tile_of
from darekit.engine.steps import Copy, Merge, Step, is_counted, is_measured, vectors_of
from darekit.engine.tiles import BASE, OUT, TILE, ScratchPool, Sink, StepRun, Tally
from darekit.engine.trimming import settle_model_trim
from darekit.errors import DataError, MethodError
from darekit.machine import threads_of
from darekit.methods import MERGE_METHODS

SPAN = 64 * LEAF  # elements of an unmeasured tensor that one thread takes at a time

Span = tuple["Job", int, int]  # elements of a tensor, from and to

FLUSH_SECONDS = 0.1  # the disk writes while processors compute: what is left at the end takes little


@dataclass(frozen=True)
class Execution:
    """What a run of the engine did. `records`: per finished tensor its digests and kept elements."""

    seconds: float
    bytes_read: int
    bytes_written: int
    records: Mapping[str, Mapping[str, Any]]


class Observers(TypedDict, total=False):
    """Who follows an execution, and what it may skip: see `execute`."""

    finished: Container[str]
    on_tensor: Callable[[str, Mapping[str, Any]], None] | None
    flush: Callable[[], None] | None
    progress: Callable[[int], None] | None


def run(
    steps: Sequence[Step],
    outputs: Sequence[Sink],
    *,
    names: Sequence[str],
    threads: int | None = None,
    tile: int | None = None,
    allow_nonfinite: bool = False,
    **more: Unpack[Observers],
) -> Execution:
    """All of a plan's steps: what must be known of whole models is settled first, then `execute`; the same arguments
    and errors.

    Raises:
        PlanError: a float64 tensor under `trim: model`.
    """
    threads, tile, began = threads_of(threads), tile or tiles.TILE, time.perf_counter()
    steps = settle_model_trim(steps, threads=threads, tile=tile, allow_nonfinite=allow_nonfinite)
    settling = time.perf_counter() - began
    done = execute(steps, outputs, names=names, threads=threads, tile=tile, allow_nonfinite=allow_nonfinite, **more)
    return replace(done, seconds=done.seconds + settling)


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
    threads = threads_of(threads)
    began = time.perf_counter()
    jobs = [Job(group, tile) for group in _by_tensor(steps) if group[0].name not in finished]
    queue = Queue(jobs)
    records: dict[str, Mapping[str, Any]] = {}
    stop = threading.Event()
    broken = threading.Event()  # bad values were found: go on reading, to list them all, but write no more
    one_at_a_time = threading.Lock()
    workers = [Worker(outputs, tile, allow_nonfinite, broken, one_at_a_time) for _ in range(threads)]

    def work(worker: Worker) -> None:
        while not stop.is_set():
            span = queue.take(worker)
            if span is None:
                return
            job, begin, end = span
            with _told(job.name):
                worker.run(job, begin, end, stop)
            if stop.is_set():  # somebody failed: this span may be cut short
                return
            if not job.end():
                continue
            if job.measured is not None:
                with _told(job.name):
                    job.settle(job.measured)
                queue.put(job)
                continue
            record = job.record()
            if not broken.is_set():
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
            queue.close()
        for future in futures:
            future.result()
    tally = Tally()
    for worker in workers:
        tally.add(worker.tally)
    if progress:
        progress(tally.bytes_read)
    if tally.failed:
        raise DataError(explain(tally, names))
    return Execution(time.perf_counter() - began, tally.bytes_read, tally.bytes_written, records)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What goes wrong in somebody's own method is told with the tensor's name."""
    try:
        yield
    except MethodError as error:
        raise MethodError(f"{name}: {error}") from error


def _by_tensor(steps: Sequence[Step]) -> list[list[Step]]:
    groups: list[list[Step]] = []
    for step in steps:
        if groups and groups[-1][0].name == step.name:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


class Queue:
    """Spans that wait for a thread.

    Jobs that one thread must do alone come first, largest first, so that none is left over at the end. Of the others
    a thread takes those of one file after another, and while there are enough none that another thread takes from:
    threads that write to one file wait for each other. A job that was measured comes again, before all others of its
    file: what was just read may still be in a cache.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._alone = deque(sorted((job for job in jobs if not job.divisible), key=lambda job: -job.cost))
        self._files: dict[int, deque[Span]] = {}
        for job in jobs:
            if job.divisible:
                self._files.setdefault(job.steps[0].output, deque()).extend((job, *span) for span in job.spans)
        self._taken: dict[object, int] = {}  # by whom: the file
        self._coming = sum(job.measured is not None for job in jobs)  # those that are still to come again
        self._changed = threading.Condition()

    def take(self, taker: object) -> Span | None:
        """The next span for `taker`, waiting for it while one may still come; None when there is none left."""
        with self._changed:
            while True:
                if self._alone:
                    job = self._alone.popleft()
                    return (job, *job.spans[0])
                if not self._files.get(self._taken.get(taker, -1)):
                    self._taken.pop(taker, None)
                    others = Counter(self._taken.values())
                    left = [file for file, spans in self._files.items() if spans]
                    if not left and self._coming:
                        self._changed.wait()
                        continue
                    if not left:
                        return None
                    self._taken[taker] = min(left, key=lambda file: others[file])
                return self._files[self._taken[taker]].popleft()

    def put(self, job: Job) -> None:
        """A job that was measured is to be merged now."""
        with self._changed:
            self._coming -= 1
            self._files[job.steps[0].output].extendleft((job, *span) for span in reversed(job.spans))
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing comes any more: a thread failed, and others may be waiting for what it had taken."""
        with self._changed:
            self._coming = 0
            self._changed.notify_all()


class Job:
    """One output tensor on its way: its steps, how it may be cut, and what its finished parts add up to.

    `measured`: its step, as long as its spans are to be measured before they are merged. (A tensor that one thread does
    alone is measured there.)
    """

    def __init__(self, steps: Sequence[Step], tile: int) -> None:
        self.steps = tuple(steps)
        self.name = steps[0].name
        self.cost = sum(step.count * (1 + len(step.models)) for step in steps)
        count = sum(step.count for step in steps)
        span = span_of(steps[0], tile) if len(steps) == 1 else None
        self.divisible = span is not None
        self.spans = [(0, count)]
        if span is not None and count > span:
            self.spans = [(begin, min(begin + span, count)) for begin in range(0, count, span)]
        first = steps[0]
        self.measured: Merge | None = first if self.divisible and is_measured(first) else None
        self._lines = f"{vectors_of(steps[0])}s"
        self._lock = threading.Lock()
        self._open = len(self.spans)
        self._leaves: dict[int, dict[int, list[bytes]]] = {}
        self._kept: Counter[tuple[int, int]] = Counter()
        self._products: dict[int, Doubles] = {}
        self._coefficients: dict[int, Doubles] = {}
        self._facts: dict[str, Any] = {}
        self._losses: list[Losses] = []

    def add(
        self,
        begin: int,
        digests: Mapping[int, TensorDigest],
        kept: Counter[tuple[int, int]],
        coefficients: Mapping[int, Doubles],
        facts: Mapping[str, Any],
        losses: Sequence[Losses],
    ) -> None:
        """Take what one span found out."""
        with self._lock:
            for key, digest in digests.items():
                self._leaves.setdefault(key, {})[begin] = digest.finish()
            self._kept.update(kept)
            self._coefficients.update(coefficients)
            self._facts.update(facts)
            self._losses += losses

    def add_products(self, begin: int, products: Doubles) -> None:
        """Take what one span measured."""
        with self._lock:
            self._products[begin] = products

    def end(self) -> bool:
        """One span is done; whether it was the last one of this pass."""
        with self._lock:
            self._open -= 1
            return not self._open

    def settle(self, step: Merge) -> None:
        """All spans of the step are measured: from now on they are merged."""
        merging, found = settled(step, np.concatenate([self._products[begin] for begin in sorted(self._products)]))
        self.steps, self.measured, self._open = (merging,), None, len(self.spans)
        self._products, self._coefficients = {}, {0: found[None]}

    def record(self) -> dict[str, Any]:
        """What the finished tensor is made of, JSON-able: digests, kept elements, and what was measured."""
        digests = {
            key: tensor_digest(leaf for begin in sorted(parts) for leaf in parts[begin])
            for key, parts in self._leaves.items()
        }
        self._leaves = {}  # 72 bytes for each 64Ki elements of each input: they would grow with the model
        owners = sorted({owner for step in self.steps for owner in step.owners})
        rounding = record_of(self._losses, sum(step.count for step in self.steps if is_counted(step)))
        return {
            "output": digests.get(OUT),
            "base": digests.get(BASE),
            "models": {str(owner): digests[owner] for owner in owners if owner in digests},
            # What the stage that leaves least lets through: DARE's tenth, or TIES' fifth.
            "kept": {
                str(owner): min((n for (key, _), n in self._kept.items() if key == owner), default=0)
                for owner in owners
            },
            **({"measured": _measured(told(self._coefficients), self._lines)} if self._coefficients else {}),
            **({"measured": self._facts} if self._facts else {}),
            **({"rounding": rounding} if rounding else {}),
        }


def span_of(step: Step, tile: int) -> int | None:
    """How many elements of a step one thread takes at a time; None: one thread must do all of it."""
    size = tile_of(step, tile)
    if (size != tile and size >= step.count) or (size == tile and SPAN % tile):
        return None
    if any(entry.count != step.count for entry in step.inputs):  # one thread then digests what is cut off as well
        return None
    if any(traits_of(entry.source).ordered for entry in step.inputs):
        return None
    if isinstance(step, Merge) and not _is_divisible(step):
        return None
    grain = LEAF if size == tile else math.lcm(LEAF, step.row)  # digests are cut at leaves
    return max(1, SPAN // grain) * grain


def _is_divisible(step: Merge) -> bool:
    """Whether tiles of it can be merged without what was seen of the tiles before them."""
    method = MERGE_METHODS[step.method]
    if method.rows or method.survey or vectors_of(step) == "column":
        return False
    return all(stage.ready and not stage.ordered for stage in (build(s, step) for chain in step.chains for s in chain))


def _measured(found: Doubles, lines: str) -> dict[str, Any]:
    """(vectors, R) coefficients: the numbers themselves where there is one, else how many rows or columns (`lines`)
    there are, and a digest of all their coefficients."""
    if len(found) == 1:
        return {"coefficients": found[0].tolist()}
    return {lines: len(found), "digest": xxhash.xxh3_128_hexdigest(np.ascontiguousarray(found, "<f8").tobytes())}


class Worker:
    """One thread: runs whole jobs or spans of them, and counts what went through."""

    def __init__(
        self,
        outputs: Sequence[Sink],
        tile: int,
        allow_nonfinite: bool,
        broken: threading.Event,
        one_at_a_time: threading.Lock | None = None,
    ) -> None:
        self.outputs, self.tile, self.allow_nonfinite, self.broken = outputs, tile, allow_nonfinite, broken
        self.one_at_a_time = one_at_a_time or threading.Lock()
        self.tally = Tally()
        self.scratch = ScratchPool()

    def run(self, job: Job, begin: int, end: int, stop: threading.Event) -> None:
        """Elements begin .. end of a tensor that can be cut; all of one that cannot."""
        digests: dict[int, TensorDigest] = {}
        kept: Counter[tuple[int, int]] = Counter()
        if job.measured is not None:
            job.add_products(begin, measure(StepRun(job.measured, self, digests, kept), begin, end, stop))
            return
        coefficients: dict[int, Doubles] = {}
        facts: dict[str, Any] = {}
        losses: list[Losses] = []
        for step in job.steps:
            if isinstance(step, Copy):
                copy(step, self, digests, begin, end, stop)
                continue
            run = StepRun(step, self, digests, kept)
            if len(job.spans) > 1:
                run.merge(begin, end, stop)
            elif matrix_memory(step) > HEAVY:  # its algebra runs on all processors anyway
                with self.one_at_a_time:
                    settle_run(run, stop)
                    run.merge(0, step.count, stop)
                    self.scratch = ScratchPool()
            else:
                settle_run(run, stop)
                run.merge(0, step.count, stop)
            coefficients |= run.coefficients
            facts |= run.surveyor.facts if run.surveyor is not None else {}
            losses.append(run.losses.finish())
        if len(job.spans) == 1:
            self._digest_rest(job, digests)
        job.add(begin, digests, kept, coefficients, facts, losses)

    def _digest_rest(self, job: Job, digests: dict[int, TensorDigest]) -> None:
        """Rows that no step wanted (a vocabulary cut to the base's) still belong to the input's digest."""
        inputs = {key: entry for step in job.steps for key, entry in zip(step.owners, step.models, strict=True)}
        for key, entry in inputs.items():
            if key not in digests:  # its values were asked for, and not its bytes
                continue
            done = sum(step.count for step in job.steps if key in step.owners)
            raw = np.empty(self.tile * entry.dtype.itemsize, np.uint8)
            for start in range(done, entry.count, self.tile):
                part = raw[: min(self.tile, entry.count - start) * entry.dtype.itemsize]
                entry.source.read_into(part, start * entry.dtype.itemsize)
                self.tally.bytes_read += round(part.size * entry.cost)
                digests[key].update(part)


def settle_run(run: StepRun, stop: threading.Event) -> None:
    """Whatever must be known of all of a step before its tiles are merged."""
    run.settle(stop)
    if vectors_of(run.step) == "column":
        run.by_column, found = ByColumn.of(run.step, measure_columns(run, stop))
        run.coefficients[0] = found
    elif is_measured(run.step):
        step, found = settled(run.step, measure(run, 0, run.step.count, stop))
        run.become(step)
        run.coefficients[0] = found[None]


def explain(tally: Tally, names: Sequence[str]) -> str:
    """Why nothing may be published. `names`: of the models, in order."""
    lines = []
    if tally.nonfinite:
        lines.append("NaN or Inf in the input, so there is no result:")
        lines += _listed(tally.nonfinite, names, "values")
        lines.append(
            "Repair or leave out these models; `dare merge` and `dare drop` can also take the base's elements there: "
            "--allow-nonfinite"
        )
    if tally.differing:
        lines.append(
            "Integers or complex numbers differ from the base's and cannot be merged (is the model quantised?):"
        )
        lines += _listed(tally.differing, names, "tiles")
    if tally.overflow:
        lines.append("Values do not fit the output's number format, so there is no result:")
        lines += [f"  {name}: {count} values" for name, count in sorted(tally.overflow.items())[:10]]
        lines.append("Write a wider format (dtype: bfloat16 or float32), or use a smaller weight or lambda")
    return "\n".join(lines)


def _listed(counter: Counter[tuple[int, str]], names: Sequence[str], unit: str) -> list[str]:
    rows = sorted(counter.items())
    lines = [f"  {'base' if key == BASE else names[key]}: {name}: {count} {unit}" for (key, name), count in rows[:20]]
    return lines + ([f"  ... and {len(rows) - 20} more tensors"] if len(rows) > 20 else [])
