# SPDX-License-Identifier: Apache-2.0
"""The kept values of one leaf, compressed where that is smaller: a frame of one byte that says how, and then the rest.

0 the values' bytes; 1 the same in byte planes, through zstd; 2 of fine-tuned values, their XOR with the base's, in byte
planes, through zstd. Measured on BF16 models with normal deltas, 2 % of the weights: 16 bit values become 0.45 of
their size, 8, 4 and 2 bit codes 0.93, 0.91 and 0.82, signs nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import zstandard

from darekit.dtypes import Bytes, DType
from darekit.errors import CheckpointError
from darekit.kernels.packs import cut_difference
from darekit.packs.format import PackedTensor
from darekit.packs.lossless import cut_planes, inflate_all, join_planes

RAW, PLANES, DIFFERENCE = 0, 1, 2
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


def can_shrink(tensor: PackedTensor) -> bool:
    """Whether compressing its values is worth a try: signs are noise."""
    return tensor.kind == "delta" and tensor.bits != 1


def has_difference(tensor: PackedTensor, values: DType) -> bool:
    """Whether values are fine-tuned elements in the base's own format, so that most of their bits agree."""
    return tensor.encoding == "exact" and values.name == tensor.dtype


def compress_values(tensor: PackedTensor, values: DType, stored: Bytes, base: Bytes) -> Bytes:
    """A leaf's values and the base's elements at the same places, raw -> its frame, at most one byte longer."""
    if not stored.size:
        return stored
    words = stored.view(f"u{values.itemsize}")
    method = DIFFERENCE if has_difference(tensor, values) else PLANES
    if method == DIFFERENCE and values.itemsize == 2:
        planes = np.empty(stored.size, np.uint8)
        cut_difference(words, base.view(words.dtype), planes)
    elif method == DIFFERENCE:
        planes = cut_planes(words ^ base.view(words.dtype))
    else:
        planes = cut_planes(words) if values.itemsize > 1 else stored
    body = _COMPRESSOR.codec.compress(planes.data)
    if len(body) < stored.size:
        return np.frombuffer(bytes([method]) + body, np.uint8)
    return np.concatenate([np.zeros(1, np.uint8), stored])


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
    (body,) = inflate_all([frame.data[1:]], [nbytes], tensor.name)
    words = join_planes(np.frombuffer(body, np.uint8), values.itemsize)
    if form == DIFFERENCE and base is not None:
        words ^= base.view(words.dtype)
    return words.view(np.uint8)


def unwrap_values(
    tensor: PackedTensor, values: DType, frames: Bytes, frame_ends: Sequence[int], out: Bytes, ends: Sequence[int]
) -> Bytes:
    """Frames of several leaves -> their values in `out`, and in what form each leaf's are: RAW, PLANES or DIFFERENCE.

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
    forms, bodies, places = [], [], []
    first = begin = 0
    for last, end in zip(frame_ends, ends, strict=True):
        form = _form_of(tensor, values, source[first:last], end - begin) if last > first or end > begin else RAW
        forms.append(form)
        if form != RAW:
            bodies.append(source[first + 1 : last])
            places.append((begin, end))
        elif end > begin:
            target[begin:end] = source[first + 1 : last]
        first, begin = last, end
    found = inflate_all(bodies, [end - begin for begin, end in places], tensor.name)
    for (begin, end), body in zip(places, found, strict=True):
        target[begin:end] = body
    return np.array(forms, np.uint8)


def _form_of(tensor: PackedTensor, values: DType, frame: memoryview, nbytes: int) -> int:
    """How `nbytes` of values stand in a frame."""
    form = frame[0] if frame else -1
    if form == PLANES or (form == RAW and len(frame) == nbytes + 1):
        return form
    if form == DIFFERENCE and has_difference(tensor, values):
        return form
    raise CheckpointError(
        f"tensor {tensor.name}: a frame of kind {form} with {len(frame):,} bytes; the pack is damaged"
    )
