# SPDX-License-Identifier: Apache-2.0
"""Passes over data with a model that runs, into a statistics file: in bounded memory, resumable, and visible only when
complete. The sums of a group of tensors are in memory during one pass; finished groups are on the disk."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from darekit import __version__
from darekit.errors import CheckpointError, DataError, OutputError, PlanError, Unsupported
from darekit.inputs.statistics import FISHER, FORMAT, GRAM, KINDS, refuse_existing
from darekit.live.batches import padding_known
from darekit.live.data import Row, Tokens, read_rows, rows_digest, tokenize
from darekit.live.models import LiveModel, build, memory_told, one_thread, recipe_of
from darekit.live.reading import refuse_foresight, refuse_unreadable
from darekit.live.tasks import CAUSAL, SEQ2SEQ
from darekit.output.card import public_name
from darekit.planning.opening import open_plan
from darekit.planning.plan import Plan
from darekit.statistics.budget import bytes_of_sums, grouped, settled
from darekit.statistics.passes import EMPIRICAL, LABELS, FisherPass, GramPass, Pass
from darekit.statistics.staging import Stage
from darekit.wording import brief, size_of
from darekit.wording.progress import Progress

MAX_LENGTH = 2048  # tokens of an example, where neither the model nor the caller asks for less
SAVE_SECONDS = 30.0  # between two savings of an unfinished pass, more where a saving takes long
SAVE_SHARE = 20  # a saving may take one part in so many of the time
PART = 1 << 22  # elements of a sum that are converted at once

ADVICE = (
    "a smaller --memory leaves more for the batches, and works with --resume; {}, or --dtype bfloat16, means "
    "starting over"
)
SMALLER = {GRAM: "a smaller --batch-size or --max-length", FISHER: "a smaller --max-length"}


@dataclass(frozen=True)
class StatisticsReport:
    """What a finished run did.

    Attributes:
        output: the file.
        kind: fisher or gram.
        examples: of the data that were read.
        tokens: in those examples.
        tensors: that have statistics.
        bytes: of the file.
        seconds: of all passes.
        mean: of a Fisher, over all its elements; None for Grams.
        passes: over the data.
        memory: bytes that the sums might take.
        sums_bytes: bytes that they took at most.
        notes: notes and warnings given during the run.
    """

    output: str
    kind: str
    examples: int
    tokens: int
    tensors: int
    bytes: int
    seconds: float
    mean: float | None
    passes: int
    memory: int
    sums_bytes: int
    notes: tuple[str, ...] = field(default=())

    def __repr__(self) -> str:
        return brief(
            self, f"{self.kind} of {self.tensors} tensors from {self.examples} examples, {self.output}, "
            f"{size_of(self.bytes)}",
        )  # fmt: skip

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**self.__dict__, "notes": list(self.notes)}


def make_statistics(
    kind: str,
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    labels: str = EMPIRICAL,
    seed: int = 0,
    limit: int | None = None,
    split: str = "train",
    max_length: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    memory: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> StatisticsReport:
    """Collect the statistics that `fisher` or `regmean` needs of a model, from data (needs torch).

    Args:
        kind: fisher or gram.
        model: a checkpoint: directory, file or Hub id.
        data: a file of JSON lines, or the name of a dataset.
        out: the `.safetensors` file to write.
        labels: fisher: empirical (the data's), sampled (the model's own, drawn) or exact (expectation over a
            classifier's labels, or a regressor's normal distribution).
        seed: for sampled labels.
        limit: read only this many rows.
        split: which split of a dataset to read.
        max_length: tokens of one example; the model's own limit, 2048 at most, if not given.
        batch_size: gram: examples at once. A Fisher takes one at a time.
        device: cpu, cuda or mps; the fastest available if not given.
        dtype: number format to compute in; float32 on a CPU if not given. Sums are float32.
        memory: bytes that the sums may take beside the model and its activations; half of what is free on the device
            if not given. Tensors whose sums fit together take one pass over the data; the file is the same.
        overwrite: replace an existing file.
        resume: continue a run that was interrupted, with this or another `memory`.
        progress: called with (examples done, examples in all), both counted over all passes.
        say: called with each note.

    Returns:
        What was read and written.

    Raises:
        DarekitError: see `darekit.errors`; what was finished is kept for `resume`.

    Examples:
        >>> for name in ("math", "code"):
        ...     report = dk.make_statistics("gram", name, "sums.jsonl", f"{name}.gram.safetensors", device="cpu")
        >>> report.examples, report.tensors
        (8, 9)
        >>> models = [{"model": name, "stats": f"{name}.gram.safetensors"} for name in ("math", "code")]
        >>> dk.merge({"models": models, "merge_method": "regmean"}, "merged").tensors
        21
    """
    out = Path(out)
    _check_arguments(kind, model, labels, batch_size, max_length)
    refuse_existing(out, overwrite=overwrite)
    rows = read_rows(data, limit=limit, split=split)
    notes: list[str] = []

    def tell(line: str) -> None:
        notes.append(line)
        if say:
            say(line)

    began = time.perf_counter()
    recipe, _ = recipe_of(str(model))
    with open_plan(recipe) as plan:
        live = build(plan, device=device, dtype=dtype)
        refuse_unreadable(live, rows)
        if live.tokenizer is None:
            raise CheckpointError(
                f"{model} has no tokenizer, so text cannot become tokens; copy its base's tokenizer into it"
            )
        length = min(max_length or MAX_LENGTH, live.max_length)
        examples = tokenize(live.tokenizer, rows, max_length=length, apart=live.task == SEQ2SEQ)
        if kind == FISHER and live.task in (CAUSAL, SEQ2SEQ):
            if not any(example.targets for example in examples):
                raise DataError(f"{data}: no row has a second token, so there is nothing to predict")
            if live.task == CAUSAL:
                refuse_foresight(live)
        batch = 1 if kind == FISHER else batch_size
        facts = _facts(kind, plan, live, rows, str(data), labels=labels, seed=seed, length=length)
        shapes = {place.name: tuple(place.shape) for shard in plan.shards for place in shard.placements}
        with one_thread(live.device), padding_known(live):
            accumulation: Pass = (
                FisherPass(live, live.parts(shapes), labels=labels, seed=seed)
                if kind == FISHER
                else GramPass(live, live.tensors(shapes))
            )
            run = _Run(Stage(out), accumulation, live.device, facts, examples, batch, tell, progress)
            try:
                document = run.make(memory, resume=resume)
            finally:
                accumulation.close()
    return StatisticsReport(
        output=str(out),
        kind=kind,
        examples=len(examples),
        tokens=document["tokens"],
        tensors=len(run.stage.shapes),
        bytes=out.stat().st_size,
        seconds=time.perf_counter() - began,
        mean=document.get("mean"),
        passes=run.passes,
        memory=run.memory,
        sums_bytes=run.largest,
        notes=tuple(notes),
    )


def _check_arguments(kind: str, model: str | Path, labels: str, batch_size: int, max_length: int | None) -> None:
    if kind not in KINDS:
        raise PlanError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    if labels not in LABELS:
        raise PlanError(f"labels {labels!r} is not one of {', '.join(LABELS)}")
    if batch_size < 1:
        raise PlanError(f"batch size {batch_size} is impossible; use 1 or more")
    if max_length is not None and max_length < 2:
        raise PlanError(f"a length of {max_length} tokens leaves nothing to predict; use 2 or more")
    if Path(model).suffix in (".yaml", ".yml") and not Path(model).is_dir():
        raise Unsupported(f"{model} is a recipe; statistics belong to one model on disk: merge it first")


def _facts(
    kind: str, plan: Plan, live: LiveModel, rows: Sequence[Row], data: str, *, labels: str, seed: int, length: int
) -> dict[str, Any]:
    """What the statistics depend on: the beginning of the file's document, and what a resumed run must share."""
    return {
        "kind": kind,
        "model": public_name(plan.models[0].ref),
        "model_digest": plan.sample_digests[0].hex(),
        "data": {
            "name": public_name(data) if Path(data).exists() else data,
            "rows": len(rows),
            "digest": rows_digest(rows),
        },
        "max_length": length,
        "dtype": str(live.model.dtype).removeprefix("torch."),
        "version": __version__,
        **({"labels": labels, "seed": seed} if kind == FISHER else {}),
    }


