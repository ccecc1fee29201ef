# SPDX-License-Identifier: Apache-2.0
"""Kernels of packs against the frozen mask, numpy and the general way, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from darekit import masks
from darekit.checkpoints import digests
from darekit.dtypes import DTYPES
from darekit.errors import CheckpointError, DataError
from darekit.kernels import packs as kernels
from darekit.packs.format import PackedTensor
from darekit.packs.frames import DIFFERENCE, NARROW, PLANES, RAW, STEPS, Forms, compress_values, decompress_values
from darekit.packs.lane import READ_LEAVES, Lane, lane_for
from darekit.packs.leaves import Mask, encode, factor_of, put, restore, scale_factors, take
from darekit.packs.lossless import compress, cut_planes, decompress
from darekit.packs.quantization import encode_values, groups_in, pack_bits, quantize
from darekit.packs.steps import after_steps, cut_narrow, head_of, join_narrow, steps_between

SIZES = (0, 1, 63, 64, 65, 1023, 1024, 1025, 8191, 8193, 65536)
RATES = (1e-9, 0.1, 0.5, 0.9, 0.99)
BF16 = DTYPES["BF16"]


def weights(count: int, spread: float, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(count) * spread
    return values.astype(BF16.numpy).view(np.uint8)


def pair(count: int) -> tuple[np.ndarray, np.ndarray]:
    """A base and a model, (2 count,) uint8, some of whose elements agree, and zeros of both signs."""
    base = weights(count, 0.02, 1)
    tuned = base.view(BF16.numpy).astype(np.float32) + weights(count, 5e-4, 2).view(BF16.numpy).astype(np.float32)
    raw = tuned.astype(BF16.numpy).view(np.uint8)
    raw.view(np.uint16)[::7] = base.view(np.uint16)[::7]
    base.view(np.uint16)[::11] = 0x8000
    return base, raw


def tensor_of(count: int, rate: float, encoding: str, group: int = 64) -> PackedTensor:
    group = group if encoding.startswith("int") else 0
    return PackedTensor("w", "BF16", (count,), "delta", drop_rate=rate, encoding=encoding, group=group)


def test_a_leaf_is_that_of_the_digests() -> None:
    assert kernels.LEAF == digests.LEAF


@pytest.mark.parametrize("rate", RATES)
def test_indices_are_those_of_the_frozen_mask(rate: float) -> None:
    seed, stream = (1 << 63) + 5, masks.stream_of("lm_head.weight")
    for start in (0, 7 * 1024, 1 << 34, 5 * 1024 << 40):
        for count in SIZES if start == 0 else (1025,):
            constants = np.uint64(seed), np.uint64(stream), start, masks.threshold_of(rate), count
            expected = np.flatnonzero(masks.kept(seed, stream, start, count, rate))
            for kind in (np.int32, np.uint16):
                room = np.zeros(count + kernels.SPARE, kind)
                assert kernels.kept_indices(*constants, room).tolist() == expected.tolist(), (start, count)


@pytest.mark.parametrize("name", ["BF16", "F32", "F64", "F8_E4M3"])
def test_take_and_put_are_numpys(name: str) -> None:
    dtype = DTYPES[name]
    raw = np.random.default_rng(3).integers(0, 256, 1000 * dtype.itemsize, np.uint8)
    at = np.flatnonzero(np.random.default_rng(4).random(1000) < 0.3).astype(np.int32)
    words = raw.view(f"u{dtype.itemsize}")
    taken = take(raw, dtype, at)
    assert np.array_equal(taken.view(words.dtype), words[at])
    expected = words.copy()
    expected[at] = ~words[at]
    put(raw, dtype, at, (~taken.view(words.dtype)).view(np.uint8))
    assert np.array_equal(words, expected)


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("group", [1, 3, 64, 5000])
def test_codes_and_scales_are_those_of_the_formulas(bits: int, group: int) -> None:
    for count in (0, 1, 31, 63, 64, 65, 95, 96, 97, 1023, 1024, 1025):
        delta = (np.random.default_rng(count).standard_normal(count) * 1e-3).astype(np.float32)
        delta[::5] = 0
        delta[: min(count, group)] *= np.float32(1e-42)  # scales that are subnormal, or 0
        codes, scales = quantize(delta, bits, group) if count else (np.empty(0, np.uint8), np.empty(0, np.uint8))
        packed, found = encode_values(delta, bits, group)
        assert np.array_equal(found, scales), count
        assert np.array_equal(packed, pack_bits(codes, bits)), count


def general(tensor: PackedTensor, base: np.ndarray, tuned: np.ndarray) -> tuple[list, np.ndarray, list[int]]:
    """Leaf by leaf, as `darekit.packs.leaves` does it: (values, scales) of each, the result, the counts."""
    mask, values, result = Mask(tensor, 42, None), value_format(tensor), base.copy()
    stored, counts = [], []
    for leaf in range(tensor.leaves):
        part = slice(leaf * 2 * digests.LEAF, (leaf + 1) * 2 * digests.LEAF)
        at = mask.indices(leaf)
        found = encode(tensor, take(base[part], BF16, at), take(tuned[part], BF16, at), values, BF16)
        restore(tensor, values, factor_of(tensor, "paper"), at, *found, result[part])
        stored.append(found)
        counts.append(at.size)
    return stored, result, counts


def value_format(tensor: PackedTensor):
    return DTYPES["U8" if tensor.bits else "BF16"]


def lane_of(tensor: PackedTensor) -> Lane:
    lane = lane_for(Mask(tensor, 42, None), value_format(tensor), factor_of(tensor, "paper"))
    assert lane is not None
    return lane


def rooms(lane: Lane) -> tuple[np.ndarray, np.ndarray]:
    return np.empty(READ_LEAVES * 2 * digests.LEAF, np.uint8), np.empty(READ_LEAVES * lane.most_scales, np.uint8)


@pytest.mark.parametrize("encoding", ["exact", "int8", "int4", "int2", "int1"])
@pytest.mark.parametrize("rate", [0.1, 0.9, 0.99])
def test_the_fast_lane_does_what_the_general_way_does(encoding: str, rate: float) -> None:
    for count in (1, 63, 64, 65, 1023, 1024, 1025, 65535, 65536, 65537, 3 * 65536 + 17):
        tensor, (base, tuned) = tensor_of(count, rate, encoding), pair(count)
        stored, result, expected = general(tensor, base, tuned)
        counts, raw, lane = np.zeros(tensor.leaves, np.int64), base.copy(), lane_of(tensor)
        made = lane.encode(raw, tuned, 0, counts, *rooms(lane))
        assert counts.tolist() == expected
        assert np.array_equal(raw, result)
        assert made.ends == np.cumsum([pieces[0].size for pieces in stored]).tolist()
        assert made.scale_ends == np.cumsum([pieces[1].size for pieces in stored]).tolist()
        values, scales = (np.concatenate([pieces[i] for pieces in stored]) for i in (0, 1))
        assert np.array_equal(made.values, values)
        assert np.array_equal(made.scales, scales)
        # And back, with what was overwritten.
        kept, places = np.zeros((2, sum(expected)), np.uint16)
        raw = base.copy()
        plain = Forms.plain(tensor.leaves)
        assert lane.restore(raw, 0, counts, values, scale_factors(scales, "w"), plain, kept, places) == (-1, 0)
        assert np.array_equal(raw, result)
        kernels.put_leaves(raw.view(np.uint16), counts, places, kept)
        assert np.array_equal(raw, base)


@pytest.mark.parametrize("form", [RAW, PLANES, DIFFERENCE, STEPS, NARROW])
def test_the_fast_lane_begins_at_any_leaf_and_reads_what_frames_hold(form: int) -> None:
    tensor, (base, tuned) = tensor_of(3 * 65536 + 17, 0.9, "exact"), pair(3 * 65536 + 17)
    stored, result, expected = general(tensor, base, tuned)
    begin, lane, nothing = 2 * 2 * digests.LEAF, lane_of(tensor), np.empty(0, np.uint16)
    origin = take(base[begin:], BF16, Mask(tensor, 42, None).indices(2)).view(np.uint16)
    words = stored[2][0].view(np.uint16)
    many = np.empty(0, np.uint16)
    if form == NARROW:
        (narrow,) = cut_narrow(words, origin, [words.size])
        assert narrow is not None
        many, first = np.frombuffer(narrow[0][2:], "<u2"), np.pad(narrow[1], (0, words.size))
        assert many.size == int.from_bytes(narrow[0][:2], "little") > 0
    elif form == RAW:
        first = words.view(np.uint8)
    else:
        first = cut_planes({PLANES: words, DIFFERENCE: words ^ origin, STEPS: steps_between(words, origin)}[form])
    values = np.concatenate([first, stored[3][0]])
    raw = base[begin:].copy()
    forms = Forms(np.array([form, RAW], np.uint8), many, np.array([many.size, 0]))
    counts = np.array(expected[2:], np.int64)
    assert lane.restore(raw, 2, counts, values, np.empty(0, np.float32), forms, nothing, nothing) == (-1, 0)
    assert np.array_equal(raw, result[begin:])
    counts[1] += 1
    raw = base[begin:].copy()
    assert lane.restore(raw, 2, counts, values, np.empty(0, np.float32), forms, nothing, nothing)[0] == 1
    if form == NARROW:  # one step is missing: nothing is touched
        forms, raw = Forms(forms.kinds, many, np.array([many.size - 1, 0])), base[begin:].copy()
        assert lane.restore(raw, 2, counts, values, np.empty(0, np.float32), forms, nothing, nothing)[0] == 0
        assert np.array_equal(raw, base[begin:])


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_steps_are_undone_and_the_nearest_numbers_are_one_step_away(kind: type) -> None:
    rng, most = np.random.default_rng(0), np.iinfo(kind).max
    base, words = rng.integers(0, most, (2, 5000), kind, endpoint=True)
    assert np.array_equal(after_steps(base, steps_between(words, base)), words)
    assert not steps_between(base, base).any()
    floats = {np.uint16: np.float16, np.uint32: np.float32, np.uint64: np.float64}
    if kind in floats:
        number = rng.standard_normal(1000).astype(floats[kind])
        number[:3] = 1, -1, 2  # where the exponent changes
        up, down = (np.nextafter(number, floats[kind](end)).view(kind) for end in (np.inf, -np.inf))
        assert set(steps_between(up, number.view(kind))) == {2} and set(steps_between(down, number.view(kind))) == {1}
        zeros = np.array([0.0, -0.0], floats[kind]).view(kind)
        assert steps_between(zeros[::-1], zeros).tolist() == [1, 2]


def test_steps_in_one_byte_are_those_of_the_formula() -> None:
    rng = np.random.default_rng(1)
    for count in (0, 1, 7, 8, 9, 31, 1000, 1003):
        base = rng.integers(0, 1 << 16, count, np.uint16)
        words = base + rng.integers(-200, 200, count).astype(np.uint16)
        steps = steps_between(words, base)
        low, found = np.empty(count, np.uint8), np.empty(count, np.uint16)
        many = kernels.cut_steps(words, base, found, low)
        assert np.array_equal(low, np.minimum(steps, 255)) and np.array_equal(found[:many], steps[steps >= 255])
        raw = memoryview(found[:many].tobytes())
        assert np.array_equal(join_narrow(base, low, raw, "w"), words)
        for other in ([raw[2:]] if many else []) + [memoryview(raw.tobytes() + b"..")]:
            with pytest.raises(CheckpointError, match="steps do not fit together"):
                join_narrow(base, low, other, "w")
    far = rng.integers(0, 1 << 16, (2, 1000), np.uint16)
    assert cut_narrow(*far, [400, 1000]) == [None, None]
    assert head_of(np.array([255, 0x1234], np.uint16)) == b"\2\0\xff\0\x34\x12"


@pytest.mark.parametrize("spread", [0.0, 1e-4, 0.02, 3.0])
@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F64"])
def test_frames_hold_every_value_and_pay(name: str, spread: float) -> None:
    """Spread: of the changes, relative to the weights. Small ones in 16 bits are a byte each, all others planes."""
    dtype, rng = DTYPES[name], np.random.default_rng(2)
    base = (rng.standard_normal(3001) * 0.02).astype(dtype.numpy)
    tuned = (base.astype(np.float64) + rng.standard_normal(3001) * 0.02 * spread).astype(dtype.numpy)
    before, after = base.view(np.uint8), tuned.view(np.uint8)
    tensor = PackedTensor("w", name, (65536,), "delta", drop_rate=0.9, encoding="exact")
    frame = compress_values(tensor, dtype, after, before)
    assert frame[0] == (NARROW if dtype.itemsize == 2 and spread <= 0.02 else STEPS)
    assert np.array_equal(decompress_values(tensor, dtype, frame, after.size, before), after)
    words, origin = (raw.view(f"u{dtype.itemsize}") for raw in (after, before))
    difference = compress_values(tensor_of(65536, 0.9, "delta"), dtype, (words ^ origin).view(np.uint8), before)
    assert spread in (0, 3) or frame.size < 0.99 * difference.size
    exact = compress(before, after, dtype.itemsize)
    raw = before.copy()
    decompress(exact, raw, dtype.itemsize, "w")
    assert np.array_equal(raw, after)


def test_what_is_not_finite_is_refused() -> None:
    base, tuned = pair(1000)
    tuned.view(np.uint16)[:] = 0x7F80
    for encoding in ("exact", "int4", "int1"):
        with pytest.raises(DataError, match="NaN or Inf"):
            lane = lane_of(tensor_of(1000, 0.5, encoding))
            lane.encode(base.copy(), tuned, 0, np.zeros(1, np.int64), *rooms(lane))
    tuned.view(np.uint16)[:] = 0x7F00  # 1.7e38: ten times that does not fit
    with pytest.raises(CheckpointError, match="results are NaN or Inf"):
        lane = lane_of(tensor_of(1000, 0.9, "exact"))
        lane.encode(base.copy(), tuned, 0, np.zeros(1, np.int64), *rooms(lane))


def test_what_takes_the_lane() -> None:
    def found(
        rate: float, dtype: str = "BF16", encoding: str = "exact", values: str = "BF16", rows: bool = False
    ) -> bool:
        tensor = PackedTensor("w", dtype, (8, 8), "delta", drop_rate=rate, encoding=encoding)
        bitmap = np.ones(1, np.uint8) if rows else None
        return lane_for(Mask(tensor, 1, bitmap), DTYPES[values], np.float32(1)) is not None

    assert found(0.5) and found(0.5, encoding="int4", values="U8")
    assert not found(0.0) and not found(1.0)
    assert not found(0.5, dtype="F32") and not found(0.5, values="F32") and not found(0.5, encoding="delta")
    assert not found(0.5, rows=True)
    assert groups_in(0, 64) == 0
