# SPDX-License-Identifier: Apache-2.0
"""Sparsifiers: one delta -> one delta. Plain numpy, whole tensors: the definition, and the oracle of the tests.

Each takes `delta`, (rows, columns) float32 or float64, and `draws`, (rows, columns) uint32 from `darekit.masks`
(ignored where nothing is random), and returns a new array of delta's shape and dtype with the dropped elements 0.
A tensor's rows are its last axis; a 1-D tensor is one row. Elements count in C order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from darekit.errors import PlanError
from darekit.masks import threshold_of
from darekit.methods.kinds import Sparsifier
from darekit.methods.parameters import Choice, Number

Delta = npt.NDArray[np.floating]
Draws = npt.NDArray[np.uint32]

DropRate = Annotated[float, Number("fraction of the elements that is dropped", 0, 1)]
Rescale = Annotated[
    str,
    Choice(
        "paper: survivors times 1/(1-p); l1: times what restores the tensor's L1 norm; none: as they are",
        ("paper", "l1", "none"),
    ),
]

Divisor = Annotated[
    float,
    Number(
        "what survivors are divided by instead of 1-p (DAREx); 0: as `rescale` says; also `rescale: {q: 0.15}`", 0, 1
    ),
]

L1_LANES = 16
L1_TINY = 1e-7


def paper_factor(drop_rate: float) -> np.float32:
    """The paper's 1/(1-p) in float32; 1 at p = 1, where nothing is left to scale."""
    return np.float32(1.0) if drop_rate == 1.0 else np.float32(1.0 / (1.0 - drop_rate))


def survivor_factor(drop_rate: float, rescale: str, q: float = 0.0) -> np.float32:
    """What survivors are multiplied by, in float32: 1/q where there is a q, 1/(1-p) for `paper`, else 1."""
    if q > 0 and drop_rate < 1.0:
        return np.float32(1.0 / q)
    return paper_factor(drop_rate) if rescale == "paper" else np.float32(1.0)


def noise_gain(drop_rate: float, q: float = 0.0) -> float:
    """Standard deviation of one surviving-or-dropped element, as a multiple of it: sqrt(p (1-p)) / q, where q = 1-p
    unless it is given: sqrt(p / (1-p)); 0 at p = 1, where all that is left is the base."""
    if drop_rate == 1.0:
        return 0.0
    return math.sqrt(drop_rate * (1.0 - drop_rate)) / (q or 1.0 - drop_rate)


