# SPDX-License-Identifier: Apache-2.0
"""Kernels of packs: which elements a mask keeps, as bits and as indices; kept values taken, encoded and put back.

A mask is drawn, compared and packed into bits in registers. Everything behind it works on the kept elements alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from darekit.kernels.compiling import inlined, intrinsic
from darekit.kernels.compiling import kernel as _kernel
from darekit.kernels.lanes import LANES
from darekit.masks import BLOCK, COUNTERS

SPARE = 8  # elements that `list_kept` writes at once
LEAF = 65536  # elements; a test holds it to `darekit.checkpoints.digests`, which kernels do not know
_EXPONENT = np.uint32(0x7F800000)
_ALL = np.uint32(0xFFFFFFFF)
_LARGEST = np.float32(3.3895314e38)  # of BF16

_keep_lanes, _prefetch = intrinsic("keep_lanes"), intrinsic("prefetch")
_count_bits, _lowest_bit = intrinsic("count_bits"), intrinsic("lowest_bit")


@_kernel
def keep_bits(seed, stream, start, threshold, bits, ahead):
    """Which of elements start .. start + 32 n survive -> `bits`, (n,) uint32, the first in the lowest bit.

    `start` is a multiple of 1024, n of 32; `threshold` is below 2^32. `ahead`: addresses of two arrays of 32 n uint16
    that are wanted next, or the same twice, or zeros: they come while memory has nothing else to do.
    """
    limit = np.uint32(threshold)
    quarter = COUNTERS // LANES
    for block in range(bits.size // (BLOCK // LANES)):
        first = np.uint64(start // BLOCK + block) * np.uint64(COUNTERS)
        low, high = np.uint32(first), np.uint32(first >> np.uint64(32))
        part = bits[block * 4 * quarter : (block + 1) * 4 * quarter]
        for i in range(quarter):
            if ahead[0]:
                at = (block * quarter + i) * 8 * LANES
                for line in range(at, at + 8 * LANES, 64):
                    _prefetch(ahead[0] + line)
                    _prefetch(ahead[1] + line)
            m0, m1, m2, m3 = _keep_lanes(np.uint32(low + np.uint32(i * LANES)), high, stream, seed, limit)
            part[i] = m0
            part[quarter + i] = m1
            part[2 * quarter + i] = m2
            part[3 * quarter + i] = m3


@_kernel
def list_kept(bits, count, out):
    """`keep_bits` of `count` elements, as (n,) uint64 -> which survive: the front of `out`; how many.

    `out`, int32 or uint16, has room for `SPARE` more, which hold anything then.
    """
    place = np.int64(0)
    for w in range((count + 63) // 64):
        word = bits[w]
        if w == count // 64:
            word &= (np.uint64(1) << np.uint64(count % 64)) - np.uint64(1)
        begin, end = np.int64(64 * w), place + np.int64(_count_bits(word))
        # Eight at a time without asking how many there are: at p = 0.9 of 64 about 6, and a wrong guess costs 5 ns.
        while True:
            for j in range(SPARE):
                out[place + j] = begin + np.int64(_lowest_bit(word))
                word &= word - np.uint64(1)
            place += SPARE
            if place >= end:
                break
        place = end
    return place


def kept_indices(seed: Any, stream: Any, start: int, threshold: int, count: int, room: Any) -> Any:
    """Which of elements start .. start + count survive: the front of `room`, (count + SPARE,), counted from `start`.

    `start` is a multiple of 1024, `threshold` is below 2^32.
    """
    words = np.empty(-(-count // BLOCK) * (BLOCK // 64), np.uint64)
    keep_bits(seed, stream, start, threshold, words.view(np.uint32), (0, 0))
    return room[: list_kept(words, count, room)]


@_kernel
def take(words, indices, out):
    """(n,) of any kind, (k,) int32 -> `out`, (k,)."""
    for j in range(indices.size):
        out[j] = words[np.uint32(indices[j])]


@_kernel
def put(words, indices, values):
    """(n,) of any kind in place, (k,) int32 or uint16, (k,): the inverse of `take`."""
    for j in range(indices.size):
        words[np.uint32(indices[j])] = values[j]


@_kernel
def mark_changed(base, tuned, start, row, changed):
    """(n,) of any kind twice, elements from `start` on of rows of `row` -> True in `changed`, (rows,), where a row's
    bits differ. Rows that did change are found out by their first elements."""
    at = 0
    while at < base.size:
        r = (start + at) // row
        end = min((r + 1) * row - start, base.size)
        while at < end and base[at] == tuned[at]:
            at += 1
        if at < end:
            changed[r] = True
        at = end


@_kernel
def count_bad_bf16(base, tuned):
    """(k,) uint16 BF16 twice -> how many differences are NaN or Inf."""
    bad = np.uint32(0)
    for j in range(base.size):
        before = np.uint32(np.uint32(base[j]) << np.uint32(16)).view(np.float32)
        after = np.uint32(np.uint32(tuned[j]) << np.uint32(16)).view(np.float32)
        change = np.float32(after - before).view(np.uint32)
        bad = np.uint32(bad + np.uint32(np.uint32(change & _EXPONENT) == _EXPONENT))
    return int(bad)


@inlined
def _rounded_sum(bits, base, change):
    """BF16 as uint16 in uint32, the same as float32, and what is added: `add_round_bf16` of one element, uint32."""
    total = np.float32(base + change).view(np.uint32)
    even = np.uint32(np.uint32(total >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(np.uint32(total + np.uint32(0x7FFF)) + even) >> np.uint32(16))
    same = np.uint32(np.uint32(change == np.float32(0)) * _ALL)
    return np.uint32(np.uint32(rounded & np.uint32(same ^ _ALL)) | np.uint32(bits & same))


@_kernel
def _add_exact(before, after, factor, out):
    """(k,) uint16 BF16 of base and fine-tuned model -> `out`, (k,): `difference_bf16`, `scale`, `add_round_bf16`.

    Returns how many differences, and how many results, are NaN or Inf.
    """
    bad, wrong = np.uint32(0), np.uint32(0)
    for j in range(out.size):
        bits = np.uint32(before[j])
        base = np.uint32(bits << np.uint32(16)).view(np.float32)
        change = np.float32(np.uint32(np.uint32(after[j]) << np.uint32(16)).view(np.float32) - base)
        bad = np.uint32(bad + np.uint32(np.uint32(change.view(np.uint32) & _EXPONENT) == _EXPONENT))
        result = _rounded_sum(bits, base, np.float32(change * factor))
        wrong = np.uint32(wrong + np.uint32(np.uint32(result & np.uint32(0x7F80)) == np.uint32(0x7F80)))
        out[j] = np.uint16(result)
    return int(bad), int(wrong)


@_kernel
def _add_changes(before, delta, factor, out):
    """(k,) uint16 BF16, (k,) float32 -> `out`, (k,) uint16: `scale`, `add_round_bf16`; how many are NaN or Inf."""
    wrong = np.uint32(0)
    for j in range(out.size):
        bits = np.uint32(before[j])
        base = np.uint32(bits << np.uint32(16)).view(np.float32)
        result = _rounded_sum(bits, base, np.float32(delta[j] * factor))
        wrong = np.uint32(wrong + np.uint32(np.uint32(result & np.uint32(0x7F80)) == np.uint32(0x7F80)))
        out[j] = np.uint16(result)
    return int(wrong)


@_kernel
def restore_bf16(raw, indices, tuned, factor):
    """(n,) uint16 BF16 base in place, (k,) int32, (k,) uint16 BF16: `difference_bf16`, `scale`, `add_round_bf16` there.

    Taken, computed and put back one after another, as only the middle vectorises. Returns how many results are NaN or
    Inf.
    """
    before, out = np.empty(indices.size, np.uint16), np.empty(indices.size, np.uint16)
    take(raw, indices, before)
    _, wrong = _add_exact(before, tuned, factor, out)
    put(raw, indices, out)
    return wrong


@_kernel
def restore_changes_bf16(raw, indices, delta, factor):
    """(n,) uint16 BF16 base in place, (k,) int32, (k,) float32: `scale` and `add_round_bf16` at those elements.

    Returns how many of the results are NaN or Inf.
    """
    before, out = np.empty(indices.size, np.uint16), np.empty(indices.size, np.uint16)
    take(raw, indices, before)
    wrong = _add_changes(before, delta, factor, out)
    put(raw, indices, out)
    return wrong


@_kernel
def group_scales(delta, group, limit, scales):
    """(k,) float32 -> max |d| / limit of each group, rounded up to BF16: `scales`, (groups,) uint16.

    The last group takes the rest. Positive floats order like their bit patterns: the next one up is one more.
    """
    bits = delta.view(np.uint32)
    for g in range(scales.size):
        end = delta.size if g + 1 == scales.size else (g + 1) * group
        largest = np.uint32(0)
        part = bits[g * group : end]
        for i in range(part.size):
            size = np.uint32(part[i] & np.uint32(0x7FFFFFFF))
            largest = size if size > largest else largest
        most = np.uint32(largest)  # numba views only what is assigned once
        value = np.float64(most.view(np.float32)) / np.float64(limit)
        single = np.float32(value)
        pattern = np.uint32(single.view(np.uint32) + np.uint32(np.float64(single) < value))
        scales[g] = np.uint16(min(np.uint32(pattern + np.uint32(0xFFFF)) >> np.uint32(16), np.uint32(0x7F7F)))


@_kernel
def group_sums(delta, group, total):
    """(k,) float32 -> sum |d| of each group, in order: `total`, (groups,) float64; the last takes the rest."""
    for g in range(total.size):
        end = delta.size if g + 1 == total.size else (g + 1) * group
        sum_ = np.float64(0)
        for i in range(g * group, end):
            sum_ += np.float64(abs(delta[i]))
        total[g] = sum_


@_kernel
def pack_codes(delta, scales, bits, group, packed):
    """(k,) float32, (groups,) uint16 BF16 -> codes in `packed`, (ceil(k bits / 8),) uint8; see `packs.quantization`."""
    half = np.int32(1) << np.int32(bits - 1)
    limit = np.float64(half - 1)
    codes = packed if bits == 8 else np.empty(-(-delta.size // 8) * 8, np.uint8)
    codes[delta.size :] = np.uint8(0)
    if bits == 1:
        for i in range(delta.size):
            codes[i] = np.uint8(delta[i] >= np.float32(0))
    else:
        for g in range(scales.size):
            begin, end = g * group, delta.size if g + 1 == scales.size else (g + 1) * group
            scale = np.float64(np.uint32(np.uint32(scales[g]) << np.uint32(16)).view(np.float32))
            source, target = delta[begin:end], codes[begin:end]
            if scale > 0:
                for i in range(source.size):
                    whole = np.rint(np.float64(source[i]) / scale)
                    target[i] = np.uint8(np.int32(min(max(whole, -limit), limit)) + half)
            else:
                target[:] = np.uint8(half)
    if bits == 4:
        for i in range(packed.size):
            packed[i] = codes[2 * i] | np.uint8(codes[2 * i + 1] << 4)
    elif bits == 2:
        for i in range(packed.size):
            low = codes[4 * i] | np.uint8(codes[4 * i + 1] << 2)
            packed[i] = low | np.uint8(codes[4 * i + 2] << 4) | np.uint8(codes[4 * i + 3] << 6)
    elif bits == 1:
        for i in range(packed.size):
            byte = np.uint8(0)
            for j in range(8):
                byte |= np.uint8(codes[8 * i + j] << j)
            packed[i] = byte


@_kernel
def unpack_values(packed, scales, bits, group, out):
    """Packed codes and (groups,) float32 scales -> `out`, (k,) float32: the inverse of `pack_codes`."""
    half = np.int32(1) << np.int32(bits - 1)
    codes = packed if bits == 8 else np.empty(-(-out.size // 8) * 8, np.uint8)
    if bits == 4:
        for i in range(packed.size):
            codes[2 * i] = packed[i] & np.uint8(15)
            codes[2 * i + 1] = packed[i] >> np.uint8(4)
    elif bits == 2:
        for i in range(packed.size):
            for j in range(4):
                codes[4 * i + j] = (packed[i] >> np.uint8(2 * j)) & np.uint8(3)
    elif bits == 1:
        for i in range(packed.size):
            for j in range(8):
                codes[8 * i + j] = (packed[i] >> np.uint8(j)) & np.uint8(1)
    for g in range(scales.size):
        begin, end = g * group, out.size if g + 1 == scales.size else (g + 1) * group
        scale = scales[g]
        source, target = codes[begin:end], out[begin:end]
        if bits == 1:
            for i in range(target.size):
                target[i] = scale if source[i] else -scale
        else:
            for i in range(target.size):
                target[i] = np.float32(np.int32(source[i]) - half) * scale


@_kernel
def _groups_in(count, group):
    """Twin of `packs.quantization.groups_in`."""
    groups = (2 * count + group) // (2 * group)
    return 1 if count and not groups else groups


@_kernel
def _mean_scales(delta, group, factor, scales):
    """(k,) float32 -> factor * mean |d| of each group, to the nearest BF16: `scales`, (groups,) uint16."""
    total = np.empty(scales.size, np.float64)
    group_sums(delta, group, total)
    for g in range(scales.size):
        members = delta.size - g * group if g + 1 == scales.size else group
        value = np.float32(min(total[g] / np.float64(members) * factor, np.float64(_LARGEST)))
        pattern = value.view(np.uint32)
        even = np.uint32(0x7FFF) + ((pattern >> np.uint32(16)) & np.uint32(1))
        scales[g] = np.uint16(np.uint32(pattern + even) >> np.uint32(16))


# --- the fast lane: BF16, dropped, several leaves a call. Scratch, (LEAF,) each: `room` uint16 and SPARE longer,
# `before`, `after` and `out` uint16, `delta` and `singles` float32; `bits`, (LEAF / 64,) uint64. `mask`: seed, stream,
# threshold and first element, as `keep_bits` takes them. What leaves keep stands one after another.


@_kernel
def _list_leaf(mask, leaf, size, ahead, bits, room):
    """What the mask keeps of `size` elements of the leaf-th leaf -> the front of `room`; how many."""
    seed, stream, threshold, start = mask
    words = bits[: (size + BLOCK - 1) // BLOCK * (BLOCK // 64)]
    addresses = np.int64(ahead[0]), np.int64(ahead[1])  # as Python gives them: one compilation serves both
    keep_bits(seed, stream, start + leaf * LEAF, threshold, words.view(np.uint32), addresses)
    return list_kept(words, size, room)


@_kernel
def encode_exact(base, tuned, mask, factor, counts, kept, values, bits, room, out):
    """(n,) uint16 of the base, in place the result, and of the model -> kept elements of both, and each leaf's count.

    Returns how many differences, and how many results, are NaN or Inf.
    """
    at, bad, wrong = 0, 0, 0
    for leaf in range(counts.size):
        raw, other = base[leaf * LEAF : (leaf + 1) * LEAF], tuned[leaf * LEAF : (leaf + 1) * LEAF]
        count = _list_leaf(mask, leaf, raw.size, (raw.ctypes.data, other.ctypes.data), bits, room)
        places, before, after = room[:count], kept[at : at + count], values[at : at + count]
        take(raw, places, before)
        take(other, places, after)
        nans, overflows = _add_exact(before, after, factor, out[:count])
        bad += nans
        wrong += overflows
        put(raw, places, out[:count])
        counts[leaf] = count
        at += count
    return bad, wrong


@_kernel
def encode_integers(
    base, tuned, mask, factor, width, group, mean, counts, packed, scales, bits, room, before, after, out, delta,
    singles,
):  # fmt: skip
    """(n,) uint16 of the base, in place the result, and of the model -> codes, BF16 scales, and each leaf's count.

    `mean`: scales are so many times mean |d|; None: max |d| / (2^(bits-1) - 1), rounded up (numba compiles but one of
    the two). Returns as `encode_exact`.
    """
    begin, first, bad, wrong = 0, 0, 0, 0
    for leaf in range(counts.size):
        raw, other = base[leaf * LEAF : (leaf + 1) * LEAF], tuned[leaf * LEAF : (leaf + 1) * LEAF]
        count = _list_leaf(mask, leaf, raw.size, (raw.ctypes.data, other.ctypes.data), bits, room)
        places = room[:count]
        take(raw, places, before[:count])
        take(other, places, after[:count])
        bad += _difference(before[:count], after[:count], delta[:count])
        groups = _groups_in(count, group)
        found = scales[first : first + groups]
        if mean is None:
            group_scales(delta[:count], group, (1 << (width - 1)) - 1, found)
        else:
            _mean_scales(delta[:count], group, mean, found)
        codes = packed[begin : begin + -(-count * width // 8)]
        pack_codes(delta[:count], found, width, group, codes)
        for g in range(groups):
            singles[g] = np.uint32(np.uint32(found[g]) << np.uint32(16)).view(np.float32)
        unpack_values(codes, singles[:groups], width, group, delta[:count])
        wrong += _add_changes(before[:count], delta[:count], factor, out[:count])
        put(raw, places, out[:count])
        counts[leaf] = count
        begin += codes.size
        first += groups
    return bad, wrong


@_kernel
def _difference(before, after, out):
    """(k,) uint16 BF16 twice -> `out`, (k,) float32: after - before; returns how many are NaN or Inf."""
    bad = np.uint32(0)
    for j in range(out.size):
        base = np.uint32(np.uint32(before[j]) << np.uint32(16)).view(np.float32)
        value = np.uint32(np.uint32(after[j]) << np.uint32(16)).view(np.float32)
        change = np.float32(value - base)
        bad = np.uint32(bad + np.uint32(np.uint32(change.view(np.uint32) & _EXPONENT) == _EXPONENT))
        out[j] = change
    return int(bad)


@inlined
def _in_order(bits):
    """uint16 bits of a float -> its place among all such numbers, modulo 2^16: -0.0 comes before 0.0."""
    # All in 16 bits, so that vectors hold twice as many: this and what calls it run at 5e9 elements/s.
    negative = np.uint16(np.uint16(0) - np.uint16(bits >> np.uint16(15)))
    return np.uint16(bits ^ np.uint16(negative & np.uint16(0x7FFF)))


@inlined
def _after_steps(base, steps):
    """uint16 bits of a float, and what `cut_steps` found -> those of the other one."""
    odd = np.uint16(np.uint16(0) - np.uint16(steps & np.uint16(1)))
    place = np.uint16(_in_order(base) + np.uint16(np.uint16(steps >> np.uint16(1)) ^ odd))
    return _in_order(place)


@inlined
def _has_full_byte(low, start):
    """Whether one of eight bytes from `start` on is 255."""
    word = np.uint64(0)
    for j in range(8):
        word |= np.uint64(low[start + j]) << np.uint64(8 * j)
    rest = ~word  # a byte of 0 borrows from those above it
    return (rest - np.uint64(0x0101010101010101)) & ~rest & np.uint64(0x8080808080808080)


@_kernel
def cut_steps(words, base, steps, low):
    """(k,) uint16 twice, bits of floats -> how many numbers of their format lie between them: `packs.steps`.

    `low`, (k,) uint8, takes them, 255 where they are as many or more, and the front of `steps`, (k,) uint16, those
    that are; returns how many.
    """
    for j in range(words.size):
        ahead = np.uint16(_in_order(words[j]) - _in_order(base[j]))
        down = np.uint16(np.uint16(0) - np.uint16(ahead >> np.uint16(15)))
        count = np.uint16(np.uint16(ahead << np.uint16(1)) ^ down)
        steps[j] = count
        low[j] = np.uint8(min(count, np.uint16(255)))
    many, whole = 0, low.size // 8 * 8
    for start in range(0, whole, 8):
        if _has_full_byte(low, start):
            for j in range(start, start + 8):
                steps[many] = steps[j]
                many += int(low[j] == np.uint8(255))
    for j in range(whole, low.size):
        steps[many] = steps[j]
        many += int(low[j] == np.uint8(255))
    return many


@_kernel
def cut_leaves(words, base, ends, steps, low, numbers):
    """`cut_steps` of leaves that end at `ends`, (leaves,) int64: steps of each in its place; `numbers`: how many."""
    begin = 0
    for leaf in range(ends.size):
        end = ends[leaf]
        numbers[leaf] = cut_steps(words[begin:end], base[begin:end], steps[begin:end], low[begin:end])
        begin = end


@_kernel
def take_steps(base, low, many, out):
    """The inverse of `cut_steps`: (k,) uint16, (k,) uint8, (m,) uint16 -> `out`, (k,) uint16; whether `many` is as
    long as `low` says."""
    for j in range(out.size):
        out[j] = _after_steps(base[j], np.uint16(low[j]))
    used, whole = 0, low.size // 8 * 8
    for start in range(0, whole, 8):
        if _has_full_byte(low, start):
            used = _take_many(base, low, many, used, start, start + 8, out)
    return _take_many(base, low, many, used, whole, low.size, out) == many.size


@_kernel
def _take_many(base, low, many, used, begin, end, out):
    """Elements begin .. end of `take_steps` that take the next of `many`; how many are used then."""
    for j in range(begin, end):
        if low[j] == np.uint8(255):
            if used < many.size:
                out[j] = _after_steps(base[j], many[used])
            used += 1
    return used


@_kernel
def restore_exact(
    raw, mask, factor, counts, values, forms, many, numbers, kept, places, bits, room, before, after, out
):
    """(n,) uint16 of the base, in place the result; each leaf's count, and the kept elements of the model, raw.

    `forms`, (leaves,) uint8, says how these stand in `values`, (2 k,) uint8, as frames do (`packs.frames`): 0 plain, 1
    in byte planes, 2 their XOR with the base's in byte planes, 3 steps from the base's in byte planes, 4 the same in
    one byte each, with those that are more in `many`, (m,) uint16, `numbers`, (leaves,) int64, of each leaf.
    What is overwritten goes to `kept`, where it was to `places`, (k,) uint16 each or both empty. Returns the first leaf
    of which the mask keeps another number, or whose steps make no sense (-1: none; it and all behind it are untouched),
    and how many results are NaN or Inf.
    """
    at, wrong, used = 0, 0, 0
    words = values.view(np.uint16)
    for leaf in range(counts.size):
        part = raw[leaf * LEAF : (leaf + 1) * LEAF]
        count = _list_leaf(mask, leaf, part.size, (part.ctypes.data, part.ctypes.data), bits, room)
        if count != counts[leaf]:
            return leaf, wrong
        chosen = room[:count]
        take(part, chosen, before[:count])
        if kept.size:
            for j in range(count):  # numba compiles assignment to a slice for 5 s, all for its message of errors
                kept[at + j] = before[j]
                places[at + j] = chosen[j]
        if forms[leaf]:
            low, high = values[2 * at : 2 * at + count], values[2 * at + count : 2 * (at + count)]
            if forms[leaf] == 4:
                if not take_steps(before[:count], low, many[used : used + numbers[leaf]], after[:count]):
                    return leaf, wrong
                used += numbers[leaf]
            elif forms[leaf] == 3:
                for j in range(count):
                    after[j] = _after_steps(
                        before[j], np.uint16(low[j] | np.uint16(np.uint16(high[j]) << np.uint16(8)))
                    )
            else:
                differs = np.uint16(0xFFFF) if forms[leaf] == 2 else np.uint16(0)
                for j in range(count):
                    joined = np.uint16(low[j]) | np.uint16(np.uint16(high[j]) << np.uint16(8))
                    after[j] = joined ^ (before[j] & differs)
            wrong += _add_exact(before[:count], after[:count], factor, out[:count])[1]
        else:
            wrong += _add_exact(before[:count], words[at : at + count], factor, out[:count])[1]
        put(part, chosen, out[:count])
        at += count
    return -1, wrong


@_kernel
def restore_integers(
    raw, mask, factor, width, group, counts, packed, scales, kept, places, bits, room, before, out, delta
):
    """`restore_exact` from codes and float32 scales."""
    at, begin, first, wrong = 0, 0, 0, 0
    for leaf in range(counts.size):
        part = raw[leaf * LEAF : (leaf + 1) * LEAF]
        count = _list_leaf(mask, leaf, part.size, (part.ctypes.data, part.ctypes.data), bits, room)
        if count != counts[leaf]:
            return leaf, wrong
        chosen = room[:count]
        take(part, chosen, before[:count])
        if kept.size:
            for j in range(count):  # numba compiles assignment to a slice for 5 s, all for its message of errors
                kept[at + j] = before[j]
                places[at + j] = chosen[j]
        groups, nbytes = _groups_in(count, group), -(-count * width // 8)
        unpack_values(packed[begin : begin + nbytes], scales[first : first + groups], width, group, delta[:count])
        wrong += _add_changes(before[:count], delta[:count], factor, out[:count])
        put(part, chosen, out[:count])
        at += count
        begin += nbytes
        first += groups
    return -1, wrong


@_kernel
def put_leaves(raw, counts, places, words):
    """(n,) uint16 in place, (leaves,) int64, (k,) uint16 twice: `put` in one leaf after another."""
    at = 0
    for leaf in range(counts.size):
        part = raw[leaf * LEAF : (leaf + 1) * LEAF]
        for j in range(at, at + counts[leaf]):
            part[places[j]] = words[j]
        at += counts[leaf]
