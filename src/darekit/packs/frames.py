# SPDX-License-Identifier: Apache-2.0
"""The kept values of one leaf, compressed where that is smaller: a frame of one byte that says how, and then the rest.

0 the values' bytes; 1 the same in byte planes, through zstd; of fine-tuned values 3 their steps from the base's
(`darekit.packs.steps`) in byte planes, through zstd, or 4, of 16 bit values, those beyond a byte apart and then one
byte for each, through zstd. 2 is read, and not written any more: the XOR with the base's, in byte planes, through zstd.
Measured on BF16 models with normal deltas, 2 % of the weights: 16 bit values become 0.38 of their size, 8, 4 and 2 bit
codes 0.93, 0.91 and 0.82, signs nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from darekit.dtypes import Bytes, DType
from darekit.errors import CheckpointError
from darekit.packs.format import Counts, PackedTensor
from darekit.packs.lossless import cut_planes, inflate_all, join_planes
from darekit.packs.steps import after_steps, apart, cut_narrow, join_narrow, read_head, steps_between

RAW, PLANES, DIFFERENCE, STEPS, NARROW = 0, 1, 2, 3, 4
OF_BASE = (DIFFERENCE, STEPS, NARROW)
# As small as zstd's level 1 makes them, and decoded in three quarters of the time: matches of four bytes in noise save
# nothing, and a small table stays in the cache.
SEARCH = {"strategy": 1, "min_match": 5, "target_length": 0, "hash_log": 12, "chain_log": 12, "search_log": 1}
WINDOW_LOG = 19  # the largest leaf


class _Compressor(threading.local):
    """zstd's, one for each thread: to make one takes half as long as to compress a leaf."""

    def __init__(self) -> None:
        search = zstandard.ZstdCompressionParameters(window_log=WINDOW_LOG, write_checksum=False, **SEARCH)
        self.codec = zstandard.ZstdCompressor(compression_params=search)


_COMPRESSOR = _Compressor()


@dataclass(frozen=True)
class Forms:
    """How leaves' values stand in memory.

    Attributes:
        kinds: (leaves,) uint8, each leaf's: plain, or one of the numbers above.
        many: (m,) uint16, of NARROW leaves one behind another, steps that do not fit a byte.
        numbers: (leaves,) int64, how many of them are each leaf's.
    """

    kinds: Bytes
    many: npt.NDArray[np.uint16]
    numbers: Counts

    @staticmethod
    def plain(leaves: int) -> Forms:
        """As they are."""
        return Forms(np.zeros(leaves, np.uint8), np.empty(0, np.uint16), np.zeros(leaves, np.int64))


def can_shrink(tensor: PackedTensor) -> bool:
    """Whether compressing its values is worth a try: signs are noise."""
    return tensor.kind == "delta" and tensor.bits != 1


def has_difference(tensor: PackedTensor, values: DType) -> bool:
    """Whether values are fine-tuned elements in the base's own format, so that most of their bits agree."""
    return tensor.encoding == "exact" and values.name == tensor.dtype


def compress_values(tensor: PackedTensor, values: DType, stored: Bytes, base: Bytes) -> Bytes:
    """A leaf's values and the base's elements at the same places, raw -> its frame, at most one byte longer."""
    return compress_leaves(tensor, values, stored, base, [stored.size])[0]


def compress_leaves(
    tensor: PackedTensor, values: DType, stored: Bytes, base: Bytes, ends: Sequence[int]
) -> list[Bytes]:
    """`compress_values` of leaves that lie behind one another; each one's bytes end at one of `ends`."""
    cuts = list(zip([0, *ends], ends, strict=False))
    begun = _begun(tensor, values, stored, base, cuts)
    kept = [number for number, (begin, end) in enumerate(cuts) if end > begin]
    bodies = _deflated([begun[number][1] for number in kept])
    frames = [stored[:0]] * len(cuts)
    for number, body in zip(kept, bodies, strict=True):
        begin, end = cuts[number]
        frame = b"".join((begun[number][0], body))
        if len(frame) > end - begin:
            frame = b"".join((bytes([RAW]), stored[begin:end].data))
        frames[number] = np.frombuffer(frame, np.uint8)
    return frames


