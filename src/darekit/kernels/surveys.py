# SPDX-License-Identifier: Apache-2.0
"""Surveys by variance on BF16, from raw bytes on, in blocks that stay in L1; twins of the parts of `sce`.

`weights`: a tuple of K float32, so that K is known to the compiler; scratch: work (K + 5, 1024) float32.
"""

from __future__ import annotations

import numpy as np

from darekit.kernels.compiling import kept_kernel, kernel
from darekit.kernels.cpu import (
    count_coarse,
    count_losses_bf16,
    count_window,
    difference_bf16,
    products,
    select,
    widen_bf16,
)
from darekit.kernels.lanes import SAMPLED
from darekit.kernels.rounding import add_round_bf16
from darekit.masks import BLOCK

_ALL = np.uint32(0xFFFFFFFF)
FEW_BLOCKS = 64  # whose squares float32 adds up before float64 takes them over: 1e-5 of the sum is lost at most


@kernel
def _differences(base_raw, raws, begin, count, base, work):
    """A block's deltas, as the first K rows of `work`; returns how many are NaN or Inf."""
    bad = 0
    widen_bf16(base_raw[begin : begin + count], base)
    for k in range(raws.shape[0]):
        bad += difference_bf16(raws[k, begin : begin + count], base, work[k, :count])
    return bad


@kernel
def _variance_few(deltas, weights, out):
    """`variance` for a K that the compiler knows: sums stay in registers."""
    many = np.float64(len(weights))
    for i in range(out.size):
        mean = np.float64(0)
        for k in range(len(weights)):
            mean += np.float64(deltas[k, i])
        mean = mean / many
        squares = np.float64(0)
        for k in range(len(weights)):
            away = np.float64(deltas[k, i]) - mean
            squares += away * away
        out[i] = np.float32(squares / many)


@kernel
def _keep_block(work, weights, scores):
    """A block's deltas, in place: 0 where the score is 0; returns how many are not."""
    bits = work.view(np.uint32)
    survivors = np.uint32(0)
    for i in range(scores.size):
        here = np.uint32(scores[i] != np.float32(0))
        survivors = np.uint32(survivors + here)
        mask = np.uint32(here * _ALL)
        for k in range(len(weights)):
            bits[k, i] = np.uint32(bits[k, i] & mask)
    return int(survivors)


@kernel
def _agreeing_few(deltas, weights, least, out):
    """`agreeing_mean` for a K that the compiler knows."""
    for i in range(out.size):
        elected = np.float32(0)
        for k in range(len(weights)):
            elected += deltas[k, i]
        merged, agreeing = np.float32(0), np.float32(0)
        for k in range(len(weights)):
            delta = deltas[k, i]
            agrees = (delta != np.float32(0)) & ((delta > np.float32(0)) == (elected >= np.float32(0)))
            merged += np.float32(weights[k] * delta) if agrees else np.float32(0)
            agreeing += weights[k] if agrees else np.float32(0)
        out[i] = merged / (agreeing if agreeing > least else least)


@kernel
def _move_sums(total, found):
    """(n,) float32, added to the second element of `found`, float64, and 0 afterwards."""
    for i in range(total.size):
        found[1] += np.float64(total[i])
        total[i] = np.float32(0)
    return 0


@kept_kernel
def count_variances_bf16(base_raw, raws, weights, coarse, first, fine, scores, found, work):
    """Variances of the deltas of (n,) base and (K, n) models, uint16, counted in `fine`: by their upper 16 bits, and
    then also written to `scores`, (n,) float32; or in a window from `first` on.

    `found`, (2,) float64, is added to: how many variances are not 0; the squares of all deltas where the variance is in
    the window or above, or anywhere, to 1e-5 of their sum. Returns how many are above the window; -1 where a difference
    is NaN or Inf, and all is then worthless.
    """
    models, above = len(weights), 0
    base, total = work[models], work[models + 1]
    lowest = np.int64(0 if coarse else first)
    for i in range(BLOCK):
        total[i] = np.float32(0)
    for begin in range(0, base_raw.size, BLOCK):
        count = min(BLOCK, base_raw.size - begin)
        if _differences(base_raw, raws, begin, count, base[:count], work):
            return -1
        part = scores[begin : begin + count] if coarse else work[models + 2, :count]
        _variance_few(work, weights, part)
        bits, least = part.view(np.uint32), np.uint32(lowest)
        nonzero = np.uint32(0)
        for i in range(count):
            nonzero = np.uint32(nonzero + np.uint32(bits[i] != np.uint32(0)))
            squares = np.float32(0)
            for k in range(models):
                squares += work[k, i] * work[k, i]
            total[i] += squares if bits[i] >= least else np.float32(0)
        found[0] += np.float64(nonzero)
        if coarse:
            count_coarse(part, fine)
        else:
            above += count_window(part, first, fine)
        if (begin // BLOCK) % FEW_BLOCKS == FEW_BLOCKS - 1:
            _move_sums(total, found)
    _move_sums(total, found)
    return above


@kept_kernel
def energies_bf16(base_raw, raws, weights, selects, bounds, start, leaf, sums, totals, work):
    """`products` of each delta with itself, where its variance survives (`select` by `bounds`) or, unless `selects`,
    everywhere: `sums` (K, 1, SUMS), `totals` (K, leaves, 1). Returns how many differences are NaN or Inf; all is then
    worthless."""
    models, bad = len(weights), 0
    for begin in range(0, base_raw.size, BLOCK):
        count = min(BLOCK, base_raw.size - begin)
        bad += _differences(base_raw, raws, begin, count, work[models, :count], work)
        if selects:
            scores = work[models + 1, :count]
            _variance_few(work, weights, scores)
            select(scores, bounds)
            _keep_block(work, weights, scores)
        for k in range(models):
            products(work[k : k + 1, :count], count, start + begin, leaf, sums[k], totals[k])
    return bad


@kept_kernel
def absorb_agreeing_bf16(
    base_raw, raws, weights, selects, bounds, least, factor, start, kept, counts, touched, squares, out, lanes, work
):  # fmt: skip
    """base + factor * agreeing mean of the deltas that survive, rounded to `out`, (n,) uint16; `start`, a multiple of
    1024, `counts`, `touched`, `squares` and `lanes` as `absorb_bf16` takes them; `kept`, (1,) int64, is added to.

    Returns how many differences or results are NaN or Inf; what was written or added to is then worthless.
    """
    models, bad, seen = len(weights), 0, 0
    for begin in range(0, out.size, BLOCK):
        count = min(BLOCK, out.size - begin)
        origin, base, merged = base_raw[begin : begin + count], work[models, :count], work[models + 1, :count]
        bad += _differences(base_raw, raws, begin, count, base, work)
        if selects:
            scores = work[models + 2, :count]
            _variance_few(work, weights, scores)
            select(scores, bounds)
            kept[0] += _keep_block(work, weights, scores)
        else:
            kept[0] += count
        _agreeing_few(work, weights, least, merged)
        found, block = out[begin : begin + count], (start + begin) // BLOCK
        bad += add_round_bf16(origin, base, merged, factor, found)
        if block % SAMPLED == 0:
            stored, flags = work[models + 3, :count], work[models + 4].view(np.uint32)
            count_losses_bf16(base, merged, factor, found, work, stored, counts, touched, lanes, flags, squares[seen])
            seen += 1
    return bad
