# SPDX-License-Identifier: Apache-2.0
"""How many counters of Philox a kernel runs side by side."""

from __future__ import annotations

# Counters that are drawn at once: four registers of AVX2, so that multiplications need not wait for one another.
LANES = 32
