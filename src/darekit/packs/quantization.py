# SPDX-License-Identifier: Apache-2.0
"""Deltas as integers of 8, 4, 2 or 1 bits with one BF16 scale per group, and integers as packed bits.

8 and 4 bits: q in [-(2^(b-1)-1), 2^(b-1)-1], scale max|d| / qmax rounded up, so that nothing is clipped. 2 bits: q in
{-1, 0, 1}. 1 bit: the sign, scale mean|d| (BitDelta, arXiv 2402.10193, in groups). A value is q * scale.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from darekit.dtypes import Bytes, Floats
from darekit.kernels import packs as kernels

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LARGEST = np.float32(3.3895314e38)  # of BF16
# Measured on 2e6 values: three levels lose least of a normal distribution at 1.53 mean|d| (19.0 % of its energy), of a
# Laplace distribution at 1.99 (26.4 %; here 28.8 %). Deltas of fine-tuning are nearer to the former.
TERNARY = 1.53

Codes = npt.NDArray[np.uint8]
Doubles = npt.NDArray[np.float64]


def groups_in(count: Any, group: int) -> Any:
    """Numbers of kept elements -> of groups, the nearest: the last takes the rest, from half a group to one and a half.

    Groups that were only rounded up would cost half a scale per leaf, 0.9 % of a 1 bit pack at p = 0.99.

    >>> groups_in(np.array([0, 1, 95, 96, 128]), 64).tolist()
    [0, 1, 1, 2, 2]
    """
    return np.maximum((2 * count + group) // (2 * group), np.minimum(count, 1))


def quantize(delta: Floats, bits: int, group: int) -> tuple[Codes, Bytes]:
    """(k,) -> codes (k,) uint8 below 2^bits, and scales (groups,) BF16 as raw bytes.

    A code is q + 2^(bits-1); of 1 bit, 1 for values of 0 or more.
    """
    begins = group * np.arange(groups_in(delta.size, group))
    size = np.abs(delta.astype(np.float64))
    largest, total = np.maximum.reduceat(size, begins), np.add.reduceat(size, begins)
    scales = _scales(largest, total, delta.size, bits, group)
    if bits == 1:
        return (delta >= 0).astype(np.uint8), scales.view(np.uint8)
    wide = spread(scales.astype(np.float64), group, delta.size)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(wide > 0, delta / wide, 0.0)
    limit = _largest(bits)
    whole = np.clip(np.rint(ratio), -limit, limit).astype(np.int16)
    return (whole + (1 << (bits - 1))).astype(np.uint8), scales.view(np.uint8)


def encode_values(delta: Floats, bits: int, group: int) -> tuple[Bytes, Bytes]:
    """(k,) -> `quantize` and `pack_bits`: packed codes, and scales as raw bytes."""
    if delta.dtype != np.float32:
        codes, scales = quantize(delta, bits, group)
        return pack_bits(codes, bits), scales
    found = np.empty(int(groups_in(delta.size, group)), BFLOAT16)
    if bits >= 4:
        kernels.group_scales(delta, group, _largest(bits), found.view(np.uint16))
    else:
        total = np.empty(found.size)
        kernels.group_sums(delta, group, total)
        found = _scales(total, total, delta.size, bits, group)
    packed = np.empty(-(-delta.size * bits // 8), np.uint8)
    kernels.pack_codes(delta, found.view(np.uint16), bits, group, packed)
    return packed, found.view(np.uint8)


def decode_values(packed: Bytes, scales: Floats, bits: int, group: int, out: Floats) -> None:
    """Packed codes and (groups,) float32 scales -> `out`, (k,): `unpack_bits` and `dequantize`."""
    if out.dtype == np.float32:
        kernels.unpack_values(packed, scales, bits, group, out)
    else:
        dequantize(unpack_bits(packed, bits, out.size), scales, bits, group, out)


def dequantize(codes: Codes, scales: Floats, bits: int, group: int, out: Floats) -> None:
    """Codes (k,) and scales (groups,) float32 -> `out`, (k,) float32 or float64; exact."""
    if bits == 1:
        np.multiply(codes, 2.0, out=out, casting="same_kind")
        out -= 1
    else:
        np.subtract(codes, float(1 << (bits - 1)), out=out, casting="same_kind")
    out *= spread(scales, group, out.size)


def spread(scales: Floats, group: int, count: int) -> Floats:
    """(groups,) -> (count,): each element's scale."""
    found: Floats = scales[np.minimum(np.arange(count) // group, scales.size - 1)]
    return found


def pack_bits(codes: Codes, bits: int) -> Bytes:
    """(k,) codes -> (ceil(k * bits / 8),) bytes, the first code in the lowest bits."""
    if bits == 8:
        return codes
    each = 8 // bits
    padded = np.zeros(-(-codes.size // each) * each, np.uint8)
    padded[: codes.size] = codes
    columns = padded.reshape(-1, each)
    packed = np.zeros(columns.shape[0], np.uint8)
    for i in range(each):
        packed |= columns[:, i] << np.uint8(i * bits)
    return packed


def unpack_bits(packed: Bytes, bits: int, count: int) -> Codes:
    """The inverse of `pack_bits`.

    >>> unpack_bits(pack_bits(np.array([3, 1, 2], np.uint8), 2), 2, 3).tolist()
    [3, 1, 2]
    """
    if bits == 8:
        return packed
    each = 8 // bits
    codes = np.empty((packed.size, each), np.uint8)
    for i in range(each):
        codes[:, i] = (packed >> np.uint8(i * bits)) & np.uint8((1 << bits) - 1)
    return codes.reshape(-1)[:count]


def _scales(largest: Doubles, total: Doubles, count: int, bits: int, group: int) -> npt.NDArray[np.generic]:
    """Max |d| (for 4 bits and more) and sum |d| (for fewer) of each group of `count` values -> their scales, BF16."""
    if bits >= 4:
        return _round_up(largest / _largest(bits))
    members = np.full(total.size, group, np.int64)
    if members.size:
        members[-1] = count - (members.size - 1) * group  # the rest as well
    mean = total / members * (TERNARY if bits == 2 else 1.0)
    scales: npt.NDArray[np.generic] = np.minimum(mean, float(LARGEST)).astype(BFLOAT16)
    return scales


def _largest(bits: int) -> int:
    return (1 << (bits - 1)) - 1


def _round_up(values: Doubles) -> npt.NDArray[np.generic]:
    """(n,) float64, 0 or more -> (n,) BF16, none below its value, but that nothing is above the largest."""
    wanted = np.minimum(values, float(LARGEST))
    nearest = wanted.astype(BFLOAT16)
    low = nearest.astype(np.float64) < wanted
    # Positive floats order like their bit patterns: the next one up is one more.
    found: npt.NDArray[np.generic] = (nearest.view(np.uint16) + low.astype(np.uint16)).view(BFLOAT16)
    return found
