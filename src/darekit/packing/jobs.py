# SPDX-License-Identifier: Apache-2.0
"""What is to be stored of each tensor: nothing where nothing changed, and no row that did not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import xxhash

from darekit.checkpoints import Source
from darekit.checkpoints.digests import LEAF
from darekit.dtypes import DTYPES, Bytes, DType, dtype_named
from darekit.errors import DataError, PlanError
from darekit.kernels.packs import mark_changed
from darekit.packs.format import Counts, PackedTensor, full_counts
from darekit.packs.frames import can_shrink, compress_values
from darekit.packs.leaves import Mask, encode, take
from darekit.planning.matching.alignment import AlignedTensor

Flags = npt.NDArray[np.bool_]

WORTH = 0.95  # of the values' size: what a codec must get below, as decoding costs time

SAMPLED = 4  # leaves, which tell of tensors with at least 16 whether it will; of smaller ones all do

CLEAR = 0.1  # if they are as much below WORTH, fewer do, once they hold SAMPLE bytes

SAMPLE = 4096  # bytes at the start, in the middle and at the end, which tell most changed tensors at once

SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Terms:
    """What was asked for, as far as single tensors are concerned. `codec`: auto, or one of `format.CODECS`."""

    seed: int
    lossless: bool
    codec: str = "none"
    rescale: str = "paper"
    bits: int = 16
    dense_bits: int = 16
    group: int = 64

    def encoding(self, rate: float, dtype: DType) -> tuple[str, DType]:
        """Drop rate and the fine-tuned tensor's format -> encoding, and the format of the values."""
        bits = self.bits if rate > 0 else self.dense_bits
        if bits >= 8 * dtype.itemsize:
            return "exact", dtype
        if bits >= 16:
            return "delta", DTYPES["F32" if bits == 32 else "BF16"]
        return f"int{bits}", DTYPES["U8"]


@dataclass(frozen=True)
class Job:
    """A tensor on its way into the pack.

    Attributes:
        source: where its elements are.
        tensor: what is said of it.
        values: format of its stored values.
        counts: of every leaf, elements kept (of a lossless one: bytes of its frame).
        rows: which rows changed, as bits; None: all are stored.
        digests: of every leaf of base, result, and stored bytes, as values and as frames.
        frames: bytes of every leaf's frame, where there are frames.
        bare: whether leaves are kept without frames too, until all are made.
        changed: (rows,) which rows are found to have changed while leaves are made; None: that is known.
    """

    source: AlignedTensor
    tensor: PackedTensor
    values: DType
    counts: Counts
    rows: Bytes | None
    digests: Mapping[str, list[bytes]]
    frames: Counts | None = None
    bare: bool = True
    changed: Flags | None = None


def job_for(aligned: AlignedTensor, rate: float, terms: Terms, *, thorough: bool, whole: bool = False) -> Job | None:
    """What is to be stored of one tensor, of whose delta `rate` is dropped; `whole`: it is no weight, and stays exact.

    Most tensors tell by a few samples; where one does not, it is read if `thorough`, and otherwise None is returned.

    Raises:
        DataError: integers differ.
        PlanError: formats or shapes that a pack cannot hold.
    """
    aligned = _with_all_rows(aligned)
    base, tuned = aligned.base, aligned.models[0]
    assert base is not None
    tensor = PackedTensor(aligned.name, base.dtype, base.shape, "same")
    if tuned is not None and (terms.lossless or (whole and tuned.dtype == base.dtype)):
        return _exact_job(aligned, tensor, thorough)
    terms = replace(terms, dense_bits=64) if whole else terms
    if tuned is None:
        return _same(aligned, tensor, _leaf_digests(aligned)) if thorough else None
    floats, alike = dtype_named(base.dtype).kind == "float", tuned.dtype == base.dtype
    by_rows = alike and floats and (rate == 0 or aligned.token_axis == 0)
    changed = None
    if alike and (not floats or _looks_same(aligned) or (by_rows and _has_same_row(aligned, tensor))):
        if not thorough:
            return None
        changed, leaves = _changed_rows(aligned, tensor)
        if not changed.any():
            return _same(aligned, tensor, leaves)
    if not floats:
        raise DataError(
            f"{base.name} ({base.dtype}) differs from the base's. The delta of integers or complex numbers cannot be "
            "stored: pack with --lossless; if the model is quantised, dequantise it first"
        )
    encoding, values = terms.encoding(rate, dtype_named(tuned.dtype))
    group = terms.group if values.name == "U8" else 0
    tensor = replace(tensor, kind="delta", drop_rate=rate, encoding=encoding, group=group)
    rows = None if changed is None else _worthwhile_rows(tensor, values, changed)
    job = _new_job(aligned, tensor, values, rows)
    if by_rows and changed is None:
        job = replace(job, changed=np.zeros(_rows_of(tensor), bool))
    if terms.codec == "none" or not can_shrink(tensor):
        return job
    sampled = terms.codec == "auto" and tensor.leaves >= 4 * SAMPLED
    if sampled and not thorough:
        return None
    if sampled and not _looks_worth(job, terms.seed):
        return job
    return replace(job, frames=np.zeros(tensor.leaves, np.int64), bare=not sampled)


