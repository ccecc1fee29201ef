# SPDX-License-Identifier: Apache-2.0
"""Leaves on their way into a pack: read, compared, encoded and digested once, in any order, into a spool.

How long leaves are is known when they are made, so they wait in a file beside the output until all are; memory is a
few leaves per thread, whatever the model's size.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from darekit.checkpoints.digests import LEAF, digest_pieces
from darekit.dtypes import DTYPES, Bytes, DType
from darekit.errors import CheckpointError, DataError
from darekit.kernels.packs import count_bad_bf16
from darekit.packing.jobs import Job, Terms, note_changes
from darekit.packs.format import stored_digests
from darekit.packs.frames import compress_leaves
from darekit.packs.lane import READ_LEAVES, Encoded, Lane, Room, lane_for
from darekit.packs.leaves import Mask, encode, factor_of, refuse_nonfinite, restore, take
from darekit.packs.lossless import compress

ROLES = ("values", "frames", "scales")

_TOO_MUCH = "{}: the result would be NaN or Inf; try a smaller drop rate"

Parts = Mapping[str, list[Any]]  # role -> buffers of bytes


@dataclass(frozen=True)
class Piece:
    """READ_LEAVES of one tensor, from `first` on, as they wait in the spool: bytes of values, frames and scales."""

    name: str
    first: int
    offset: int
    sizes: Mapping[str, int]


class Spool:
    """A file that threads append to."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._lock = threading.Lock()

    def append(self, buffers: Sequence[Any]) -> int:
        """Bytes, one buffer behind another; returns where the first begins."""
        with self._lock:
            offset = self._file.tell()
            for buffer in buffers:
                self._file.write(buffer)
        return offset

    def close(self) -> None:
        """With everything written."""
        self._file.close()


class _Buffers(threading.local):
    """What one thread works in, span after span: fresh pages are dear."""

    def __init__(self) -> None:
        self._rooms: defaultdict[str, Room] = defaultdict(Room)

    def of(self, what: str, size: int) -> Bytes:
        """(size,) uint8, with whatever was in it."""
        return self._rooms[what].get(size)


BUFFERS = _Buffers()


def make_span(job: Job, first: int, terms: Terms, spool: Spool) -> tuple[Piece, int]:
    """The leaves from `first` on -> the spool, their digests and counts into the job; and the bytes read.

    Raises:
        DataError: differences or results are NaN or Inf.
    """
    parts: dict[str, list[Any]] = {role: [] for role in ROLES}
    if job.tensor.kind == "lossless":
        done = _compress_leaves(job, first, parts)
    else:
        tuned = job.source.models[0]
        assert tuned is not None
        dtype, mask = DTYPES[tuned.dtype], Mask(job.tensor, terms.seed, job.rows)
        factor = factor_of(job.tensor, terms.rescale)
        lane = lane_for(mask, job.values, factor) if dtype.name == "BF16" else None
        if lane is not None:
            done = _encode_in_lane(job, lane, first, parts)
        else:
            done = _encode_leaves(job, mask, factor, dtype, first, parts)
    sizes = {role: sum(len(piece) for piece in pieces) for role, pieces in parts.items()}
    offset = spool.append([piece for pieces in parts.values() for piece in pieces])
    return Piece(job.tensor.name, first, offset, sizes), done


def _encode_in_lane(job: Job, lane: Lane, first: int, parts: Parts) -> int:
    """All leaves in one call. Values and scales lie in this thread's buffers until they are written."""
    tensor, base, tuned = job.tensor, job.source.base, job.source.models[0]
    assert base is not None and tuned is not None
    size, last = 2 * LEAF, min(first + READ_LEAVES, tensor.leaves)
    nbytes = min(last * size, 2 * tensor.count) - first * size
    before, after = BUFFERS.of("base", nbytes), BUFFERS.of("model", nbytes)
    base.source.read_into(before, first * size)
    tuned.source.read_into(after, first * size)
    if job.changed is not None:
        note_changes(tensor, before, after, first * LEAF, job.changed)
    if not lane.mask.whole:
        bad = count_bad_bf16(before.view(np.uint16), after.view(np.uint16))
        _refuse_dropped(job, bad, DTYPES["BF16"], before, after, first)
    ends = [*range(size, nbytes, size), nbytes]
    job.digests["base"][first:last] = digest_pieces(before, ends)
    rooms = BUFFERS.of("values", nbytes), BUFFERS.of("scales", (last - first) * lane.most_scales)
    try:
        found = lane.encode(before, after, first, job.counts[first:last], *rooms)
    except CheckpointError as error:
        raise DataError(_TOO_MUCH.format(tensor.name)) from error
    job.digests["result"][first:last] = digest_pieces(before, ends)
    _keep(job, first, found, parts)
    return 2 * nbytes


