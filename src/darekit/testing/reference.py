# SPDX-License-Identifier: Apache-2.0
"""A merge written down as the formulas have it: whole tensors, plain numpy, no tiles, no threads, no plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from darekit import masks
from darekit.methods import AVERAGE, MERGE_METHODS, SPARSIFIERS, MergeMethod
from darekit.methods.sparsifiers import largest

Array = npt.NDArray[Any]


def reference(
    name: str,
    base: Array | None,
    models: Sequence[Array],
    *,
    seeds: Sequence[int],
    sparsify: tuple[str, Mapping[str, Any]] | None = None,
    method: str = AVERAGE,
    weights: Sequence[float] | None = None,
    lambda_: float = 1.0,
    keep: float = 1.0,
    normalize: bool | None = None,
    on: str = "delta",
    statistics: Sequence[Array] | None = None,
    own: Mapping[str, Any] | None = None,
) -> Array:
    """One tensor merged as the formulas have it: whole tensors, plain numpy, no tiles, no threads, no plan.

    Args:
        name: of the tensor, from which its masks follow.
        base: the base's array; None: there is none.
        models: arrays of one shape, in any float dtype.
        seeds: effective seed of each model.
        sparsify: sparsifier and its parameters.
        method: the merge method.
        weights: of the models; 1 each if not given.
        lambda_: scale of the merged delta.
        keep: what a trim leaves of each delta.
        normalize: the method's parameter of this name; its default if not given.
        on: `delta` or `weights`.
        statistics: what the method must know of each model.
        own: the method's other parameters.

    Returns:
        The merged array, in the base's (else the first model's) dtype.

    Examples:
        >>> from darekit import testing
        >>> base, model = np.float32([1, 1]), np.float32([2, 3])
        >>> testing.reference("w", base, [model], seeds=[0], method="task_arithmetic", lambda_=0.5)
        array([1.5, 2. ], dtype=float32)
    """
    like = models[0] if base is None else base
    wide = any(a.dtype == np.float64 for a in (like, *models))
    number: Any = np.float64 if wide else np.float32
    origin: Array = np.zeros(like.shape, number) if base is None or on == "weights" else base.astype(number)
    rows = (1, like.size) if like.ndim < 2 else (like.size // max(1, like.shape[-1]), like.shape[-1])
    deltas = []
    for model, seed in zip(models, seeds, strict=True):
        delta = (model.astype(number) - origin).reshape(rows)
        if sparsify is not None:
            kind, given = sparsify
            draws = masks.draws(seed, masks.stream_of(name), 0, like.size).reshape(rows)
            defaults = {p.name: p.default for p in SPARSIFIERS[kind].parameters.values() if p.default is not None}
            delta = SPARSIFIERS[kind].function(delta, draws, **defaults | dict(given)) if delta.size else delta
        flat = delta.reshape(-1)
        if keep < 1:
            flat = np.where(largest(np.abs(flat), min(flat.size, max(1, int(keep * flat.size)))), flat, number(0))
        deltas.append(flat)
    entry = MERGE_METHODS[method]
    alone = len(models) == 1 and sparsify is None and keep == 1 and lambda_ == 1
    if entry.keeps_one and alone and base is not None and weights is not None and tuple(weights) == (1.0,):
        return models[0]
    parameters = dict(own or {}) | ({} if normalize is None else {"normalize": normalize})
    parameters = {key: value for key, value in parameters.items() if key in entry.own_parameters}
    factors = np.ones(len(models)) if weights is None else np.array(weights, dtype=np.float64)
    merged = _combined(entry, origin, np.array(deltas), models if sparsify is None else None, factors, parameters,
                       statistics, rows)  # fmt: skip
    if merged is None:
        return models[0]
    with np.errstate(all="ignore"):
        if base is None or on == "weights":
            return merged.astype(like.dtype).reshape(like.shape)
        if entry.sums_models:  # s (base + d) is base + s d + (s - 1) base
            merged = merged + number(factors.sum() - 1) * origin.reshape(-1)
        change = number(lambda_ if entry.needs_base else 1.0) * merged
        result = (origin.reshape(-1) + change).astype(like.dtype)
    word = f"u{like.dtype.itemsize}"
    bits = np.where(change == 0, np.ascontiguousarray(base).reshape(-1).view(word), result.view(word))
    found: Array = bits.astype(word).view(like.dtype).reshape(like.shape)
    return found


def _combined(
    entry: MergeMethod,
    origin: Array,
    deltas: Array,
    models: Sequence[Array] | None,
    weights: Array,
    parameters: Mapping[str, Any],
    statistics: Sequence[Array] | None,
    rows: tuple[int, int],
) -> Array | None:
    """(K, n) deltas -> (n,); None where the one model itself is the result."""
    if entry.products:
        return _weighed(entry, origin, deltas, models, weights, parameters)
    if entry.statistics is None:
        more = [weights] if entry.weighted else [origin.reshape(rows)] if entry.survey and entry.survey.lines else []
        if entry.shaped or entry.survey:
            deltas = deltas.reshape(len(deltas), *rows)
        merged: Array = entry.function(deltas, *more, **parameters) if deltas.size else deltas[0]
        return merged.reshape(-1)
    if statistics is None:
        average: Array = MERGE_METHODS[AVERAGE].function(deltas, weights)
        return average
    shape = (len(deltas), *(origin.shape if entry.rows else (origin.size,)))
    known = [np.asarray(s) if entry.rows else np.asarray(s).reshape(-1) for s in statistics]
    informed: Array = entry.function(deltas.reshape(shape), weights, known, np.ones(len(deltas)), **parameters)
    return informed.reshape(-1)


def _weighed(
    entry: MergeMethod,
    base: Array,
    deltas: Array,
    models: Sequence[Array] | None,
    weights: Array,
    parameters: Mapping[str, Any],
) -> Array | None:
    """What a method with coefficients adds to the base, (n,): from the inner products of whole rows. `models` as they
    are stored; None: they are base + delta."""
    base = base.reshape(-1)
    if entry.products == "deltas":
        rows = list(deltas)
    else:
        rows = [base + d for d in deltas] if models is None else [m.astype(base.dtype).reshape(-1) for m in models]
    stacked = np.array([base, *rows] if entry.base_row else rows).astype(np.float64)
    more = {"weights": weights} if entry.weighted else {}
    found = entry.function(stacked @ stacked.T, **more, **parameters)
    shift = 0.0 if entry.products == "deltas" else found.sum() - 1
    if entry.products == "models" and models is not None and found.tolist() == [0.0, 1.0]:
        return None
    number = base.dtype.type
    merged = np.zeros_like(base)
    for weight, delta in zip(found[int(entry.base_row) :], deltas, strict=True):
        merged += number(weight) * delta
    return merged + number(shift) * base if shift else merged
