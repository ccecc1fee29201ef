# SPDX-License-Identifier: Apache-2.0
"""Content digests: fingerprints of tensors and checkpoints that do not depend on shards, tiles or threads.

leaf = xxh3-128 of 64Ki elements of raw bytes (the last one shorter); tensor = xxh3-128 over its leaves' digests;
checkpoint = BLAKE2b-128 over name-sorted (name, dtype, shape, tensor digest).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import xxhash

from darekit.dtypes import Bytes

LEAF = 65536


def digest_pieces(raw: Bytes, ends: Iterable[int]) -> list[bytes]:
    """(n,) uint8, cut at `ends` -> the xxh3-128 of each piece."""
    found, begin = [], 0
    for end in ends:
        found.append(xxhash.xxh3_128_digest(raw[begin:end]))
        begin = end
    return found


class TensorDigest:
    """Digest of one tensor, fed in order, from any aligned starting leaf; parts of one tensor join their leaves."""

    def __init__(self, itemsize: int) -> None:
        self.leaf_bytes = LEAF * itemsize
        self.leaves: list[bytes] = []
        self._open = xxhash.xxh3_128()
        self._filled = 0

    def update(self, raw: Bytes) -> None:
        """Take the next bytes."""
        if self._filled == 0:  # whole leaves need no state
            size = self.leaf_bytes
            whole = raw.size // size * size
            self.leaves += digest_pieces(raw[:whole], range(size, whole + 1, size))
            raw = raw[whole:]
        while raw.size:
            part = raw[: self.leaf_bytes - self._filled]
            self._open.update(part)
            self._filled += part.size
            raw = raw[part.size :]
            if self._filled == self.leaf_bytes:
                self._close()

    def _close(self) -> None:
        self.leaves.append(self._open.digest())
        self._open.reset()
        self._filled = 0

    def finish(self) -> list[bytes]:
        """All leaves, the last partial one included."""
        if self._filled:
            self._close()
        return self.leaves


def tensor_digest(leaves: Iterable[bytes]) -> str:
    """Leaves in order -> the tensor's digest in hex."""
    return xxhash.xxh3_128_hexdigest(b"".join(leaves))


def checkpoint_digest(tensors: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """(name, dtype, shape, tensor digest) of every tensor -> the checkpoint's digest in hex."""
    state = hashlib.blake2b(digest_size=16)
    for name, dtype, shape, digest in sorted(tensors):
        state.update(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0{digest}\n".encode())
    return state.hexdigest()
