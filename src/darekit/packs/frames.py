# SPDX-License-Identifier: Apache-2.0
"""The kept values of one leaf, compressed where that is smaller: a frame of one byte that says how, and then the rest.

0 the values' bytes; 1 the same in byte planes, through zstd; 2 of fine-tuned values, their XOR with the base's, in byte
planes, through zstd. Measured on BF16 models with normal deltas, 2 % of the weights: 16 bit values become 0.45 of
their size, 8, 4 and 2 bit codes 0.93, 0.91 and 0.82, signs nothing.
"""

from __future__ import annotations

import threading

import numpy as np
import zstandard

from darekit.dtypes import Bytes, DType
from darekit.errors import CheckpointError
from darekit.kernels.packs import cut_difference
from darekit.packs.format import PackedTensor
from darekit.packs.lossless import cut_planes, inflate, join_planes

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
    method, body = _open(tensor, values, frame, nbytes)
    if method == RAW:
        return body.copy()  # aligned
    words = join_planes(body, values.itemsize)
    if method == DIFFERENCE and base is not None:
        words ^= base.view(words.dtype)
    return words.view(np.uint8)


def unwrap_values(tensor: PackedTensor, values: DType, frame: Bytes, out: Bytes) -> int:
    """A frame -> `out`, (n,) uint8, in the form that is returned: RAW, PLANES or DIFFERENCE.

    Raises:
        CheckpointError: as `decompress_values`.
    """
    if not frame.size and not out.size:
        return RAW
    method, out[:] = _open(tensor, values, frame, out.size)
    return method


def _open(tensor: PackedTensor, values: DType, frame: Bytes, nbytes: int) -> tuple[int, Bytes]:
    """How a frame's values stand in it, and these, (nbytes,) uint8, without zstd."""
    method = int(frame[0]) if frame.size else -1
    if method == RAW and frame.size == nbytes + 1:
        return method, frame[1:]
    if method != PLANES and not (method == DIFFERENCE and has_difference(tensor, values)):
        raise CheckpointError(
            f"tensor {tensor.name}: a frame of kind {method} with {frame.size:,} bytes; the pack is damaged"
        )
    body = inflate(frame[1:], nbytes, tensor.name)
    if body.size != nbytes:
        raise CheckpointError(
            f"tensor {tensor.name}: a frame of {body.size:,} bytes for {nbytes:,}; the pack is damaged"
        )
    return method, body