def without_same_rows(job: Job) -> Job | None:
    """A job all of whose leaves were made -> what is to be made instead, as some rows turned out not to have changed;
    None: it is right as it is."""
    rows = None if job.changed is None else _worthwhile_rows(job.tensor, job.values, job.changed)
    if rows is None:
        return None
    frames = None if job.frames is None else np.zeros(job.tensor.leaves, np.int64)
    return replace(_new_job(job.source, job.tensor, job.values, rows), frames=frames, bare=job.bare)


def _new_job(source: AlignedTensor, tensor: PackedTensor, values: DType, rows: Bytes | None) -> Job:
    digests = {"head": [], **{key: [b""] * tensor.leaves for key in ("base", "result", "stored", "framed")}}
    return Job(source, tensor, values, np.zeros(tensor.leaves, np.int64), rows, digests)


def _same(aligned: AlignedTensor, tensor: PackedTensor, leaves: list[bytes]) -> Job:
    digests: dict[str, list[bytes]] = {"head": [], "base": leaves, "result": leaves, "stored": []}
    return Job(aligned, tensor, DTYPES[tensor.dtype], full_counts(tensor), None, digests)


def _exact_job(aligned: AlignedTensor, tensor: PackedTensor, thorough: bool) -> Job | None:
    base, tuned = aligned.base, aligned.models[0]
    assert base is not None and tuned is not None
    if tuned.dtype != base.dtype:
        raise PlanError(
            f"{base.name} is {tuned.dtype} in the model and {base.dtype} in the base; a lossless pack needs equal "
            "formats. Convert the base, or pack with a drop rate"
        )
    if _looks_same(aligned):
        if not thorough:
            return None
        changed, leaves = _changed_rows(aligned, tensor)
        if not changed.any():
            return _same(aligned, tensor, leaves)
    return _new_job(aligned, replace(tensor, kind="lossless"), DTYPES["U8"], None)


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


# What changed


def _looks_same(aligned: AlignedTensor) -> bool:
    base = aligned.base
    assert base is not None
    size = min(SAMPLE, base.nbytes)
    return all(_agree(aligned, at, size) for at in (0, (base.nbytes - size) // 2, base.nbytes - size))


def _has_same_row(aligned: AlignedTensor, tensor: PackedTensor) -> bool:
    """Whether one of a few rows, spread over a tensor, did not change: then all are compared before any is encoded."""
    rows, size = _rows_of(tensor), tensor.row * DTYPES[tensor.dtype].itemsize
    places = sorted({row * (rows - 1) // (SAMPLED_ROWS - 1) for row in range(SAMPLED_ROWS)}) if rows else []
    return any(_agree(aligned, row * size, size) for row in places)


def _agree(aligned: AlignedTensor, at: int, size: int) -> bool:
    """Whether `size` bytes from `at` on are the same in both."""
    base, tuned = aligned.base, aligned.models[0]
    assert base is not None and tuned is not None
    raws = np.empty(size, np.uint8), np.empty(size, np.uint8)
    base.source.read_into(raws[0], at)
    tuned.source.read_into(raws[1], at)
    return np.array_equal(*raws)


def _changed_rows(aligned: AlignedTensor, tensor: PackedTensor) -> tuple[Flags, list[bytes]]:
    """(rows,) bool: whether any bit of the row differs; and the digests of the base's leaves."""
    changed, digests, start = np.zeros(_rows_of(tensor), bool), [], 0
    for before, after in _leaf_pairs(aligned):
        digests.append(xxhash.xxh3_128_digest(before))
        note_changes(tensor, before, after, start, changed)
        start += LEAF
    return changed, digests


def note_changes(tensor: PackedTensor, before: Bytes, after: Bytes, start: int, changed: Flags) -> None:
    """Raw elements of base and model from `start` on -> True in `changed`, (rows,), where a bit of a row differs."""
    word = f"u{DTYPES[tensor.dtype].itemsize}"
    mark_changed(before.view(word), after.view(word), start, tensor.row, changed)


def _worthwhile_rows(tensor: PackedTensor, values: DType, changed: Flags) -> Bytes | None:
    """Which rows changed, as bits, if it saves more than it costs to say so and to have counts of leaves."""
    if changed.all():
        return None
    rows = np.packbits(changed, bitorder="little")
    bits = tensor.bits or 8 * values.itemsize
    saved = (1 - changed.mean()) * tensor.count * (1 - tensor.drop_rate) * bits / 8
    return rows if saved > rows.size + 2 * tensor.leaves else None


def _rows_of(tensor: PackedTensor) -> int:
    rows = tensor.shape[0] if tensor.shape else 1
    return rows if tensor.count else 0


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


def _looks_worth(job: Job, seed: int) -> bool:
    """Whether a few leaves, spread over a tensor, say that frames will pay: fewer, where they clearly do."""
    tensor, base, tuned = job.tensor, job.source.base, job.source.models[0]
    assert base is not None and tuned is not None
    mask, dtype, bare, framed = Mask(tensor, seed, job.rows), DTYPES[tuned.dtype], 0, 0
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
        if bare >= SAMPLE and framed < bare * (WORTH - CLEAR):
            break
    return framed < bare * WORTH