def _begun(
    tensor: PackedTensor, values: DType, stored: Bytes, base: Bytes, cuts: Sequence[tuple[int, int]]
) -> list[tuple[bytes, Any]]:
    """How each leaf's frame begins, and what is then to be compressed."""
    size = values.itemsize
    words: Any = stored.view(f"u{size}")
    if not has_difference(tensor, values):
        if size == 1:
            return [(bytes([PLANES]), stored[begin:end].data) for begin, end in cuts]
        return [(bytes([PLANES]), cut_planes(words[begin // size : end // size]).data) for begin, end in cuts]
    origin: Any = base.view(words.dtype)
    places = [(begin // size, end // size) for begin, end in cuts]
    narrow = cut_narrow(words, origin, [end for _, end in places]) if size == 2 else [None] * len(cuts)
    found: list[tuple[bytes, Any]] = []
    for (begin, end), one in zip(places, narrow, strict=True):
        if one is not None:
            found.append((bytes([NARROW]) + one[0], one[1].data))
        else:
            steps = steps_between(words[begin:end], origin[begin:end])
            found.append((bytes([STEPS]), cut_planes(steps).data))
    return found


def _deflated(bodies: Sequence[Any]) -> Sequence[Any]:
    """Each as a zstd frame, of something that has a buffer."""
    codec = _COMPRESSOR.codec
    many = getattr(codec, "multi_compress_to_buffer", None)  # zstandard's C, and not all of its builds
    if many and len(bodies) > 1:
        found: Sequence[Any] = many(bodies)
        return found
    return [codec.compress(body) for body in bodies]


def decompress_values(tensor: PackedTensor, values: DType, frame: Bytes, nbytes: int, base: Bytes | None) -> Bytes:
    """A frame -> the values, (nbytes,) uint8. `base`: its elements at the same places; None: there is no base at hand.

    Raises:
        CheckpointError: the frame makes no sense; nothing larger than the values is ever made of it.
    """
    if not frame.size and not nbytes:
        return frame
    form = _form_of(tensor, values, frame.data, nbytes)
    if form == RAW:
        return frame[1:].copy()  # aligned
    count = nbytes // values.itemsize
    origin = np.zeros(0, np.uint8)
    if form in OF_BASE:  # only there are the base's elements of the same size
        origin = np.zeros(count, f"u{values.itemsize}") if base is None else base.view(f"u{values.itemsize}")
    if form == NARROW:
        many, body = read_head(frame.data[1:], count, tensor.name)
        (low,) = inflate_all([body], [count], tensor.name)
        return join_narrow(origin, low, many, tensor.name).view(np.uint8)
    (planes,) = inflate_all([frame.data[1:]], [nbytes], tensor.name)
    words = join_planes(np.frombuffer(planes, np.uint8), values.itemsize)
    if form == DIFFERENCE:
        words ^= origin
    elif form == STEPS:
        words = after_steps(origin, words)
    return words.view(np.uint8)


def unwrap_values(
    tensor: PackedTensor, values: DType, frames: Bytes, frame_ends: Sequence[int], out: Bytes, ends: Sequence[int]
) -> Forms:
    """Frames of several leaves -> their values in `out`, and in what forms these are.

    Args:
        tensor: whose leaves.
        values: format of the values.
        frames: (m,) uint8, one frame behind another.
        frame_ends: where each ends.
        out: (n,) uint8, one leaf's values behind another's.
        ends: where each leaf's end.

    Raises:
        CheckpointError: as `decompress_values`.
    """
    source, target = frames.data, out.data
    kinds, numbers, heads, bodies, places = [], [], [], [], []
    first = begin = 0
    for last, end in zip(frame_ends, ends, strict=True):
        form = _form_of(tensor, values, source[first:last], end - begin) if last > first or end > begin else RAW
        number = 0
        if form == NARROW:
            count = (end - begin) // 2
            many, body = read_head(source[first + 1 : last], count, tensor.name)
            number = len(many) // 2
            heads.append(many)
            bodies.append(body)
            places.append((begin, begin + count))
        elif form != RAW:
            bodies.append(source[first + 1 : last])
            places.append((begin, end))
        elif end > begin:
            target[begin:end] = source[first + 1 : last]
        kinds.append(form)
        numbers.append(number)
        first, begin = last, end
    found = inflate_all(bodies, [end - begin for begin, end in places], tensor.name)
    for (begin, end), content in zip(places, found, strict=True):
        target[begin:end] = content
    return Forms(np.array(kinds, np.uint8), apart(b"".join(heads)), np.array(numbers, np.int64))


def _form_of(tensor: PackedTensor, values: DType, frame: memoryview, nbytes: int) -> int:
    """How `nbytes` of values stand in a frame."""
    form = frame[0] if frame else -1
    if form == PLANES or (form == RAW and len(frame) == nbytes + 1):
        return form
    if form in OF_BASE and has_difference(tensor, values) and (form != NARROW or values.itemsize == 2):
        return form
    raise CheckpointError(
        f"tensor {tensor.name}: a frame of kind {form} with {len(frame):,} bytes; the pack is damaged"
    )
