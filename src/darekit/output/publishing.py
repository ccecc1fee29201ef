# SPDX-License-Identifier: Apache-2.0
"""From a checked plan to a published model directory: stage, engine, companions, lock."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from darekit.checkpoints import OutputFile, index_json, sync_directory
from darekit.checkpoints.companions import Companions
from darekit.engine import execution
from darekit.errors import CheckpointError, DataError, OutputError
from darekit.machine import peak_rss
from darekit.methods import MERGE_METHODS
from darekit.output.card import agreed_license, model_card
from darekit.output.companions import write_companions
from darekit.output.lock import LOCK_NAME, identity, is_output_of, make_lock, times_of
from darekit.output.staging import Stage, open_stage
from darekit.planning.losses import names_of, rounding_lines, rounding_of, swallowed_notes
from darekit.planning.plan import Plan
from darekit.planning.travel.beside import companions_of
from darekit.recipe.stages import input_names
from darekit.wording import brief, size_of, some
from darekit.wording.progress import Progress

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Report:
    """What a finished merge, drop or unpack did.

    Attributes:
        output: the directory that was written.
        seconds: of the engine, first read to last write.
        fsync_seconds: until those bytes were on the disk.
        bytes_read: of tensors, by the engine.
        bytes_written: of weight files.
        peak_rss_bytes: largest resident memory of the process.
        tensors: of the output.
        parameters: elements of the output.
        kept: model -> elements of it that were not dropped, those that are exactly 0 among them.
        kept_of: what they are elements of: its delta or its weights; None where nothing could be dropped.
        rounding: what the output's format left of the changes, from a sample (`share` of them that are stored as the
            base, `error` and `scale` of what was applied, `models`: the share of each); None without a base.
        notes: notes and warnings given during the run.
    """

    output: str
    seconds: float
    fsync_seconds: float
    bytes_read: int
    bytes_written: int
    peak_rss_bytes: int
    tensors: int
    parameters: int
    kept: dict[str, int]
    rounding: dict[str, Any] | None = None
    notes: tuple[str, ...] = field(default=())
    kept_of: Literal["delta", "weights"] | None = "delta"

    def __repr__(self) -> str:
        return brief(
            self, f"{self.output}, {self.tensors} tensors, {self.parameters:,} parameters, "
            f"{size_of(self.bytes_written)} written in {self.seconds:.3g} s",
        )  # fmt: skip

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**self.__dict__, "notes": list(self.notes)}


def execute(
    plan: Plan,
    out: Path,
    *,
    threads: int | None,
    tile: int | None,
    overwrite: bool,
    resume: bool,
    allow_nonfinite: bool,
    progress: Progress | None,
    say: Callable[[str], None],
    accept: Callable[[Mapping[str, Mapping[str, Any]]], None] | None = None,
) -> Report:
    """Execute a plan whose checkpoints are open, and publish the result at `out`, unless `accept` of the tensors'
    records raises."""
    inputs = [file.path for file in plan.files]
    with (
        open_stage(
            out,
            identity=identity(plan, allow_nonfinite=allow_nonfinite),
            times=times_of(plan),
            overwrite=overwrite,
            resume=resume,
            inputs=inputs,
            is_complete=partial(is_output_of, plan),
        ) as stage,
        _remains_told(stage),
    ):
        for note in stage.notes:
            say(note)
        if stage.complete:
            stage.discard()
            say(f"{out} is complete, and its {LOCK_NAME} agrees with the recipe and the inputs: nothing is left to do")
            return Report(str(out), 0.0, 0.0, 0, 0, peak_rss(), len(plan.alignment.tensors), plan.parameters, {})
        _refuse_full_disk(plan, stage.path)
        if lost := _lost(plan, stage):
            say(f"gone or cut short since the unfinished run wrote them: {some(lost)}; their tensors are merged again")
        outputs: list[OutputFile] = []

        def sync() -> None:
            for output in outputs:
                output.sync()

        try:
            for shard in plan.shards:
                outputs.append(OutputFile.create(stage.path / shard.filename, shard.size))
            sync_directory(stage.path)  # the journal must not outlive the files that it tells of
            for output, shard in zip(outputs, plan.shards, strict=True):
                output.write(np.frombuffer(shard.header, np.uint8), 0)
            done = execution.run(
                plan.steps,
                outputs,
                names=[model.ref for model in plan.models],
                threads=threads,
                tile=tile,
                finished=stage.finished,
                allow_nonfinite=allow_nonfinite,
                on_tensor=stage.record,
                flush=partial(stage.flush, sync),
                progress=partial(_tell, progress, plan.bytes_to_read(stage.finished)) if progress else None,
            )
            began = time.perf_counter()
            stage.flush(sync)
            sync()
        except BaseException:  # Ctrl-C, a full disk: --resume shall find all that was finished
            with suppress(Exception):
                stage.flush(sync)
            raise
        finally:
            for output in outputs:
                output.close()
        _refuse_changed(plan)
        records = {**stage.finished, **done.records}
        if accept:
            accept(records)
        plan.refuse_damaged(records, "nothing was published")
        if len(plan.shards) > 1:
            _write(stage.path / INDEX_NAME, index_json(plan.shards))
        _write(stage.path / LOCK_NAME, json.dumps(make_lock(plan, records), indent=1) + "\n")
        rounding = rounding_of(plan, records.values())
        for warning in swallowed_notes(rounding):
            say(warning)
        for warning in _write_companions(plan, stage.path, out.name, rounding):
            say(warning)
        stage.publish()
        publishing = time.perf_counter() - began
    return Report(
        output=str(out),
        seconds=done.seconds,
        fsync_seconds=publishing,
        bytes_read=done.bytes_read,
        bytes_written=done.bytes_written,
        peak_rss_bytes=peak_rss(),
        tensors=len(plan.alignment.tensors),
        parameters=plan.parameters,
        kept=_kept(plan, records),
        rounding=rounding,
        kept_of=_kept_of(plan),
    )


@contextmanager
def _remains_told(stage: Stage) -> Iterator[None]:
    """What becomes of the unfinished files when the inputs fail a run."""
    try:
        yield
    except DataError:
        stage.discard()  # a repaired model, or --allow-nonfinite, is another run: nothing could resume this one
        raise
    except CheckpointError as error:
        raise type(error)(f"{error}. The unfinished output is in {stage.root}: run again, or delete it") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}. All tensors are there: free some space, then run again "
            "with --resume"
        ) from error


def _lost(plan: Plan, stage: Stage) -> list[str]:
    """Files of a resumed run that do not hold its finished tensors any more, which the stage forgets."""
    if not stage.finished:
        return []
    sizes = {path.name: path.stat().st_size for path in stage.path.glob("*.safetensors")}
    gone = {
        shard.filename: [place.name for place in shard.placements if place.name in stage.finished]
        for shard in plan.shards
        if sizes.get(shard.filename) != shard.size
    }
    stage.forget([name for names in gone.values() for name in names])
    return [filename for filename, names in gone.items() if names]


def _refuse_full_disk(plan: Plan, directory: Path) -> None:
    """What a resumed run has already written counts as free."""
    there = sum(getattr(path.stat(), "st_blocks", 0) * 512 for path in directory.glob("*.safetensors"))
    usage = shutil.disk_usage(directory)
    free = usage.free + there
    if usage.total and free < plan.bytes_out:  # some FUSE mounts report only zeros
        raise OutputError(
            f"the output needs {plan.bytes_out} bytes, and the disk of {directory} has {free} free; make room, or "
            "choose an OUT on another disk"
        )


def _tell(progress: Progress, total: int, done: int) -> None:
    progress(done, total)


def _refuse_changed(plan: Plan) -> None:
    changed = [str(file.path) for file in plan.files if file.changed()]
    if changed:
        raise CheckpointError(
            f"{', '.join(changed)} changed while it was read; nothing was published. Run again once "
            "nothing is writing to it"
        )


def _kept_of(plan: Plan) -> Literal["delta", "weights"] | None:
    """A method that takes models as they are (passthrough, slerp) has no deltas of which something is kept."""
    if plan.recipe.sparsify is not None:
        return plan.recipe.sparsify.on
    method = MERGE_METHODS[plan.recipe.merge_method]
    return None if plan.base is None or method.products == "models" or method.sums_models else "delta"


def _kept(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Surviving elements per model."""
    return {
        name: sum(record["kept"].get(str(k), 0) for record in records.values()) for k, name in enumerate(names_of(plan))
    }


