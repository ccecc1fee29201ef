# SPDX-License-Identifier: Apache-2.0
"""Fast twins of the functions in `checkpoints/quantised/formulas.py`, to the bit, and into BF16 in the same pass.

What a code is worth is computed where it follows from its bits, which takes a quarter of the time of looking it up in a
table (0.06 ns against 0.24). Scales are spread over a block of elements first: loops over one group of 16 or 32 are too
short for vectors.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from darekit.kernels.compiling import kept_kernel, kernel
from darekit.kernels.rounding import round_bf16

How = npt.NDArray[np.int64]

BLOCK = 4096  # elements; with 1024, what a call costs is as much as the work (0.36 ns an element against 0.22)

_ALL = np.uint32(0xFFFFFFFF)
_NAN = np.uint32(0x7FC00000)

# What codes are, for `how`: a kind, and two numbers for integers.
LOOKED_UP: How = np.array([0, 0, 0], np.int64)  # by the table, which all kernels get
E4M3: How = np.array([1, 0, 0], np.int64)
E2M1: How = np.array([2, 0, 0], np.int64)
INT8: How = np.array([3, 128, 128], np.int64)  # the bit of the sign is turned, and 128 taken away
OF_FORMATS = {"F8_E4M3": E4M3, "F8_E5M2": LOOKED_UP, "I8": INT8}


def integers(bits: int) -> How:
    """How codes of `formulas.integers` become numbers."""
    return np.array([3, 0, 1 << (bits - 1)], np.int64)


@kernel
def _values(codes, table, how, out):
    """(n,) uint8 -> `out`, (n,) float32: what codes are worth before they are scaled.

    Shifts by a variable, and a complement by `^`, have 64 bits in numba, and LLVM makes no vectors of 32 of them: 0.16
    ns for a code instead of 0.06.
    """
    bits = out.view(np.uint32)
    if how[0] == 1:  # E4M3: 7 + 3 bits below the sign; below 8 a multiple of 2^-9; 127 is no number
        for i in range(codes.size):
            code = np.uint32(codes[i])
            magnitude = np.uint32(code & np.uint32(0x7F))
            normal = np.uint32(np.uint32(magnitude << np.uint32(20)) + np.uint32(120 << 23))
            small = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-9)).view(np.uint32)
            below = np.uint32(np.uint32(magnitude < np.uint32(8)) * _ALL)
            none = np.uint32(np.uint32(magnitude == np.uint32(0x7F)) * _NAN)
            sign = np.uint32(np.uint32(code & np.uint32(0x80)) << np.uint32(24))
            bits[i] = np.uint32(np.uint32(normal & np.uint32(~below)) | np.uint32(small & below) | none | sign)
    elif how[0] == 2:  # E2M1: below 2 a multiple of 1/2
        for i in range(codes.size):
            code = np.uint32(codes[i])
            magnitude = np.uint32(code & np.uint32(7))
            normal = np.uint32(np.uint32(magnitude << np.uint32(22)) + np.uint32(126 << 23))
            small = np.uint32(magnitude * np.uint32(0x3F000000))
            below = np.uint32(np.uint32(magnitude < np.uint32(2)) * _ALL)
            sign = np.uint32(np.uint32(code & np.uint32(8)) << np.uint32(28))
            bits[i] = np.uint32(np.uint32(normal & np.uint32(~below)) | np.uint32(small & below) | sign)
    elif how[0] == 3:
        turned, half = np.uint8(how[1]), np.int32(how[2])
        for i in range(codes.size):
            out[i] = np.float32(np.int32(np.int32(np.uint8(codes[i] ^ turned)) - half))
    else:
        for i in range(codes.size):
            out[i] = table[codes[i]]


@kernel
def _spread(grid, start, columns, block_rows, block_columns, top, left, out):
    """One number for each block -> `out`, (n,) float32: one for each element from `start` on."""
    done = 0
    while done < out.size:
        row, column = (start + done) // columns, (start + done) % columns
        end = min(columns, column + out.size - done)
        line = grid[row // block_rows - top]
        if block_columns == 1:
            own, part = line[column - left : end - left], out[done : done + end - column]
            for i in range(part.size):  # what slices are assigned by may raise, and needs numba at every run
                part[i] = own[i]
            done += end - column
            continue
        group = column // block_columns
        while column < end:
            stop = min((group + 1) * block_columns, end)
            number, part = line[group - left], out[done : done + stop - column]
            for i in range(part.size):
                part[i] = number
            done += stop - column
            column = stop
            group += 1


@kernel
def _worth_block(
    codes, table, how, zeros, scales, start, columns, block_rows, block_columns, top, left, factor, out, wide
):  # fmt: skip
    """`worth` of n <= BLOCK elements; wide (BLOCK,) float32."""
    _values(codes, table, how, out)
    spread = wide[: codes.size]
    if zeros.shape[0]:
        _spread(zeros, start, columns, block_rows, block_columns, top, left, spread)
        for i in range(out.size):
            out[i] = np.float32(out[i] - spread[i])
    _spread(scales, start, columns, block_rows, block_columns, top, left, spread)
    for i in range(out.size):
        out[i] = np.float32(np.float32(out[i] * spread[i]) * factor)


@kept_kernel
def worth(
    codes, table, how, zeros, scales, start, columns, block_rows, block_columns, top, left, factor, out, scratch
):  # fmt: skip
    """`formulas.worth` -> `out`, (n,) float32; block and corner in two numbers each.

    `how`: what the table says as arithmetic, one of this module's; `zeros`: (0, 0) for none; scratch (2, BLOCK)
    float32.
    """
    for begin in range(0, codes.size, BLOCK):
        part = codes[begin : begin + BLOCK]
        _worth_block(
            part, table, how, zeros, scales, start + begin, columns, block_rows, block_columns, top, left, factor,
            out[begin : begin + BLOCK], scratch[0],
        )  # fmt: skip
    return 0


@kept_kernel
def worth_bf16(
    codes, table, how, zeros, scales, start, columns, block_rows, block_columns, top, left, factor, out, scratch
):  # fmt: skip
    """`worth` rounded to `out`, (n,) uint16 BF16. Returns how many are NaN or Inf."""
    bad = 0
    for begin in range(0, codes.size, BLOCK):
        part = codes[begin : begin + BLOCK]
        values = scratch[1, : part.size]
        _worth_block(
            part, table, how, zeros, scales, start + begin, columns, block_rows, block_columns, top, left, factor,
            values, scratch[0],
        )  # fmt: skip
        bad += round_bf16(values, out[begin : begin + BLOCK])
    return bad


@kept_kernel
def nibbles(raw, high_first, skip, out):
    """`formulas.nibbles` without the first `skip` (0 or 1) of them -> `out`, (n,) uint8."""
    first = np.uint8(4) if high_first else np.uint8(0)
    second = np.uint8(np.uint8(4) - first)
    if not out.size:
        return 0
    whole = (out.size - skip) // 2
    if skip:
        out[0] = np.uint8(raw[0] >> second) & np.uint8(15)
    pairs, rest = raw[skip : skip + whole], out[skip : skip + 2 * whole]
    for i in range(pairs.size):
        rest[2 * i] = np.uint8(pairs[i] >> first) & np.uint8(15)
        rest[2 * i + 1] = np.uint8(pairs[i] >> second) & np.uint8(15)
    if skip + 2 * whole < out.size:
        out[out.size - 1] = np.uint8(raw[skip + whole] >> first) & np.uint8(15)
    return 0


@kept_kernel
def flip(words, out):
    """(8 n, m) uint64, little-endian -> `out`, (8 m, n) uint64: the (8 n, 8 m) bytes in them, transposed.

    Eight by eight bytes at a time, in registers: 0.14 ns for a byte, a quarter of what a loop over bytes takes. Pieces
    of 256 rows, and of columns that share lines of memory, stay in the first cache.
    """
    bytes_, pairs, halves = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00000000FFFFFFFF)
    one, two, four = np.uint64(8), np.uint64(16), np.uint64(32)
    for left in range(0, words.shape[1], 8):
        for top in range(0, out.shape[1], 32):
            for column in range(left, min(left + 8, words.shape[1])):
                for i in range(top, min(top + 32, out.shape[1])):
                    k, j = 8 * i, 8 * column
                    a, b, c, d = words[k, column], words[k + 1, column], words[k + 2, column], words[k + 3, column]
                    e, f, g, h = words[k + 4, column], words[k + 5, column], words[k + 6, column], words[k + 7, column]
                    # Single bytes are exchanged, then pairs of them, then halves of words.
                    a0, a1 = (a & bytes_) | ((b & bytes_) << one), ((a >> one) & bytes_) | (b & ~bytes_)
                    c0, c1 = (c & bytes_) | ((d & bytes_) << one), ((c >> one) & bytes_) | (d & ~bytes_)
                    e0, e1 = (e & bytes_) | ((f & bytes_) << one), ((e >> one) & bytes_) | (f & ~bytes_)
                    g0, g1 = (g & bytes_) | ((h & bytes_) << one), ((g >> one) & bytes_) | (h & ~bytes_)
                    p0, p2 = (a0 & pairs) | ((c0 & pairs) << two), ((a0 >> two) & pairs) | (c0 & ~pairs)
                    p1, p3 = (a1 & pairs) | ((c1 & pairs) << two), ((a1 >> two) & pairs) | (c1 & ~pairs)
                    q0, q2 = (e0 & pairs) | ((g0 & pairs) << two), ((e0 >> two) & pairs) | (g0 & ~pairs)
                    q1, q3 = (e1 & pairs) | ((g1 & pairs) << two), ((e1 >> two) & pairs) | (g1 & ~pairs)
                    out[j, i], out[j + 4, i] = (p0 & halves) | (q0 << four), (p0 >> four) | (q0 & ~halves)
                    out[j + 1, i], out[j + 5, i] = (p1 & halves) | (q1 << four), (p1 >> four) | (q1 & ~halves)
                    out[j + 2, i], out[j + 6, i] = (p2 & halves) | (q2 << four), (p2 >> four) | (q2 & ~halves)
                    out[j + 3, i], out[j + 7, i] = (p3 & halves) | (q3 << four), (p3 >> four) | (q3 & ~halves)
    return 0


@kernel
def _product(code, exponent):
    """E2M1 x 2^(exponent - 127), uint16 each -> uint16 BF16, where that is a normal number or 0."""
    magnitude = np.uint16(code & np.uint16(7))
    half = np.uint16(np.uint16(exponent << np.uint16(7)) - np.uint16(128))  # what code 1 is: 1/2
    normal = np.uint16(half + np.uint16(magnitude << np.uint16(6)))
    small = np.uint16(half * magnitude)
    below = np.uint16(np.uint16(magnitude < np.uint16(2)) * np.uint16(0xFFFF))
    sign = np.uint16(np.uint16(code & np.uint16(8)) << np.uint16(12))
    return np.uint16(np.uint16(small & below) | np.uint16(normal & np.uint16(~below)) | sign)


@kept_kernel
def flipped_bf16(pairs, table, powers, exponents, strange, group, start, out):
    """Elements `start` .. of a matrix (2 k, n) of E2M1 whose columns were packed -> `out`, (m,) uint16 BF16.

    A code times a power of two is a sum of exponents, so a row takes 16 bits an element and no float: 0.06 ns an
    element, where floats take 0.23. What has a scale near an end of float32's range is multiplied.

    Args:
        pairs: (k, n) uint8: rows 2 i and 2 i + 1 in the lower and upper four bits of row i.
        table: (16,) float32, what codes are worth.
        powers: (256,) float32, what exponents are.
        exponents: (2 k / group, n) uint8: one for `group` elements of a column.
        strange: (2 k / group,) uint8: whether a row of exponents has any outside of 2 .. 252, where the product of a
            code may be no normal number of BF16.
    """
    columns, done, bad = pairs.shape[1], 0, 0
    while done < out.size:
        row, column = (start + done) // columns, (start + done) % columns
        count = min(columns - column, out.size - done)
        two, scale = pairs[row // 2, column : column + count], exponents[row // group, column : column + count]
        part = out[done : done + count]
        done += count
        upper = row % 2
        if strange[row // group]:
            for i in range(count):
                code = np.uint8(two[i] >> np.uint8(4)) if upper else np.uint8(two[i] & np.uint8(15))
                value = np.float32(table[code] * powers[scale[i]]).view(np.uint32)
                even = np.uint32((value >> np.uint32(16)) & np.uint32(1))
                rounded = np.uint32(np.uint32(value + np.uint32(0x7FFF) + even) >> np.uint32(16))
                bad += np.uint32(rounded & np.uint32(0x7F80)) == np.uint32(0x7F80)
                part[i] = np.uint16(rounded)
        elif upper:
            for i in range(count):
                part[i] = _product(np.uint16(np.uint16(two[i]) >> np.uint16(4)), np.uint16(scale[i]))
        else:
            for i in range(count):
                part[i] = _product(np.uint16(np.uint16(two[i]) & np.uint16(15)), np.uint16(scale[i]))
    return bad
