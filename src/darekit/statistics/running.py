# SPDX-License-Identifier: Apache-2.0
"""One pass over data with a model that runs, into a statistics file: resumable, and visible only when complete."""

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
from darekit.checkpoints import FileRange, InputFile, read_header
from darekit.checkpoints.documents import parse_object
from darekit.errors import CheckpointError, DataError, OutputError, PlanError, Unsupported
from darekit.live.batches import padding_known
from darekit.live.data import Row, Tokens, read_rows, rows_digest, tokenize
from darekit.live.models import LiveModel, build, memory_told, one_thread, recipe_of
from darekit.output.card import public_name
from darekit.planning import Plan, open_plan
from darekit.statistics.files import FISHER, FORMAT, KEY, KINDS, refuse_existing, write_statistics
from darekit.statistics.passes import EMPIRICAL, LABELS, FisherPass, GramPass, Pass

UNFINISHED = f"{FORMAT}-unfinished"
MAX_LENGTH = 2048  # tokens of an example, where neither the model nor the caller asks for less
SAVE_SECONDS = 30.0  # between two savings of an unfinished run, more where a saving takes long
SAVE_SHARE = 20  # a saving may take one part in so many of the time

Progress = Callable[[int, int], None]  # examples done, examples in all


@dataclass(frozen=True)
class StatisticsReport:
    """What a finished pass did. `mean`: of a Fisher, over all its elements; None for Grams."""

    output: str
    kind: str
    examples: int
    tokens: int
    tensors: int
    bytes: int
    seconds: float
    mean: float | None
    notes: tuple[str, ...] = field(default=())

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
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> StatisticsReport:
    """Make what `fisher` or `regmean` must know of a model, in one pass over data (needs torch).

    Args:
        kind: fisher or gram.
        model: a checkpoint: directory, file or Hub id.
        data: a file of JSON lines, or the name of a dataset.
        out: the `.safetensors` file to write.
        labels: fisher: empirical (the data's), sampled (the model's own, drawn) or exact (expectation over a
            classifier's labels, or a regressor's normal distribution).
        seed: of what is drawn.
        limit: only the first rows.
        split: of a dataset.
        max_length: tokens of one example; the model's own limit, 2048 at most, where not given.
        batch_size: gram: examples at once. A Fisher takes one at a time.
        device: cpu, cuda, mps; the fastest there is where not given.
        dtype: what the model computes in; sums are float32.
        overwrite: replace statistics that are there.
        resume: go on with a run that was interrupted.
        progress: called with (examples done, examples in all).
        say: called with each note.

    Raises:
        DarekitError: see `darekit.errors`; what was finished is kept for `resume`.
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
    with open_plan(recipe) as plan, memory_told(f"making {kind} statistics"):
        live = build(plan, device=device, dtype=dtype)
        if live.tokenizer is None:
            raise CheckpointError(f"{model} has no tokenizer, so text cannot become tokens; copy its base's into it")
        length = min(max_length or MAX_LENGTH, live.max_length)
        examples = tokenize(live.tokenizer, rows, max_length=length)
        if kind == FISHER and live.task == "causal" and not any(any(example.asked[1:]) for example in examples):
            raise DataError(f"{data}: no row has a second token, so there is nothing to predict")
        batch = 1 if kind == FISHER else batch_size
        facts = _facts(kind, plan, live, rows, str(data), labels=labels, seed=seed, length=length)
        names = live.tensors(place.name for shard in plan.shards for place in shard.placements)
        with one_thread(live.device), padding_known(live):
            accumulation: Pass = FisherPass(live, names, labels=labels, seed=seed) if kind == FISHER else GramPass(
                live, names
            )  # fmt: skip
            try:
                run = _Run(out, accumulation, facts, batch, len(examples), resume, tell)
                run.over(examples, progress)
                document, scale = _finished(facts, accumulation, examples, tell)
                write_statistics(
                    out,
                    {name: tuple(total.shape) for name, total in accumulation.sums.items()},
                    lambda name: _array(accumulation.sums[name], scale),
                    document,
                )
                run.partial.unlink(missing_ok=True)
            finally:
                accumulation.close()
    return StatisticsReport(
        output=str(out),
        kind=kind,
        examples=len(examples),
        tokens=document["tokens"],
        tensors=len(accumulation.sums),
        bytes=out.stat().st_size,
        seconds=time.perf_counter() - began,
        mean=document.get("mean"),
        notes=tuple(notes),
    )


def _check_arguments(kind: str, model: str | Path, labels: str, batch_size: int, max_length: int | None) -> None:
    if kind not in KINDS:
        raise PlanError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    if labels not in LABELS:
        raise PlanError(f"labels {labels!r} is none of {', '.join(LABELS)}")
    if batch_size < 1:
        raise PlanError(f"batch size {batch_size} is impossible; use 1 or more")
    if max_length is not None and max_length < 2:
        raise PlanError(f"a length of {max_length} tokens leaves nothing to predict; use 2 or more")
    if Path(model).suffix in (".yaml", ".yml"):
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


def _finished(
    facts: Mapping[str, Any], accumulation: Pass, examples: Sequence[Tokens], tell: Callable[[str], None]
) -> tuple[dict[str, Any], float]:
    """The file's document, and what every sum is multiplied by."""
    document = {
        "format": FORMAT,
        **facts,
        "examples": len(examples),
        "tokens": sum(len(example.ids) for example in examples),
    }
    if isinstance(accumulation, GramPass):
        if accumulation.tied:
            tell(f"left out, because the weight is not this layer's alone: {', '.join(accumulation.tied)}")
        if accumulation.missing:
            tell(f"no input reached {len(accumulation.missing)} layers: {', '.join(accumulation.missing[:3])}")
        for total in accumulation.sums.values():
            total.copy_((total + total.T) / 2)  # products of matrices are symmetric but for the last bits
        document |= {
            "rows": accumulation.rows,
            "same_input": {name: owner for name, owner in accumulation.owners.items() if name != owner},
            "transposed": accumulation.transposed,
        }
        return document, 1.0
    squares = sum(float(total.double().square().sum()) for total in accumulation.sums.values())
    count = sum(total.numel() for total in accumulation.sums.values())
    mean = sum(float(total.double().sum()) for total in accumulation.sums.values()) / len(examples) / max(1, count)
    if not mean:
        tell("every gradient is 0: in this number format they vanish, or the data asks for nothing")
    return document | {"norm": squares**0.5 / len(examples), "mean": mean}, 1 / len(examples)


