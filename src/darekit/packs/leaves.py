# SPDX-License-Identifier: Apache-2.0
"""One leaf of one tensor (64Ki elements) between its base, its fine-tuned values and its stored bytes.

All arithmetic is on the kept elements alone, compact and in order of index, so it is the same for every format. The
result of a leaf is what `dare drop` writes there; `restore` defines it, for the writer's digests and every reader.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from darekit import kernels
from darekit.checkpoints.digests import LEAF
from darekit.dtypes import DTYPES, Bytes, DType, Floats, narrow, twice_rounded
from darekit.errors import CheckpointError, DataError
from darekit.kernels import packs as cpu
from darekit.masks import DROP_ALL, stream_of, threshold_of
from darekit.methods.sparsifiers import paper_factor
from darekit.packs.format import PackedTensor
from darekit.packs.quantization import BFLOAT16, decode_values, encode_values

Indices = npt.NDArray[np.int32]


class Mask:
    """Which elements of one tensor are stored: those that the mask keeps, of the rows that changed."""

    def __init__(self, tensor: PackedTensor, seed: int, rows: Bytes | None) -> None:
        self.tensor, self.rows = tensor, rows
        self.seed, self.stream = np.uint64(seed), np.uint64(stream_of(tensor.name))
        self.threshold = threshold_of(tensor.drop_rate)

    @property
    def whole(self) -> bool:
        """Whether every element is stored."""
        return self.threshold == 0 and self.rows is None

    def indices(self, leaf: int) -> Indices:
        """(k,) int32: the leaf's stored elements, counted from its first."""
        start = leaf * LEAF
        count = min(LEAF, self.tensor.count - start)
        if self.threshold == DROP_ALL:
            return np.empty(0, np.int32)
        if self.threshold == 0:
            found: Indices = np.arange(count, dtype=np.int32)
        else:
            room = np.empty(count + cpu.SPARE, np.uint16)  # as kernels call it: one compilation serves both
            found = cpu.kept_indices(self.seed, self.stream, start, self.threshold, count, room).astype(np.int32)
        if self.rows is not None:
            row = (start + found.astype(np.int64)) // self.tensor.row
            found = found[(self.rows[row >> 3] >> (row & 7).astype(np.uint8)) & 1 == 1]
        return found


def factor_of(tensor: PackedTensor, rescale: str) -> np.float32:
    """What the stored delta is multiplied by."""
    return paper_factor(tensor.drop_rate) if rescale == "paper" and tensor.drop_rate > 0 else np.float32(1)


def take(raw: Bytes, dtype: DType, indices: Indices) -> Bytes:
    """Raw elements at `indices` -> their raw bytes, in order."""
    word = f"u{dtype.itemsize}"
    out = np.empty(indices.size, word)
    cpu.take(raw.view(word), indices, out)
    return out.view(np.uint8)


def put(raw: Bytes, dtype: DType, indices: Indices, values: Bytes) -> None:
    """The inverse of `take`, in place."""
    word = f"u{dtype.itemsize}"
    cpu.put(raw.view(word), indices, values.view(word))


def number_for(tensor: PackedTensor, values: DType) -> type[np.floating]:
    """What arithmetic is done in: float64 where the base or the fine-tuned tensor is F64."""
    wide = tensor.dtype == "F64" or (tensor.encoding == "exact" and values.name == "F64")
    return np.float64 if wide else np.float32


