# SPDX-License-Identifier: Apache-2.0
"""Frames of packs by themselves: several leaves at once, empty ones and noise; and what no frame can be."""

from types import SimpleNamespace

import numpy as np
import pytest

from darekit.dtypes import DTYPES
from darekit.errors import CheckpointError
from darekit.packs.frames import (
    NARROW,
    PLANES,
    RAW,
    STEPS,
    Forms,
    can_shrink,
    compress_leaves,
    compress_values,
    decompress_values,
    has_difference,
    unwrap_values,
)
from darekit.packs.steps import FEW_APART, head_of, read_head

# Values, what the tensor is, and how it is encoded.
KINDS = [("BF16", "BF16", "exact"), ("F32", "F32", "exact"), ("F32", "BF16", "exact"), ("F16", "F16", "rounded"),
         ("F8_E4M3", "F8_E4M3", "rounded")]  # fmt: skip


def tensor(dtype="BF16", encoding="exact", kind="delta", bits=16):
    return SimpleNamespace(name="w", dtype=dtype, encoding=encoding, kind=kind, bits=bits)


def leaves(values):
    """Raw values and base of four leaves: like the base, of one value, empty, and noise; and where each ends."""
    rng, size = np.random.default_rng(7), DTYPES[values].itemsize
    noise = rng.integers(0, 256, 600 * size, np.uint8)
    alike = rng.integers(0, 256, (4, size), np.uint8)[rng.integers(0, 4, 500)].reshape(-1)
    stored = np.concatenate([alike, np.zeros(400 * size, np.uint8), noise])
    base = np.concatenate([alike, np.zeros(400 * size, np.uint8), rng.integers(0, 256, 600 * size, np.uint8)])
    return stored, base, [500 * size, 900 * size, 900 * size, 1500 * size]


@pytest.mark.parametrize(("values", "dtype", "encoding"), KINDS)
def test_leaves_that_lie_behind_one_another_come_back(values, dtype, encoding):
    one, number = tensor(dtype, encoding), DTYPES[values]
    stored, base, ends = leaves(values)
    differs = has_difference(one, number)
    frames = compress_leaves(one, number, stored, base if differs else base[:0], ends)
    begins = [0, *ends[:-1]]
    assert frames[2].size == 0
    for frame, begin, end in zip(frames, begins, ends, strict=True):
        before = base[begin:end] if differs else None
        found = decompress_values(one, number, frame, end - begin, before)
        assert (found == stored[begin:end]).all()
        alone = compress_values(one, number, stored[begin:end], base[begin:end] if differs else base[:0])
        assert (alone == frame).all() and frame.size <= end - begin + bool(end - begin)
    kinds = [int(frame[0]) for frame in frames if frame.size]
    assert kinds[2] == RAW and frames[3].size == ends[3] - ends[2] + 1  # noise
    assert kinds[0] == ((NARROW if number.itemsize == 2 else STEPS) if differs else PLANES)
    assert kinds[1] in (NARROW, STEPS) if differs else kinds[1] == PLANES
    assert frames[1].size < 100
    joined, out = np.concatenate(frames), np.full(stored.size, 0xA5, np.uint8)
    forms = unwrap_values(one, number, joined, np.cumsum([frame.size for frame in frames]).tolist(), out, ends)
    assert forms.kinds.tolist() == [*kinds[:2], RAW, kinds[2]] and (out[ends[2] :] == stored[ends[2] :]).all()
    assert forms.numbers.tolist() == [0, 0, 0, 0]


def test_frames_that_nothing_wrote_are_refused():
    bf16, f32 = DTYPES["BF16"], DTYPES["F32"]

    def refused(one, values, frame, nbytes, base=None):
        frame = np.frombuffer(bytes(frame), np.uint8)
        out = np.zeros(nbytes, np.uint8)
        with pytest.raises(CheckpointError, match="w: a frame"):
            decompress_values(one, values, frame, nbytes, base)
        with pytest.raises(CheckpointError, match="w: a frame"):
            unwrap_values(one, values, frame, [frame.size], out, [nbytes])

    exact, rounded = tensor(), tensor(encoding="rounded")
    refused(exact, bf16, [], 8)  # nothing, where there are values
    refused(exact, bf16, [RAW, 1, 2, 3], 4)  # too short
    refused(exact, bf16, [RAW, 1, 2, 3, 4, 5], 4)  # too long
    refused(exact, bf16, [9, 1, 2, 3, 4], 4)  # of no kind that there is
    refused(rounded, bf16, [STEPS, 1, 2, 3, 4], 4)  # steps from a base that these values do not have
    refused(tensor("BF16"), f32, [STEPS, 1, 2, 3, 4], 4)
    refused(tensor("F32"), f32, [NARROW, 0, 0, 3, 4], 4)  # only 16-bit values are narrow
    refused(exact, bf16, [NARROW, 3, 0, *[0] * 6], 16)  # of eight elements at most two stand apart
    refused(exact, bf16, [NARROW, 2, 0, 0], 16)  # and they are not all there
    assert decompress_values(exact, bf16, np.zeros(0, np.uint8), 0, None).size == 0
    # Whole frames, but of values that are steps from no base.
    for values, kind in ((f32, STEPS), (bf16, NARROW)):
        stored = np.zeros(400, np.uint8)
        frame = compress_values(tensor(values.name), values, stored, stored)
        assert frame[0] == kind
        refused(tensor(values.name, "rounded"), values, frame.tobytes(), 400, stored)


def test_how_many_steps_may_stand_apart():
    many = np.arange(5, dtype=np.uint16)
    head = head_of(many)
    assert FEW_APART == 4 and head == b"\x05\x00" + many.astype("<u2").tobytes()
    found, rest = read_head(memoryview(head), 20, "w")
    assert bytes(found) == head[2:] and not len(rest)
    with pytest.raises(CheckpointError):
        read_head(memoryview(head), 19, "w")
    with pytest.raises(CheckpointError):
        read_head(memoryview(head[:-1]), 20, "w")


def test_what_can_shrink_and_what_has_a_difference():
    assert can_shrink(tensor(bits=4)) and not can_shrink(tensor(bits=1))
    assert not can_shrink(tensor(kind="copy", bits=16)) and not can_shrink(tensor(kind="copy", bits=1))
    assert has_difference(tensor(), DTYPES["BF16"]) and not has_difference(tensor(), DTYPES["F32"])
    assert not has_difference(tensor(encoding="rounded"), DTYPES["BF16"])
    plain = Forms.plain(3)
    assert plain.kinds.tolist() == [0, 0, 0] == plain.numbers.tolist() and plain.many.size == 0