def _encode_leaves(job: Job, mask: Mask, factor: np.float32, dtype: DType, first: int, parts: Parts) -> int:
    """Leaf by leaf, the general way; the model's format is `dtype`."""
    tensor, base, tuned = job.tensor, job.source.base, job.source.models[0]
    assert base is not None and tuned is not None
    own, done = DTYPES[tensor.dtype], 0
    for leaf in range(first, min(first + READ_LEAVES, tensor.leaves)):
        count = min(LEAF, tensor.count - leaf * LEAF)
        before, after = BUFFERS.of("base", count * own.itemsize), BUFFERS.of("model", count * dtype.itemsize)
        base.source.read_into(before, leaf * LEAF * own.itemsize)
        tuned.source.read_into(after, leaf * LEAF * dtype.itemsize)
        done += before.size + after.size
        if job.changed is not None:
            note_changes(tensor, before, after, leaf * LEAF, job.changed)
        job.digests["base"][leaf] = xxhash.xxh3_128_digest(before)
        indices = None if mask.whole else mask.indices(leaf)
        if indices is not None:
            bad = _nonfinite(before, own).size + _nonfinite(after, dtype).size
            _refuse_dropped(job, bad, dtype, before, after, leaf)
        if indices is None:  # they lie in the buffers, and the base's become the results
            origin, kept = before if job.frames is None else before.copy(), after.copy()
        else:
            origin, kept = take(before, own, indices), take(after, dtype, indices)
        job.counts[leaf] = kept.size // dtype.itemsize
        values, scales = encode(tensor, origin, kept, job.values, dtype)
        try:
            restore(tensor, job.values, factor, indices, values, scales, before)
        except CheckpointError as error:
            raise DataError(_TOO_MUCH.format(tensor.name)) from error
        job.digests["result"][leaf] = xxhash.xxh3_128_digest(before)
        _keep(job, leaf, Encoded(origin, values, scales, [values.size], [scales.size]), parts)
    return done


def _nonfinite(raw: Bytes, dtype: DType) -> npt.NDArray[np.intp]:
    """Which of raw elements are NaN or Inf."""
    return np.flatnonzero(~np.isfinite(raw.view(dtype.numpy)))


def _refuse_dropped(job: Job, bad: int, dtype: DType, before: Bytes, after: Bytes, first: int) -> None:
    """Whether a model is sound does not depend on a mask: NaN and Inf are refused where they are dropped, too. `bad`:
    how many there may be. Rows that did not change are the base's, whatever they hold.

    Raises:
        DataError: a row that changed has NaN or Inf, in the model or in the base.
    """
    if not bad:
        return
    places = np.union1d(_nonfinite(before, DTYPES[job.tensor.dtype]), _nonfinite(after, dtype)) + first * LEAF
    if job.rows is not None:
        row = places // job.tensor.row
        places = places[(job.rows[row >> 3] >> (row & 7).astype(np.uint8)) & 1 == 1]
    refuse_nonfinite(places.size, job.tensor.name)


def _keep(job: Job, first: int, found: Encoded, parts: Parts) -> None:
    """What is written of leaves from `first` on, and its digests."""
    last = first + len(found.ends)
    if job.bare:
        parts["values"].append(found.values.data)
        job.digests["stored"][first:last] = stored_digests(found.values, found.ends, found.scales, found.scale_ends)
    if job.frames is not None:
        frames = compress_leaves(job.tensor, job.values, found.values, found.base, found.ends)
        together = np.concatenate(frames)
        job.frames[first:last] = sizes = [frame.size for frame in frames]
        parts["frames"].append(together.data)
        ends = np.cumsum(sizes).tolist()
        job.digests["framed"][first:last] = stored_digests(together, ends, found.scales, found.scale_ends)
    parts["scales"].append(found.scales.data)


def _compress_leaves(job: Job, first: int, parts: Parts) -> int:
    """The exact model's leaves, each a frame."""
    base, tuned = job.source.base, job.source.models[0]
    assert base is not None and tuned is not None
    itemsize, done = DTYPES[job.tensor.dtype].itemsize, 0
    for leaf in range(first, min(first + READ_LEAVES, job.tensor.leaves)):
        raws = []
        for what, source in (("base", base.source), ("model", tuned.source)):
            raw = BUFFERS.of(what, min(LEAF * itemsize, base.nbytes - leaf * LEAF * itemsize))
            source.read_into(raw, leaf * LEAF * itemsize)
            raws.append(raw)
            done += raw.size
        frame = compress(raws[0], raws[1], itemsize)
        job.counts[leaf] = frame.size
        for key, raw in (("base", raws[0]), ("result", raws[1]), ("stored", frame)):
            job.digests[key][leaf] = xxhash.xxh3_128_digest(raw)
        parts["frames"].append(frame.data)
    return done
