# SPDX-License-Identifier: Apache-2.0
"""Fast twins of the functions in `darekit.methods` and `darekit.masks`, to the bit; float32 tiles that stay in L2.

Every kernel is a short loop over contiguous data that LLVM can vectorise. Without `fastmath` it neither reorders sums
nor fuses multiply and add, so results equal numpy's bit for bit. All release the GIL: threads are Python's.

numba widens integer sums to 64 bits, and a loop with one 64-bit variable is vectorised for 64 bits or not at all: hence
the many `np.uint32(...)` around 32-bit sums, and masks instead of branches (docs/decisions/0024).
"""

from __future__ import annotations

import numpy as np

from darekit.kernels.compiling import intrinsic, kept_kernel, kernel
from darekit.kernels.lanes import LANES, SAMPLED, SUMS
from darekit.kernels.rounding import add_losses, add_round_bf16, add_round_stochastic_bf16, end_block
from darekit.masks import BLOCK, COUNTERS

_EXPONENT = np.uint32(0x7F800000)

_ABS = np.uint32(0x7FFFFFFF)

_ALL = np.uint32(0xFFFFFFFF)

_store_lanes = intrinsic("store_lanes")

# Scratch of (BLOCK,) elements.
_word_block, _float_block, _double_block = map(intrinsic, ("word_block", "float_block", "double_block"))


@kernel
def _draw_block(block, stream, seed, words):
    """Draws of one aligned block of 1024 elements -> `words`, (1024,) uint32."""
    # 256 counters of one block never cross a multiple of 2^32: the high word is constant.
    first = np.uint64(block) * np.uint64(COUNTERS)
    low, high = np.uint32(first), np.uint32(first >> np.uint64(32))
    for i in range(0, COUNTERS, LANES):
        _store_lanes(np.uint32(low + np.uint32(i)), high, stream, seed, words.ctypes.data + 4 * i)


