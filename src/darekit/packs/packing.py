# SPDX-License-Identifier: Apache-2.0
"""Writing a pack: plan as `dare drop` does > what changed > leaves in any order, into a spool > layout > copy > header.

Everything is read, drawn and encoded once. How long leaves are is known when they are made, so they wait in a file
beside the output until all are; memory is a few leaves per thread, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from darekit import __version__, api
from darekit.checkpoints import Checkpoint, InputFile, OutputFile, OutputTensor, Source, sync_directory
from darekit.digests import LEAF, checkpoint_digest, tensor_digest
from darekit.dtypes import DTYPES, Bytes, DType, dtype_named
from darekit.errors import CheckpointError, DataError, OutputError, PlanError
from darekit.homology import AlignedTensor
from darekit.naming import has_vocabulary_rows
from darekit.output.card import agreed_license, public_name
from darekit.output.tokenizer import model_files, tokenizer_files
from darekit.packs.format import (
    CODECS,
    FILE_ROLE,
    GROUP_LIMIT,
    NO_DIGEST,
    CompanionFile,
    Counts,
    Document,
    LeafTable,
    PackedTensor,
    expected_counts,
    full_counts,
    lay_out_parts,
    leaf_table,
    needs_table,
    render_header,
    stored_digest,
    value_sizes,
)
from darekit.packs.frames import can_shrink, compress_values
from darekit.packs.lane import LANE_LEAVES, Encoded, lane_for
from darekit.packs.leaves import Mask, encode, factor_of, restore, take
from darekit.packs.lossless import compress
from darekit.packs.opening import packed_seed
from darekit.packs.workers import run_all
from darekit.planning import Plan, drop_rate_of, open_plan
from darekit.running import Progress, peak_rss

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LEAVES = 16  # one job: read, encoded and written at once
BITS = (64, 32, 16, 8, 4, 2, 1)
WORTH = 0.95  # of the values' size: what a codec must get below, as decoding costs time
SAMPLED = 4  # leaves, which tell of tensors with at least 16 whether it will; of smaller ones all do
SAMPLE = 4096  # bytes at the start, in the middle and at the end, which tell most changed tensors at once


@dataclass(frozen=True)
class PackReport:
    """What a finished pack is. `ratio`: the model's bytes over the pack's.

    Times in seconds, as of a merge: `seconds` from the first tensor read to the last byte written, without the plan;
    `fsync_seconds` until those bytes are on the disk, under their name.
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
            delta; to be given unless `lossless`.
        tau: the noise that `auto` allows, relative to a layer's output.
        lossless: store the exact model instead, bit for bit; bits, group, rescale and keep_dense mean nothing then.
        bits: per kept element: 64, 32 or 16 (exact where the format has no more), 8, 4, 2 or 1.
        dense_bits: the same for tensors that are not dropped; `bits` where not given, at least 4.
        group: kept elements that share a scale, where bits are 8 or fewer.
        codec: what is done to the stored values of a tensor: none; zstd, wherever that is smaller; or auto, where it
            saves at least a twentieth. A lossless pack is always compressed.
        rescale: paper (kept deltas times 1/(1-p)) or none.
        keep_dense: groups or glob patterns of tensors that are not dropped.
        seed: the mask's effective seed; derived from the model's content where not given, as `drop` does.
        vocab: what to do with vocabularies that differ: strict refuses, base keeps the base's rows, with its tokenizer.
        threads: worker threads.
        overwrite: replace `out`.
        force: go on although the base looks wrong or too much is dropped.
        progress: called with (bytes done, bytes in all).
        say: receives notes and warnings as they arise.

    Raises:
        DarekitError: see `darekit.errors`; nothing is written then.
    """
    from darekit.engine import default_threads

    out = Path(out)
    dense_bits = max(bits, 4) if dense_bits is None else dense_bits
    if bits not in BITS or dense_bits not in BITS:
        raise PlanError(f"{bits if bits not in BITS else dense_bits} bits are none of {', '.join(map(str, BITS))}")
    if not 1 <= group <= GROUP_LIMIT:
        raise PlanError(f"groups of {group} elements; expected 1 to {GROUP_LIMIT}")
    if codec not in ("auto", *CODECS):
        raise PlanError(f"codec {codec!r}: a pack knows auto, {' and '.join(CODECS)}")
    if rescale not in ("paper", "none"):
        raise PlanError(f"rescale {rescale!r}: a pack knows paper and none")
    if vocab not in ("strict", "base"):
        raise PlanError(
            f"vocab {vocab!r}: a pack knows strict and base. Rows that the base does not have are no delta from it"
        )
    if isinstance(drop_rate, str) and drop_rate != "auto":
        raise PlanError(f"drop rate {drop_rate!r}: a number in [0, 1], or auto")
    if tau is not None and drop_rate != "auto":
        raise PlanError("tau goes with the drop rate auto")
    if (drop_rate is None) != lossless:
        raise PlanError("a pack needs either a drop rate or lossless" + (", not both" if lossless else ""))
    recipe = api.drop_recipe(
        str(base), str(model), drop_rate=drop_rate or 0.0, rescale=rescale, keep_dense=keep_dense, seed=seed,
        vocab="strict" if lossless else vocab, parameters={} if tau is None else {"tau": tau},
    )  # fmt: skip
    said: list[str] = []

    def note(line: str) -> None:
        said.append(line)
        if say:
            say(line)

    with open_plan(recipe) as plan:
        _refuse_out(out, plan, overwrite)
        for line in plan.notes:
            note(line)
        if not lossless and packed_seed(plan.models[0]) is not None:
            note(f"{model} is a pack: most of its delta was dropped already, and this drops from the rest")
        if not lossless:  # which another base would only make larger, and integers that differ do not trouble
            api.check(plan, force=force, say=note)
        settings = {"lossless": True} if lossless else {
            "drop_rate": drop_rate, "bits": bits, "dense_bits": dense_bits, "group": group, "codec": codec,
            "keep_dense": list(recipe.sparsify.keep_dense if recipe.sparsify else ()),
            **({"tau": tau} if tau is not None else {}), **({"vocab": vocab} if vocab != "strict" else {}),
        }  # fmt: skip
        writer = Writer(plan, settings, rescale, threads or default_threads())
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


def _refuse_out(out: Path, plan: Plan, overwrite: bool) -> None:
    if out.suffix != ".safetensors":
        raise OutputError(f"{out} must end in .safetensors: a pack is such a file, and is known by its name")
    if out.is_dir():
        raise OutputError(f"{out} is a directory; a pack is one file")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists; choose another name, or replace it with --overwrite")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"there is no directory {out.absolute().parent} to write {out.name} in")
    if any(file.path.resolve() == out.resolve() for checkpoint in plan.checkpoints for file in checkpoint.files):
        raise OutputError(f"{out} is one of the inputs; choose another name")


def encoding_for(bits: int, dtype: DType) -> tuple[str, DType]:
    """Bits asked for and the fine-tuned tensor's format -> encoding, and the format of the values."""
    if bits >= 8 * dtype.itemsize:
        return "exact", dtype
    if bits >= 16:
        return "delta", DTYPES["F32" if bits == 32 else "BF16"]
    return f"int{bits}", DTYPES["U8"]


