# SPDX-License-Identifier: Apache-2.0
"""Kernels on tiles: `cpu` (numba, float32) and the dtype-aware edges where raw bytes become numbers and back.

Only this package imports numba, and only when a kernel is called. Where no fast kernel exists (float64, formats other
than BF16) numpy does the work.
"""

from __future__ import annotations

import numpy as np

from darekit.dtypes import Bytes, DType, Floats, narrow
from darekit.dtypes import widen as widen_any
from darekit.kernels import cpu


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


def count_nonfinite(values: Floats) -> int:
    """(n,) -> how many are NaN or Inf."""
    return int(values.size - np.count_nonzero(np.isfinite(values)))


def add_round(
    base_raw: Bytes, base_dtype: DType, base: Floats, merged: Floats, factor: float, dtype: DType, raw: Bytes
) -> int:
    """base + factor * merged, (n,), rounded once to `dtype` into `raw`; returns how many finite ones overflowed.

    Where the change is exactly 0 and the format stays, the base's bits are copied: -0.0 and NaN payloads survive.
    """
    number = merged.dtype.type
    if dtype.name == base_dtype.name == "BF16" and merged.dtype == np.float32:
        return int(cpu.add_round_bf16(base_raw.view(np.uint16), base, merged, number(factor), raw.view(np.uint16)))
    change = number(factor) * merged
    with np.errstate(over="ignore", invalid="ignore"):
        overflowed = narrow(base + change, dtype, raw)
    if dtype.name == base_dtype.name:
        word = f"u{dtype.itemsize}"
        np.copyto(raw.view(word), base_raw.view(word), where=change == 0)
    return overflowed - count_nonfinite(base) if overflowed else 0


def round_to(values: Floats, dtype: DType, raw: Bytes) -> int:
    """(n,) finite values rounded once to `dtype` into `raw`; returns how many overflowed."""
    if dtype.name == "BF16" and values.dtype == np.float32:
        return int(cpu.round_bf16(values, raw.view(np.uint16)))
    return narrow(values, dtype, raw)