def _write_companions(plan: Plan, directory: Path, title: str, rounding: Mapping[str, Any] | None) -> list[str]:
    recipe, found = plan.recipe, companions_of(plan)
    listed = [entry.model for entry in recipe.models]

    def card() -> str:
        recipes = {name: inner for name in input_names(recipe) if (inner := plan.recipe_named(name)) is not None}
        return model_card(
            base_model=recipe.base_model,
            models=[name for name in input_names(recipe) if name != recipe.base_model or name in listed],
            made_of={name: _stored_names(inner) for name, inner in recipes.items()},
            statistics=_statistics(plan),
            recipe_text=recipe.text,
            lock_name=LOCK_NAME,
            license=agreed_license(_stored_companions(plan)),
            title=title,
            summary=[f"Rounding: {line}" for line in rounding_lines(rounding)],
        )

    return write_companions(
        directory,
        config=found.config,
        files=found.files,
        chat_template=found.chat_template,
        recipe_text=recipe.text,
        card=card,
    )


def _stored_names(plan: Plan) -> list[str]:
    """The stored models that a result is made of, through all recipes that are models of it."""
    found = []
    for name in input_names(plan.recipe):
        inner = plan.recipe_named(name)
        found += [name] if inner is None else _stored_names(inner)
    return found


def _stored_companions(plan: Plan) -> list[Companions]:
    inner = {one.ref for one in plan.within}
    own = [checkpoint.companions for checkpoint in plan.checkpoints if checkpoint.ref not in inner]
    return own + [found for one in plan.within for found in _stored_companions(one.plan)]


def _statistics(plan: Plan) -> list[str]:
    own = [entry.stats for entry in plan.recipe.models if entry.stats]
    return own + [name for one in plan.within for name in _statistics(one.plan)]
