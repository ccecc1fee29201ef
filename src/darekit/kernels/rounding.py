# SPDX-License-Identifier: Apache-2.0
"""Fast twins of `darekit.dtypes`, and the rounding of BF16: to nearest even, or by a word for each element.

What is said of kernels in `darekit.kernels.cpu` holds here, too.
"""

from __future__ import annotations

import numpy as np

from darekit.kernels.compiling import kept_kernel

_ABS = np.uint32(0x7FFFFFFF)
_ALL = np.uint32(0xFFFFFFFF)
_LARGEST = np.uint32(0x7F7F8000)  # float32's bits from which on BF16 to nearest is Inf


@kept_kernel
def round_bf16(values, raw):
    """(n,) float32 without NaN -> `raw`, (n,) uint16 BF16, to nearest even; returns how many results are Inf."""
    bits = values.view(np.uint32)
    bad = np.uint32(0)
    for i in range(raw.size):
        rounded = np.uint32(bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        bad = np.uint32(bad + np.uint32((rounded & np.uint32(0x7F80)) == np.uint32(0x7F80)))
        raw[i] = np.uint16(rounded)
    return int(bad)


@kept_kernel
def round_stochastic_bf16(values, words, raw):
    """`stochastic` of (n,) float32 without NaN by (n,) uint32 words -> `raw`, (n,) uint16 BF16; returns how many would
    be Inf to nearest."""
    bits = values.view(np.uint32)
    bad = np.uint32(0)
    for i in range(raw.size):
        rounded = np.uint32(np.uint32(bits[i] + (words[i] >> np.uint32(16))) >> np.uint32(16))
        over = np.uint32(np.uint32(rounded & np.uint32(0x7FFF)) == np.uint32(0x7F80))
        bad = np.uint32(bad + np.uint32(np.uint32(bits[i] & _ABS) >= _LARGEST))
        raw[i] = np.uint16(np.uint32(rounded - over))  # beyond the largest value there is no neighbour
    return int(bad)


@kept_kernel
def add_round_bf16(base_raw, base, merged, factor, raw):
    """base + factor * merged -> `raw`, (n,) uint16 BF16, to nearest even; base_raw's bits where that change is 0.

    Returns how many results are NaN or Inf.
    """
    bad = np.uint32(0)
    for i in range(raw.size):
        change = np.float32(factor * merged[i])
        bits = np.float32(base[i] + change).view(np.uint32)
        even = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16))
        same = np.uint32(np.uint32(change == np.float32(0)) * _ALL)  # other ways to write a mask cost twice the time
        new = np.uint32(rounded & np.uint32(same ^ _ALL))
        bad = np.uint32(bad + np.uint32(np.uint32(new & np.uint32(0x7F80)) == np.uint32(0x7F80)))
        raw[i] = np.uint16(np.uint32(np.uint32(np.uint32(base_raw[i]) & same) | new))
    return int(bad)


@kept_kernel
def add_round_stochastic_bf16(base_raw, base, merged, factor, words, raw):
    """`add_round_bf16`, but `stochastic` by (n,) uint32 words; what would be NaN or Inf to nearest is counted."""
    bad = np.uint32(0)
    for i in range(raw.size):
        change = np.float32(factor * merged[i])
        bits = np.float32(base[i] + change).view(np.uint32)
        rounded = np.uint32(np.uint32(bits + (words[i] >> np.uint32(16))) >> np.uint32(16))
        over = np.uint32(np.uint32(rounded & np.uint32(0x7FFF)) == np.uint32(0x7F80))
        same = np.uint32(np.uint32(change == np.float32(0)) * _ALL)
        moved = np.uint32(same ^ _ALL)
        bad = np.uint32(bad + np.uint32(np.uint32(np.uint32(bits & _ABS) & moved) >= _LARGEST))
        new = np.uint32(np.uint32(rounded - over) & moved)
        raw[i] = np.uint16(np.uint32(np.uint32(np.uint32(base_raw[i]) & same) | new))
    return int(bad)


@kept_kernel
def add_losses(base, origin, change, stored, deltas, first, counts, touched, lanes, flags):
    """`losses` of (n,) and (K, n or more) elements of a block, of which they are those from `first` on.

    Added to `counts` (2,) and `touched` (K, 2), int64, and by the element's index to `lanes`, (3, 32) float64. Scratch:
    flags, (n or more,) uint32.
    """
    changed, swallowed = np.uint32(0), np.uint32(0)
    for i in range(change.size):
        moved = np.uint32(change[i] != np.float32(0))
        lost = np.uint32(moved & np.uint32(stored[i] == origin[i]))
        changed = np.uint32(changed + moved)
        swallowed = np.uint32(swallowed + lost)
        flags[i] = np.uint32(moved | np.uint32(lost << np.uint32(16)))
    counts[0] += int(changed)
    counts[1] += int(swallowed)
    for k in range(touched.shape[0]):
        delta, both = deltas[k], np.uint32(0)  # two counts, neither above 1024
        for i in range(change.size):
            both = np.uint32(both + (flags[i] if delta[i] != np.float32(0) else np.uint32(0)))
        touched[k, 0] += int(both & np.uint32(0xFFFF))
        touched[k, 1] += int(both >> np.uint32(16))
    done = 0
    while done < change.size:
        at = (first + done) % lanes.shape[1]
        here = min(lanes.shape[1] - at, change.size - done)
        errors, changes, products = lanes[0, at : at + here], lanes[1, at : at + here], lanes[2, at : at + here]
        before, after, asked = base[done : done + here], stored[done : done + here], change[done : done + here]
        for i in range(asked.size):  # of slices: LLVM does not see that a loop over their parts can be vectorised
            moved = asked[i]
            applied = (after[i] - before[i]) if moved != np.float32(0) else moved
            error = applied - moved
            errors[i] += np.float64(error) * np.float64(error)
            changes[i] += np.float64(moved) * np.float64(moved)
            products[i] += np.float64(applied) * np.float64(moved)
        done += here
    return 0


@kept_kernel
def end_block(lanes, sums):
    """(3, 32) float64, added up in order -> `sums`, (3,); the lanes are 0 afterwards."""
    for row in range(3):
        found = np.float64(0)
        for lane in range(lanes.shape[1]):
            found += lanes[row, lane]
            lanes[row, lane] = np.float64(0)
        sums[row] = found
    return 0