def _array(total: Any, scale: float) -> Any:
    return (total if scale == 1 else total * scale).cpu().numpy()


class _Run:
    """A pass that survives: its sums are saved now and then, and when it ends before its time."""

    def __init__(
        self,
        out: Path,
        accumulation: Pass,
        facts: Mapping[str, Any],
        batch: int,
        examples: int,
        resume: bool,
        tell: Callable[[str], None],
    ) -> None:
        self.partial = out.with_name(f".{out.name}.darekit-partial")
        self.accumulation, self.batch = accumulation, batch
        self.identity = {**facts, "batch_size": batch, "examples": examples}
        self.done = 0
        self.saved = 0
        if self.partial.exists() and resume:
            self._restore()
            tell(f"going on after {self.done} of {examples} examples")
        elif self.partial.exists():
            tell(f"an unfinished run in {self.partial} is discarded: --resume would have continued it")
            self.partial.unlink(missing_ok=True)
        elif resume:
            tell(f"no unfinished run of {out} to resume: starting anew")

    def over(self, examples: Sequence[Tokens], progress: Progress | None) -> None:
        """See all examples that are left, or save what was seen."""
        last, took = time.perf_counter(), 0.0
        try:
            with _interrupts_between_batches() as interrupt:
                while self.done < len(examples):
                    interrupt()
                    if progress:
                        progress(self.done, len(examples))
                    self.accumulation.see(examples[self.done : self.done + self.batch], self.done)
                    self.done = min(self.done + self.batch, len(examples))
                    now = time.perf_counter()
                    if now - last > max(SAVE_SECONDS, SAVE_SHARE * took) and self.done < len(examples):
                        self._save()
                        last = time.perf_counter()
                        took = last - now
        except BaseException as error:
            if self.done > self.saved and not self.accumulation.spoilt:
                with suppress(Exception):
                    self._save()
            if isinstance(error, DataError) and self.saved:
                raise DataError(f"{error}. The first {self.saved} examples are kept: --resume goes on") from error
            raise
        if progress:
            progress(self.done, len(examples))

    def _save(self) -> None:
        sums = self.accumulation.sums
        write_statistics(
            self.partial,
            {name: tuple(total.shape) for name, total in sums.items()},
            lambda name: _array(sums[name], 1.0),
            {"format": UNFINISHED, "identity": self.identity, "done": self.done, "state": self.accumulation.state()},
        )
        self.saved = self.done

    def _restore(self) -> None:
        import torch

        with _reading(self.partial) as (document, places):
            found = document.get("identity")
            if not isinstance(found, dict) or document.get("format") != UNFINISHED:
                raise OutputError(f"{self.partial} is no unfinished run of this version; delete it to start anew")
            wanted = json.loads(json.dumps(self.identity))
            changed = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
            if changed:
                listed = ", ".join(f"{name} was {found.get(name)}, is {wanted.get(name)}" for name in changed)
                raise OutputError(
                    f"the unfinished run in {self.partial} is not this one ({listed}); undo the change, or run "
                    f"without --resume to discard its {document.get('done')} examples"
                )
            shapes = {name: shape for name, (shape, _) in places.items()}
            self.accumulation.restore(document["state"], shapes)
            for name, (shape, source) in places.items():
                values = np.empty(shape, np.float32)
                if values.size:
                    source.read_into(values.reshape(-1).view(np.uint8), 0)
                self.accumulation.sums[name].copy_(torch.from_numpy(values))
            self.done = self.saved = int(document["done"])


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


@contextmanager
def _reading(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], FileRange]]]]:
    file = InputFile(path)
    try:
        metadata, placements = read_header(file)
        places = {p.name: (p.shape, FileRange(file, p.offset, p.nbytes)) for p in placements}
        yield parse_object(metadata.get(KEY, "{}").encode(), f"the metadata of {path}", strict=True), places
    finally:
        file.close()
