# SPDX-License-Identifier: Apache-2.0
"""Merge methods that know more of each model than its weights: statistics from one pass over data. Plain numpy.

Besides `deltas` and `weights` as in `darekit.methods.merging`, each takes `statistics`, one array per model, and
`sizes`, (K,) float64: what `normalize` divides by. Both methods are weighted means whose weights add up to one (for
each element, or as matrices), so base + mean of deltas is the mean of the models, and any sparsifier may go before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from darekit.errors import DataError
from darekit.methods.kinds import MergeMethod
from darekit.methods.merging import total_weight, weighted_sum
from darekit.methods.parameters import Number, Switch

Deltas = npt.NDArray[np.floating]
Weights = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]

ROWS_ELEMENTS = 1 << 22  # elements of the rows that are solved for at once
PART_ELEMENTS = 1 << 21  # elements of a Gram that are in memory at once
BLOCK = 128  # columns of a triangular factor that are eliminated at once
RESIDUAL_LIMIT = 1e-5  # relative; a well-posed solve in float64 leaves less than 1e-10


def fisher(
    deltas: Deltas,
    weights: Weights,
    statistics: Deltas,
    sizes: Weights,
    *,
    minimal: Annotated[
        float, Number("added to every element of every Fisher: where all are small, the average", 0, per_model=False)
    ] = 1e-6,
    normalize: Annotated[
        bool, Switch("divide each model's Fisher by its norm over the whole model, so that models count alike")
    ] = False,
) -> Deltas:
    """Mean of the models, each element weighted by its Fisher: by how sharply it decides the model's predictions. The
    diagonal Fisher F_k is the mean over examples of the squared gradient of the example's log-likelihood.

    Source: Fisher merging (arXiv 2111.09832), section 3: theta = sum w_k F_k theta_k / sum w_k F_k, with
    w_k (F_k + minimal) / (||F_k|| + minimal) for w_k F_k as in DARE's experiments (arXiv 2311.03099).
    """
    # statistics: (K, n) Fishers, sizes: (K,) their norms. In float64: Fishers span many orders of magnitude.
    total = np.zeros(deltas.shape[1])
    merged = np.zeros(deltas.shape[1])
    for delta, weight, values, size in zip(deltas, weights, statistics, sizes, strict=True):
        share = (values.astype(np.float64) + minimal) * (weight / (size + minimal) if normalize else weight)
        total += share
        merged += share * delta
    nothing = total == 0
    with np.errstate(invalid="ignore", divide="ignore"):
        merged /= total
    result = merged.astype(deltas.dtype)
    if nothing.any():
        result[nothing] = weighted_sum(deltas[:, nothing], weights, total_weight(weights))
    return result


def regmean(
    deltas: Deltas,
    weights: Weights,
    statistics: Sequence[Any],
    sizes: Weights,
    *,
    off_diagonal: Annotated[
        float, Number("what the entries of each Gram beside its diagonal are multiplied by", 0, 1, per_model=False)
    ] = 0.9,
    ridge: Annotated[
        float,
        Number(
            "added to the diagonal of each Gram, as a part of its mean; decides where no data is", 0, 1, per_model=False
        ),
    ] = 1e-6,
    normalize: Annotated[bool, Switch("divide each Gram by its tokens, so that models count alike")] = True,
) -> Deltas:
    """Least squares per linear layer: the weights whose outputs are nearest to those of all models on their own
    inputs, from the Gram matrices G_k of the inputs. What is no linear layer, or has no Gram, is averaged.

    Source: RegMean (arXiv 2212.09849), section 3: W = (sum w_k W_k G_k) (sum w_k G_k)^-1 for W stored
    [out, in], G_k = X_k^T X_k over the tokens, its off-diagonal entries first reduced.
    """  # fmt: skip
    # deltas: (K, out, in); statistics: K Grams (in, in), of which slices of rows are taken; sizes: (K,) tokens.
    shares = shares_of(weights, sizes, normalize=normalize)
    return NormalEquations.of(statistics, shares, weights, off_diagonal=off_diagonal, ridge=ridge).solve(deltas)


def shares_of(weights: Weights, sizes: Weights, *, normalize: bool) -> Weights:
    """(K,) weights and tokens -> (K,) what each Gram is multiplied by."""
    return weights / np.maximum(sizes, 1) if normalize else weights


def rows_at_once(columns: int) -> int:
    """Rows that `regmean` solves for at once: they depend on the length of a row alone, and so do the last bits."""
    return max(1, ROWS_ELEMENTS // max(1, columns))


def gram_memory(columns: int) -> int:
    """Bytes that `regmean` needs for a layer: the sum of its Grams, its factor, one more while it is made, and the
    parts of a Gram that are read."""
    return 8 * (3 * columns * columns + 2 * min(PART_ELEMENTS, columns * columns))


def _parts(columns: int) -> list[slice]:
    step = max(1, PART_ELEMENTS // max(1, columns))
    return [slice(start, min(start + step, columns)) for start in range(0, columns, step)]


@dataclass(frozen=True)
class NormalEquations:
    """X S = N for one linear layer: S = sum c_k H_k, N = sum c_k W_k H_k, with H_k = a G_k + (1 - a) diag(G_k) +
    ridge mean(diag(G_k)) I. Rows of X are independent.

    Attributes:
        grams: K Grams; only slices of rows are read, so that they may lie on a disk.
        shares: (K,) c_k.
        weights: (K,) for the plain average, where no Gram says anything.
        off_diagonal: a.
        extra: (K, in) what is added to the diagonal of a G_k.
        matrix: (in, in) S.
        factor: (in, in) its lower Cholesky factor; None where S is 0.
    """

    grams: Sequence[Any]
    shares: Weights
    weights: Weights
    off_diagonal: float
    extra: Matrix
    matrix: Matrix
    factor: Matrix | None

    @staticmethod
    def of(
        grams: Sequence[Any], shares: Weights, weights: Weights, *, off_diagonal: float, ridge: float
    ) -> NormalEquations:
        """Read every Gram once and factorise.

        Raises:
            DataError: a Gram is not finite, or their sum is singular.
        """
        columns = int(grams[0].shape[0])
        matrix = np.zeros((columns, columns))
        extra = np.zeros((len(grams), columns))
        for k, (gram, share) in enumerate(zip(grams, shares, strict=True)):
            diagonal = np.empty(columns)
            for part in _parts(columns):
                rows = np.asarray(gram[part], np.float64)
                if not np.isfinite(rows).all():
                    raise DataError(f"the Gram of model {k} has NaN or Inf in rows {part.start} to {part.stop - 1}")
                matrix[part] += share * off_diagonal * rows
                diagonal[part] = rows[np.arange(part.stop - part.start), np.arange(part.start, part.stop)]
            if diagonal.min(initial=0) < 0:
                raise DataError(f"the Gram of model {k} has a negative diagonal: it is no X^T X")
            extra[k] = (1 - off_diagonal) * diagonal + ridge * diagonal.mean()
        matrix[np.diag_indices(columns)] += shares @ extra
        factor: Matrix | None = None
        if matrix.diagonal().any():
            try:
                factor = np.asarray(np.linalg.cholesky(matrix), np.float64)
            except np.linalg.LinAlgError:
                raise DataError(
                    "the sum of the Grams is singular: fewer tokens than inputs, or inputs that depend on each other. "
                    f"Use a larger ridge (now {ridge:g}), off_diagonal below 1 (now {off_diagonal:g}), or more data"
                ) from None
        return NormalEquations(grams, shares, weights, off_diagonal, extra, matrix, factor)

    def solve(self, deltas: Deltas) -> Deltas:
        """(K, rows, in) -> (rows, in), solved in float64, `rows_at_once` by `rows_at_once`.

        Raises:
            DataError: a residual says that the result means nothing.
        """
        merged = np.empty(deltas.shape[1:], deltas.dtype)
        rows = rows_at_once(deltas.shape[2])
        for start in range(0, deltas.shape[1], rows):
            merged[start : start + rows] = self._solve(deltas[:, start : start + rows])
        return merged

    def _solve(self, deltas: Deltas) -> Deltas:
        if self.factor is None:  # no input ever differed from 0: any weights do, the average among them
            flat = weighted_sum(deltas.reshape(len(deltas), -1), self.weights, total_weight(self.weights))
            return flat.reshape(deltas.shape[1:])
        wanted = np.zeros(deltas.shape[1:])
        for delta, gram, share, extra in zip(deltas, self.grams, self.shares, self.extra, strict=True):
            values = delta.astype(np.float64)
            wanted += values * (share * extra)
            if self.off_diagonal:
                for part in _parts(values.shape[1]):
                    rows = np.asarray(gram[part], np.float64)
                    wanted += (share * self.off_diagonal) * (values[:, part] @ rows)
        found = _times_inverse(wanted, self.factor)
        size = float(np.linalg.norm(wanted))
        residual = float(np.linalg.norm(found @ self.matrix - wanted)) / size if size else 0.0
        if not residual <= RESIDUAL_LIMIT:
            raise DataError(
                f"the solve leaves a relative residual of {residual:.1e}, more than {RESIDUAL_LIMIT:g}: the Grams are "
                "too nearly singular (or not symmetric). Use a larger ridge, off_diagonal below 1, or more data"
            )
        return found.astype(deltas.dtype)


def _times_inverse(rows: Matrix, factor: Matrix) -> Matrix:
    """(r, n), (n, n) lower triangular L -> (r, n): rows (L L^T)^-1, by blocks of columns."""
    found = rows.copy()
    starts = range(0, factor.shape[0], BLOCK)
    for begin in starts:  # Y L^T = rows
        here = slice(begin, begin + BLOCK)
        if begin:
            found[:, here] -= found[:, :begin] @ factor[here, :begin].T
        found[:, here] = np.linalg.solve(factor[here, here], found[:, here].T).T
    for begin in reversed(starts):  # X L = Y
        here, behind = slice(begin, begin + BLOCK), slice(begin + BLOCK, None)
        if begin + BLOCK < factor.shape[0]:
            found[:, here] -= found[:, behind] @ factor[behind, here]
        found[:, here] = np.linalg.solve(factor[here, here].T, found[:, here].T).T
    return found


METHODS = (
    MergeMethod(fisher, needs_base=False, keeps_one=True, statistics="fisher"),
    MergeMethod(
        regmean, "row", needs_base=False, keeps_one=True, statistics="gram", rows=rows_at_once, matrix=gram_memory
    ),
)
