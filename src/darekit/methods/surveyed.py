# SPDX-License-Identifier: Apache-2.0
"""Merge methods that must see all of a tensor before they merge its first element. Plain numpy: definition and oracle.

Each function is the definition, on a whole tensor: `deltas`, (K, ...) float32 or float64, where it takes one `base`,
(rows, columns), and returns (...) of deltas' dtype, the merged delta before `lambda`. Beside it stand the parts that it
is made of, as a `Survey`, with which the engine does the same tile by tile.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt

from darekit.methods.kinds import MergeMethod, Survey
from darekit.methods.merging import Epsilon, changes
from darekit.methods.parameters import Number

Floats = npt.NDArray[np.floating]
Doubles = npt.NDArray[np.float64]

DIVISOR_TINY = 1e-6  # smallest sum of agreeing weights that `sce` divides by, as mergekit has it
SOFTMAX_TINY = 1e-8  # added to every probability, as mergekit has it
QUARTILES = (0.25, 0.5, 0.75)
EPSILON_TINY = 1e-30  # instead of no epsilon at all, where a model has no unique element


def index_of(quantile: float, count: int) -> int:
    """Where a quantile stands among `count` values in ascending order, from 0: the lower neighbour."""
    return int(quantile * (count - 1))


# --- sce


def variance(deltas: Floats) -> Floats:
    """(K, ...) -> (...) float32: the variance over the models, found in float64, in which equal deltas have none."""
    mean = np.zeros(deltas.shape[1:])
    for delta in deltas:
        mean += delta
    mean /= len(deltas)
    found = np.zeros(deltas.shape[1:])
    for delta in deltas:
        away = delta - mean
        found += away * away
    return (found / len(deltas)).astype(np.float32)


def _kept_share(nonzero: int, *, select_topk: float) -> int | None:
    return int(nonzero * select_topk) if select_topk < 1 else None


def themselves(deltas: Floats) -> Floats:
    """The deltas, (K, ...), whose energies are added up."""
    return deltas


def agreeing_mean(deltas: Floats, weights: Doubles) -> Floats:
    """(K, ...), (K,) -> (...): mean, by the weights, of the deltas that have the sign of the plain sum of all."""
    number = deltas.dtype.type
    elected = np.zeros(deltas.shape[1:], deltas.dtype)
    for delta in deltas:
        elected += delta
    positive = elected >= 0
    merged, total = np.zeros_like(elected), np.zeros_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = np.where(positive, delta > 0, delta < 0)
        merged += np.where(agrees, number(weight) * delta, number(0))
        total += np.where(agrees, number(weight), number(0))
    return merged / np.maximum(total, number(DIVISOR_TINY))


def _by_energy(sums: Doubles, count: int, *, floor: float) -> Doubles:
    means = sums / max(1, count)
    total = float(means.sum())
    return np.full(len(means), 1 / len(means)) if total < floor or total == 0 else means / total


def _count_alike(total: float, count: int, *, floor: float) -> bool:
    return total < floor * max(1, count)


def sce(
    deltas: Floats,
    *,
    select_topk: Annotated[
        float, Number("fraction, of the elements whose deltas differ at all, that is merged", 0, 1, per_model=False)
    ] = 1.0,
    floor: Annotated[
        float,
        Number(
            "models count alike where their deltas' mean squares sum to less; 0: never, as in the paper",
            0,
            per_model=False,
        ),
    ] = 1e-6,
) -> Floats:
    """Merge only where the models differ most: the elements of largest variance; each model counts by the mean square
    of its delta there; of each element, those deltas count that have the sign of the sum of all.

    Source: SCE of FuseChat (arXiv 2408.07990): select, calculate, erase. As in mergekit, models count
    alike where their mean squares sum to less than 1e-6, as those of short fine-tuning do, and no sum of agreeing
    weights that is divided by is smaller than 1e-6. Of equal variances the lower index survives.
    """  # fmt: skip
    scores = variance(deltas).reshape(-1)
    keep = _kept_share(int(np.count_nonzero(scores)), select_topk=select_topk)
    if keep is not None:
        mask = np.zeros(scores.size, bool)
        mask[np.argsort(-scores, kind="stable")[:keep]] = True
        deltas = deltas * mask.reshape(deltas.shape[1:])
    sums = np.square(deltas.astype(np.float64)).reshape(len(deltas), -1).sum(axis=1)
    return agreeing_mean(deltas, _by_energy(sums, scores.size, floor=floor))


SCE = Survey(
    scores=variance, keeps=_kept_share, squares=themselves, weights=_by_energy, alike=_count_alike, merge=agreeing_mean
)

# --- arcee_fusion


def divergence(base: Floats, deltas: Floats) -> Doubles:
    """Whole rows of the base, (rows, columns), and of one delta, (1, rows, columns) -> (rows,) float64: KL(p || q) of
    the softmax p of the model's row and q of the base's."""
    before = base.astype(np.float64)
    q = _softmax(before)
    p = _softmax(before + deltas[0])
    found: Doubles = np.maximum((p * np.log(p / q)).sum(axis=-1), 0.0)
    return found


def _softmax(rows: Doubles) -> Doubles:
    found: Doubles = np.exp(rows - rows.max(axis=-1, keepdims=True, initial=-np.inf))
    found /= found.sum(axis=-1, keepdims=True)
    found += SOFTMAX_TINY
    return found


def importance(deltas: Floats, lines: Doubles) -> Floats:
    """One delta, (1, rows, columns), and its rows' divergences, (rows,) -> (rows, columns) float32: |d| KL."""
    found: Floats = np.abs(deltas[0]).astype(np.float32) * lines.astype(np.float32)[:, None]
    return found


