# SPDX-License-Identifier: Apache-2.0
"""What every source must do, whatever its bytes come from; and one whose delta is finer than its bytes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest

from darekit.checkpoints import Delta, Source, TensorInfo, Traits, traits_of
from darekit.checkpoints.digests import TensorDigest, tensor_digest
from darekit.dtypes import DTYPES

GUARD = 32  # bytes around what is asked for, which must not change


def read(source, begin, end):
    """Bytes begin .. end of a source, read into memory that starts at an odd address."""
    room = np.full(end - begin + 2 * GUARD + 1, 0xA5, np.uint8)
    source.read_into(room[GUARD + 1 : GUARD + 1 + end - begin], begin)
    assert (room[: GUARD + 1] == 0xA5).all() and (room[GUARD + 1 + end - begin :] == 0xA5).all(), "wrote too much"
    return room[GUARD + 1 : GUARD + 1 + end - begin].tobytes()


def conform(source: Source, dtype: str, raw: bytes) -> None:
    """Fail where a source of a tensor of `dtype`, whose bytes are `raw`, breaks what others rely on."""
    itemsize, traits, n = DTYPES[dtype].itemsize, traits_of(source), len(raw)
    assert source.nbytes == n
    assert read(source, 0, n) == raw
    for at in {0, n // 2, n}:
        assert read(source, at, at) == b""
    for begin, end in ((-1, 0), (-1, 1), (n, n + 1), (0, n + 1), (n + 1, n + 2), (n // 2, n + 1)):
        with pytest.raises(ValueError, match="outside"):
            source.read_into(np.empty(end - begin, np.uint8), begin)
    rng = np.random.default_rng(0)
    grain = traits.grain * itemsize
    edges = [1, 3, itemsize, n // 3, n - 1, *(k * grain + d for k in (1, 2, 3) for d in (-1, 0, 1))]
    cuts = sorted({0, n, *(cut for cut in edges if 0 <= cut <= n), *rng.integers(0, n + 1, 8).tolist()})
    ranges = [(a, b) for a in cuts for b in cuts if a < b] * 2
    rng.shuffle(ranges)
    for begin, end in ranges[:20]:
        assert read(source, begin, end) == raw[begin:end], (begin, end)
    with ThreadPoolExecutor(8) as pool:  # in parallel, in any order
        found = list(pool.map(lambda where: read(source, *where), ranges))
    assert all(part == raw[begin:end] for part, (begin, end) in zip(found, ranges, strict=True))
    _conform_traits(source, dtype, raw, traits)


def _conform_traits(source, dtype, raw, traits):
    assert traits == traits_of(source), "asked again it says the same"
    assert traits.grain >= 1 and traits.cost >= 0
    assert not any(file.changed() for file in traits.files)
    assert traits.identity is None or (isinstance(traits.identity, bytes) and traits.identity)
    assert traits.seed is None or 0 <= traits.seed < 1 << 64
    if traits.result is not None:
        digest = TensorDigest(DTYPES[dtype].itemsize)
        digest.update(np.frombuffer(raw, np.uint8))
        assert traits.result == tensor_digest(digest.finish())
    if traits.delta is not None:
        kind = DTYPES[dtype].numpy
        count = len(raw) // DTYPES[dtype].itemsize
        whole = np.empty(count, np.float32)
        traits.delta.read_into(whole, 0)
        for begin, end in ((0, 1), (count // 3, count // 2), (count - 1, count)):
            part = np.empty(end - begin, np.float32)
            traits.delta.read_into(part, begin)
            assert (part == whole[begin:end]).all()
        base = np.frombuffer(read(traits.delta.base, 0, len(raw)), kind).astype(np.float32)
        assert (base + whole).astype(kind).tobytes() == raw, "the bytes are base + delta, rounded"


@dataclass(frozen=True)
class Added:
    """A BF16 tensor that is made of another and a float32 delta: what an adapter comes to. `delta`: (count,)."""

    base: TensorInfo
    delta: np.ndarray

    @property
    def nbytes(self):
        return self.base.nbytes

    @property
    def traits(self):
        base = traits_of(self.base.source)
        identity = b"added" + self.delta.tobytes()[:16]
        return Traits(base.files, identity, grain=1, delta=Delta(self.base.source, self.delta_into), cost=base.cost)

    def delta_into(self, part, start):
        part[...] = self.delta[start : start + part.size]

    def read_into(self, buffer, offset):
        if offset < 0 or offset + buffer.size > self.nbytes:
            raise ValueError("outside")
        first, last = offset // 2, -(-(offset + buffer.size) // 2)
        raw = np.empty(2 * (last - first), np.uint8)
        self.base.source.read_into(raw, 2 * first)
        values = raw.view(ml_dtypes.bfloat16).astype(np.float32) + self.delta[first:last]
        found = values.astype(ml_dtypes.bfloat16).view(np.uint8)
        buffer[...] = found[offset - 2 * first :][: buffer.size]


def added(checkpoint, deltas):
    """A checkpoint whose tensors know their deltas to `checkpoint`: name -> (shape) float32."""
    tensors = {
        name: replace(info, source=Added(info, deltas[name].reshape(-1))) for name, info in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors, files=(), directory=None)
