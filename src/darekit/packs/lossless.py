# SPDX-License-Identifier: Apache-2.0
"""One leaf of a fine-tuned tensor exactly, from its base: a frame that is as small as three ways can make it.

Nothing where nothing changed; else one byte that says how, and then: 0 the fine-tuned bytes; 3 their steps from the
base's (`darekit.packs.steps`) in byte planes, through zstd, or 4, of elements of 16 bits, those beyond a byte apart
and then one byte for each, through zstd; 5 of the changed elements only, gaps between them and steps, both in byte
planes, through zstd. 1 and 2 are read, and not written any more: 3 and 5 with XORs (BitX, NSDI'26) instead of steps.
RL-tuned models change 5 to 30 % of their elements, others nearly all.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from darekit.dtypes import Bytes
from darekit.errors import CheckpointError
from darekit.packs.steps import after_steps, cut_narrow, join_narrow, read_head, steps_between

RAW, PLANES, SPARSE, STEPS, NARROW, SPARSE_STEPS = range(6)
DENSE = (PLANES, STEPS)
LEVEL = 1  # higher levels gain 1 %, and cost several times as long
# Fractions of changed elements: in BF16 gaps and one byte for each element are equal at about a half; between these two
# limits both are tried.
SPARSE_BELOW = 0.6
PLANES_ABOVE = 0.3


class _Decompressor(threading.local):
    """zstd's, one for each thread."""

    def __init__(self) -> None:
        self.codec = zstandard.ZstdDecompressor()


class _Compressor(threading.local):
    """zstd's, one for each thread."""

    def __init__(self) -> None:
        self.codec = zstandard.ZstdCompressor(level=LEVEL, write_checksum=False)


_DECOMPRESSOR, _COMPRESSOR = _Decompressor(), _Compressor()


def compress(base: Bytes, tuned: Bytes, itemsize: int) -> Bytes:
    """(n * itemsize,) uint8 twice -> a frame, (m,) uint8 with m <= n * itemsize + 1."""
    before, after = base.view(f"u{itemsize}"), tuned.view(f"u{itemsize}")
    changed = np.flatnonzero(before != after)
    if not changed.size:
        return np.empty(0, np.uint8)
    deflate = _COMPRESSOR.codec.compress
    frames = []
    if changed.size > PLANES_ABOVE * before.size:
        (narrow,) = cut_narrow(after, before, [after.size]) if itemsize == 2 else [None]
        if narrow is not None:
            frames.append(bytes([NARROW]) + narrow[0] + deflate(narrow[1].data))
        else:
            frames.append(bytes([STEPS]) + deflate(cut_planes(steps_between(after, before)).data))
    if changed.size <= SPARSE_BELOW * before.size:
        gaps = (np.diff(changed, prepend=-1) - 1).astype(np.uint16)
        steps = steps_between(after[changed], before[changed])
        frames.append(bytes([SPARSE_STEPS]) + deflate(np.concatenate([cut_planes(gaps), cut_planes(steps)]).data))
    best = min(frames, key=len)
    return np.frombuffer(best if len(best) <= tuned.size else bytes([RAW]) + tuned.tobytes(), np.uint8)


def cut_planes(words: npt.NDArray[np.unsignedinteger]) -> Bytes:
    """(n,) unsigned -> (n * itemsize,) uint8: all lowest bytes, then all second ones, and so on."""
    # Shifts read whole words, three times as fast as a transposed copy of bytes.
    itemsize = words.dtype.itemsize
    planes = np.empty((itemsize, words.size), np.uint8)
    for i in range(itemsize):
        planes[i] = (words >> words.dtype.type(8 * i)).astype(np.uint8)
    return planes.reshape(-1)


def decompress(frame: Bytes, raw: Bytes, itemsize: int, name: str) -> None:
    """A frame and the base's leaf, (n * itemsize,) uint8 -> the fine-tuned bytes, in place of the latter.

    Raises:
        CheckpointError: the frame makes no sense; nothing larger than twice the leaf is ever made of it.
    """
    if not frame.size:
        return
    method, count = int(frame[0]), raw.size // itemsize
    if method == RAW and frame.size == raw.size + 1:
        raw[:] = frame[1:]
        return
    if method not in (PLANES, SPARSE, STEPS, NARROW, SPARSE_STEPS) or (method == NARROW and itemsize != 2):
        raise CheckpointError(f"tensor {name}: a frame of kind {method} with {frame.size:,} bytes; the pack is damaged")
    words: Any = raw.view(f"u{itemsize}")
    if method == NARROW:
        many, rest = read_head(frame.data[1:], count, name)
        (low,) = inflate_all([rest], [count], name)
        words[:] = join_narrow(words, low, many, name)
        return
    limit = raw.size if method in DENSE else (2 + itemsize) * count
    body = np.frombuffer(inflate(frame.data[1:], limit, name), np.uint8)
    if method in DENSE:
        if body.size != raw.size:
            raise CheckpointError(
                f"tensor {name}: a frame of {body.size:,} bytes for {raw.size:,}; the pack is damaged"
            )
        found = join_planes(body, itemsize)
        words[:] = words ^ found if method == PLANES else after_steps(words, found)
        return
    kept, left = divmod(body.size, 2 + itemsize)
    gaps = join_planes(body[: 2 * kept], 2)
    places = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if left or not kept or places[-1] >= count:
        raise CheckpointError(f"tensor {name}: a frame whose elements lie outside its leaf; the pack is damaged")
    found = join_planes(body[2 * kept :], itemsize)
    words[places] = words[places] ^ found if method == SPARSE else after_steps(words[places], found)


def join_planes(body: Bytes, itemsize: int) -> npt.NDArray[np.unsignedinteger]:
    """The inverse of `cut_planes`."""
    count = body.size // itemsize
    words = np.zeros(count, f"u{itemsize}")
    for i in range(itemsize):
        words |= body[i * count : (i + 1) * count].astype(words.dtype) << words.dtype.type(8 * i)
    return words


def inflate_all(frames: Sequence[memoryview], sizes: Sequence[int], name: str) -> Iterable[Any]:
    """The contents of zstd frames, of exactly these sizes, each as something that has a buffer.

    Raises:
        CheckpointError: one is damaged, or of another size.
    """
    many = getattr(_DECOMPRESSOR.codec, "multi_decompress_to_buffer", None)  # zstandard's C, and not all of its builds
    with suppress(zstandard.ZstdError):  # one by one they say what is wrong
        if many and len(frames) > 1 and [*map(zstandard.frame_content_size, frames)] == [*sizes]:
            found: Iterable[Any] = many(frames, decompressed_sizes=np.array(sizes, np.uint64))
            return found
    bodies = [inflate(frame, size, name) for frame, size in zip(frames, sizes, strict=True)]
    for body, size in zip(bodies, sizes, strict=True):
        if len(body) != size:
            raise CheckpointError(f"tensor {name}: a frame of {len(body):,} bytes for {size:,}; the pack is damaged")
    return bodies


def inflate(frame: memoryview, limit: int, name: str) -> bytes:
    """The content of one zstd frame, at most `limit` bytes.

    Raises:
        CheckpointError: it is damaged, or larger.
    """
    try:
        size = zstandard.frame_content_size(frame)
        if not 0 <= size <= limit:
            raise CheckpointError(f"tensor {name}: a frame of {size:,} bytes, expected at most {limit:,}")
        return _DECOMPRESSOR.codec.decompress(frame, max_output_size=max(1, limit))
    except zstandard.ZstdError as error:
        raise CheckpointError(f"tensor {name}: a frame that zstd cannot read ({error}); the pack is damaged") from None