@dataclass(frozen=True)
class _Job:
    """A tensor on its way into the pack.

    `digests`: of every leaf of base, result, and stored bytes, as values and as frames; `frames`: bytes of every leaf's
    frame, where there are; `bare`: whether leaves are kept without frames too, until all are made.
    """

    source: AlignedTensor
    tensor: PackedTensor
    values: DType
    counts: Counts
    rows: Bytes | None
    digests: Mapping[str, list[bytes]]
    frames: Counts | None = None
    bare: bool = True


@dataclass(frozen=True)
class _Piece:
    """Leaves of one tensor from `first` on, as they wait in the spool: bytes of their values, frames and scales."""

    name: str
    first: int
    offset: int
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Written:
    """A published pack: bytes of the file, what stands in it, and the times of `PackReport`."""

    size: int
    document: Document
    seconds: float
    fsync_seconds: float


class _Buffers(threading.local):
    """What leaves are read into, one for the base and one for the model in each thread: fresh pages are dear."""

    def __init__(self) -> None:
        self._held = [np.empty(0, np.uint8) for _ in range(2)]

    def of(self, *sizes: int) -> list[Bytes]:
        """Two buffers, (size,) uint8 each, with whatever was in them."""
        for place, size in enumerate(sizes):
            if self._held[place].size < size:
                self._held[place] = np.empty(size, np.uint8)
        return [held[:size] for held, size in zip(self._held, sizes, strict=True)]


