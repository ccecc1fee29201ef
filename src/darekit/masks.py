# SPDX-License-Identifier: Apache-2.0
"""The frozen mask: which elements of one tensor of one model survive, as a pure function of a seed and a name.

Counter-based, so the same seed gives the same mask on any device, thread count, tile size, shard layout or order
of tensors. Files on disk depend on every line of it; version 1 never changes.

- Generator: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11).
- key = the two 32-bit halves of the seed, low half first.
- stream = first 8 bytes of BLAKE2b(digest_size=8) of the tensor's UTF-8 name, little-endian.
- element e of the flattened C-order tensor: block b = e // 1024, r = e % 1024, counter t = 256 b + r % 256; the
  counter words are (t mod 2^32, t >> 32, stream mod 2^32, stream >> 32); the draw is output word r // 256.
- An element is kept iff draw >= T, T = round(p * 2^32) to nearest even; p = 1 gives T = 2^32 and keeps nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

BLOCK = 1024  # contiguous elements that share 256 counters
COUNTERS = 256
DROP_ALL = 1 << 32  # the threshold of p = 1, the only one that needs 33 bits

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def key_of(seed: int) -> tuple[int, int]:
    """Effective seed (unsigned 64 bits) -> Philox key words."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed} is not an unsigned 64-bit integer")
    return seed & 0xFFFFFFFF, seed >> 32


def stream_of(name: str) -> int:
    """Tensor name -> 64-bit stream number."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def threshold_of(drop_rate: float) -> int:
    """Drop rate p -> T = round(p * 2^32), nearest even; from 0 to 2^32 inclusive (both ends are exact)."""
    if not 0.0 <= drop_rate <= 1.0:
        raise ValueError(f"drop rate {drop_rate} is outside [0, 1]")
    return round(drop_rate * 4294967296.0)


def effective_seeds(seed: int, sample_digests: Sequence[bytes]) -> tuple[int, ...]:
    """Recipe seed and each model's sample digest -> one unsigned 64-bit seed per model.

    Depends on a model's contents and not on its place, so reordering models or trying seeds 42, 43 never reuses a
    mask. Only models with equal digests mix in their index: they would interfere everywhere at once.
    """
    seeds = []
    for index, digest in enumerate(sample_digests):
        text = b"darekit-seed-1" + seed.to_bytes(8, "little") + digest
        if sample_digests.count(digest) > 1:
            text += index.to_bytes(8, "little")
        seeds.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
    return tuple(seeds)


def rounding_seed(seed: int, sample_digests: Sequence[bytes]) -> int:
    """Recipe seed and the sample digests of base and models -> the unsigned 64-bit seed by whose draws an output is
    rounded: element e of a tensor by the draw that a mask of this seed would have there.

    Frozen, like masks. It follows from the inputs, so results that are merged once more do not meet their own draws.

    >>> f"{rounding_seed(0, [bytes(16)]):016x}"
    '7da2febad8a5b704'
    """
    text = b"darekit-rounding-1" + seed.to_bytes(8, "little") + b"".join(sample_digests)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def philox(counter: npt.NDArray[np.uint64], stream: int, seed: int) -> tuple[npt.NDArray[np.uint64], ...]:
    """(n,) uint64 counters -> four (n,) uint64 arrays of 32-bit words (Philox4x32-10)."""
    c0, c1 = counter & _LOW, counter >> _SHIFT
    c2, c3 = np.full_like(counter, stream & 0xFFFFFFFF), np.full_like(counter, stream >> 32)
    k0, k1 = key_of(seed)
    for _ in range(ROUNDS):
        wide0, wide1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (wide1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            wide1 & _LOW,
            (wide0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            wide0 & _LOW,
        )
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def draws(seed: int, stream: int, start: int, count: int) -> npt.NDArray[np.uint32]:
    """Draws of elements start .. start + count of one tensor -> (count,) uint32.

    >>> [f"{x:08x}" for x in draws(0, stream_of("w"), 0, 2)]
    ['985868c7', '46fed606']
    """
    first = start // BLOCK
    blocks = -(-(start + count) // BLOCK) - first
    counter = np.arange(first * COUNTERS, (first + blocks) * COUNTERS, dtype=np.uint64)
    words = philox(counter, stream, seed)
    by_block = np.stack([word.astype(np.uint32).reshape(blocks, COUNTERS) for word in words], axis=1)
    offset = start - first * BLOCK
    return by_block.reshape(-1)[offset : offset + count]


def kept(seed: int, stream: int, start: int, count: int, drop_rate: float) -> npt.NDArray[np.bool_]:
    """The mask itself -> (count,) bool, True where the element survives.

    >>> np.flatnonzero(kept(0, stream_of("w"), 0, 48, 0.9)).tolist()
    [8, 13, 14, 24, 39, 40]
    """
    return draws(seed, stream, start, count).astype(np.uint64) >= np.uint64(threshold_of(drop_rate))