class _Run:
    """Passes until every sum is on the disk.

    Attributes:
        stage: what is on the disk.
        passes: that are finished.
        memory: bytes that the sums may take.
        largest: bytes that they took at most.
    """

    def __init__(
        self,
        stage: Stage,
        accumulation: Pass,
        device: Any,
        facts: Mapping[str, Any],
        examples: Sequence[Tokens],
        batch: int,
        tell: Callable[[str], None],
        progress: Progress | None,
    ) -> None:
        self.stage, self.accumulation, self.device, self.facts = stage, accumulation, device, facts
        self.examples, self.batch, self.tell, self.progress = examples, batch, tell, progress
        self.identity = {**facts, "batch_size": batch, "examples": len(examples)}
        self.passes = self.memory = self.largest = 0
        self._group: dict[str, tuple[int, ...]] = {}  # of the pass that is under way
        self._done = 0  # examples that it has seen
        self._behind: list[str] = []  # the groups of finished passes
        self._measured: dict[str, tuple[float, float]] = {}  # finished Fishers: sum of squares, sum
        self._saved = (0, 0)  # passes, and examples of the next, that are on the disk
        self._told = False  # that a saving failed

    def make(self, memory: int | None, *, resume: bool) -> dict[str, Any]:
        """Make and publish the file -> its document.

        Raises:
            DarekitError: see `darekit.errors`; the message says what is kept for `resume`.
        """
        there, kind = self.stage.partial.exists(), self.facts["kind"]
        try:
            with (
                _interrupts_between_batches() as interrupt,
                memory_told(f"making {kind} statistics", ADVICE.format(SMALLER[kind])),
            ):
                if there and resume:
                    self._restore()
                else:
                    self._begin(there=there, resume=resume)
                self._settle(memory)
                while self._group or self._next():
                    self._see_all(interrupt)
                    self._finish_group()
                if self.progress:
                    self.progress(self.passes * len(self.examples), self.passes * len(self.examples))
                document = self._document()
                self.stage.publish(document)
                return document
        except BaseException as error:
            if (self.passes, self._done) > self._saved and not self.accumulation.spoilt:
                with suppress(Exception):
                    self._save()
            if self._saved == (0, 0) and not resume:
                self.stage.discard()
            if isinstance(error, DataError | OutputError) and self._saved > (0, 0):
                raise type(error)(f"{error}. Kept for --resume: {self._kept()}") from error
            raise

    def _begin(self, *, there: bool, resume: bool) -> None:
        if there:
            self.tell(f"an unfinished run in {self.stage.partial} is discarded: --resume would have continued it")
        elif resume:
            self.tell(f"no unfinished run of {self.stage.out} to resume: starting from the beginning")
        self.stage.discard()
        self.accumulation.explore(self.examples[0])
        self.stage.create(self.accumulation.shapes(), self._widest())

    def _left(self) -> dict[str, tuple[int, ...]]:
        """The sums that neither a finished pass nor this one makes."""
        over = {*self._behind, *self._group}
        return {name: shape for name, shape in self.accumulation.shapes().items() if name not in over}

    def _in_all(self) -> int:
        """Passes, as far as can be known now."""
        return self.passes + bool(self._group) + len(grouped(self._left(), self.memory))

    def _settle(self, memory: int | None) -> None:
        """Decide what fits into memory, and say so where it is not everything."""
        left = self._left()
        self.memory = settled(memory, {**self._group, **left}, self.device)
        if bytes_of_sums(self._group) > self.memory:
            self.tell(
                f"the {self._done} examples of the pass under way are discarded: its sums do not fit into --memory"
            )
            self._group, self._done = {}, 0
            self.accumulation.begin(())
        if self._in_all() > 1:
            whole = bytes_of_sums(self.accumulation.shapes())
            reason = "half of what is free; see --memory" if memory is None else "--memory"
            self.tell(
                f"the sums take {size_of(whole)}, but only {size_of(self.memory)} may be in memory ({reason}): "
                f"{self._in_all()} passes over the data"
            )

    def _next(self) -> bool:
        """Begin the next pass, if there is one."""
        groups = grouped(self._left(), self.memory)
        if groups:
            self._group, self._done = groups[0], 0
            self.accumulation.begin(self._group)
        return bool(groups)

    def _see_all(self, interrupt: Callable[[], None]) -> None:
        """See all examples that are left, and save the sums now and then."""
        last, took = time.perf_counter(), 0.0
        count, in_all = len(self.examples), self._in_all()
        while self._done < count:
            interrupt()
            if self.progress:
                self.progress(self.passes * count + self._done, in_all * count)
            self.accumulation.see(self.examples[self._done : self._done + self.batch], self._done)
            self._done = min(self._done + self.batch, count)
            now = time.perf_counter()
            if now - last > max(SAVE_SECONDS, SAVE_SHARE * took) and self._done < count:
                self._try_to_save()
                last = time.perf_counter()
                took = last - now

    def _finish_group(self) -> None:
        """Put the sums on the disk, and forget them."""
        self.accumulation.finish()
        sums, fisher = self.accumulation.sums, self.facts["kind"] == FISHER
        shapes = {name: shape for name, shape in self._group.items() if name in sums}
        for name in shapes:
            self._measured[name] = _measure(sums[name])
            if not np.isfinite(self._measured[name]).all():
                self.accumulation.spoilt = True
                raise DataError(f"the sums of {name} overflow float32; are the model's weights sound?")
        self.largest = max(self.largest, bytes_of_sums(shapes))
        scale = 1 / len(self.examples) if fisher else 1.0
        self.stage.append(shapes, lambda name: _parts(sums[name], scale))
        self._behind += self._group
        self.passes += 1
        self._group, self._done = {}, 0
        self.accumulation.begin(())
        self._save()

    def _kept(self) -> str:
        passes, examples = self._saved
        if not passes:
            return f"the first {examples} examples"
        finished = f"{passes} of {self._in_all()} passes"
        return f"{finished}, and the first {examples} examples of the next" if examples else finished

    def _try_to_save(self) -> None:
        """What cannot be saved now is still in memory, and perhaps there is room again later."""
        try:
            self._save()
        except OutputError as error:
            if not self._told:
                self.tell(f"progress in this pass could not be saved; continuing: {error}")
            self._told = True

    def _save(self) -> None:
        sums = self.accumulation.sums
        self.stage.save(
            {name: tuple(total.shape) for name, total in sums.items()},
            lambda name: sums[name].cpu().numpy(),
            {
                "identity": self.identity,
                "passes": self.passes,
                "behind": self._behind,
                "measured": self._measured,
                "group": list(self._group),
                "done": self._done,
                "state": self.accumulation.state(),
            },
        )
        self._saved = (self.passes, self._done)

    def _restore(self) -> None:
        import torch

        with self.stage.resume() as (document, sums):
            found, wanted = document["identity"], json.loads(json.dumps(self.identity))
            changed = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
            if changed:
                listed = ", ".join(f"{name} was {found.get(name)}, is {wanted.get(name)}" for name in changed)
                raise OutputError(
                    f"the unfinished run in {self.stage.partial} is not this one ({listed}); undo the change, or run "
                    f"without --resume to discard its {document['passes']} passes and {document['done']} examples"
                )
            self.passes, self._done = document["passes"], document["done"]
            self._behind = list(document["behind"])
            self._measured = {name: (squares, total) for name, (squares, total) in document["measured"].items()}
            self.accumulation.restore(document["state"])
            shapes = self.accumulation.shapes()
            self._group = {name: shapes[name] for name in document["group"]}
            self.accumulation.begin(self._group)
            self.accumulation.restore(document["state"])
            for name, (shape, source) in sums.items():
                values = np.empty(shape, np.float32)
                if values.size:
                    source.read_into(values.reshape(-1).view(np.uint8), 0)
                self.accumulation.sums[name] = torch.from_numpy(values).to(self.device)
        self._saved = (self.passes, self._done)
        where = f"in pass {self.passes + 1}, " if self.passes else ""
        self.tell(f"continuing {where}after {self._done} of {len(self.examples)} examples")

    def _document(self) -> dict[str, Any]:
        """The document of the finished file."""
        document, passes = self._beginning(), self.accumulation
        if isinstance(passes, GramPass):
            if passes.tied:
                self.tell(f"left out, because the weight is shared:  {', '.join(passes.tied)}")
            if passes.missing:
                self.tell(f"no input reached {len(passes.missing)} layers: {', '.join(passes.missing[:3])}")
            return document | {
                "rows": {name: passes.rows[name] for name in self.stage.shapes},
                "same_input": {name: passes.owners[name] for name in passes.layers if passes.shares(name)},
                "transposed": passes.transposed,
            }
        squares, total = (sum(values) for values in zip(*self._measured.values(), strict=True))
        count, elements = len(self.examples), bytes_of_sums(self.stage.shapes) // 4
        if not total:
            self.tell(
                "every gradient is 0: they underflow in this number format, or the data asks nothing of the model"
            )
        return document | {"norm": squares**0.5 / count, "mean": total / count / max(1, elements)}

    def _widest(self) -> dict[str, Any]:
        """A document that is at least as long as the one to come, to make room for it."""
        document, passes = self._beginning(), self.accumulation
        if isinstance(passes, GramPass):
            longest = max(passes.layers, key=lambda name: len(json.dumps(name)))
            return document | {
                "rows": dict.fromkeys(passes.layers, 10**15),
                "same_input": dict.fromkeys(passes.layers, longest),
                "transposed": passes.transposed,
            }
        return document | {"norm": -1.2345678901234567e-300, "mean": -1.2345678901234567e-300}

    def _beginning(self) -> dict[str, Any]:
        tokens = sum(len(example.ids) for example in self.examples)
        return {"format": FORMAT, **self.facts, "examples": len(self.examples), "tokens": tokens}


def _parts(total: Any, scale: float) -> Iterator[Any]:
    """A tensor -> its float32 values times `scale`, part by part, on the CPU."""
    for part in total.reshape(-1).split(PART):
        yield (part if scale == 1 else part * scale).cpu().numpy()


def _measure(total: Any) -> tuple[float, float]:
    """A float32 tensor -> its sum of squares and its sum, in float64; the parts do not depend on groups."""
    squares = sums = 0.0
    for part in total.reshape(-1).split(PART):
        values = part.double()
        squares += float(values.square().sum())
        sums += float(values.sum())
    return squares, sums


@contextmanager
def _interrupts_between_batches() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits until the sums hold whole batches, so that they can be kept; a second one does not wait.

    Gives a function that raises where one was pressed.
    """
    pressed = False

    def press(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def interrupt() -> None:
        if pressed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield interrupt
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
