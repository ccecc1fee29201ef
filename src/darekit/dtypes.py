# SPDX-License-Identifier: Apache-2.0
"""Number formats of tensors on disk: their sizes and names, how they widen to arithmetic and round back.

Arithmetic is float32, float64 where an input is F64. Widening is exact for every format here; rounding happens
once, to nearest even. The functions below are the reference; `darekit.kernels` has faster twins for BF16.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class DType:
    """One number format: its safetensors name, the name used by torch and recipes, its numpy dtype."""

    name: str
    torch_name: str
    kind: Literal["float", "int", "bool", "complex"]  # arithmetic is of floats: all others are copied
    numpy: np.dtype

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.numpy.itemsize


DTYPES: dict[str, DType] = {
    entry.name: entry
    for entry in (
        DType("F64", "float64", "float", np.dtype("<f8")),
        DType("F32", "float32", "float", np.dtype("<f4")),
        DType("F16", "float16", "float", np.dtype("<f2")),
        DType("BF16", "bfloat16", "float", np.dtype(ml_dtypes.bfloat16)),
        DType("F8_E4M3", "float8_e4m3fn", "float", np.dtype(ml_dtypes.float8_e4m3fn)),
        DType("F8_E5M2", "float8_e5m2", "float", np.dtype(ml_dtypes.float8_e5m2)),
        DType("I64", "int64", "int", np.dtype("<i8")),
        DType("I32", "int32", "int", np.dtype("<i4")),
        DType("I16", "int16", "int", np.dtype("<i2")),
        DType("I8", "int8", "int", np.dtype("i1")),
        DType("U64", "uint64", "int", np.dtype("<u8")),
        DType("U32", "uint32", "int", np.dtype("<u4")),
        DType("U16", "uint16", "int", np.dtype("<u2")),
        DType("U8", "uint8", "int", np.dtype("u1")),
        DType("BOOL", "bool", "bool", np.dtype("?")),
        DType("C64", "complex64", "complex", np.dtype("<c8")),
    )
}

Rounding = Literal["nearest", "stochastic"]
NEAREST: Rounding = "nearest"
STOCHASTIC: Rounding = "stochastic"
_WORDS = 4294967296.0
# Powers of two, which scale quantised weights and mean nothing by themselves: read, and never written.
POWERS = DType("F8_E8M0", "float8_e8m0fnu", "int", np.dtype("u1"))

FLOAT_DTYPES: tuple[str, ...] = tuple(name for name, entry in DTYPES.items() if entry.kind == "float")


def dtype_named(name: str) -> DType:
    """Look up a format by its safetensors name, one of `DTYPES` or `POWERS`: no header with another one is read."""
    return POWERS if name == POWERS.name else DTYPES[name]


def dtype_from_torch_name(name: str) -> DType | None:
    """Look up a format by the name that torch and recipes use (`bfloat16`, `torch.bfloat16`); None if unknown."""
    wanted = name.removeprefix("torch.")
    return next((entry for entry in DTYPES.values() if entry.torch_name == wanted), None)


def is_torch(array: Any) -> bool:
    """Whether an array is torch's, of a class of whomever; torch is not imported for that."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def dtype_of(array: Any) -> DType | None:
    """Format of a numpy array or torch tensor; None if unknown."""
    if is_torch(array):
        return dtype_from_torch_name(str(array.dtype))
    dtype = array.dtype.newbyteorder("<")
    return next((entry for entry in DTYPES.values() if entry.numpy == dtype), None)


def widen(raw: Bytes, dtype: DType, out: Floats) -> None:
    """(n * itemsize,) uint8 -> (n,) float32 or float64, in place in `out`; exact."""
    # A cast of a signalling NaN raises the processor's "invalid" flag; finding NaNs is the engine's work, not numpy's.
    with np.errstate(invalid="ignore", over="ignore"):
        out[...] = raw.view(dtype.numpy)


