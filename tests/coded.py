# SPDX-License-Identifier: Apache-2.0
"""Quantised weights made by hand, each with what it decodes to: nothing of darekit takes part.

A function takes a name and a weight, (..., rows, columns) float32, and returns the tensors that are stored and the
float32 values that they stand for, computed element by element from what the formats say.
"""

import json
import math

import ml_dtypes
import numpy as np

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16


def spread(scales, shape, block):
    """One number for each block -> one for each element."""
    rows, columns = np.arange(shape[-2]) // block[0], np.arange(shape[-1]) // block[1]
    return scales[..., rows, :][..., columns]


def blocks_of(shape, block):
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def largest(weight, block):
    """Of each block; the last ones may be smaller."""
    found = np.zeros(blocks_of(weight.shape, block), np.float32)
    for row in range(found.shape[-2]):
        for column in range(found.shape[-1]):
            part = weight[..., row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]
            found[..., row, column] = np.abs(part).max(axis=(-2, -1))
    return found


def eights(name, weight, block=(128, 128), *, kind=E4M3, scale="_scale_inv", number=np.float32, shape=None):
    """F8 in blocks; `number`: format of the scales; `shape`: that they are stored in."""
    scales = (largest(weight, block) / float(ml_dtypes.finfo(kind).max)).astype(number)
    wide = spread(scales.astype(np.float32), weight.shape, block)
    codes = (weight / np.where(wide == 0, 1, wide)).astype(kind)
    stored = {name: codes, f"{name}{scale}": scales if shape is None else scales.reshape(shape)}
    return stored, codes.astype(np.float32) * wide


def powers(weight, block, most):
    """Exponents of E8M0 with which no value is above `most`."""
    return np.clip(np.ceil(np.log2(np.maximum(largest(weight, block), 1e-30) / most)) + 127, 0, 254).astype(np.uint8)


def nearest(values):
    return np.abs(np.abs(values)[..., None] - np.array(E2M1[:8])).argmin(-1).astype(np.uint8) + 8 * (values < 0)


def pairs(codes):
    """The first of two in the lower bits."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def fours(name, weight, group=32):
    """MXFP4 in rows, as compressed-tensors packs it; in groups of 16, NVFP4."""
    if group == 32:
        stored = powers(weight, (1, group), 6)
        scales = np.ldexp(np.float32(1), stored.astype(int) - 127)
        more = {}
    else:
        whole = np.float32(448 * 6 / np.abs(weight).max())
        stored = (largest(weight, (1, group)) / 6 * whole).astype(E4M3)
        scales = stored.astype(np.float32) / whole
        more = {f"{name}_global_scale": np.array([whole])}
    wide = spread(scales, weight.shape, (1, group))
    codes = nearest(weight / wide)
    return {f"{name}_packed": pairs(codes), f"{name}_scale": stored, **more}, np.array(E2M1, np.float32)[codes] * wide


def blocks(name, weight):
    """MXFP4 of gpt-oss: (experts, inputs, outputs), packed down the inputs."""
    down = np.ascontiguousarray(weight.swapaxes(1, 2))
    exponents = powers(down, (1, 32), 6)
    wide = spread(np.ldexp(np.float32(1), exponents.astype(int) - 127), down.shape, (1, 32))
    codes = nearest(down / wide)
    packed = pairs(codes).reshape(*exponents.shape, 16)
    values = np.array(E2M1, np.float32)[codes] * wide
    return {f"{name}_blocks": packed, f"{name}_scales": exponents}, np.ascontiguousarray(values.swapaxes(1, 2))


def words(codes, bits):
    """(rows, columns) -> (rows, words) int32: one code behind the other, one bit after the other."""
    rows, columns = codes.shape
    line = np.unpackbits(codes[..., None].astype(np.uint8), axis=-1, bitorder="little")[..., :bits].reshape(rows, -1)
    line = np.pad(line, ((0, 0), (0, -line.shape[1] % 32)))
    return np.packbits(line, axis=-1, bitorder="little").view(np.int32).reshape(rows, math.ceil(columns * bits / 32))


def packed(name, weight, bits=4, group=32, *, number=BF16, zeros=None, order=None):
    """Integers in words, as compressed-tensors packs them. `zeros`: (rows, groups) zero points; `order`: the group of
    each column, which then need not be that of its place."""
    half = 1 << (bits - 1)
    at = np.arange(weight.shape[1]) // group if order is None else order
    groups = int(at.max()) + 1
    scales = np.stack([np.abs(weight[:, at == g]).max(axis=1) for g in range(groups)], axis=1) / (half - 1)
    scales = scales.astype(number)
    wide = scales.astype(np.float32)[:, at]
    points = 0 if zeros is None else zeros[:, at]
    codes = np.clip(np.rint(weight / wide) + points, -half, half - 1)
    stored = {
        f"{name}_packed": words((codes + half).astype(np.uint8), bits), f"{name}_scale": scales,
        f"{name}_shape": np.array(weight.shape, np.int64),
    }  # fmt: skip
    if zeros is not None:
        stored[f"{name}_zero_point"] = np.ascontiguousarray(words((zeros + half).astype(np.uint8).T, bits).T)
    if order is not None:
        stored[f"{name}_g_idx"] = order.astype(np.int32)
    return stored, ((codes - points).astype(np.float32) * wide).astype(np.float32)


def integers(name, weight, *, number=np.float32):
    """INT8, one scale for each row."""
    scales = (np.abs(weight).max(axis=-1, keepdims=True) / 127).astype(number)
    codes = np.rint(weight / scales.astype(np.float32)).astype(np.int8)
    return {name: codes, f"{name}_scale": scales}, codes.astype(np.float32) * scales.astype(np.float32)


def state(**facts):
    """JSON in a tensor, as bitsandbytes stores it."""
    return np.frombuffer(json.dumps(facts).encode(), np.uint8)
