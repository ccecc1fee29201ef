# SPDX-License-Identifier: Apache-2.0
"""From a checked plan to a published model directory: stage, engine, companions, lock."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from darekit import engine, tiles
from darekit.checkpoints import Checkpoint, OutputFile, index_json
from darekit.dtypes import DTYPES, DType, dtype_named
from darekit.errors import CheckpointError, DataError, OutputError
from darekit.homology import label
from darekit.lock import LOCK_NAME, identity, make_lock
from darekit.output.card import agreed_license, model_card
from darekit.output.companions import write_companions
from darekit.output.config import merged_config
from darekit.output.tokenizer import TemplateChoice, choose_chat_template, model_files, tokenizer_files
from darekit.planning import Plan, heads_giver
from darekit.staging import Stage, open_stage
from darekit.trimming import settle_model_trim

INDEX_NAME = "model.safetensors.index.json"

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Report:
    """What a finished merge did. Times in seconds: `seconds` is the engine, first read to last write."""

    output: str
    seconds: float
    fsync_seconds: float
    bytes_read: int
    bytes_written: int
    peak_rss_bytes: int
    tensors: int
    parameters: int
    kept: dict[str, int]
    notes: tuple[str, ...] = field(default=())

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
    threads = threads or engine.default_threads()
    tile = tile or tiles.TILE
    inputs = [file.path for file in plan.files]
    with (
        open_stage(
            out,
            identity=identity(plan, allow_nonfinite=allow_nonfinite),
            overwrite=overwrite,
            resume=resume,
            inputs=inputs,
        ) as stage,
        _remains_told(stage),
    ):
        for note in stage.notes:
            say(note)
        began = time.perf_counter()
        steps = settle_model_trim(plan.steps, threads=threads, tile=tile, allow_nonfinite=allow_nonfinite)
        trimming = time.perf_counter() - began
        _refuse_full_disk(plan, stage.path)
        outputs = [OutputFile.create(stage.path / shard.filename, shard.size) for shard in plan.shards]

        def sync() -> None:
            for output in outputs:
                output.sync()

        try:
            for output, shard in zip(outputs, plan.shards, strict=True):
                output.write(np.frombuffer(shard.header, np.uint8), 0)
            execution = engine.execute(
                steps,
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
        records = {**stage.finished, **execution.records}
        if accept:
            accept(records)
        plan.refuse_damaged(records, "nothing was published")
        if len(plan.shards) > 1:
            _write(stage.path / INDEX_NAME, index_json(plan.shards))
        _write(stage.path / LOCK_NAME, json.dumps(make_lock(plan, records), indent=1) + "\n")
        for warning in _write_companions(plan, stage.path, out.name):
            say(warning)
        stage.publish()
        publishing = time.perf_counter() - began
    return Report(
        output=str(out),
        seconds=execution.seconds + trimming,
        fsync_seconds=publishing,
        bytes_read=execution.bytes_read,
        bytes_written=execution.bytes_written,
        peak_rss_bytes=peak_rss(),
        tensors=len(plan.alignment.tensors),
        parameters=plan.parameters,
        kept=_kept(plan, records),
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


def _refuse_full_disk(plan: Plan, directory: Path) -> None:
    """What a resumed run has already written counts as free."""
    there = sum(path.stat().st_blocks * 512 for path in directory.glob("*.safetensors"))
    usage = shutil.disk_usage(directory)
    free = usage.free + there
    if usage.total and free < plan.bytes_out:  # some FUSE mounts report only zeros
        raise OutputError(
            f"the output needs {plan.bytes_out} bytes, and the disk of {directory} has {free} free; make room, or "
            "choose an OUT on another disk"
        )


def _tell(progress: Progress, total: int, done: int) -> None:
    progress(done, total)


def peak_rss() -> int:
    """The process's largest resident size so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _refuse_changed(plan: Plan) -> None:
    changed = [str(file.path) for file in plan.files if file.changed()]
    if changed:
        raise CheckpointError(
            f"{', '.join(changed)} changed while it was read; nothing was published. Run again when it is still"
        )


def _kept(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Surviving elements per model; of two models with one name the later ones carry their place."""
    seen: Counter[str] = Counter()
    kept = {}
    for k, summary in enumerate(plan.summaries):
        seen[summary.ref] += 1
        name = summary.ref if seen[summary.ref] == 1 else f"{summary.ref} #{k + 1}"
        kept[name] = sum(record["kept"].get(str(k), 0) for record in records.values())
    return kept


def _main_dtype(plan: Plan) -> DType:
    """The format of most of the output's float bytes: what config.json must say."""
    sizes: Counter[str] = Counter()
    for shard in plan.shards:
        for place in shard.placements:
            if dtype_named(place.dtype).kind == "float":
                sizes[place.dtype] += max(1, place.nbytes)
    return DTYPES[sizes.most_common(1)[0][0]] if sizes else DTYPES["F32"]


@dataclass(frozen=True)
class Companions:
    """What lies beside an output's weights: config.json (None: no input has one), copied files, the chat template."""

    config: dict[str, Any] | None
    files: tuple[Path, ...]
    chat_template: TemplateChoice | None


def companions_of(plan: Plan) -> Companions:
    """Config of the base (of the model, where there is only one and the tokenizer is its own too), and the rest."""
    recipe = plan.recipe
    donor = plan.base or plan.models[0]
    tokenizer: Checkpoint = donor
    if recipe.tokenizer_source != "base":
        tokenizer = next(
            m for m, e in zip(plan.models, recipe.models, strict=True) if e.model == recipe.tokenizer_source
        )
        if len(plan.models) == 1 and tokenizer.config is not None:
            donor = tokenizer
        if tokenizer.directory is None or not tokenizer_files(tokenizer.directory):
            tokenizer = donor  # weights alone: the base's is better than none
    giver = heads_giver(recipe, plan.base, plan.models)
    if giver is not None and giver.config is not None:  # class, number of labels and their names go with the head
        donor = giver
    config = None
    if donor.config is not None:
        config = merged_config(
            donor.config, dtype=_main_dtype(plan), vocab_size=plan.alignment.vocab_size, tied=plan.alignment.tied
        )
    files = (
        *(tokenizer_files(tokenizer.directory) if tokenizer.directory else ()),
        *(model_files(donor.directory) if donor.directory else ()),
    )
    template = choose_chat_template(
        tokenizer.directory, [(label(model.ref), model.directory) for model in plan.models if model.directory]
    )
    return Companions(config, files, template)


def _write_companions(plan: Plan, directory: Path, title: str) -> list[str]:
    recipe, found = plan.recipe, companions_of(plan)
    directories = [checkpoint.directory for checkpoint in plan.checkpoints if checkpoint.directory]

    def card() -> str:
        return model_card(
            base_model=recipe.base_model,
            models=[entry.model for entry in recipe.models],
            statistics=[entry.stats for entry in recipe.models if entry.stats],
            recipe_text=recipe.text,
            lock_name=LOCK_NAME,
            license=agreed_license(directories),
            title=title,
        )

    warnings = write_companions(
        directory,
        config=found.config,
        files=found.files,
        chat_template=found.chat_template,
        recipe_text=recipe.text,
        card=card,
    )
    return ([found.chat_template.note] if found.chat_template and found.chat_template.note else []) + warnings