@kept_kernel
def draws(seed, stream, start, out):
    """Draws of elements start .. start + n -> `out`, (n,) uint32."""
    words = _word_block()
    done = 0
    while done < out.size:
        offset = (start + done) % BLOCK
        count = min(BLOCK - offset, out.size - done)
        _draw_block((start + done) // BLOCK, stream, seed, words)
        found, drawn = out[done : done + count], words[offset : offset + count]
        for i in range(count):  # numba's assignment to a slice can raise
            found[i] = drawn[i]
        done += count
    return 0


@kept_kernel
def random_drop(delta, seed, stream, start, threshold, factor):
    """(n,) float32 in place: zero where draw < threshold (which is < 2^32), times `factor` elsewhere; counts kept."""
    words = _word_block()
    limit = np.uint32(threshold)
    kept = 0
    done = 0
    while done < delta.size:
        offset = (start + done) % BLOCK
        count = min(BLOCK - offset, delta.size - done)
        _draw_block((start + done) // BLOCK, stream, seed, words)
        part = delta[done : done + count]
        chosen = words[offset : offset + count]
        survivors = np.uint32(0)
        for i in range(count):
            keep = np.uint32(chosen[i] >= limit)
            survivors = np.uint32(survivors + keep)
            part[i] = part[i] * factor if keep else np.float32(0)
        kept += int(survivors)
        done += count
    return kept


@kernel
def _drop_difference(raw, base, words, limit, factor, out):
    """`difference_bf16` of n <= 1024 elements, 0 where word < limit, times `factor` elsewhere; -> (bad, kept)."""
    bits = out.view(np.uint32)
    survivors, bad = np.uint32(0), np.uint32(0)
    for i in range(out.size):
        change = np.float32(np.uint32(np.uint32(raw[i]) << np.uint32(16)).view(np.float32) - base[i])
        bad = np.uint32(bad + np.uint32((change.view(np.uint32) & _EXPONENT) == _EXPONENT))
        keep = np.uint32(words[i] >= limit)
        survivors = np.uint32(survivors + keep)
        bits[i] = np.float32(change * factor).view(np.uint32) & np.uint32(np.uint32(0) - keep)
    return int(bad), int(survivors)


@kernel
def _drop_known(known, words, limit, factor, out):
    """(n,) float32, n <= 1024: 0 where word < limit, times `factor` elsewhere -> `out`; -> (NaN and Inf, kept)."""
    bits, before = out.view(np.uint32), known.view(np.uint32)
    survivors, bad = np.uint32(0), np.uint32(0)
    for i in range(out.size):
        bad = np.uint32(bad + np.uint32((before[i] & _EXPONENT) == _EXPONENT))
        keep = np.uint32(words[i] >= limit)
        survivors = np.uint32(survivors + keep)
        bits[i] = np.float32(known[i] * factor).view(np.uint32) & np.uint32(np.uint32(0) - keep)
    return int(bad), int(survivors)


@kernel
def _copy_known(known, out):
    """(n,) float32 -> `out`; counts NaN and Inf."""
    before, bad = known.view(np.uint32), np.uint32(0)
    for i in range(out.size):
        bad = np.uint32(bad + np.uint32((before[i] & _EXPONENT) == _EXPONENT))
        out[i] = known[i]
    return int(bad)


@kept_kernel
def random_difference_bf16(raw, base, seed, stream, start, threshold, factor, out, kept):
    """`difference_bf16` and `random_drop` in one pass over memory: counts NaN and Inf in the difference; how many
    elements survive is added to `kept`, (1,) int64."""
    words = _word_block()
    bad = 0
    done = 0
    while done < out.size:
        offset = (start + done) % BLOCK
        count = min(BLOCK - offset, out.size - done)
        _draw_block((start + done) // BLOCK, stream, seed, words)
        faulty, survivors = _drop_difference(
            raw[done : done + count], base[done : done + count], words[offset : offset + count],
            np.uint32(threshold), factor, out[done : done + count],
        )  # fmt: skip
        bad += faulty
        kept[0] += survivors
        done += count
    return bad


@kept_kernel
def widen_bf16(raw, out):
    """(n,) uint16 -> (n,) float32: BF16 is float32's upper half."""
    bits = out.view(np.uint32)
    for i in range(raw.size):
        bits[i] = np.uint32(raw[i]) << np.uint32(16)
    return 0


@kept_kernel
def subtract(values, base):
    """(n,) float32 in place: values -= base; counts NaN and Inf in the difference."""
    bad = np.uint32(0)
    for i in range(values.size):
        change = np.float32(values[i] - base[i])
        bad = np.uint32(bad + np.uint32((change.view(np.uint32) & _EXPONENT) == _EXPONENT))
        values[i] = change
    return int(bad)


@kept_kernel
def difference_bf16(raw, base, out):
    """`widen_bf16` and `subtract` in one pass."""
    bad = np.uint32(0)
    for i in range(raw.size):
        change = np.float32(np.uint32(np.uint32(raw[i]) << np.uint32(16)).view(np.float32) - base[i])
        bad = np.uint32(bad + np.uint32((change.view(np.uint32) & _EXPONENT) == _EXPONENT))
        out[i] = change
    return int(bad)


@kept_kernel
def weighted_sum(deltas, weights, divisor, out):
    """(K, n or more) float32, K float32 -> `out`, (n,) float32: sum of w_k d_k in order of k, divided once."""
    for i in range(out.size):
        out[i] = np.float32(0) + weights[0] * deltas[0, i]
    for k in range(1, len(weights)):
        weight, delta = weights[k], deltas[k]
        for i in range(out.size):
            out[i] += weight * delta[i]
    if divisor != np.float32(1):
        for i in range(out.size):
            out[i] = out[i] / divisor
    return 0


@kernel
def add_scaled(values, other, factor):
    """(n,) float32 in place: values += factor * other."""
    for i in range(values.size):
        values[i] = np.float32(values[i] + np.float32(factor * other[i]))


@kept_kernel
def elect(deltas, weights, normalize, out):
    """(K, n) float32, (K,) float32 -> `out`, (n,) float32: sign election, then (disjoint) mean or sum.

    Models are the outer loop over chunks that stay in L1: with an inner loop over K nothing vectorises.
    """
    elected, agreeing = _float_block(), _float_block()
    for begin in range(0, out.size, BLOCK):
        count = min(BLOCK, out.size - begin)
        merged = out[begin : begin + count]
        for i in range(count):
            elected[i] = np.float32(0)
            agreeing[i] = np.float32(0)
            merged[i] = np.float32(0)
        for k in range(weights.size):
            weight, delta = weights[k], deltas[k, begin : begin + count]
            for i in range(count):
                elected[i] += weight * delta[i]
        for k in range(weights.size):
            weight, delta = weights[k], deltas[k, begin : begin + count]
            for i in range(count):
                vote = weight * delta[i]
                agrees = (vote != np.float32(0)) & ((vote > np.float32(0)) == (elected[i] >= np.float32(0)))
                merged[i] += vote if agrees else np.float32(0)
                agreeing[i] += weight if agrees else np.float32(0)
        if normalize:
            for i in range(count):
                merged[i] = merged[i] / (agreeing[i] if agreeing[i] != np.float32(0) else np.float32(1))
    return 0


@kept_kernel
def elect_few(deltas, weights, normalize, out):
    """`elect` for a tuple of weights: K is then known to the compiler, and votes and sums stay in registers."""
    for i in range(out.size):
        elected = np.float32(0)
        for k in range(len(weights)):
            elected += weights[k] * deltas[k, i]
        merged, agreeing = np.float32(0), np.float32(0)
        for k in range(len(weights)):
            vote = weights[k] * deltas[k, i]
            agrees = (vote != np.float32(0)) & ((vote > np.float32(0)) == (elected >= np.float32(0)))
            merged += vote if agrees else np.float32(0)
            agreeing += weights[k] if agrees else np.float32(0)
        out[i] = merged / (agreeing if agreeing != np.float32(0) else np.float32(1)) if normalize else merged
    return 0


@kept_kernel
def variance(deltas, out):
    """(K, n) float32 -> `out`, (n,) float32: the variance over the models, in float64, on blocks that stay in L1."""
    many = np.float64(deltas.shape[0])
    mean, squares = _double_block(), _double_block()
    for begin in range(0, out.size, BLOCK):
        count = min(BLOCK, out.size - begin)
        found = out[begin : begin + count]
        for i in range(count):
            mean[i] = np.float64(0)
            squares[i] = np.float64(0)
        for k in range(deltas.shape[0]):
            delta = deltas[k, begin : begin + count]
            for i in range(count):
                mean[i] += np.float64(delta[i])
        for i in range(count):
            mean[i] = mean[i] / many
        for k in range(deltas.shape[0]):
            delta = deltas[k, begin : begin + count]
            for i in range(count):
                away = np.float64(delta[i]) - mean[i]
                squares[i] += away * away
        for i in range(count):
            found[i] = np.float32(squares[i] / many)
    return 0


@kept_kernel
def agreeing_mean(deltas, weights, least, out):
    """(K, n) float32, (K,) float32 -> `out`, (n,) float32: the weighted mean of the deltas that have the sign of the
    plain sum of all; a sum of weights below `least` counts as it."""
    elected, agreeing = _float_block(), _float_block()
    for begin in range(0, out.size, BLOCK):
        count = min(BLOCK, out.size - begin)
        merged = out[begin : begin + count]
        for i in range(count):
            elected[i] = np.float32(0)
            agreeing[i] = np.float32(0)
            merged[i] = np.float32(0)
        for k in range(weights.size):
            delta = deltas[k, begin : begin + count]
            for i in range(count):
                elected[i] += delta[i]
        for k in range(weights.size):
            weight, delta = weights[k], deltas[k, begin : begin + count]
            for i in range(count):
                agrees = (delta[i] != np.float32(0)) & ((delta[i] > np.float32(0)) == (elected[i] >= np.float32(0)))
                merged[i] += np.float32(weight * delta[i]) if agrees else np.float32(0)
                agreeing[i] += weight if agrees else np.float32(0)
        for i in range(count):
            merged[i] = merged[i] / (agreeing[i] if agreeing[i] > least else least)
    return 0


@kept_kernel
def changed_mean(deltas, factors, epsilon, out):
    """(K, n) float32, (K,) float32 -> `out`, (n,) float32: of each element, the mean of the deltas larger than
    `epsilon`; where there is one, it times its model's factor."""
    alone, many = _float_block(), _float_block()
    for begin in range(0, out.size, BLOCK):
        count = min(BLOCK, out.size - begin)
        merged = out[begin : begin + count]
        for i in range(count):
            alone[i] = np.float32(0)
            many[i] = np.float32(0)
            merged[i] = np.float32(0)
        for k in range(factors.size):
            factor, delta = factors[k], deltas[k, begin : begin + count]
            for i in range(count):
                here = abs(delta[i]) > epsilon
                part = delta[i] if here else np.float32(0)
                merged[i] += part
                alone[i] += np.float32(factor * part)
                many[i] += np.float32(1) if here else np.float32(0)
        for i in range(count):
            mean = merged[i] / (many[i] if many[i] > np.float32(1) else np.float32(1))
            merged[i] = alone[i] if many[i] == np.float32(1) else mean
    return 0


@kept_kernel
def shared_and_unique(deltas, epsilon, out):
    """(K, n) float32 -> `out`, (2 K, n) float32: 1 where a delta larger than `epsilon` is one of several, then where it
    is the only one."""
    many = _float_block()
    models = deltas.shape[0]
    for begin in range(0, deltas.shape[1], BLOCK):
        count = min(BLOCK, deltas.shape[1] - begin)
        for i in range(count):
            many[i] = np.float32(0)
        for k in range(models):
            delta = deltas[k, begin : begin + count]
            for i in range(count):
                many[i] += np.float32(1) if abs(delta[i]) > epsilon else np.float32(0)
        for k in range(models):
            delta = deltas[k, begin : begin + count]
            shared, unique = out[k, begin : begin + count], out[models + k, begin : begin + count]
            for i in range(count):
                here = np.float32(1) if abs(delta[i]) > epsilon else np.float32(0)
                alone = many[i] == np.float32(1)
                shared[i] = np.float32(0) if alone else here
                unique[i] = here if alone else np.float32(0)
    return 0


@kept_kernel
def keep_where(deltas, mask):
    """(K, n) float32 in place: 0 where `mask`, (n,) uint8 of 0 and 1, is 0."""
    for k in range(deltas.shape[0]):
        bits = deltas[k].view(np.uint32)
        for i in range(mask.size):
            bits[i] &= np.uint32(np.uint32(0) - np.uint32(mask[i]))
    return 0


@kept_kernel
def count_coarse(delta, bins):
    """(n,) float32 -> bins[upper 16 bits of |delta|] += 1."""
    bits = delta.view(np.uint32)
    for i in range(bits.size):
        bins[(bits[i] & _ABS) >> np.uint32(16)] += 1
    return 0


@kept_kernel
def count_window(delta, first, fine):
    """(n,) float32 -> fine[|delta| - first] += 1, as bit patterns, where that is inside; returns how many are above.

    The window is narrow: few chunks of 32 elements reach into it, and only those are looked at one by one.
    """
    bits = delta.view(np.uint32)
    lowest, width = np.uint32(first), np.uint32(fine.size)
    end = np.uint32(lowest + width)  # at most 2^31
    above = np.uint32(0)
    for i in range(bits.size):
        above = np.uint32(above + np.uint32(np.uint32(bits[i] & _ABS) >= end))
    whole = bits.size - bits.size % 32
    for begin in range(0, whole, 32):
        inside = np.uint32(0)
        for i in range(32):
            inside = np.uint32(inside + np.uint32(np.uint32(np.uint32(bits[begin + i] & _ABS) - lowest) < width))
        if inside:
            for i in range(begin, begin + 32):
                place = np.uint32(np.uint32(bits[i] & _ABS) - lowest)
                if place < width:
                    fine[place] += 1
    for i in range(whole, bits.size):
        place = np.uint32(np.uint32(bits[i] & _ABS) - lowest)
        if place < width:
            fine[place] += 1
    return int(above)


@kept_kernel
def select(delta, bounds):
    """(n,) float32 in place: keep |delta| strictly between the bit patterns `low` and `high`, and of those equal to
    either only the first `low_left` and `high_left`; returns how many are kept.

    `bounds`, (4,) int64: low, low_left, high and high_left, left as they are after this tile.
    """
    low, low_left, high, high_left = bounds[0], bounds[1], bounds[2], bounds[3]
    bits = delta.view(np.uint32)
    block = _word_block()
    kept = 0
    for begin in range(0, delta.size, BLOCK):
        part = bits[begin : begin + BLOCK]
        before = block[: part.size]
        for i in range(part.size):
            before[i] = part[i]
        survivors, low_left, high_left = _select_block(before, low, low_left, high, high_left, part)
        kept += survivors
    bounds[1], bounds[3] = low_left, high_left
    return kept


@kernel
def _select_block(bits, low, low_left, high, high_left, out):
    """`select` for a block of (n,) uint32 bit patterns -> `out`, (n,) uint32.

    Not in place: LLVM would only store what is dropped, and masked stores take AVX2 three times as long.
    """
    low_bits, high_bits = np.uint32(low), np.uint32(high)
    at_low, at_high = np.uint32(0), np.uint32(0)
    for i in range(bits.size):
        key = np.uint32(bits[i] & _ABS)
        at_low = np.uint32(at_low + np.uint32(key == low_bits))
        at_high = np.uint32(at_high + np.uint32(key == high_bits))
    low_whole = low_left == 0 or low_left >= at_low
    high_whole = high_left == 0 or high_left >= at_high
    survivors = np.uint32(0)
    if low_whole and high_whole:  # all or none of the equals: no counting, so it vectorises
        floor = np.int64(low if low_left > 0 else low + 1)
        ceiling = np.int64(high if high_left > 0 else high - 1)
        if ceiling < floor:
            for i in range(bits.size):
                out[i] = np.uint32(0)
            return 0, low_left - min(low_left, np.int64(at_low)), high_left - min(high_left, np.int64(at_high))
        lowest, width = np.uint32(floor), np.uint32(ceiling - floor)
        for i in range(bits.size):
            inside = np.uint32(np.uint32(np.uint32(bits[i] & _ABS) - lowest) <= width)
            survivors = np.uint32(survivors + inside)
            out[i] = bits[i] & np.uint32(inside * _ALL)
        low_left -= min(low_left, np.int64(at_low))
        high_left -= min(high_left, np.int64(at_high))
    else:
        for i in range(bits.size):
            key = bits[i] & _ABS
            keep = low < key < high
            if key == low and low_left > 0:
                low_left -= 1
                keep = True
            elif key == high and high_left > 0:
                high_left -= 1
                keep = True
            out[i] = bits[i] if keep else np.uint32(0)
            survivors = np.uint32(survivors + np.uint32(keep))
    return int(survivors), low_left, high_left


@kept_kernel
def add_l1(delta, start, lanes):
    """(n,) float32 -> lanes[(start + i) % 16] += |delta[i]| in float64, in order of i."""
    for i in range(delta.size):
        lanes[(start + i) % lanes.size] += np.float64(abs(delta[i]))
    return 0


@kept_kernel
def scale(delta, factor):
    """(n,) float32 in place: delta *= factor."""
    for i in range(delta.size):
        delta[i] = delta[i] * factor
    return 0


@kernel
def count_losses_bf16(base, merged, factor, found, deltas, stored, counts, touched, lanes, flags, squares):
    """`add_losses` and `end_block` of one block: (n,) base and merged, of which base + factor * merged became `found`,
    (n,) uint16. `merged` is overwritten; scratch: stored (n,), flags (n or more,) uint32."""
    widen_bf16(found, stored)
    scale(merged, factor)
    add_losses(base, base, merged, stored, deltas, 0, counts, touched, lanes, flags)
    end_block(lanes, squares)
    return 0


@kernel
def _absorb_bf16(
    base_raw, raws, deltas, finer, start, streams, seeds, thresholds, factors, bounds, weights, election, normalize,
    divisor, factor, base_weight, stochastic, rounding_stream, rounding_seed, kept, counts, touched, squares, out,
    words, lanes, work,
):  # fmt: skip
    """`absorb_bf16`; or, where `stochastic`, `absorb_stochastic_bf16`."""
    models = len(weights)
    bad, seen = 0, 0
    for begin in range(0, out.size, BLOCK):
        count = min(BLOCK, out.size - begin)
        origin = base_raw[begin : begin + count]
        base, merged = work[models, :count], work[models + 1, :count]
        widen_bf16(origin, base)
        for k in range(models):
            raw, delta = raws[k, begin : begin + count], work[k, :count]
            if finer[k]:
                known = deltas[k, begin : begin + count]
                if thresholds[k]:
                    _draw_block((start + begin) // BLOCK, streams[k], seeds[k], words)
                    faulty, survivors = _drop_known(known, words[:count], thresholds[k], factors[k], delta)
                else:
                    faulty, survivors = _copy_known(known, delta), count
            elif thresholds[k]:
                _draw_block((start + begin) // BLOCK, streams[k], seeds[k], words)
                faulty, survivors = _drop_difference(raw, base, words[:count], thresholds[k], factors[k], delta)
            elif bounds[k, 2]:
                faulty = difference_bf16(raw, base, merged)  # which is free until all deltas are there
                survivors, bounds[k, 1], bounds[k, 3] = _select_block(
                    merged.view(np.uint32), bounds[k, 0], bounds[k, 1], bounds[k, 2], bounds[k, 3],
                    delta.view(np.uint32),
                )  # fmt: skip
            else:
                faulty, survivors = difference_bf16(raw, base, delta), count
            bad += faulty
            kept[k] += survivors
        if election:
            elect_few(work, weights, normalize, merged)
        else:
            weighted_sum(work, weights, divisor, merged)
        if base_weight != np.float32(0):
            add_scaled(merged, base, base_weight)
        found, block = out[begin : begin + count], (start + begin) // BLOCK
        if stochastic:
            _draw_block(block, rounding_stream, rounding_seed, words)
            bad += add_round_stochastic_bf16(origin, base, merged, factor, words, found)
        else:
            bad += add_round_bf16(origin, base, merged, factor, found)
        if block % SAMPLED == 0:
            stored = work[models + 2, :count]
            count_losses_bf16(base, merged, factor, found, work, stored, counts, touched, lanes, words, squares[seen])
            seen += 1
    return bad


@kept_kernel
def absorb_bf16(
    base_raw, raws, deltas, finer, start, streams, seeds, thresholds, factors, bounds, weights, election, normalize,
    divisor, factor, base_weight, kept, counts, touched, squares, out, words, lanes, work,
):  # fmt: skip
    """The whole way of a BF16 tile: the small kernels one after another, on blocks that stay in L1.

    base_raw (n,), raws (K, n), out (n,) uint16; deltas (K, n) float32 of the models that are `finer`, (K,) int64: what
    is known is no difference of BF16. Per model, (K,) each: uint64 streams and seeds, uint32 thresholds (0:
    no random drop), float32 factors, and (K, 4) int64 bounds: what `select` takes (high 0: no selection), left as it
    leaves them. `weights`: a tuple of K float32. `start` is a multiple of 1024. `kept`, (K,) int64, is added to;
    in one block in `SAMPLED`, so are `counts`, (2,) int64, and `touched`, (K, 2) int64, while the rows of `squares`,
    (blocks, 3) float64, are written (`add_losses`). Scratch: words (1024,) uint32, lanes (3, 32) float64, which are 0,
    work (K + 3, 1024) float32. Returns how many differences or results are NaN or Inf; what was written or added to is
    then worthless.
    """
    return _absorb_bf16(
        base_raw, raws, deltas, finer, start, streams, seeds, thresholds, factors, bounds, weights, election, normalize,
        divisor, factor, base_weight, False, np.uint64(0), np.uint64(0), kept, counts, touched, squares, out, words,
        lanes, work,
    )  # fmt: skip


@kept_kernel
def absorb_stochastic_bf16(
    base_raw, raws, deltas, finer, start, streams, seeds, thresholds, factors, bounds, weights, election, normalize,
    divisor, factor, base_weight, stream, seed, kept, counts, touched, squares, out, words, lanes, work,
):  # fmt: skip
    """`absorb_bf16`, rounded by the draws of this stream and seed, uint64: a kernel of its own, since the other one's
    time grew by 5 % when both were one."""
    return _absorb_bf16(
        base_raw, raws, deltas, finer, start, streams, seeds, thresholds, factors, bounds, weights, election, normalize,
        divisor, factor, base_weight, True, stream, seed, kept, counts, touched, squares, out, words, lanes, work,
    )  # fmt: skip


@kernel
def _difference_both_bf16(base_raw, raw, out):
    """`difference_bf16` where the base, (n,) uint16, is needed only once."""
    bad = np.uint32(0)
    for i in range(out.size):
        before = np.uint32(np.uint32(base_raw[i]) << np.uint32(16)).view(np.float32)
        change = np.float32(np.uint32(np.uint32(raw[i]) << np.uint32(16)).view(np.float32) - before)
        bad = np.uint32(bad + np.uint32((change.view(np.uint32) & _EXPONENT) == _EXPONENT))
        out[i] = change
    return int(bad)


@kept_kernel
def sample_bf16(base_raw, raw, bins, delta):
    """`difference_bf16` and `count_coarse`: (n,) uint16 base and model -> `delta`, (n,) float32, counted in `bins`.

    Returns how many differences are NaN or Inf; `bins` is then worthless.
    """
    bad = _difference_both_bf16(base_raw, raw, delta)
    if not bad:
        count_coarse(delta, bins)
    return bad


@kept_kernel
def survey_bf16(base_raw, raw, first, fine, scratch):
    """`difference_bf16` and `count_window` on blocks that stay in L1: (n,) uint16 base and model, scratch (1024,).

    Returns how many are above the window; -1 where a difference is NaN or Inf, and `fine` is then worthless.
    """
    above = 0
    for begin in range(0, base_raw.size, BLOCK):
        origin, tuned = base_raw[begin : begin + BLOCK], raw[begin : begin + BLOCK]
        delta = scratch[: origin.size]
        if _difference_both_bf16(origin, tuned, delta):
            return -1
        above += count_window(delta, first, fine)
    return above


@kernel
def _add_four(one, other, lanes):
    """(4 SUMS,) each -> their products, added to `lanes`, (SUMS,) float64, in order of the index: of sums that wait in
    registers a quarter is loaded and stored."""
    one0, one1, one2, one3 = one[:SUMS], one[SUMS : 2 * SUMS], one[2 * SUMS : 3 * SUMS], one[3 * SUMS :]
    other0, other1, other2, other3 = other[:SUMS], other[SUMS : 2 * SUMS], other[2 * SUMS : 3 * SUMS], other[3 * SUMS :]
    for k in range(SUMS):
        found = lanes[k] + np.float64(one0[k]) * np.float64(other0[k])
        found += np.float64(one1[k]) * np.float64(other1[k])
        found += np.float64(one2[k]) * np.float64(other2[k])
        lanes[k] = found + np.float64(one3[k]) * np.float64(other3[k])


@kept_kernel
def products(rows, count, start, leaf, sums, totals):
    """(R, count or more) float32 or float64: elements start .. start + count of a tensor -> the products of each two
    rows (0 0, 0 1, ..., 1 1, ...) in float64, added to `sums`, (pairs, SUMS), by the element's index.

    At the end of each leaf of `leaf` elements the sums are added up into `totals`, (leaves, pairs), and begin again.
    """
    done = 0
    while done < count:
        place = start + done
        first = place % SUMS
        many = 4 if first == 0 and count - done >= 4 * SUMS and place % leaf + 4 * SUMS <= leaf else 1
        here = min(many * SUMS - first, count - done)
        pair = 0
        for i in range(rows.shape[0]):
            one = rows[i, done : done + here]
            for j in range(i, rows.shape[0]):
                other = rows[j, done : done + here]
                if many == 4:
                    _add_four(one, other, sums[pair])
                else:
                    lanes = sums[pair, first : first + here]
                    for k in range(here):
                        lanes[k] += np.float64(one[k]) * np.float64(other[k])
                pair += 1
        done += here
        if (start + done) % leaf == 0:
            add_up(sums, totals[(start + done) // leaf - 1])
    return 0


@kernel
def add_up(sums, total):
    """(pairs, SUMS) float64 -> `total`, (pairs,), added in order; the sums are 0 afterwards."""
    for pair in range(total.size):
        found = np.float64(0)
        for k in range(sums.shape[1]):
            found += sums[pair, k]
            sums[pair, k] = np.float64(0)
        total[pair] = found


@kept_kernel
def products_by_row(rows, length, sums, totals):
    """(R, n) float32 or float64, n a multiple of `length` -> `totals`, (n / length, pairs): `products` of each piece
    of `length` elements."""
    for r in range(totals.shape[0]):
        products(rows[:, r * length : (r + 1) * length], length, 0, length, sums, totals[r : r + 1])
    return 0


@kept_kernel
def products_by_column(rows, start, totals):
    """(R, n) float32 or float64: elements start .. start + n of a matrix -> their products in float64, added to those
    of their columns, `totals`, (pairs, columns): in order of the rows, when the calls are."""
    columns = totals.shape[1]
    done = 0
    while done < rows.shape[1]:
        first = (start + done) % columns
        here = min(columns - first, rows.shape[1] - done)
        pair = 0
        for i in range(rows.shape[0]):
            one = rows[i, done : done + here]
            for j in range(i, rows.shape[0]):
                other, total = rows[j, done : done + here], totals[pair, first : first + here]
                for k in range(here):
                    total[k] += np.float64(one[k]) * np.float64(other[k])
                pair += 1
        done += here
    return 0


@kernel
def _widen_all_bf16(raw, out):
    """`widen_bf16`, which counts NaN and Inf."""
    bits = out.view(np.uint32)
    bad = np.uint32(0)
    for i in range(raw.size):
        one = np.uint32(np.uint32(raw[i]) << np.uint32(16))
        bad = np.uint32(bad + np.uint32((one & _EXPONENT) == _EXPONENT))
        bits[i] = one
    return int(bad)


@kept_kernel
def products_bf16(base_raw, raws, base_row, deltas, start, leaf, sums, totals, work):
    """`products` of BF16 elements, on blocks that stay in L1: base_raw (n,) and raws (K, n) uint16; the base itself is
    the first row where `base_row`; the others are the models, or their `deltas`. Scratch: work (rows + 1, 1024)
    float32. Returns how many elements of a row are NaN or Inf; `sums` and `totals` are then worthless.
    """
    models, bad = raws.shape[0], 0
    first = 1 if base_row else 0
    for begin in range(0, base_raw.size, BLOCK):
        count = min(BLOCK, base_raw.size - begin)
        base = work[0, :count]
        if base_row or deltas:
            bad += _widen_all_bf16(base_raw[begin : begin + count], base)
        for k in range(models):
            raw, row = raws[k, begin : begin + count], work[1 + k, :count]
            bad += difference_bf16(raw, base, row) if deltas else _widen_all_bf16(raw, row)
        products(work[1 - first : 1 + models], count, start + begin, leaf, sums, totals)
    return bad


@kernel
def _add_squares(values, sums):
    """(n,) float32 -> their squares, added to `sums`, (SUMS,) float64, by the element's index."""
    whole = values.size - values.size % (4 * SUMS)
    for begin in range(0, whole, 4 * SUMS):
        part = values[begin : begin + 4 * SUMS]
        _add_four(part, part, sums)
    for begin in range(whole, values.size, SUMS):
        part = values[begin : begin + SUMS]
        for k in range(part.size):
            sums[k] += np.float64(part[k]) * np.float64(part[k])


@kept_kernel
def squares(values, sums):
    """(n,) float32 -> their squares, added to `sums`, (SUMS,) float64."""
    _add_squares(values, sums)
    return 0


@kept_kernel
def squares_between(values, others, sums):
    """`squares` of (n,) float32 differences, on blocks that stay in L1; `others` is where they are computed."""
    for begin in range(0, values.size, BLOCK):
        one, other = values[begin : begin + BLOCK], others[begin : begin + BLOCK]
        for i in range(one.size):
            other[i] = one[i] - other[i]
        _add_squares(other, sums)
    return 0


@kept_kernel
def squared_difference_bf16(base_raw, raw, out, sums):
    """(n,) uint16 base and model -> `out`, (n,) float32, and its `squares`, on blocks that stay in L1.

    Returns how many differences are NaN or Inf; `sums` is then worthless.
    """
    bad = 0
    for begin in range(0, base_raw.size, BLOCK):
        part = out[begin : begin + BLOCK]
        bad += _difference_both_bf16(base_raw[begin : begin + BLOCK], raw[begin : begin + BLOCK], part)
        _add_squares(part, sums)
    return bad


@kept_kernel
def count_bins(delta, bins, dropped_bits):
    """(n,) float32 -> bins[bits of |delta| >> dropped_bits] += 1."""
    bits = delta.view(np.uint32)
    for i in range(bits.size):
        bins[(bits[i] & _ABS) >> np.uint32(dropped_bits)] += 1
    return 0
