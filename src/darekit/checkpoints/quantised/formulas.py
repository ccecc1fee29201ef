# SPDX-License-Identifier: Apache-2.0
"""What codes of quantised weights are worth: tables, scales and packings, in plain numpy. This is the definition;
`darekit.kernels.quantised` has faster twins.

A weight is `((table[code] - zero) * scale) * factor` in float32, rounded after each operation as IEEE 754 says, and
once more into the number format that it is read as. Without a zero point or a factor these are 0 and 1, which change
nothing. For codes of at most eight bits and scales of at most sixteen the first product is exact, so that it is then
the correctly rounded weight; otherwise it is what transformers, compressed-tensors and bitsandbytes compute.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Singles = npt.NDArray[np.float32]

# Sign, two bits of exponent, one of mantissa (OCP Microscaling Formats, version 1.0).
E2M1: Singles = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

# Quantiles of a normal distribution, scaled into [-1, 1] (arXiv 2305.14314, appendix E).
NF4: Singles = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip

# Of bitsandbytes: in no order, with 12 as the largest, and one zero.
FP4: Singles = np.array(
    [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32
) / np.float32(12)  # fmt: skip

INT8_STEP = np.float32(7.874015718698502e-3)  # 1 / 127, as bitsandbytes multiplies by it
POWERS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))  # E8M0


def eights(dtype: str) -> Singles:
    """Name of a format of one byte, as in safetensors -> (256,) float32, what each byte is worth.

    >>> eights("F8_E4M3")[0x38], eights("I8")[0xFF]
    (np.float32(1.0), np.float32(-1.0))
    """
    formats = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "I8": np.int8}
    found: Singles = np.arange(256, dtype=np.uint8).view(formats[dtype]).astype(np.float32)
    return found


def integers(bits: int) -> Singles:
    """(2^bits,) float32: what codes of signed integers are worth that were made positive before they were packed.

    >>> integers(2)
    array([-2., -1.,  0.,  1.], dtype=float32)
    """
    return np.arange(1 << bits, dtype=np.float32) - np.float32(1 << (bits - 1))


def powers(codes: Bytes) -> Singles:
    """(n,) uint8 E8M0 -> (n,) float32, 2^(code - 127); NaN of 255.

    >>> powers(np.array([126, 127, 255], np.uint8))
    array([0.5, 1. , nan], dtype=float32)
    """
    found: Singles = POWERS[codes]
    return found


def nibbles(raw: Bytes, high_first: bool) -> Bytes:
    """(n,) uint8 -> (2n,) uint8: two codes of four bits in each byte.

    >>> nibbles(np.array([0x21], np.uint8), False)
    array([1, 2], dtype=uint8)
    """
    found = np.empty((raw.size, 2), np.uint8)
    found[:, int(high_first)] = raw & 15
    found[:, int(not high_first)] = raw >> 4
    return found.reshape(-1)


def unpacked(words: npt.NDArray[np.uint32], bits: int, count: int) -> Bytes:
    """(rows, n) uint32 -> (rows, count) uint8: codes of so many bits one behind the other in each row, the first in the
    lowest bits; one may lie in two words.

    >>> unpacked(np.array([[0xFAC688]], np.uint32), 3, 8)
    array([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=uint8)
    """
    begin = np.arange(count) * bits
    word, shift = begin // 32, (begin % 32).astype(np.uint64)
    pairs = np.pad(words, ((0, 0), (0, 1))).astype(np.uint64)
    both = pairs[:, word] | (pairs[:, word + 1] << np.uint64(32))
    return ((both >> shift) & np.uint64((1 << bits) - 1)).astype(np.uint8)


def worth(
    codes: Bytes, table: Singles, zeros: Singles, scales: Singles, start: int, columns: int, block: tuple[int, int],
    corner: tuple[int, int], factor: np.float32,
) -> Singles:  # fmt: skip
    """(n,) uint8, elements `start` .. of a matrix with so many columns -> (n,) float32, what they are worth.

    Args:
        codes: one for each element.
        table: (256,) or fewer, what each code is worth before it is scaled.
        zeros: (rows, groups) that are subtracted first.
        scales: (rows, groups), one for each block.
        start: index of the first element in the flattened matrix.
        columns: of the matrix.
        block: rows and columns of elements that share a scale; the last block of an axis may be smaller.
        corner: which block of the whole matrix `scales[0, 0]` belongs to.
        factor: that the product is multiplied by.
    """
    row, column = np.divmod(np.arange(start, start + codes.size), columns)
    at = row // block[0] - corner[0], column // block[1] - corner[1]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        found: Singles = ((table[codes] - zeros[at]) * scales[at]) * factor
    return found


def cells(table: Singles) -> Singles:
    """(n,) float32 codes' worth -> (n,) float32: the width of the interval whose values are rounded to each.

    A uniform value in it is off by its twelfth root, so that the sum of the squares of a tensor's cells, over 12, is
    about the squared norm of what rounding it has changed.

    >>> cells(np.array([0, 1, 3], np.float32))
    array([1. , 1.5, 2. ], dtype=float32)
    """
    known = np.unique(table[np.isfinite(table)])  # sorted
    gaps = np.diff(known.astype(np.float64))
    widths = (np.concatenate([gaps[:1], gaps]) + np.concatenate([gaps, gaps[-1:]])) / 2
    at = np.searchsorted(known, np.where(np.isfinite(table), table, known[0]))
    return np.where(np.isfinite(table), widths[at], 0).astype(np.float32)
