# SPDX-License-Identifier: Apache-2.0
"""How much a kernel does side by side."""

from __future__ import annotations

# Counters that are drawn at once: four registers of AVX2, so that multiplications need not wait for one another.
LANES = 32

# Sums that one product of two rows is spread over, by the index of the element: no sum waits for the one before it, and
# the result is the same on a processor of any width.
SUMS = 256

# One block of 1024 elements in so many, from a tensor's first on, is looked at to see what rounding does to changes.
SAMPLED = 61

# That a sum of one block is spread over, by the element's index.
SUM_LANES = 32
