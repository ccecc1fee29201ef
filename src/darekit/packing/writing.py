# SPDX-License-Identifier: Apache-2.0
"""Writing a pack: plan as `dare drop` does > jobs > spans of leaves, into a spool > layout > copy > header.

Everything is read, drawn and encoded once, but for tensors of which only then some rows turn out to be unchanged.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from darekit import __version__
from darekit.checkpoints import (
    Checkpoint,
    InputFile,
    OutputFile,
    OutputTensor,
    sample_digest,
    sync_directory,
    traits_of,
)
from darekit.checkpoints.companions import CONFIG, content_of, matching
from darekit.checkpoints.digests import checkpoint_digest, tensor_digest
from darekit.dtypes import DTYPES, dtype_named
from darekit.errors import CheckpointError, OutputError, PlanError
from darekit.inputs.opening import packed_seed
from darekit.machine import peak_rss
from darekit.output.card import agreed_license, public_name
from darekit.packing.jobs import WORTH, Job, Terms, job_for, without_same_rows
from darekit.packing.spans import BUFFERS, Piece, Spool, make_span
from darekit.packs.format import (
    CODECS,
    FILE_ROLE,
    GROUP_LIMIT,
    NO_DIGEST,
    PATH,
    CompanionFile,
    Counts,
    Document,
    LeafTable,
    expected_counts,
    lay_out_parts,
    leaf_table,
    needs_table,
    render_header,
    stored_digest,
    value_sizes,
)
from darekit.packs.lane import READ_LEAVES
from darekit.packs.workers import run_all
from darekit.planning import checks
from darekit.planning.matching.alignment import AlignedTensor
from darekit.planning.opening import open_plan
from darekit.planning.plan import Plan
from darekit.planning.travel.merged import with_ids
from darekit.recipe import single
from darekit.wording import brief, size_of, some
from darekit.wording.progress import Progress

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BITS = (64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class PackReport:
    """What a finished pack is.

    Attributes:
        output: the file.
        seconds: from the first tensor read to the last byte written, without the plan.
        fsync_seconds: until those bytes were on the disk, under their name.
        bytes: of the file.
        model_bytes: of the model's tensors.
        tensors: of the model.
        same: tensors that are the base's to the bit.
        parameters: elements of the model.
        kept: elements that are stored.
        seed: effective seed of the mask.
        peak_rss_bytes: largest resident memory of the process.
        notes: notes and warnings given during the run.
        lossless: whether it holds the exact model.
    """

    output: str
    seconds: float
    fsync_seconds: float
    bytes: int
    model_bytes: int
    tensors: int
    same: int
    parameters: int
    kept: int
    seed: int
    peak_rss_bytes: int
    notes: tuple[str, ...] = ()
    lossless: bool = False

    def __repr__(self) -> str:
        return brief(
            self, f"{self.output}, {size_of(self.bytes)}, {self.ratio:.3g} times smaller than the model, keeps "
            f"{self.kept:,} of {self.parameters:,} parameters",
        )  # fmt: skip

    @property
    def ratio(self) -> float:
        """How many times smaller than the model."""
        return self.model_bytes / self.bytes

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**self.__dict__, "notes": list(self.notes), "ratio": self.ratio}


def pack(
    base: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    drop_rate: float | str | None = None,
    tau: float | None = None,
    lossless: bool = False,
    bits: int = 16,
    dense_bits: int | None = None,
    group: int = 64,
    codec: str = "auto",
    rescale: str = "paper",
    keep_dense: Sequence[str] = (),
    seed: int | None = None,
    vocab: str = "strict",
    threads: int | None = None,
    overwrite: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> PackReport:
    """Store a fine-tuned model as its kept deltas from a base, in one safetensors file.

    Args:
        base: the checkpoint that `model` was fine-tuned from.
        model: the fine-tuned model.
        out: the file to write.
        drop_rate: fraction of the delta that is dropped, in [0, 1], or "auto": each tensor's own, from a sample of its
            delta; required unless `lossless`.
        tau: the noise that `auto` allows, relative to a layer's output.
        lossless: store the exact model instead, bit for bit; nothing is drawn or rounded, so a seed, bits, dense_bits,
            group, rescale and keep_dense are refused.
        bits: per kept element: 64, 32 or 16 (exact if the model's format has no more), 8, 4, 2 or 1.
        dense_bits: the same for tensors that are not dropped; `bits` if not given, at least 4.
        group: kept elements that share a scale, where bits are 8 or fewer.
        codec: what is done to the stored values of a tensor: none; zstd, wherever that is smaller; or auto, where it
            saves at least a twentieth. A lossless pack is always compressed.
        rescale: paper (kept deltas times 1/(1-p)) or none.
        keep_dense: groups or glob patterns of tensors that are not dropped.
        seed: the mask's effective seed; derived from the model's content if not given, as `drop` does.
        vocab: what to do with vocabularies that differ: strict refuses, base keeps the base's rows, with its tokenizer.
        threads: worker threads.
        overwrite: replace `out`.
        force: continue even if the base looks wrong or too much is dropped.
        progress: called with (bytes done, bytes in all).
        say: receives notes and warnings as they arise.

    Returns:
        The file's size, what it keeps, and the notes.

    Raises:
        DarekitError: see `darekit.errors`; nothing is written then.

    Examples:
        >>> report = dk.pack("base", "math", "math.safetensors", drop_rate=0.9, seed=42)
        >>> report.kept, report.parameters
        (2359, 23712)

        The exact model, and a pack at four bits for each kept element:

        >>> exact = dk.pack("base", "math", "exact.safetensors", lossless=True)
        >>> small = dk.pack("base", "math", "small.safetensors", drop_rate=0.9, bits=4)
        >>> exact.bytes > report.bytes > small.bytes
        True
    """
    from darekit.machine import threads_of

    out = Path(out)
    if lossless:
        _refuse_idle(seed=seed, bits=bits, dense_bits=dense_bits, group=group, rescale=rescale, keep_dense=keep_dense)
    for count in (bits, *(() if dense_bits is None else (dense_bits,))):
        if count not in BITS:
            raise PlanError(f"{count!r} bits: expected one of {', '.join(map(str, BITS))}")
    dense_bits = max(bits, 4) if dense_bits is None else dense_bits
    if type(group) is not int or not 1 <= group <= GROUP_LIMIT:
        raise PlanError(f"groups of {group} elements; expected 1 to {GROUP_LIMIT}")
    if codec not in ("auto", *CODECS):
        raise PlanError(f"codec {codec!r}: expected auto, {' or '.join(CODECS)}")
    if rescale not in ("paper", "none"):
        raise PlanError(f"rescale {rescale!r}: expected paper or none")
    if vocab not in ("strict", "base"):
        raise PlanError(
            f"vocab {vocab!r}: expected strict or base. A pack stores differences from the base, so rows the base "
            "lacks cannot be packed"
        )
    if isinstance(drop_rate, str) and drop_rate != "auto":
        raise PlanError(f"drop rate {drop_rate!r}: expected a number in [0, 1], or auto")
    if tau is not None and drop_rate != "auto":
        raise PlanError("tau can only be used with the drop rate auto")
    if (drop_rate is None) != lossless:
        raise PlanError("a pack needs either a drop rate or lossless" + (", not both" if lossless else ""))
    recipe = single.drop_recipe(
        str(base), str(model), drop_rate=drop_rate or 0.0, rescale=rescale, keep_dense=keep_dense, seed=seed,
        vocab="strict" if lossless else vocab, base_extras="leave_out" if lossless else "keep",
        parameters={} if tau is None else {"tau": tau},
    )  # fmt: skip
    said: list[str] = []

    def note(line: str) -> None:
        said.append(line)
        if say:
            say(line)

    with open_plan(recipe, verbatim=lossless) as plan:
        _refuse_out(out, plan, overwrite)
        _refuse_other_names(plan, lossless=lossless)
        for line in (*plan.notes, *_unnameable(plan)):
            note(line)
        if not lossless and packed_seed(plan.models[0]) is not None:
            note(f"{model} is a pack: most of its delta has already been dropped, and this drops more of what is left")
        if not lossless and any(traits_of(info.source).values for info in plan.models[0].tensors.values()):
            note(
                f"{model} has an adapter, whose float32 product `dare drop` and `dare merge` use as it is: here it is "
                "packed as a merged model would hold it, rounded to the base's number format"
            )
        if not lossless:  # which another base would only make larger, and integers that differ do not trouble
            checks.check(plan, force=force, say=note)
        settings = {"lossless": True} if lossless else {
            "drop_rate": drop_rate, "bits": bits, "dense_bits": dense_bits, "group": group, "codec": codec,
            "keep_dense": list(recipe.sparsify.keep_dense if recipe.sparsify else ()),
            **({"tau": tau} if tau is not None else {}), **({"vocab": vocab} if vocab != "strict" else {}),
        }  # fmt: skip
        assert plan.seeds[0] is not None
        terms = Terms(plan.seeds[0], lossless, codec, rescale, bits, dense_bits, group)
        writer = Writer(plan, settings, terms, threads_of(threads))
        for line in () if lossless else writer.losses():
            note(line)
        written = writer.write(out, overwrite=overwrite, progress=progress)
        model_bytes = sum(info.nbytes for info in plan.models[0].tensors.values())
    tensors = written.document.tensors.values()
    return PackReport(
        str(out), written.seconds, written.fsync_seconds, written.size, model_bytes, len(tensors),
        sum(tensor.kind == "same" for tensor in tensors), sum(tensor.count for tensor in tensors),
        sum(tensor.kept for tensor in tensors), written.document.seed, peak_rss(), tuple(said), lossless,
    )  # fmt: skip


def _refuse_idle(**given: Any) -> None:
    """A lossless pack draws and rounds nothing: what says how is a mistake."""
    defaults = {name: one.default for name, one in signature(pack).parameters.items()}
    idle = [name for name, value in given.items() if value != defaults[name] and value not in ((), [])]
    if idle:
        found = ", ".join(f"{name} = {given[name]!r}" for name in idle)
        raise PlanError(
            f"a lossless pack stores the exact model: nothing is drawn or rounded, so {found} would have no effect; "
            f"leave {'it' if len(idle) == 1 else 'them'} out, or give a drop rate instead of lossless"
        )


def _refuse_other_names(plan: Plan, *, lossless: bool) -> None:
    """A pack holds tensors of its base, under their names; and it draws its masks by these names, a merge by those that
    a model is stored under."""
    assert plan.base is not None
    for tensor in plan.alignment.tensors:
        info = tensor.models[0]
        stored = plan.base.tensors.get(tensor.name)
        if stored is None and tensor.base is not None and tensor.base.name == tensor.name:
            raise PlanError(
                f"{plan.models[0].ref} has {tensor.name} of its own, which {plan.base.ref} ties to another tensor and "
                "does not store: a pack can only hold tensors that its base stores. Write the base out untied (drop "
                "the model with -p 1), and pack on that, or keep the whole model"
            )
        if stored is None:
            raise PlanError(
                f"{plan.base.ref} stores {tensor.name} as {tensor.base.name if tensor.base else 'nothing'}: write it "
                "out under its own names first (merge it alone with `merge_method: linear`), and pack on that"
            )
        if not lossless and info is not None and info.stored is not None and info.stored != tensor.name:
            raise PlanError(
                f"{plan.models[0].ref}: {tensor.name} is stored as {info.stored}, so a pack would drop other elements "
                "than a merge does; write the model out first (merge it alone with `merge_method: linear`), and pack it"
            )


def _refuse_out(out: Path, plan: Plan, overwrite: bool) -> None:
    if out.suffix != ".safetensors":
        raise OutputError(f"{out} must end in .safetensors, by which packs are recognised")
    if out.is_dir():
        raise OutputError(f"{out} is a directory; a pack is one file")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists; choose another name, or replace it with --overwrite")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"there is no directory {out.absolute().parent} to write {out.name} in")
    if any(file.path.resolve() == out.resolve() for file in plan.files):
        raise OutputError(f"{out} is one of the inputs; choose another name")


@dataclass(frozen=True)
class Written:
    """A published pack: bytes of the file, what stands in it, and the times of `PackReport`."""

    size: int
    document: Document
    seconds: float
    fsync_seconds: float


class Writer:
    """One pack being written."""

    def __init__(self, plan: Plan, settings: Mapping[str, Any], terms: Terms, threads: int) -> None:
        assert plan.base is not None
        self.plan, self.settings, self.terms, self.threads = plan, settings, terms, threads
        self.base, self.model = plan.base, plan.models[0]

    def losses(self) -> Iterator[str]:
        """What is lost beside what is dropped, where one would not expect it."""
        found = {
            info.dtype
            for aligned in self.plan.alignment.tensors
            if (info := aligned.models[0]) is not None
            and dtype_named(info.dtype).kind == "float"
            and not self.plan.is_kept_whole(0, aligned)
            and self.terms.encoding(self._rate(aligned), dtype_named(info.dtype))[0] == "delta"
        }
        for dtype in sorted(found):
            yield (
                f"{self.settings['bits']} bits are fewer than {dtype} has: deltas are rounded, and unpack differs from "
                f"`dare drop` by that; --bits {8 * DTYPES[dtype].itemsize} is exact"
            )

    def write(self, out: Path, *, overwrite: bool, progress: Progress | None) -> Written:
        """Scan, lay out, write out of sight, publish."""
        began = time.perf_counter()
        self._refuse_other_tensors()
        hidden, spool = (out.with_name(f".{out.name}.darekit-{word}") for word in ("part", "spool"))
        with _claimed(hidden, out):
            jobs = self._jobs()
            try:
                jobs, pieces = self._make_leaves(jobs, spool, progress)
                jobs = [_settled(job, self.terms.codec) for job in jobs]
                waiting = InputFile(spool)
                try:
                    size, document, waited = self._write_jobs(jobs, hidden, pieces, waiting)
                finally:
                    waiting.close()
            finally:
                with contextlib.suppress(OSError):
                    spool.unlink()
            self._refuse_changed()
            seconds = time.perf_counter() - began - waited
            _publish(hidden, out, overwrite)
        return Written(size, document, seconds, time.perf_counter() - began - seconds)

    def _write_jobs(
        self, jobs: Sequence[Job], hidden: Path, pieces: Sequence[Piece], spool: InputFile
    ) -> tuple[int, Document, float]:
        """All of the file; returns its size, what stands in it, and the seconds that the disk took to have it."""
        contents = dict(_companions(self.plan))
        files = tuple(
            CompanionFile(name, not _is_same_file(self.base, name, raw), xxhash.xxh3_128_hexdigest(raw))
            for name, raw in contents.items()
        )
        # No digest but the files' is known yet; the size of all of them is.
        document = self._document(jobs, files)
        stored = [file for file in files if file.stored]
        changed = [_Changed(job, _table_of(job), _tables(job)) for job in jobs if job.tensor.kind != "same"]
        parts = [part for one in changed for part in _parts_of(one)]
        parts += [OutputTensor(f"{FILE_ROLE}:{file.name}", "U8", (len(contents[file.name]),)) for file in stored]
        layout = lay_out_parts(parts, document)
        offsets = {name: place.offset for name, place in layout.places.items()}
        output = OutputFile.create(hidden, layout.size)
        try:
            for file in stored:
                output.write(np.frombuffer(contents[file.name], np.uint8), offsets[f"{FILE_ROLE}:{file.name}"])
            self._write_tables(changed, offsets, output)
            self._copy(changed, pieces, spool, offsets, output)
            document = self._with_digests(document, jobs)
            header = render_header(document, list(layout.places.values()), layout.data)
            output.write(np.frombuffer(header, np.uint8), 0)
            began = time.perf_counter()
            output.sync()
            waited = time.perf_counter() - began
        finally:
            output.close()
        return layout.size, document, waited

    def _document(self, jobs: Sequence[Job], files: tuple[CompanionFile, ...]) -> Document:
        return Document(
            seed=self.terms.seed,
            rescale=self.terms.rescale,
            tensors={job.tensor.name: job.tensor for job in jobs},
            files=files,
            base={
                "ref": public_name(self.base.ref),
                "revision": self.base.revision,
                "sample_digest": sample_digest(self.base, decoded=True).hex(),
                "content_digest": NO_DIGEST,
            },
            model={
                "ref": public_name(self.model.ref),
                "revision": self.model.revision,
                "sample_digest": self.plan.sample_digests[1].hex(),
            },
            settings=self.settings,
            license=agreed_license([self.model.companions]),
            tool=f"darekit {__version__}",
        )

    def _rate(self, aligned: AlignedTensor) -> float:
        return self.plan.rate_of(0, aligned)[0]

    def _jobs(self) -> list[Job]:
        """One for each tensor, in the plan's order."""
        aligned = self.plan.alignment.tensors
        # A few small reads each: threads would only wait for one another.
        found = {one.name: self._job(one, thorough=False) for one in aligned}

        def read(one: AlignedTensor) -> int:
            found[one.name] = self._job(one, thorough=True)
            return 1

        unclear = [one for one in aligned if found[one.name] is None]
        run_all(sorted(unclear, key=lambda one: -(one.base.nbytes if one.base else 0)), read, threads=self.threads)
        return [job for one in aligned if (job := found[one.name]) is not None]

    def _job(self, one: AlignedTensor, *, thorough: bool) -> Job | None:
        whole = self.plan.is_kept_whole(0, one)
        if one.name in self.plan.counters and not whole and not self.terms.lossless:
            one = replace(one, models=(None,))  # the base's
        return job_for(one, self._rate(one), self.terms, thorough=thorough, whole=whole)

    def _make_leaves(self, jobs: Sequence[Job], path: Path, progress: Progress | None) -> tuple[list[Job], list[Piece]]:
        """All leaves of all tensors that changed, in any order, into one file; and the jobs as they were done."""
        total = sum(info.nbytes for checkpoint in self.plan.checkpoints for info in checkpoint.tensors.values())
        with _told(path):
            spool = Spool(path)
            try:

                def tell(done: int) -> None:
                    if progress:
                        progress(min(done, total), total)

                pieces = self._make(jobs, spool, tell)
                again = {job.tensor.name: other for job in jobs if (other := without_same_rows(job)) is not None}
                if again:
                    pieces = [piece for piece in pieces if piece.name not in again]
                    pieces += self._make(list(again.values()), spool, lambda done: None)
                tell(total)
            finally:
                spool.close()
        return [again.get(job.tensor.name, job) for job in jobs], pieces

    def _make(self, jobs: Sequence[Job], spool: Spool, tell: Callable[[int], None]) -> list[Piece]:
        spans = [(job, first) for job in jobs if job.tensor.kind != "same"
                 for first in range(0, job.tensor.leaves, READ_LEAVES)]  # fmt: skip
        found: list[Piece] = []

        def work(span: tuple[Job, int]) -> int:
            piece, done = make_span(*span, self.terms, spool)
            found.append(piece)
            return done

        run_all(spans, work, threads=self.threads, tell=tell)
        return found

    def _copy(
        self, changed: Sequence[_Changed], pieces: Sequence[Piece], spool: InputFile, offsets: Mapping[str, int],
        output: OutputFile,
    ) -> None:  # fmt: skip
        """What waited in the spool, to its place."""
        tables = {one.job.tensor.name: one.table for one in changed}

        def work(piece: Piece) -> int:
            table, begin = tables[piece.name], piece.offset
            for role, size in piece.sizes.items():
                place = offsets.get(f"{role}:{piece.name}")  # none: of values and their frames only one is wanted
                if size and place is not None:
                    raw = BUFFERS.of("copy", size)
                    spool.read_into(raw, begin)
                    starts = table.scales if role == "scales" else table.values
                    output.write(raw, place + int(starts[piece.first]))
                begin += size
            return 1

        run_all(pieces, work, threads=self.threads)

    def _refuse_other_tensors(self) -> None:
        """A lossless pack is the whole model, and nothing but it."""
        aligned = self.plan.alignment.tensors
        kept = {info.stored_name for one in aligned if (info := one.models[0]) is not None}
        base_only = {one.name for one in aligned if one.models[0] is None and not one.copied}
        alignment = self.plan.alignment
        known = {*kept, *alignment.copies[1], *alignment.buffers[1]}
        other = sorted((set(self.model.tensors) - known) | base_only)
        if self.terms.lossless and other:
            raise PlanError(
                f"a lossless pack needs the same tensors in base and model; they differ in {', '.join(other[:4])}"
            )

    def _write_tables(self, changed: Sequence[_Changed], offsets: Mapping[str, int], output: OutputFile) -> None:
        """Everything but the leaves: changed rows, counts and sizes of leaves; their digests come first."""
        for one in changed:
            head = []
            for role, raw in one.small.items():
                output.write(raw.view(np.uint8), offsets[f"{role}:{one.job.tensor.name}"])
                head.append(xxhash.xxh3_128_digest(raw))
            one.job.digests["head"][:] = head

    def _with_digests(self, document: Document, jobs: Sequence[Job]) -> Document:
        tensors = {}
        for job in jobs:
            base = tensor_digest(job.digests["base"])
            result = base if job.tensor.kind == "same" else tensor_digest(job.digests["result"])
            stored = stored_digest([*job.digests["head"], *job.digests["stored"]])
            tensors[job.tensor.name] = replace(job.tensor, base=base, result=result, stored=stored)

        def content(which: str) -> str:
            return checkpoint_digest((t.name, t.dtype, t.shape, getattr(t, which)) for t in tensors.values())

        return replace(
            document,
            tensors=tensors,
            base={**document.base, "content_digest": content("base")},
            content_digest=content("result"),
        )

    def _refuse_changed(self) -> None:
        changed = [str(file.path) for file in self.plan.files if file.changed()]
        if changed:
            raise CheckpointError(
                f"{', '.join(changed)} changed while it was read; nothing was written. Run again once nothing is "
                "writing to it"
            )


def _settled(job: Job, codec: str) -> Job:
    """With what is known when all leaves are made: how many elements are kept, and whether frames are worth it."""
    if job.tensor.kind != "delta":
        return job
    job = replace(job, tensor=replace(job.tensor, kept=int(job.counts.sum())))
    if job.frames is None:
        return job
    sizes = int(job.frames.sum()) + job.tensor.leaves * _sizes_dtype(job.frames).itemsize
    bare = int(value_sizes(job.tensor, job.counts, job.values.itemsize).sum())
    if not job.bare or sizes < bare * (WORTH if codec == "auto" else 1):
        digests = {**job.digests, "stored": job.digests["framed"]}
        return replace(job, tensor=replace(job.tensor, codec="zstd", values=job.values.name), digests=digests)
    return replace(job, frames=None)


@dataclass(frozen=True)
class _Changed:
    """A tensor all of whose leaves are made. `table`: where they begin; `small`: role -> the parts that say so."""

    job: Job
    table: LeafTable
    small: Mapping[str, np.ndarray]


def _table_of(job: Job) -> LeafTable:
    return leaf_table(job.tensor, job.counts, job.values.itemsize, job.frames)


def _sizes_dtype(frames: Counts) -> np.dtype:
    return np.dtype("<u2" if frames.max(initial=0) <= 0xFFFF else "<u4")


def _tables(job: Job) -> dict[str, np.ndarray]:
    """Role -> content of the small parts that say where things are."""
    tensor, found = job.tensor, {}
    if job.rows is not None:
        found["rows"] = job.rows
    if tensor.kind == "lossless":
        found["leaves"] = job.counts.astype("<u4")
    elif tensor.kind == "delta" and needs_table(tensor, job.rows is not None):
        # At p = 0.99 the U16 of each leaf would be 2 % of a pack of 1 bit.
        differences = job.counts - expected_counts(tensor)
        if np.all(np.abs(differences) <= 127):
            found["leaves"] = differences.astype("i1")
        else:
            found["leaves"] = job.counts.astype("<u2" if job.counts.max() <= 0xFFFF else "<u4")
    if job.frames is not None:
        found["sizes"] = job.frames.astype(_sizes_dtype(job.frames))
    return found


def _parts_of(changed: _Changed) -> Iterator[OutputTensor]:
    job, table = changed.job, changed.table
    tensor = job.tensor
    if tensor.kind == "lossless" or job.frames is not None:
        yield OutputTensor(f"frames:{tensor.name}", "U8", (int(table.values[-1]),))
    else:
        yield OutputTensor(f"values:{tensor.name}", job.values.name, (int(table.values[-1]) // job.values.itemsize,))
    if tensor.bits:
        yield OutputTensor(f"scales:{tensor.name}", "BF16", (int(table.scales[-1]) // 2,))
    for role, content in changed.small.items():
        dtype = next(entry.name for entry in DTYPES.values() if entry.numpy == content.dtype)
        yield OutputTensor(f"{role}:{tensor.name}", dtype, content.shape)


def _companions(plan: Plan) -> Iterator[tuple[str, bytes]]:
    """Name -> content of the small files that make the result an ordinary model directory; what `dare drop` copies."""
    travel = plan.travel
    config = matching(travel.config.companions, (CONFIG,))
    if travel.config.config is not None and (travel.labels or travel.tokenizer is not travel.config):
        right = {**with_ids(travel.config.config, travel.tokenizer.config), **travel.labels}
        if right != travel.config.config:
            config = {CONFIG: (json.dumps(right, indent=2, ensure_ascii=False) + "\n").encode()}
    for name, content in {**config, **travel.files}.items():
        if PATH.fullmatch(name):
            with contextlib.suppress(OSError):
                yield name, content_of(content)


def _unnameable(plan: Plan) -> Iterator[str]:
    """Companions whose names are none in a pack."""
    names = [name for name in plan.travel.files if not PATH.fullmatch(name)]
    if names:
        yield (
            f"not packed: {some(names)}. Names in a pack may contain only letters, digits, dots and dashes; copy the "
            "files you need to the unpacked model yourself"
        )


def _is_same_file(base: Checkpoint, name: str, raw: bytes) -> bool:
    try:
        return name in base.companions and content_of(base.companions[name]) == raw
    except OSError:
        return False


@contextlib.contextmanager
def _claimed(hidden: Path, out: Path) -> Iterator[None]:
    """Hold the hidden file alone; whatever goes wrong, it is gone then."""
    with _told(out):
        descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OutputError(f"another run is writing {out}; wait for it, or choose another name") from error
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                hidden.unlink()
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _publish(hidden: Path, out: Path, overwrite: bool) -> None:
    with _told(out):
        if out.exists() and not overwrite:
            raise OutputError(f"{out} appeared while the pack was written; nothing was replaced")
        hidden.replace(out)
        sync_directory(out.absolute().parent)
