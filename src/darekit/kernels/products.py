# SPDX-License-Identifier: Apache-2.0
"""Products of two thin factors, a tile at a time; the fast twin of `darekit.inputs.adapters.products.low_rank`.

Each element adds its terms in the order of the rank, each rounded to float32: so it is the same whatever range it is
asked for in, with any number of threads, on any machine, which no BLAS promises. (0.3 to 0.6 ns an element at rank 16;
one thread of OpenBLAS takes 0.35.)
"""

from __future__ import annotations

import numpy as np

from darekit.kernels.compiling import inlined, kept_kernel, kernel
from darekit.kernels.cpu import widen_bf16
from darekit.kernels.rounding import add_round_bf16

COLUMNS = 256  # of the right factor: 16 rows of them stay in L1 while all rows of the left one pass by


@inlined
def _add_rows(left, right, row, col, part):
    """(n,) float32 `part`, elements (row, col) .. (row, col + n) of left x right."""
    rank, n = right.shape[0], part.size
    for j in range(n):
        part[j] = np.float32(0)
    k = 0
    while k + 8 <= rank:
        b0, b1, b2, b3 = left[row, k], left[row, k + 1], left[row, k + 2], left[row, k + 3]
        b4, b5, b6, b7 = left[row, k + 4], left[row, k + 5], left[row, k + 6], left[row, k + 7]
        a0, a1, a2, a3 = right[k, col:], right[k + 1, col:], right[k + 2, col:], right[k + 3, col:]
        a4, a5, a6, a7 = right[k + 4, col:], right[k + 5, col:], right[k + 6, col:], right[k + 7, col:]
        for j in range(n):
            total = part[j] + b0 * a0[j]
            total = total + b1 * a1[j]
            total = total + b2 * a2[j]
            total = total + b3 * a3[j]
            total = total + b4 * a4[j]
            total = total + b5 * a5[j]
            total = total + b6 * a6[j]
            part[j] = total + b7 * a7[j]
        k += 8
    while k < rank:
        b0, a0 = left[row, k], right[k, col:]
        for j in range(n):
            part[j] = part[j] + b0 * a0[j]
        k += 1


@kept_kernel
def add_low_rank_bf16(base_raw, left, right, start, out, work):
    """BF16 elements start .. start + n of a tensor, (n,) uint16, with the product added, rounded once -> `out`.

    The base's bits stay where the product is 0. `work`: (2, n) float32. Returns how many results are NaN or Inf.
    """
    product, base = work[0], work[1]
    low_rank(left, right, start, product)
    widen_bf16(base_raw, base)
    return add_round_bf16(base_raw, base, product, np.float32(1), out)


@kernel
def low_rank(left, right, start, out):
    """(R, r) x (r, C) float32, flattened: elements start .. start + n -> `out`, (n,) float32."""
    width = right.shape[1]
    row, col = start // width, start % width
    done = 0
    while done < out.size:
        if col or out.size - done < width:  # a part of a row
            count = min(width - col, out.size - done)
            _add_rows(left, right, row, col, out[done : done + count])
            done += count
            row += 1
            col = 0
            continue
        rows = (out.size - done) // width
        for at in range(0, width, COLUMNS):
            count = min(COLUMNS, width - at)
            for i in range(rows):
                begin = done + i * width + at
                _add_rows(left, right, row + i, at, out[begin : begin + count])
        done += rows * width
        row += rows
    return 0


@kept_kernel
def low_rank_into(left, right, start, out):
    """`low_rank`, as merges call it."""
    return low_rank(left, right, start, out)