_BUFFERS = _Buffers()


class Writer:
    """One pack being written."""

    def __init__(self, plan: Plan, settings: Mapping[str, Any], rescale: str, threads: int) -> None:
        assert plan.base is not None and plan.seeds[0] is not None
        self.lossless = bool(settings.get("lossless"))
        self.codec = str(settings.get("codec", "none"))
        self.plan, self.settings, self.rescale, self.threads = plan, settings, rescale, threads
        self.base, self.model, self.seed = plan.base, plan.models[0], plan.seeds[0]

    def losses(self) -> Iterator[str]:
        """What is lost beside what is dropped, where one would not expect it."""
        found = {
            info.dtype
            for aligned in self.plan.alignment.tensors
            if (info := aligned.models[0]) is not None
            and dtype_named(info.dtype).kind == "float"
            and encoding_for(self._bits(aligned), dtype_named(info.dtype))[0] == "delta"
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
            jobs = self._scan()
            try:
                pieces = self._encode(jobs, spool, progress)
                jobs = [_settled(job, self.codec) for job in jobs]
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
        self, jobs: Sequence[_Job], hidden: Path, pieces: Sequence[_Piece], spool: InputFile
    ) -> tuple[int, Document, float]:
        """All of the file; returns its size, what stands in it, and the seconds that the disk took to have it."""
        # Cut to the base's rows, the model does not know the tokens that its own tokenizer and config speak of.
        contents = dict(_companions(self.base if self.settings.get("vocab") == "base" else self.model))
        files = tuple(
            CompanionFile(name, not _is_same_file(self.base, name, raw), xxhash.xxh3_128_hexdigest(raw))
            for name, raw in contents.items()
        )
        # No digest but the files' is known yet; the size of all of them is.
        document = self._document(jobs, files)
        stored = [file for file in files if file.stored]
        parts = [part for job in jobs for part in _parts_of(job)]
        parts += [OutputTensor(f"{FILE_ROLE}:{file.name}", "U8", (len(contents[file.name]),)) for file in stored]
        layout = lay_out_parts(parts, document)
        offsets = {name: place.offset for name, place in layout.places.items()}
        output = OutputFile.create(hidden, layout.size)
        try:
            for file in stored:
                output.write(np.frombuffer(contents[file.name], np.uint8), offsets[f"{FILE_ROLE}:{file.name}"])
            self._write_tables(jobs, offsets, output)
            self._copy(jobs, pieces, spool, offsets, output)
            document = self._with_digests(document, jobs)
            header = render_header(document, list(layout.places.values()), layout.data)
            output.write(np.frombuffer(header, np.uint8), 0)
            began = time.perf_counter()
            output.sync()
            waited = time.perf_counter() - began
        finally:
            output.close()
        return layout.size, document, waited

    def _document(self, jobs: Sequence[_Job], files: tuple[CompanionFile, ...]) -> Document:
        return Document(
            seed=self.seed,
            rescale=self.rescale,
            tensors={job.tensor.name: job.tensor for job in jobs},
            files=files,
            base={
                "ref": public_name(self.base.ref),
                "revision": self.base.revision,
                "sample_digest": self.plan.sample_digests[0].hex(),
                "content_digest": NO_DIGEST,
            },
            model={
                "ref": public_name(self.model.ref),
                "revision": self.model.revision,
                "sample_digest": self.plan.sample_digests[1].hex(),
            },
            settings=self.settings,
            license=agreed_license([self.model.directory] if self.model.directory else []),
            tool=f"darekit {__version__}",
        )

    def _bits(self, aligned: AlignedTensor) -> int:
        rate, _ = drop_rate_of(self.plan.recipe, 0, aligned)
        return int(self.settings["bits" if rate > 0 else "dense_bits"])

    def _scan(self) -> list[_Job]:
        """What is stored of each tensor: nothing where nothing changed, and no row that did not."""
        aligned = self.plan.alignment.tensors
        found: dict[str, _Job] = {}

        def scan(one: AlignedTensor) -> int:
            found[one.name] = self._scan_tensor(one)
            return 1

        run_all(sorted(aligned, key=lambda one: -(one.base.nbytes if one.base else 0)), scan, threads=self.threads)
        return [found[one.name] for one in aligned]

    def _scan_tensor(self, aligned: AlignedTensor) -> _Job:
        aligned = _with_all_rows(aligned)
        base, tuned = aligned.base, aligned.models[0]
        assert base is not None
        rate, _ = drop_rate_of(self.plan.recipe, 0, aligned)
        tensor = PackedTensor(aligned.name, base.dtype, base.shape, "same")
        floats = dtype_named(base.dtype).kind == "float"
        if self.lossless:
            return self._scan_exactly(aligned, tensor)
        if tuned is None:
            return _same(aligned, tensor, _leaf_digests(aligned))
        bitmap = None
        alike = tuned.dtype == base.dtype
        if alike and (not floats or rate == 0 or has_vocabulary_rows(base.name, base.shape) or _looks_same(aligned)):
            changed, leaves = _changed_rows(aligned, tensor)
            if not changed.any():
                return _same(aligned, tensor, leaves)
            if not changed.all():
                bitmap = np.packbits(changed, bitorder="little")
        if not floats:
            raise DataError(
                f"{base.name} ({base.dtype}) differs from the base's. The delta of integers cannot be stored; if the "
                "model is quantised, dequantise it first"
            )
        encoding, values = encoding_for(self._bits(aligned), dtype_named(tuned.dtype))
        group = self.settings["group"] if values.name == "U8" else 0
        tensor = replace(tensor, kind="delta", drop_rate=rate, encoding=encoding, group=group)
        if bitmap is not None:
            saved = (1 - changed.mean()) * tensor.count * (1 - rate) * (tensor.bits or 8 * values.itemsize) / 8
            if saved <= bitmap.size + 2 * tensor.leaves:
                bitmap = None
        counts = np.zeros(tensor.leaves, np.int64)
        job = _Job(aligned, tensor, values, counts, bitmap, _digest_lists(tensor))
        if self.codec == "none" or not can_shrink(tensor):
            return job
        sampled = self.codec == "auto" and tensor.leaves >= 4 * SAMPLED
        if sampled and not self._looks_worth(job):
            return job
        return replace(job, frames=np.zeros(tensor.leaves, np.int64), bare=not sampled)

    def _looks_worth(self, job: _Job) -> bool:
        """Whether a few leaves, spread over a tensor, say that frames will pay."""
        tensor, base, tuned = job.tensor, job.source.base, job.source.models[0]
        assert base is not None and tuned is not None
        mask, dtype, bare, framed = Mask(tensor, self.seed, job.rows), DTYPES[tuned.dtype], 0, 0
        for leaf in ((2 * i + 1) * tensor.leaves // (2 * SAMPLED) for i in range(SAMPLED)):
            kept, indices = [], mask.indices(leaf)
            for info, own in ((base, DTYPES[tensor.dtype]), (tuned, dtype)):
                raw = np.empty(LEAF * own.itemsize, np.uint8)
                info.source.read_into(raw, leaf * raw.size)
                kept.append(take(raw, own, indices))
            try:
                values, _ = encode(tensor, kept[0], kept[1], job.values, dtype)
            except DataError:  # it will be said of the whole tensor
                return True
            bare += values.size
            framed += compress_values(tensor, job.values, values, kept[0]).size + 2
        return framed < bare * WORTH

    def _scan_exactly(self, aligned: AlignedTensor, tensor: PackedTensor) -> _Job:
        base, tuned = aligned.base, aligned.models[0]
        assert base is not None and tuned is not None
        if tuned.dtype != base.dtype:
            raise PlanError(
                f"{base.name} is {tuned.dtype} in the model and {base.dtype} in the base; a lossless pack needs equal "
                "formats. Convert the base, or pack with a drop rate"
            )
        if _looks_same(aligned):
            changed, leaves = _changed_rows(aligned, tensor)
            if not changed.any():
                return _same(aligned, tensor, leaves)
        tensor = replace(tensor, kind="lossless")
        counts = np.zeros(tensor.leaves, np.int64)
        return _Job(aligned, tensor, DTYPES["U8"], counts, None, _digest_lists(tensor))

    def _encode(self, jobs: Sequence[_Job], spool: Path, progress: Progress | None) -> list[_Piece]:
        """All leaves of all tensors that changed, in any order, into one file."""
        spans = [(job, first) for job in jobs if job.tensor.kind != "same"
                 for first in range(0, job.tensor.leaves, LEAVES)]  # fmt: skip
        total = sum(info.nbytes for checkpoint in self.plan.checkpoints for info in checkpoint.tensors.values())
        found: list[_Piece] = []
        lock = threading.Lock()
        with _told(spool), spool.open("wb") as file:

            def work(span: tuple[_Job, int]) -> int:
                job, first = span
                parts, done = self._compress_span(job, first) if self.lossless else self._encode_span(job, first)
                raw = b"".join(piece for pieces in parts.values() for piece in pieces)
                sizes = {role: sum(map(len, pieces)) for role, pieces in parts.items()}
                with lock:
                    found.append(_Piece(job.tensor.name, first, file.tell(), sizes))
                    file.write(raw)
                return done

            def tell(done: int) -> None:
                if progress:
                    progress(done, total)

            run_all(spans, work, threads=self.threads, tell=tell)
            tell(total)
        return found

    def _copy(
        self, jobs: Sequence[_Job], pieces: Sequence[_Piece], spool: InputFile, offsets: Mapping[str, int],
        output: OutputFile,
    ) -> None:  # fmt: skip
        """What waited in the spool, to its place."""
        tables = {job.tensor.name: _table_of(job) for job in jobs if job.tensor.kind != "same"}

        def work(piece: _Piece) -> int:
            table, begin = tables[piece.name], piece.offset
            for role, size in piece.sizes.items():
                place = offsets.get(f"{role}:{piece.name}")  # none: of values and their frames only one is wanted
                if size and place is not None:
                    raw = np.empty(size, np.uint8)
                    spool.read_into(raw, begin)
                    starts = table.scales if role == "scales" else table.values
                    output.write(raw, place + int(starts[piece.first]))
                begin += size
            return 1

        run_all(pieces, work, threads=self.threads)

    def _refuse_other_tensors(self) -> None:
        """A lossless pack is the whole model, and nothing but it."""
        names = {aligned.name for aligned in self.plan.alignment.tensors}
        if self.lossless and names != set(self.model.tensors):
            other = sorted(names ^ set(self.model.tensors))
            raise PlanError(
                f"a lossless pack needs the same tensors in base and model; they differ in {', '.join(other[:4])}"
            )

    def _write_tables(self, jobs: Sequence[_Job], offsets: Mapping[str, int], output: OutputFile) -> None:
        """Everything but the leaves: changed rows, counts and sizes of leaves; their digests come first."""
        for job in jobs:
            head = []
            for role, raw in _tables(job).items():
                output.write(raw.view(np.uint8), offsets[f"{role}:{job.tensor.name}"])
                head.append(xxhash.xxh3_128_digest(raw))
            job.digests["head"][:] = head

    def _encode_span(self, job: _Job, first: int) -> tuple[dict[str, list[bytes]], int]:
        """Some leaves of one tensor -> their values, frames and scales, and the bytes read."""
        tensor, info = job.tensor, job.source.models[0]
        assert job.source.base is not None and info is not None
        formats = DTYPES[tensor.dtype], DTYPES[info.dtype]
        mask, factor = Mask(tensor, self.seed, job.rows), factor_of(tensor, self.rescale)
        lane = lane_for(mask, job.values, factor) if formats[1].name == "BF16" else None
        step = LANE_LEAVES if lane else 1
        buffers = _BUFFERS.of(*(step * LEAF * dtype.itemsize for dtype in formats))
        parts: dict[str, list[bytes]] = {"values": [], "frames": [], "scales": []}
        last, done = min(first + LEAVES, tensor.leaves), 0
        for at in range(first, last, step):
            end = min(at + step, last)
            count = min(end * LEAF, tensor.count) - at * LEAF
            before, after = (buffer[: count * dtype.itemsize] for buffer, dtype in zip(buffers, formats, strict=True))
            job.source.base.source.read_into(before, at * LEAF * formats[0].itemsize)
            info.source.read_into(after, at * LEAF * formats[1].itemsize)
            done += before.size + after.size
            cuts = [
                before[n : n + LEAF * formats[0].itemsize] for n in range(0, before.size, LEAF * formats[0].itemsize)
            ]
            job.digests["base"][at:end] = map(xxhash.xxh3_128_digest, cuts)
            try:
                if lane:
                    made = lane.encode(before, after, at, job.counts[at:end])
                else:
                    made = [self._encode_leaf(job, mask, factor, formats[1], at, before, after)]
            except CheckpointError as error:
                raise DataError(f"{tensor.name}: the result would be NaN or Inf: smaller drop rate?") from error
            job.digests["result"][at:end] = map(xxhash.xxh3_128_digest, cuts)
            for leaf, found in enumerate(made, at):
                self._keep_leaf(job, leaf, found, parts)
        return parts, done

    @staticmethod
    def _encode_leaf(
        job: _Job, mask: Mask, factor: np.float32, dtype: DType, leaf: int, before: Bytes, after: Bytes
    ) -> Encoded:
        """One leaf of the base, in place the result, and of the model, whose format is `dtype`, the general way."""
        own = DTYPES[job.tensor.dtype]
        indices = None if mask.whole else mask.indices(leaf)
        kept = (before, after) if indices is None else (take(before, own, indices), take(after, dtype, indices))
        job.counts[leaf] = kept[0].size // own.itemsize
        values, scales = encode(job.tensor, *kept, job.values, dtype)
        origin = kept[0].copy() if indices is None and job.frames is not None else kept[0]
        restore(job.tensor, job.values, factor, indices, values, scales, before)
        return Encoded(origin, values, scales)

    @staticmethod
    def _keep_leaf(job: _Job, leaf: int, found: Encoded, parts: Mapping[str, list[bytes]]) -> None:
        """What is written of a leaf, and its digests."""
        values, scales = found.values.tobytes(), found.scales.tobytes()
        if job.bare:
            job.digests["stored"][leaf] = xxhash.xxh3_128_digest(values + scales)
        parts["scales"].append(scales)
        if job.bare:
            parts["values"].append(values)
        if job.frames is not None:
            frame = compress_values(job.tensor, job.values, found.values, found.base).tobytes()
            job.frames[leaf] = len(frame)
            job.digests["framed"][leaf] = xxhash.xxh3_128_digest(frame + scales)
            parts["frames"].append(frame)

    def _compress_span(self, job: _Job, first: int) -> tuple[dict[str, list[bytes]], int]:
        """Some leaves of one tensor -> their lossless frames, and the bytes read."""
        base, tuned = job.source.base, job.source.models[0]
        assert base is not None and tuned is not None
        itemsize = DTYPES[job.tensor.dtype].itemsize
        frames, done = [], 0
        for leaf in range(first, min(first + LEAVES, job.tensor.leaves)):
            raws = []
            for source in (base.source, tuned.source):
                raw = np.empty(min(LEAF * itemsize, base.nbytes - leaf * LEAF * itemsize), np.uint8)
                source.read_into(raw, leaf * LEAF * itemsize)
                raws.append(raw)
                done += raw.size
            frame = compress(raws[0], raws[1], itemsize)
            job.counts[leaf] = frame.size
            for key, raw in (("base", raws[0]), ("result", raws[1]), ("stored", frame)):
                job.digests[key][leaf] = xxhash.xxh3_128_digest(raw)
            frames.append(frame.tobytes())
        return {"frames": frames}, done

    def _with_digests(self, document: Document, jobs: Sequence[_Job]) -> Document:
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
        changed = [str(f.path) for checkpoint in self.plan.checkpoints for f in checkpoint.files if f.changed()]
        if changed:
            raise CheckpointError(
                f"{', '.join(changed)} changed while it was read; nothing was written. Run again when it is still"
            )


def _digest_lists(tensor: PackedTensor) -> dict[str, list[bytes]]:
    return {"head": [], **{key: [b""] * tensor.leaves for key in ("base", "result", "stored", "framed")}}


def _settled(job: _Job, codec: str) -> _Job:
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


def _table_of(job: _Job) -> LeafTable:
    return leaf_table(job.tensor, job.counts, job.values.itemsize, job.frames)


def _sizes_dtype(frames: Counts) -> np.dtype:
    return np.dtype("<u2" if frames.max(initial=0) <= 0xFFFF else "<u4")


def _same(aligned: AlignedTensor, tensor: PackedTensor, leaves: list[bytes]) -> _Job:
    digests: dict[str, list[bytes]] = {"head": [], "base": leaves, "result": leaves, "stored": []}
    return _Job(aligned, tensor, DTYPES[tensor.dtype], full_counts(tensor), None, digests)


@dataclass(frozen=True)
class _Rows:
    """A model's rows, and below them the base's: `size` bytes of the former."""

    model: Source
    base: Source
    size: int

    @property
    def nbytes(self) -> int:
        return self.base.nbytes

    def read_into(self, buffer: Bytes, offset: int) -> None:
        own = min(max(self.size - offset, 0), buffer.size)
        if own:
            self.model.read_into(buffer[:own], offset)
        if own < buffer.size:
            self.base.read_into(buffer[own:], offset + own)


def _with_all_rows(aligned: AlignedTensor) -> AlignedTensor:
    """Where the model's vocabulary is the smaller one, the base's rows are unchanged behind its own."""
    base, tuned = aligned.base, aligned.models[0]
    if base is None or tuned is None or tuned.count >= base.count:
        return aligned
    if tuned.dtype != base.dtype:
        raise PlanError(
            f"{base.name} has {tuned.shape[0]} rows of {tuned.dtype} in the model and {base.shape[0]} of {base.dtype} "
            "in the base; convert one of them"
        )
    source = _Rows(tuned.source, base.source, tuned.nbytes)
    return replace(aligned, models=(replace(tuned, shape=base.shape, source=source),))


def _leaf_digests(aligned: AlignedTensor) -> list[bytes]:
    return [xxhash.xxh3_128_digest(raw) for raw, _ in _leaf_pairs(aligned)]


def _leaf_pairs(aligned: AlignedTensor) -> Iterator[tuple[Bytes, Bytes]]:
    """Raw leaves of the base and of the model (of the base twice, where the model has nothing)."""
    base, tuned = aligned.base, aligned.models[0] or aligned.base
    assert base is not None and tuned is not None
    size = LEAF * dtype_named(base.dtype).itemsize
    buffers = np.empty(size, np.uint8), np.empty(size, np.uint8)
    for start in range(0, base.nbytes, size):
        count = min(size, base.nbytes - start)
        base.source.read_into(buffers[0][:count], start)
        tuned.source.read_into(buffers[1][:count], start)
        yield buffers[0][:count], buffers[1][:count]


def _looks_same(aligned: AlignedTensor) -> bool:
    base, tuned = aligned.base, aligned.models[0]
    assert base is not None and tuned is not None
    size = min(SAMPLE, base.nbytes)
    raws = np.empty(size, np.uint8), np.empty(size, np.uint8)
    for at in (0, (base.nbytes - size) // 2, base.nbytes - size):
        base.source.read_into(raws[0], at)
        tuned.source.read_into(raws[1], at)
        if not np.array_equal(*raws):
            return False
    return True


def _changed_rows(aligned: AlignedTensor, tensor: PackedTensor) -> tuple[np.ndarray, list[bytes]]:
    """(rows,) bool: whether any bit of the row differs; and the digests of the base's leaves."""
    word = f"u{DTYPES[tensor.dtype].itemsize}"
    rows = tensor.shape[0] if tensor.shape else 1
    changed = np.zeros(rows if tensor.count else 0, bool)
    digests = []
    start = 0
    for before, after in _leaf_pairs(aligned):
        digests.append(xxhash.xxh3_128_digest(before))
        differs = before.view(word) != after.view(word)
        if differs.any():
            first, end = start // tensor.row, -(-(start + differs.size) // tensor.row)
            begins = np.maximum(np.arange(first, end, dtype=np.int64) * tensor.row - start, 0)
            changed[first:end] |= np.bitwise_or.reduceat(differs, begins)
        start += differs.size
    return changed, digests


def _tables(job: _Job) -> dict[str, np.ndarray]:
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


def _parts_of(job: _Job) -> Iterator[OutputTensor]:
    tensor = job.tensor
    if tensor.kind == "same":
        return
    table = _table_of(job)
    if tensor.kind == "lossless" or job.frames is not None:
        yield OutputTensor(f"frames:{tensor.name}", "U8", (int(table.values[-1]),))
    else:
        yield OutputTensor(f"values:{tensor.name}", job.values.name, (int(table.values[-1]) // job.values.itemsize,))
    if tensor.bits:
        yield OutputTensor(f"scales:{tensor.name}", "BF16", (int(table.scales[-1]) // 2,))
    for role, content in _tables(job).items():
        dtype = next(entry.name for entry in DTYPES.values() if entry.numpy == content.dtype)
        yield OutputTensor(f"{role}:{tensor.name}", dtype, content.shape)


def _companions(model: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """Name -> content of the small files that make the result an ordinary model directory."""
    directory = model.directory
    if directory is None:
        return
    paths = [path for path in (directory / "config.json",) if path.is_file()]
    for path in dict.fromkeys((*paths, *tokenizer_files(directory), *model_files(directory))):
        with contextlib.suppress(OSError):
            yield path.relative_to(directory).as_posix(), path.read_bytes()


def _is_same_file(base: Checkpoint, name: str, raw: bytes) -> bool:
    if base.directory is None:
        return False
    try:
        return (base.directory / name).read_bytes() == raw
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
