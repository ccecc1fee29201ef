# SPDX-License-Identifier: Apache-2.0
"""A merge written down as the formulas have it: whole tensors, plain numpy, no tiles, no threads, no plan."""

import numpy as np

from darekit import masks
from darekit.dtypes import DTYPES
from darekit.methods import MERGE_METHODS, SPARSIFIERS
from darekit.methods.sparsifiers import largest


def raw_of(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def merge(
    name,
    base,
    models,
    *,
    seeds,
    sparsify=None,
    method="linear",
    weights=None,
    lambda_=1.0,
    keep=1.0,
    normalize=None,
    on="delta",
    statistics=None,
    own=None,
):
    """One tensor: arrays of one shape in any float dtype -> the merged array in base's (first model's) dtype."""
    like = models[0] if base is None else base
    wide = any(a.dtype == np.float64 for a in (like, *models))
    number = np.float64 if wide else np.float32
    origin = np.zeros(like.shape, number) if base is None or on == "weights" else base.astype(number)
    rows = (1, like.size) if like.ndim < 2 else (like.size // max(1, like.shape[-1]), like.shape[-1])
    deltas = []
    for model, seed in zip(models, seeds, strict=True):
        delta = (model.astype(number) - origin).reshape(rows)
        if sparsify is not None:
            kind, parameters = sparsify
            draws = masks.draws(seed, masks.stream_of(name), 0, like.size).reshape(rows)
            delta = SPARSIFIERS[kind].function(delta, draws, **parameters)
        flat = delta.reshape(-1)
        if keep < 1:
            flat = np.where(largest(np.abs(flat), min(flat.size, max(1, int(keep * flat.size)))), flat, number(0))
        deltas.append(flat)
    entry = MERGE_METHODS[method]
    alone = len(models) == 1 and sparsify is None and keep == 1 and lambda_ == 1
    if entry.keeps_one and alone and base is not None and weights is not None and tuple(weights) == (1.0,):
        return models[0]
    parameters = dict(own or {}) | ({} if normalize is None else {"normalize": normalize})
    weights = np.ones(len(models)) if weights is None else np.array(weights, dtype=np.float64)
    if entry.products:
        merged = weighed(entry, origin, np.array(deltas), models if sparsify is None else None, weights, parameters)
        if merged is None:
            return models[0]
    elif entry.statistics is None:
        rows = (like.size // max(1, like.shape[-1]), like.shape[-1]) if like.ndim > 1 else (1, like.size)
        deltas = np.array(deltas).reshape(len(models), *rows)
        more = [weights] if entry.weighted else [origin.reshape(rows)] if entry.survey and entry.survey.lines else []
        merged = entry.function(deltas if entry.survey else deltas.reshape(len(models), -1), *more, **parameters)
        merged = merged.reshape(-1)
    elif statistics is None:
        merged = MERGE_METHODS["linear"].function(np.array(deltas), weights)
    else:
        shape = (len(models), *(like.shape if entry.rows else (like.size,)))
        known = [np.asarray(s) if entry.rows else np.asarray(s).reshape(-1) for s in statistics]
        merged = entry.function(np.array(deltas).reshape(shape), weights, known, np.ones(len(models)), **parameters)
        merged = merged.reshape(-1)
    out_dtype = like.dtype
    with np.errstate(all="ignore"):
        if base is None or on == "weights":
            return merged.astype(out_dtype).reshape(like.shape)
        if entry.sums_models:  # s (base + d) is base + s d + (s - 1) base
            merged = merged + number(weights.sum() - 1) * origin.reshape(-1)
        change = number(lambda_ if entry.needs_base else 1.0) * merged
        result = (origin.reshape(-1) + change).astype(out_dtype)
    word = f"u{out_dtype.itemsize}"
    bits = np.where(change == 0, np.ascontiguousarray(base).reshape(-1).view(word), result.view(word))
    return bits.astype(word).view(out_dtype).reshape(like.shape)


def weighed(entry, base, deltas, models, weights, parameters):
    """What a method with coefficients adds to the base, (n,): from the inner products of whole rows. `models` as they
    are stored; None: they are base + delta. None where the one model itself is the result."""
    base = base.reshape(-1)
    if entry.products == "deltas":
        rows = list(deltas)
    else:
        rows = [base + d for d in deltas] if models is None else [m.astype(base.dtype).reshape(-1) for m in models]
    rows = np.array([base, *rows] if entry.base_row else rows).astype(np.float64)
    more = {"weights": weights} if entry.weighted else {}
    found = entry.function(rows @ rows.T, **more, **{n: v for n, v in parameters.items() if n in entry.own_parameters})
    shift = 0.0 if entry.products == "deltas" else found.sum() - 1
    if entry.products == "models" and models is not None and found.tolist() == [0.0, 1.0]:
        return None
    number = base.dtype.type
    merged = np.zeros_like(base)
    for weight, delta in zip(found[int(entry.base_row) :], deltas, strict=True):
        merged += number(weight) * delta
    return merged + number(shift) * base if shift else merged


def family(rng, shape, dtype, k=3, scale=5e-4):
    """A base and k models with deltas of about `scale`, in a safetensors dtype."""
    kind = DTYPES[dtype].numpy
    base = rng.normal(0, 0.02, shape).astype(kind)
    spread = scale if dtype not in ("F8_E4M3", "F8_E5M2") else 0.01
    models = [(base.astype(np.float64) + rng.normal(0, spread, shape)).astype(kind) for _ in range(k)]
    return base, models
