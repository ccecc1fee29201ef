# SPDX-License-Identifier: Apache-2.0
"""Deltas out of a pack, as they are added to the base: some rows of a tensor, leaf by leaf."""

from __future__ import annotations

import numpy as np

from darekit import kernels
from darekit.checkpoints import Checkpoint
from darekit.checkpoints.digests import LEAF
from darekit.dtypes import DTYPES, Bytes, Floats
from darekit.errors import PlanError
from darekit.packs.decoding import Decoder
from darekit.packs.format import PackedTensor, PackFile
from darekit.packs.leaves import decode, number_for, take

Found = tuple[np.ndarray, Floats]  # indices in the flattened tensor, values


def delta_of(source: PackFile, tensor: PackedTensor, rows: slice, base: Checkpoint | None) -> Floats:
    """(rows, ...) float32 (float64 for F64): one tensor's delta, 0 where dropped; only the leaves of `rows` are read.

    Raises:
        PlanError: rows with a step, a tensor of integers, or an exact pack without its base.
    """
    count = tensor.shape[0] if tensor.shape else 1
    first, last, step = rows.indices(count)
    if step != 1:
        raise PlanError(f"rows of {tensor.name} with a step of {step}; only contiguous ranges can be read")
    last = max(first, last)
    begin, end = first * tensor.row, last * tensor.row
    if DTYPES[tensor.dtype].kind != "float":
        raise PlanError(f"{tensor.name} is {tensor.dtype}: integers have no delta")
    wide = tensor.kind == "delta" and number_for(tensor, source.value_dtype(tensor)) is np.float64
    out: Floats = np.zeros(end - begin, np.float64 if wide or tensor.dtype == "F64" else np.float32)
    if tensor.kind != "same":
        for leaf in range(begin // LEAF, -(-end // LEAF)):
            at, values = _leaf_delta(source, tensor, leaf, base)
            inside = (at >= begin) & (at < end)
            out[at[inside] - begin] = values[inside]
    found: Floats = out.reshape((last - first, *tensor.shape[1:]) if tensor.shape else ())
    return found


def _leaf_delta(source: PackFile, tensor: PackedTensor, leaf: int, base: Checkpoint | None) -> Found:
    decoder = Decoder(source, tensor)
    if tensor.kind == "lossless":
        return _exact_delta(source, decoder, leaf, base)
    indices = decoder.indices(leaf)
    stored, scales = source.read_leaf(tensor, leaf)
    before: Floats = np.zeros(indices.size, decoder.number)
    kept = None
    if tensor.encoding == "exact":
        kept = take(_base_leaf(source, decoder, leaf, base), DTYPES[tensor.dtype], indices)
        kernels.widen(kept, DTYPES[tensor.dtype], before)
    stored = decoder.bare(stored, indices.size, kept)
    delta = decode(tensor, decoder.values, stored, scales, indices.size, before)
    delta *= before.dtype.type(decoder.factor)
    return indices.astype(np.int64) + leaf * LEAF, delta


def _exact_delta(source: PackFile, decoder: Decoder, leaf: int, base: Checkpoint | None) -> Found:
    """Every element of a leaf: the fine-tuned values minus the base's."""
    dtype = DTYPES[decoder.tensor.dtype]
    raw = _base_leaf(source, decoder, leaf, base)
    before: Floats = np.empty(raw.size // dtype.itemsize, decoder.number)
    delta = np.empty_like(before)
    kernels.widen(raw, dtype, before)
    decoder.restore(leaf, raw)
    kernels.difference(raw, dtype, before, delta)
    return np.arange(leaf * LEAF, leaf * LEAF + before.size), delta


def _base_leaf(source: PackFile, decoder: Decoder, leaf: int, base: Checkpoint | None) -> Bytes:
    if base is None:
        raise PlanError(
            f"{source.file.path} stores fine-tuned values: their delta needs the base; open_pack(path, base=...)"
        )
    raw = np.empty(decoder.size(leaf), np.uint8)
    base.tensors[decoder.tensor.name].source.read_into(raw, leaf * decoder.leaf_bytes)
    return raw