def narrow(values: Floats, dtype: DType, raw: Bytes, words: npt.NDArray[np.uint32] | None = None) -> int:
    """(n,) float32 or float64 -> (n * itemsize,) uint8, in place in `raw`; nearest even, or `stochastic` by `words`.

    Returns how many results are NaN or Inf: of finite values, those for which the format is too small.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = _nearest(values, dtype.numpy) if words is None else stochastic(values, dtype.numpy, words)
    raw.view(dtype.numpy)[...] = rounded
    return int(rounded.size - np.count_nonzero(np.isfinite(rounded)))


def _nearest(values: Floats, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """(n,) float32 or float64 -> (n,) `dtype`, rounded once, to nearest even.

    ml_dtypes takes float64 to its formats by way of float32, rounded twice: to BF16 one of 131,072 values then lands on
    the wrong side of a tie. By way of float32 rounded to odd, the second rounding is the only one that counts.

    >>> float(_nearest(np.array([1 + 2**-8 + 2**-40]), np.dtype(ml_dtypes.bfloat16))[0])
    1.0078125
    """
    if not _by_way_of_float32(values, dtype):
        return values.astype(dtype)
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    inexact = np.isfinite(values) & (single != values)
    bits -= inexact & (np.abs(single) > np.abs(values))  # towards 0, and from Inf to the largest
    bits |= inexact
    return single.astype(dtype)


def _by_way_of_float32(values: Floats, dtype: np.dtype[Any]) -> bool:
    """Whether astype rounds twice: formats of ml_dtypes, which numpy has not, from float64."""
    return values.dtype == np.float64 and dtype.itemsize <= 2 and dtype != np.float16


def twice_rounded(values: Floats, dtype: DType) -> Floats:
    """(n,) -> what version 1 of packs rounds to `dtype`: of float64, for BF16 and float8, the nearest float32."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32) if _by_way_of_float32(values, dtype.numpy) else values


def stochastic(values: Floats, dtype: np.dtype[Any], words: npt.NDArray[np.uint32]) -> npt.NDArray[Any]:
    """(n,) float32 or float64, (n,) uint32 -> (n,) `dtype`: one of the two neighbours, so that the mean is the value.

    A value x between neighbours a and b of the format, |a| < |x| < |b|, becomes b with the probability
    T / 2^32, T = round(2^32 (|x| - |a|) / (|b| - |a|)) to nearest even: where word + T >= 2^32. What the format has
    stays, signs of zeros too. Beyond the largest finite value there is no neighbour: up to where rounding to nearest
    would overflow, it is that value, and from there on NaN or Inf, as to nearest. NaN stays NaN.

    Source: stochastic rounding as in arXiv 1502.02551; the words are Philox4x32-10's.

    >>> stochastic(np.float32([1, 1.001, -1.001]), np.dtype(np.float16), np.uint32([0, 2**31, 0])).tolist()
    [1.0, 1.0009765625, -1.0009765625]
    """
    bits = np.dtype(f"u{dtype.itemsize}")
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = _nearest(values, dtype)
        exact, found = np.abs(values.astype(np.float64)), np.abs(nearest.astype(np.float64))
    inexact = np.isfinite(found) & (exact != found)
    if not inexact.any():
        return nearest
    codes = nearest.view(bits).copy()
    at = np.flatnonzero(inexact)
    # Codes of one sign are in the order of magnitudes: the neighbours are the codes before and after.
    below = codes[at] - (found[at] > exact[at]).astype(bits)
    above = below + bits.type(1)
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = (np.abs(code.view(dtype).astype(np.float64)) for code in (below, above))
        limits = np.rint((exact[at] - low) / (high - low) * _WORDS)
    up = np.isfinite(high) & (words[at] + np.where(np.isfinite(limits), limits, 0.0) >= _WORDS)
    codes[at] = np.where(up, above, below)
    return codes.view(dtype)