def l1_norm(values: Delta) -> float:
    """Sum of |values| in float64, over 16 lanes by index, so that it does not depend on how tiles are cut."""
    flat = np.abs(values.reshape(-1)).astype(np.float64)
    padded = np.zeros(-(-flat.size // L1_LANES) * L1_LANES)
    padded[: flat.size] = flat
    lanes = np.add.reduce(padded.reshape(-1, L1_LANES), axis=0)
    return float(sum(lanes.tolist()))


def l1_factor(before: float, after: float) -> np.float32:
    """L1 norms of the delta and of what survived -> the factor that restores the norm (1 where either vanishes)."""
    return np.float32(1.0) if before < L1_TINY or after < L1_TINY else np.float32(before / after)


def dropped_to_density(count: int, drop_rate: float) -> int:
    """How many of `count` elements a magnitude sparsifier keeps at drop rate p: n - int(p n)."""
    return count - int(drop_rate * count)


def kept_count(keep: float, count: int) -> int:
    """How many of `count` elements a trim (or mergekit's density) keeps: max(1, int(keep n)), from the number as
    written; nothing of nothing."""
    return min(count, max(1, int(keep * count)))


def largest(magnitude: Delta, keep: int) -> npt.NDArray[np.bool_]:
    """(n,) magnitudes -> (n,) bool, True for exactly `keep` of the largest; of equals the lower index survives."""
    mask = np.zeros(magnitude.size, dtype=bool)
    mask[np.argsort(-magnitude, kind="stable")[:keep]] = True
    return mask


def _rescaled(delta: Delta, mask: npt.NDArray[np.bool_], drop_rate: float, rescale: str) -> Delta:
    sparse = np.where(mask, delta, delta.dtype.type(0))
    if rescale == "none":
        return sparse
    factor = paper_factor(drop_rate) if rescale == "paper" else l1_factor(l1_norm(delta), l1_norm(sparse))
    return sparse * delta.dtype.type(factor)


def dare(delta: Delta, draws: Draws, *, drop_rate: DropRate, rescale: Rescale = "paper", q: Divisor = 0.0) -> Delta:
    """Drop at random and rescale the survivors by 1/(1-p): every element keeps its expectation.

    Source: DARE (arXiv 2311.03099), section 3.2: d~ = (1 - m) * d, m ~ Bernoulli(p); d^ = d~ / (1 - p). With q
    DAREx (arXiv 2410.09344): d^ = d~ / q.
    """
    mask = draws >= np.uint64(threshold_of(drop_rate))
    if q == 0:
        return _rescaled(delta, mask, drop_rate, rescale)
    return _rescaled(delta, mask, drop_rate, "none") * delta.dtype.type(survivor_factor(drop_rate, rescale, q))


def drop_only(delta: Delta, draws: Draws, *, drop_rate: DropRate) -> Delta:
    """Drop at random and leave the survivors as they are: the paper's ablation.

    Source: DARE (arXiv 2311.03099), section 4.4: d~ = (1 - m) * d, m ~ Bernoulli(p).
    """
    return _rescaled(delta, draws >= np.uint64(threshold_of(drop_rate)), drop_rate, "none")


def magnitude(delta: Delta, draws: Draws, *, drop_rate: DropRate, rescale: Rescale = "none") -> Delta:
    """Keep exactly n - int(p n) elements of largest magnitude (MP); of equal ones the lower index survives.

    Source: DARE (arXiv 2311.03099), section 4.5: the p fraction with the smallest |d| is dropped, per tensor.
    """
    mask = largest(np.abs(delta.reshape(-1)), dropped_to_density(delta.size, drop_rate))
    return _rescaled(delta, mask.reshape(delta.shape), drop_rate, rescale)


def della(
    delta: Delta,
    draws: Draws,
    *,
    drop_rate: DropRate,
    window: Annotated[float, Number("width of the range of keep probabilities across a row", 0, 1)] = 0.14,
    rescale: Rescale = "paper",
) -> Delta:
    """Drop at random, small magnitudes of a row more often (MAGPRUNE); rescale each survivor by its own 1/keep.

    Source: DELLA (arXiv 2406.11617), section 3: keep_i = (1 - p) - w/2 + w r_i / (n - 1), r_i the ascending rank
    of |d_i| in its row (ties by index), n the row's length; keep = 1 - p where n = 1.
    """
    keep = della_keep(delta, drop_rate, window)
    mask = draws.astype(np.float64) >= np.rint((1.0 - keep) * 4294967296.0)
    if rescale != "paper":
        return _rescaled(delta, mask, drop_rate, rescale)
    with np.errstate(divide="ignore"):  # keep = 0 is never kept
        factor = (1.0 / keep).astype(np.float32)
    kept: Delta = np.multiply(delta, factor.astype(delta.dtype), where=mask, out=np.zeros_like(delta))
    return kept


def check_window(values: Mapping[str, Any], count: int, name: str) -> dict[str, Any]:
    """`della`'s parameters for one tensor, as they are.

    Raises:
        PlanError: the window reaches beyond drop rates of 0 or 1.
    """
    rate, window = float(values["drop_rate"]), float(values["window"])
    if rate - window / 2 < 0 or rate + window / 2 > 1:
        largest = 2 * min(rate, 1 - rate)
        raise PlanError(
            f"della: drop rate {rate:g} with window {window:g} asks {name} for drop rates from {rate - window / 2:g} "
            f"to {rate + window / 2:g}; they must stay within [0, 1]: use a window of at most {largest:g} "
            "(mergekit's epsilon is half of it)"
        )
    return dict(values)


def della_keep(rows: Delta, drop_rate: float, window: float) -> npt.NDArray[np.float64]:
    """(rows, columns) deltas -> (rows, columns) float64 keep probabilities."""
    count = rows.shape[1]
    if count <= 1:
        return np.full(rows.shape, 1.0 - drop_rate)
    order = np.argsort(np.abs(rows), axis=1, kind="stable")
    ranks = np.empty(rows.shape, dtype=np.float64)
    np.put_along_axis(ranks, order, np.arange(count, dtype=np.float64)[None, :], axis=1)
    keep: npt.NDArray[np.float64] = (1.0 - drop_rate) - window / 2 + window * ranks / (count - 1)
    return keep


def breadcrumbs(
    delta: Delta,
    draws: Draws,
    *,
    drop_rate: DropRate,
    gamma: Annotated[float, Number("fraction of the largest magnitudes that is dropped too", 0, 1)] = 0.01,
    rescale: Rescale = "none",
) -> Delta:
    """Drop the largest magnitudes, then the smallest: int(gamma n) of the former, until n - int(p n) are left.

    Source: Model Breadcrumbs (arXiv 2312.06795), section 3: mask both tails of |d| per layer. Of equal magnitudes
    the lower index survives, at either end.
    """
    flat = np.abs(delta.reshape(-1))
    top, keep = breadcrumb_counts(flat.size, dropped_to_density(flat.size, drop_rate), gamma)
    mask = crumbs(flat, top, keep)
    return _rescaled(delta, mask.reshape(delta.shape), drop_rate, rescale)


def count_survivors(values: Mapping[str, Any], count: int, name: str) -> dict[str, Any]:
    """Parameters of `magnitude` for one tensor of `count` elements, with `keep_count`: how many survive.

    mergekit's recipes count them from `density` as written, never through 1 - p.
    """
    return _counted(values, count, kept_count)


def count_crumbs(values: Mapping[str, Any], count: int, name: str) -> dict[str, Any]:
    """The same of `breadcrumbs`, of which mergekit may keep nothing: int(density n) of a tensor with few elements."""
    return _counted(values, count, lambda density, count: min(count, int(density * count)))


def _counted(values: Mapping[str, Any], count: int, kept: Callable[[float, int], int]) -> dict[str, Any]:
    rest = {key: value for key, value in values.items() if key != "density"}
    density = values.get("density")
    if density is None:
        return rest | {"keep_count": dropped_to_density(count, rest["drop_rate"])}
    return rest | {"keep_count": kept(density, count)}


def magnitude_range(values: Mapping[str, Any], count: int) -> tuple[int, int]:
    """`magnitude`'s parameters, tensor size -> (how many of the largest are dropped, how many are kept then).

    They may be prepared, as those of a recipe of mergekit's are.
    """
    return 0, values["keep_count"] if "keep_count" in values else dropped_to_density(count, values["drop_rate"])


def breadcrumbs_range(values: Mapping[str, Any], count: int) -> tuple[int, int]:
    """`breadcrumbs`' prepared parameters, tensor size -> (how many of the largest are dropped, how many are kept)."""
    return breadcrumb_counts(count, values["keep_count"], values["gamma"])


def breadcrumb_counts(count: int, target: int, gamma: float) -> tuple[int, int]:
    """Tensor size, wanted survivors and gamma -> (how many of the largest are dropped, how many are kept then)."""
    keep = min(target, count)
    return min(int(gamma * count), count - keep), keep


def crumbs(magnitude: Delta, top: int, keep: int) -> npt.NDArray[np.bool_]:
    """(n,) magnitudes -> (n,) bool: without the `top` largest, the `keep` largest of the rest."""
    rest = np.ones(magnitude.size, dtype=bool)
    # Reversed, so that of equals the HIGHER index is dropped first.
    rest[magnitude.size - 1 - np.argsort(-magnitude[::-1], kind="stable")[:top]] = False
    mask = np.zeros(magnitude.size, dtype=bool)
    mask[rest] = largest(magnitude[rest], keep)
    return mask


METHODS = (
    Sparsifier(dare, "element", random=True, unbiased=True, kernel="drop"),
    Sparsifier(drop_only, "element", random=True, kernel="drop"),
    Sparsifier(magnitude, "tensor", random=False, kernel="select", selects=magnitude_range, prepare=count_survivors),
    Sparsifier(della, "row", random=True, unbiased=True, kernel="rank", prepare=check_window),
    Sparsifier(breadcrumbs, "tensor", random=False, kernel="select", selects=breadcrumbs_range, prepare=count_crumbs),
)