def encode(tensor: PackedTensor, base: Bytes, tuned: Bytes, values: DType, tuned_dtype: DType) -> tuple[Bytes, Bytes]:
    """Kept elements of base and fine-tuned tensor, raw -> the leaf's values and scales as they are stored.

    Raises:
        DataError: NaN or Inf.
    """
    base_dtype = DTYPES[tensor.dtype]
    nothing = np.empty(0, np.uint8)
    if tensor.encoding == "exact" and base_dtype.name == tuned_dtype.name == "BF16":
        refuse_nonfinite(cpu.count_bad_bf16(base.view(np.uint16), tuned.view(np.uint16)), tensor.name)
        return tuned, nothing
    wide = "F64" in (base_dtype.name, tuned_dtype.name)
    before: Floats = np.empty(base.size // base_dtype.itemsize, np.float64 if wide else np.float32)
    delta = np.empty_like(before)
    kernels.widen(base, base_dtype, before)
    refuse_nonfinite(kernels.difference(tuned, tuned_dtype, before, delta), tensor.name)
    if tensor.encoding == "exact":
        return tuned, nothing
    if not tensor.bits:
        raw = np.empty(delta.size * values.itemsize, np.uint8)
        _refuse_overflow(kernels.round_to(delta, values, raw), tensor.name)
        return raw, nothing
    return encode_values(delta, tensor.bits, tensor.group)


def scale_factors(scales: Bytes, name: str) -> Floats:
    """(2 groups,) uint8 -> (groups,) float32.

    Raises:
        CheckpointError: one is negative, NaN or Inf.
    """
    factors: Floats = scales.view(BFLOAT16).astype(np.float32)
    if not np.all((factors >= 0) & (factors < np.inf)):
        raise CheckpointError(f"tensor {name}: a scale is negative, NaN or Inf; the pack is damaged")
    return factors


def decode(tensor: PackedTensor, values: DType, stored: Bytes, scales: Bytes, count: int, base: Floats) -> Floats:
    """Stored bytes and the kept elements of the base, (k,) widened -> the kept deltas, (k,), not yet rescaled.

    Raises:
        CheckpointError: a scale that is negative, NaN or Inf; values that are.
    """
    delta = np.empty(count, base.dtype)
    if tensor.bits:
        decode_values(stored, scale_factors(scales, tensor.name), tensor.bits, tensor.group, delta)
        return delta
    if tensor.encoding == "exact":
        bad = kernels.difference(stored, values, base, delta)
    else:
        kernels.widen(stored, values, delta)
        bad = kernels.count_nonfinite(delta)
    if bad:
        raise CheckpointError(
            f"tensor {tensor.name}: {bad} deltas are NaN or Inf; the pack is damaged, or this is not its base"
        )
    return delta


def restore(
    tensor: PackedTensor, values: DType, factor: np.float32, indices: Indices | None, stored: Bytes, scales: Bytes,
    raw: Bytes,
) -> None:  # fmt: skip
    """One leaf of the base, raw, in place -> the result: base + factor * delta at `indices` (None: everywhere).

    Rounded once, to nearest even; the base's bits where the change is exactly 0.

    Raises:
        CheckpointError: stored values make no sense.
        DataError: a result does not fit the format.
    """
    dtype = DTYPES[tensor.dtype]
    if tensor.verbatim and values.name == dtype.name:
        if indices is None:
            raw[:] = stored
        else:
            put(raw, dtype, indices, stored)
        return
    if dtype.name == "BF16" and indices is not None and number_for(tensor, values) is np.float32 and (
        tensor.encoding != "exact" or values.name == "BF16"
    ):  # fmt: skip
        # Exactly what follows, in one pass over the kept elements.
        words = raw.view(np.uint16)
        if tensor.encoding == "exact":
            bad = cpu.restore_bf16(words, indices, stored.view(np.uint16), factor)
        else:
            delta = decode(tensor, values, stored, scales, indices.size, np.empty(indices.size, np.float32))
            bad = cpu.restore_changes_bf16(words, indices, delta, factor)
        refuse_nonfinite_results(bad, tensor.name)
        return
    kept = raw if indices is None else take(raw, dtype, indices)
    count = kept.size // dtype.itemsize
    base: Floats = np.empty(count, number_for(tensor, values))
    out = np.empty(kept.size, np.uint8)
    if tensor.verbatim:
        kernels.widen(stored, values, base)
        _refuse_overflow(narrow(twice_rounded(base, dtype), dtype, out), tensor.name)
    else:
        kernels.widen(kept, dtype, base)
        delta = decode(tensor, values, stored, scales, count, base)
        delta *= base.dtype.type(factor)
        _refuse_overflow(kernels.add_round(kept, dtype, base, delta, 1.0, dtype, out, packed=True), tensor.name)
    if indices is None:
        raw[:] = out
    else:
        put(raw, dtype, indices, out)


def refuse_nonfinite(bad: int, name: str) -> None:
    """Raise if any difference is."""
    if bad:
        raise DataError(
            f"{name} has {bad} differences that are NaN or Inf; repair the model or its base, or keep all of it with "
            "--lossless"
        )


def refuse_nonfinite_results(bad: int, name: str) -> None:
    """Raise if any result is; a writer knows that it is not the pack's fault."""
    if bad:
        raise CheckpointError(
            f"tensor {name}: {bad} results are NaN or Inf; the pack is damaged, or this is not its base"
        )


def _refuse_overflow(overflowed: int, name: str) -> None:
    if overflowed:
        raise DataError(
            f"{overflowed} results of {name} do not fit its number format; use a smaller drop rate, or --rescale none"
        )
