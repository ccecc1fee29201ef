# SPDX-License-Identifier: Apache-2.0
"""Codes and scales of packs, against Python's own integers and fractions: groups, extremes, bits."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from darekit.packs.quantization import (
    LARGEST,
    TERNARY,
    decode_values,
    dequantize,
    encode_values,
    groups_in,
    pack_bits,
    quantize,
    spread,
    unpack_bits,
)

BITS = (8, 4, 2, 1)
FINITE = np.arange(0x7F80, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)  # all BF16 of 0 or more


def groups_of(count, group):
    """Begin and end of each group: the last takes the rest, from half a group to one and a half."""
    many = max((2 * count + group) // (2 * group), min(count, 1))
    return [(at * group, count if at == many - 1 else (at + 1) * group) for at in range(many)]


def scale_of(values, bits):
    """Of one group, exactly: the least BF16 that clips nothing, or the BF16 nearest to a multiple of the mean."""
    sizes = [abs(Fraction(float(value))) for value in values]
    if bits >= 4:
        wanted = max(sizes) / (2 ** (bits - 1) - 1)
        return float(FINITE[min(np.searchsorted(FINITE, float(wanted)), FINITE.size - 1)])
    mean = float(sum(sizes) / len(sizes) * Fraction(TERNARY if bits == 2 else 1))
    return float(np.float64(min(mean, float(LARGEST))).astype(ml_dtypes.bfloat16))


def code_of(value, scale, bits):
    if bits == 1:
        return 1 if value >= 0 else 0
    limit = 2 ** (bits - 1) - 1
    q = round(Fraction(float(value)) / Fraction(scale)) if scale else 0
    return max(-limit, min(limit, q)) + 2 ** (bits - 1)


def number_of(codes, bits):
    """Codes as bytes, the first in the lowest bits."""
    whole = sum(int(code) << (bits * at) for at, code in enumerate(codes))
    return whole.to_bytes(-(-len(codes) * bits // 8), "little")


def values(count, dtype=np.float32):
    rng = np.random.default_rng(count)
    found = rng.normal(size=count).astype(dtype)
    found[::5] = 0
    found[1::7] *= 30
    return found


@pytest.mark.parametrize("group", [1, 2, 3, 64])
def test_groups_are_the_nearest_number(group):
    for count in range(4 * group + 2):
        assert int(groups_in(count, group)) == len(groups_of(count, group))
    sizes = [end - begin for count in range(1, 999) for begin, end in groups_of(count, 64)[-1:] if count > 32]
    assert min(sizes) == 32 and max(sizes) == 64 + 31
    assert groups_in(np.array([0, 1, 31, 32, 95, 96]), 64).tolist() == [0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [3, 8])
def test_codes_and_scales_are_those_of_fractions(bits, group, dtype):
    for count in (0, 1, 2, 4, 7, 8, 11, 12, 13, 50):
        delta = values(count, dtype)
        scales = [scale_of(delta[begin:end], bits) for begin, end in groups_of(count, group)]
        mine = [scales[min(at // group, len(scales) - 1)] for at in range(count)]
        codes = [code_of(value, scale, bits) for value, scale in zip(delta.tolist(), mine, strict=True)]
        found, raw = quantize(delta, bits, group)
        assert raw.view(ml_dtypes.bfloat16).astype(float).tolist() == scales
        assert found.tolist() == codes and found.dtype == raw.dtype == np.uint8
        packed, other = encode_values(delta, bits, group)
        assert packed.tobytes() == number_of(codes, bits) and other.tobytes() == raw.tobytes()
        if not count:
            continue
        wide = np.array(scales, np.float32)
        assert spread(wide, group, count).tolist() == mine
        worth = [
            (2 * code - 1 if bits == 1 else code - 2 ** (bits - 1)) * scale
            for code, scale in zip(codes, mine, strict=True)
        ]
        for out in (np.full(count, np.nan, np.float32), np.full(count, np.nan)):
            decode_values(packed, wide, bits, group, out)
            assert out.tolist() == worth
            out[...] = np.nan
            dequantize(found, wide, bits, group, out)
            assert out.tolist() == worth


@pytest.mark.parametrize("bits", BITS)
def test_bits(bits):
    for count in (0, 1, 7, 8, 9, 33):
        codes = np.random.default_rng(count).integers(0, 1 << bits, count).astype(np.uint8)
        packed = pack_bits(codes, bits)
        assert packed.tobytes() == number_of(codes, bits)
        assert unpack_bits(packed, bits, count).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", BITS)
def test_scales_never_pass_the_largest_number(bits):
    """Of float64 that BF16 does not hold; the 1.53 of 2 bits alone may lead beyond it."""
    delta = np.array([1e300, -1e300, 3e38, 0.0])
    scale = quantize(delta, bits, 4)[1].view(ml_dtypes.bfloat16).astype(float)
    assert scale.tolist() == [float(LARGEST)]
    near = np.full(4, 3.3e38, np.float32)
    for found in (quantize(near, bits, 4), encode_values(near, bits, 4)):
        scale = found[1].view(ml_dtypes.bfloat16).astype(float)
        assert scale.tolist() == [scale_of(near, bits)] and scale[0] <= float(LARGEST)


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_are_rounded_up_so_that_nothing_is_clipped(bits):
    qmax = 2 ** (bits - 1) - 1
    exact = np.array([0.0, 1.0, 1.5, 2.0**-100, 2.0**100])
    above = np.where(exact > 0, exact * (1 + 1e-9), 1e-300)
    for one, other in zip(exact * qmax, above * qmax, strict=True):
        found, more = (quantize(np.array([x]), bits, 1)[1].view(np.uint16)[0] for x in (one, other))
        assert found.view(ml_dtypes.bfloat16).astype(float) * qmax == one and more == found + 1


def test_nothing_is_said_of_groups_of_zeros():
    with np.errstate(all="raise"):
        for bits in BITS:
            codes, scales = quantize(np.zeros(5, np.float32), bits, 2)
            assert not scales.any() and codes.tolist() == [1 if bits == 1 else 1 << (bits - 1)] * 5
