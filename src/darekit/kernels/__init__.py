# SPDX-License-Identifier: Apache-2.0
"""Kernels on tiles: `cpu` (numba, float32) and the dtype-aware edges where raw bytes become numbers and back.

Only this package imports numba, and only when a kernel is called. Where no fast kernel exists (float64, formats other
than BF16) numpy does the work.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from darekit.dtypes import Bytes, DType, Floats, narrow, twice_rounded
from darekit.dtypes import widen as widen_any
from darekit.kernels import cpu, rounding
from darekit.kernels.lanes import SUMS

Words = npt.NDArray[np.uint32]


def widen(raw: Bytes, dtype: DType, out: Floats) -> None:
    """(n * itemsize,) uint8 -> (n,) float32 or float64, in place in `out`; exact."""
    if dtype.name == "BF16" and out.dtype == np.float32:
        cpu.widen_bf16(raw.view(np.uint16), out)
    else:
        widen_any(raw, dtype, out)


def difference(raw: Bytes, dtype: DType, base: Floats, out: Floats) -> int:
    """Widened `raw` minus `base`, (n,), in place in `out`; returns how many differences are NaN or Inf."""
    if dtype.name == "BF16" and out.dtype == np.float32:
        return int(cpu.difference_bf16(raw.view(np.uint16), base, out))
    widen_any(raw, dtype, out)
    if out.dtype == np.float32:
        return int(cpu.subtract(out, base))
    with np.errstate(over="ignore", invalid="ignore"):
        out -= base
    return count_nonfinite(out)


def squared_difference(base_raw: Bytes, raw: Bytes, out: Floats) -> tuple[int, float]:
    """BF16 `raw` minus `base_raw`, (n,) float32, in place in `out` -> how many are NaN or Inf, and the sum of squares,
    which is worthless if there are any."""
    sums = np.zeros(SUMS)
    bad = cpu.squared_difference_bf16(base_raw.view(np.uint16), raw.view(np.uint16), out, sums)
    return int(bad), math.fsum(sums)


def square(values: Floats) -> float:
    """(n,) float32, contiguous -> the sum of squares, added up in float64."""
    sums = np.zeros(SUMS)
    cpu.squares(values, sums)
    return math.fsum(sums)


def square_between(values: Floats, others: Floats) -> float:
    """(n,) float32, contiguous -> the sum of squares of their differences, which take the place of `others`."""
    sums = np.zeros(SUMS)
    cpu.squares_between(values, others, sums)
    return math.fsum(sums)


def count_nonfinite(values: Floats) -> int:
    """(n,) -> how many are NaN or Inf."""
    return int(values.size - np.count_nonzero(np.isfinite(values)))


def add_round(
    base_raw: Bytes,
    base_dtype: DType,
    base: Floats,
    merged: Floats,
    factor: float,
    dtype: DType,
    raw: Bytes,
    words: Words | None = None,
    *,
    packed: bool = False,
) -> int:
    """base + factor * merged, (n,), rounded once to `dtype` into `raw`; returns how many finite ones overflowed.

    To nearest even, or stochastically by `words`, (n,); `packed`: as version 1 of packs does, see `twice_rounded`.
    Where the change is exactly 0 and the format stays, the base's bits are copied: -0.0 and NaN payloads survive.
    """
    number = merged.dtype.type
    if dtype.name == base_dtype.name == "BF16" and merged.dtype == np.float32:
        origin, found = base_raw.view(np.uint16), raw.view(np.uint16)
        if words is None:
            return int(rounding.add_round_bf16(origin, base, merged, number(factor), found))
        return int(rounding.add_round_stochastic_bf16(origin, base, merged, number(factor), words, found))
    change = number(factor) * merged
    with np.errstate(over="ignore", invalid="ignore"):
        total = base + change
        overflowed = narrow(twice_rounded(total, dtype) if packed else total, dtype, raw, words)
    if dtype.name == base_dtype.name:
        word = f"u{dtype.itemsize}"
        np.copyto(raw.view(word), base_raw.view(word), where=change == 0)
    return overflowed - count_nonfinite(base) if overflowed else 0


def in_format(values: Floats, dtype: DType) -> Bytes:
    """(n,) -> bytes in `dtype`, to nearest."""
    raw: Bytes = np.empty(values.size * dtype.itemsize, np.uint8)
    round_to(values, dtype, raw)
    return raw


def round_to(values: Floats, dtype: DType, raw: Bytes, words: Words | None = None) -> int:
    """(n,) finite values rounded once to `dtype` into `raw`, as in `add_round`; returns how many overflowed."""
    if dtype.name == "BF16" and values.dtype == np.float32:
        if words is None:
            return int(rounding.round_bf16(values, raw.view(np.uint16)))
        return int(rounding.round_stochastic_bf16(values, words, raw.view(np.uint16)))
    return narrow(values, dtype, raw, words)