def outlying(first: float, median: float, third: float) -> float:
    """Quartiles -> the threshold of an outlier: the median and one and a half times the range between the others."""
    return float(np.float32(median) + np.float32(1.5) * (np.float32(third) - np.float32(first)))


def _only(deltas: Floats) -> Floats:
    (delta,) = deltas
    return np.asarray(delta)


def arcee_fusion(deltas: Floats, base: Floats) -> Floats:
    """Take over only the outliers among the changes of one model: elements whose change, times how much the softmax of
    their row diverges from the base's, is at least the median and 1.5 times the range between the quartiles.

    Source: Arcee Fusion of mergekit (arXiv 2403.13257): |d| KL(softmax(row) || softmax(base's row)), with 1e-8 added to
    every probability. The quartiles are exact here, the lower neighbours; mergekit draws them from a sample of 1e6
    elements where a tensor has more.
    """  # fmt: skip
    scores = importance(deltas, divergence(base, deltas))
    if not scores.size:
        return np.asarray(deltas[0])
    ordered = np.sort(scores, axis=None)
    low = outlying(*(float(ordered[index_of(q, ordered.size)]) for q in QUARTILES))
    return np.where(scores >= np.float32(low), deltas[0], deltas.dtype.type(0))


ARCEE_FUSION = Survey(lines=divergence, scores=importance, quantiles=QUARTILES, threshold=outlying, merge=_only)

# --- ramplus_tl


def shared_and_unique(deltas: Floats, *, epsilon: float) -> Floats:
    """(K, ...) -> (2 K, ...) float32: 1 where a delta changes what others change too, then where it alone does."""
    changed, many = changes(deltas, epsilon)
    return np.concatenate([changed & (many > 1), changed & (many == 1)]).astype(np.float32)


def _factors(sums: Doubles, count: int, *, r: float, alpha: float, epsilon: float) -> Doubles:
    shared, unique = sums.reshape(2, -1)
    factors: Doubles = 1 + r * np.minimum(shared / np.maximum(unique, max(epsilon, EPSILON_TINY)), alpha)
    return factors


def amplified(deltas: Floats, factors: Doubles, *, epsilon: float) -> Floats:
    """(K, ...), (K,) -> (...): the mean of the deltas that change an element; where one does, it times its factor."""
    changed, many = changes(deltas, epsilon)
    number = deltas.dtype.type
    total, alone = np.zeros(deltas.shape[1:], deltas.dtype), np.zeros(deltas.shape[1:], deltas.dtype)
    for delta, here, factor in zip(deltas, changed, factors, strict=True):
        part = np.where(here, delta, number(0))
        total += part
        alone += number(factor) * part
    return np.where(many == 1, alone, total / np.maximum(many, 1).astype(deltas.dtype))


def ramplus_tl(
    deltas: Floats,
    *,
    r: Annotated[float, Number("how much is added for each unit of that ratio", per_model=False)] = 0.1,
    alpha: Annotated[float, Number("largest ratio of shared to unique elements that counts", 0, per_model=False)] = 0.2,
    epsilon: Epsilon = 1e-5,
) -> Floats:
    """`ram` with each model's own part amplified: the more, the more changes it shares with others in this tensor.

    Source: RAM+ (arXiv 2601.13572), per tensor as in mergekit: unique parts times
    1 + r min(shared_k / unique_k, alpha), where these are the numbers of model k's shared and unique elements.
    """
    squares = shared_and_unique(deltas, epsilon=epsilon)
    sums = squares.astype(np.float64).reshape(len(squares), -1).sum(axis=1)
    return amplified(deltas, _factors(sums, deltas[0].size, r=r, alpha=alpha, epsilon=epsilon), epsilon=epsilon)


RAMPLUS_TL = Survey(squares=shared_and_unique, weights=_factors, merge=amplified)


METHODS = (
    MergeMethod(sce, "tensor", survey=SCE),
    MergeMethod(arcee_fusion, "tensor", models=(1, 1), survey=ARCEE_FUSION),
    MergeMethod(ramplus_tl, "tensor", survey=RAMPLUS_TL),
)
