# SPDX-License-Identifier: Apache-2.0
"""Fast twins of the functions in `darekit.quantised`, to the bit, and into BF16 in the same pass.

Codes are looked up in a table of 1 KiB: 0.5 ns for an element, whatever the format; bit operations on E4M3 alone were
no faster.
"""

from __future__ import annotations

import numpy as np

from darekit.kernels.compiling import kept_kernel, kernel
from darekit.kernels.cpu import round_bf16
from darekit.masks import BLOCK


@kernel
def worth(codes, table, zeros, scales, start, columns, block_rows, block_columns, top, left, factor, out):
    """`darekit.quantised.worth` -> `out`, (n,) float32; block and corner in two numbers each."""
    done = 0
    while done < codes.size:
        row, column = (start + done) // columns, (start + done) % columns
        end = min(columns, column + codes.size - done)
        line = row // block_rows - top
        while column < end:
            group = column // block_columns
            stop = min((group + 1) * block_columns, end)
            scale, zero = scales[line, group - left], zeros[line, group - left]
            part, found = codes[done : done + stop - column], out[done : done + stop - column]
            for i in range(part.size):
                found[i] = np.float32(np.float32(np.float32(table[part[i]] - zero) * scale) * factor)
            done += stop - column
            column = stop


@kept_kernel
def worth_bf16(
    codes, table, zeros, scales, start, columns, block_rows, block_columns, top, left, factor, out, scratch
):  # fmt: skip
    """`worth` rounded to `out`, (n,) uint16 BF16; scratch (1024,) float32. Returns how many are NaN or Inf."""
    bad = 0
    for begin in range(0, codes.size, BLOCK):
        part = codes[begin : begin + BLOCK]
        values = scratch[: part.size]
        worth(part, table, zeros, scales, start + begin, columns, block_rows, block_columns, top, left, factor, values)
        bad += round_bf16(values, out[begin : begin + BLOCK])
    return bad


@kept_kernel
def nibbles(raw, high_first, skip, out):
    """`darekit.quantised.nibbles` without the first `skip` (0 or 1) of them -> `out`, (n,) uint8."""
    first = np.uint8(4) if high_first else np.uint8(0)
    second = np.uint8(np.uint8(4) - first)
    whole = (out.size - skip) // 2
    if skip and out.size:
        out[0] = np.uint8(raw[0] >> second) & np.uint8(15)
    pairs, rest = raw[skip : skip + whole], out[skip : skip + 2 * whole]
    for i in range(pairs.size):
        rest[2 * i] = np.uint8(pairs[i] >> first) & np.uint8(15)
        rest[2 * i + 1] = np.uint8(pairs[i] >> second) & np.uint8(15)
    if skip + 2 * whole < out.size:
        out[out.size - 1] = np.uint8(raw[skip + whole] >> first) & np.uint8(15)
    return 0


@kept_kernel
def flip(rows, out):
    """(n, m) uint8 -> `out`, (m, n): transposed in pieces of 64 x 64, of which each line of memory is touched once."""
    for top in range(0, rows.shape[0], 64):
        bottom = min(top + 64, rows.shape[0])
        for left in range(0, rows.shape[1], 64):
            for j in range(left, min(left + 64, rows.shape[1])):
                for i in range(top, bottom):
                    out[j, i] = rows[i, j]
    return 0


@kept_kernel
def flipped_bf16(pairs, table, scales, group, start, out, scratch):
    """Elements `start` .. of a matrix (2 k, n) whose columns were packed -> `out`, (m,) uint16 BF16.

    `pairs`, (k, n) uint8: rows 2 i and 2 i + 1 in the lower and upper four bits of row i; `scales`, (2 k / group, n)
    float32: one for `group` elements of a column; scratch (1024,) float32. Returns how many are NaN or Inf.
    """
    columns = pairs.shape[1]
    bad, done = 0, 0
    while done < out.size:
        row, column = (start + done) // columns, (start + done) % columns
        count = min(columns - column, out.size - done, BLOCK)
        shift = np.uint8(4 * (row % 2))
        part, scale = pairs[row // 2, column : column + count], scales[row // group, column : column + count]
        values = scratch[:count]
        for i in range(count):
            values[i] = table[np.uint8(part[i] >> shift) & np.uint8(15)] * scale[i]
        bad += round_bf16(values, out[done : done + count])
        done += count
    return bad
