# SPDX-License-Identifier: Apache-2.0
"""The kept values of one leaf, compressed where that is smaller: a frame of one byte that says how, and then the rest.

0 the values' bytes; 1 the same in byte planes, through zstd; 2 of fine-tuned values, their XOR with the base's, in byte
planes, through zstd. Measured on BF16 models with normal deltas, 2 % of the weights: 16 bit values become 0.45 of
their size, 8, 4 and 2 bit codes 0.93, 0.91 and 0.82, signs nothing.
"""

from __future__ import annotations

import numpy as np
import zstandard

from darekit.dtypes import Bytes, DType
from darekit.errors import CheckpointError
from darekit.packs.format import PackedTensor
from darekit.packs.lossless import LEVEL, cut_planes, inflate, join_planes

RAW, PLANES, DIFFERENCE = 0, 1, 2


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
    method = PLANES
    if has_difference(tensor, values):
        words, method = words ^ base.view(words.dtype), DIFFERENCE
    body = zstandard.ZstdCompressor(level=LEVEL, write_checksum=False).compress(cut_planes(words).data)
    if len(body) < stored.size:
        return np.frombuffer(bytes([method]) + body, np.uint8)
    return np.concatenate([np.zeros(1, np.uint8), stored])


def is_difference(frame: Bytes) -> bool:
    """Whether a frame holds XORs with the base's elements."""
    return bool(frame.size) and int(frame[0]) == DIFFERENCE


def decompress_values(tensor: PackedTensor, values: DType, frame: Bytes, nbytes: int, base: Bytes | None) -> Bytes:
    """A frame -> the values, (nbytes,) uint8. `base`: its elements at the same places; None: there is no base at hand.

    Raises:
        CheckpointError: the frame makes no sense; nothing larger than the values is ever made of it.
    """
    if not frame.size and not nbytes:
        return frame
    method = int(frame[0]) if frame.size else -1
    if method == RAW and frame.size == nbytes + 1:
        return frame[1:].copy()  # aligned
    if method != PLANES and not (method == DIFFERENCE and has_difference(tensor, values)):
        raise CheckpointError(
            f"tensor {tensor.name}: a frame of kind {method} with {frame.size:,} bytes; the pack is damaged"
        )
    body = inflate(frame[1:], nbytes, tensor.name)
    if body.size != nbytes:
        raise CheckpointError(
            f"tensor {tensor.name}: a frame of {body.size:,} bytes for {nbytes:,}; the pack is damaged"
        )
    words = join_planes(body, values.itemsize)
    if method == DIFFERENCE and base is not None:
        words ^= base.view(words.dtype)
    return words.view(np.uint8)
