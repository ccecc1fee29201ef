# SPDX-License-Identifier: Apache-2.0
"""Merge methods: K deltas (or, for `linear` without a base, K models) -> one. Plain numpy: definition and oracle.

Each takes `deltas`, (K, n) float32 or float64, and, if it has weights, `weights`, (K,) float64, and returns (n,) of
deltas' dtype: the merged delta before `lambda`. Sums run over models in recipe order. Whatever a method needs to know
of a whole tensor beforehand (TIES' trim) is a stage of its own, so that these functions work on tiles of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt

from darekit.methods.kinds import MergeMethod
from darekit.methods.parameters import Number, Switch

Deltas = npt.NDArray[np.floating]
Weights = npt.NDArray[np.float64]

Epsilon = Annotated[float, Number("an element that changed by no more counts as unchanged", 0, per_model=False)]

WEIGHTS_TINY = 1e-8
DISTANCE_TINY = 1e-6  # smallest distance that `nearswap` divides by, as mergekit has it


def total_weight(weights: Weights | Sequence[float]) -> float:
    """Sum of the weights; 1 where it vanishes, as mergekit has it."""
    total = float(np.sum(weights))
    return total if abs(total) >= WEIGHTS_TINY else 1.0


def weighted_sum(deltas: Deltas, weights: Weights, divisor: float) -> Deltas:
    """(K, n), (K,) -> (n,): sum of w_k d_k, divided by `divisor` once at the end (so equal models stay exact)."""
    number = deltas.dtype.type
    merged = np.zeros(deltas.shape[1], dtype=deltas.dtype)
    for delta, weight in zip(deltas, weights, strict=True):
        merged += number(weight) * delta
    return merged if divisor == 1.0 else merged / number(divisor)


def linear(
    deltas: Deltas,
    weights: Weights,
    *,
    normalize: Annotated[bool, Switch("divide by the sum of the weights")] = True,
) -> Deltas:
    """Weighted average of the models (of their deltas, where there is a base: the same average).

    Source: model soups (arXiv 2203.05482); "average merging" of DARE (arXiv 2311.03099), section 3.3:
    theta = sum w_k theta_k / sum w_k.
    """
    return weighted_sum(deltas, weights, total_weight(weights) if normalize else 1.0)


def passthrough(deltas: Deltas, weights: Weights) -> Deltas:
    """The one model as it is, each tensor times its `scale`: for stacks of layers of several models.

    Source: mergekit (arXiv 2403.13257), its method of this name: theta = s theta_1.
    """
    return weighted_sum(deltas, weights, 1.0)


def task_arithmetic(
    deltas: Deltas,
    weights: Weights,
    *,
    normalize: Annotated[bool, Switch("divide by the sum of the weights")] = False,
) -> Deltas:
    """Base plus lambda times the weighted sum of the deltas.

    Source: task arithmetic (arXiv 2212.04089), section 2: theta = theta_pre + lambda sum w_k d_k.
    """
    return weighted_sum(deltas, weights, total_weight(weights) if normalize else 1.0)


def ties(
    deltas: Deltas,
    weights: Weights,
    *,
    normalize: Annotated[bool, Switch("disjoint mean; false: the plain sum of those that agree")] = True,
) -> Deltas:
    """Elect a sign per element, average what agrees: the weighted mean of the deltas with that sign, after the trim.

    Source: TIES-Merging (arXiv 2306.01708), section 4: s = sgn(sum w_k d_k); mean of {d_k : sgn d_k = s}. A zero
    is in no one's favour; a sum of exactly 0 elects +, as PEFT and mergekit do (the authors take the majority sign
    of the whole vector there).
    """
    number = deltas.dtype.type
    votes = [number(weight) * delta for delta, weight in zip(deltas, weights, strict=True)]
    elected = np.zeros(deltas.shape[1], dtype=deltas.dtype)
    for vote in votes:
        elected += vote
    positive = elected >= 0
    merged, agreeing = np.zeros_like(elected), np.zeros_like(elected)
    for vote, weight in zip(votes, weights, strict=True):
        agrees = np.where(positive, vote > 0, vote < 0)
        merged += np.where(agrees, vote, number(0))
        agreeing += np.where(agrees, number(weight), number(0))
    if not normalize:
        return merged
    return merged / np.where(agreeing == 0, number(1), agreeing)


def nearswap(
    deltas: Deltas,
    *,
    t: Annotated[float, Number("how far an element may move from the base's towards the model's", 0, per_model=False)],
) -> Deltas:
    """Take over the elements of one model that are near the base's: within t; go t towards the others.

    Source: NearSwap (alchemonaut/QuartetAnemoi-70B-t0.0001) and mergekit (arXiv 2403.13257):
    d min(1, t / max(|d|, 1e-6)).
    """
    number = deltas.dtype.type
    share: Deltas = np.minimum(number(t) / np.maximum(np.abs(deltas[0]), number(DISTANCE_TINY)), number(1))
    moved: Deltas = share * deltas[0]
    return moved


def changes(deltas: Deltas, epsilon: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """(K, ...) -> which deltas change an element, (K, ...), and how many do, (...)."""
    changed = np.abs(deltas) > deltas.dtype.type(epsilon)
    return changed, changed.sum(axis=0)


def ram(deltas: Deltas, *, epsilon: Epsilon = 1e-5) -> Deltas:
    """The mean, of each element, of the deltas that change it: what one model alone has learned keeps its size.

    Source: Reinforced Agent Merging (arXiv 2601.13572): unique parts are added, shared parts averaged; as in mergekit,
    |d| > epsilon is a change, and smaller ones are dropped.
    """
    changed, many = changes(deltas, epsilon)
    total = np.zeros(deltas.shape[1:], deltas.dtype)
    for delta, here in zip(deltas, changed, strict=True):
        total += np.where(here, delta, deltas.dtype.type(0))
    result: Deltas = total / np.maximum(many, 1).astype(deltas.dtype)
    return result


METHODS = (
    MergeMethod(linear, needs_base=False, kernel="sum", keeps_one=True, mean_if="normalize"),
    MergeMethod(
        passthrough,
        needs_base=False,
        kernel="sum",
        models=(1, 1),
        keeps_one=True,
        weight_word="scale",
        sums_models=True,
    ),
    MergeMethod(task_arithmetic, kernel="sum", keeps_one=True),
    MergeMethod(ties, kernel="elect", trims=True, keeps_one=True),
    MergeMethod(nearswap, models=(1, 1)),
    MergeMethod(ram, kernel="changes"),
)  # fmt: skip
