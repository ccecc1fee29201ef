# SPDX-License-Identifier: Apache-2.0
"""A matrix as a product of two thin ones: truncated singular value decompositions, and how much they leave out.

Arrays only. A budget (energy, error) needs all singular values: LAPACK. A rank needs the first few: a randomised range
finder with power iterations (Halko, Martinsson, Tropp, arXiv 0909.4061), whose random matrix follows from a key, so
that a tensor's factors depend on nothing but its values, on one machine.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from darekit.masks import draws

Matrix = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# Columns beyond the rank, and times that the matrix and its transpose are applied once more. On bench-size matrices
# the error is 0.1 to 0.7 % above the optimum, whether the spectrum is flat or decays as i^-1.5.
OVERSAMPLING, POWERS = 8, 2
SMALL = 128  # rows or columns of matrices whose decomposition takes LAPACK no time

# Singular values below this share of the largest are float32's own noise: an exactly low-rank delta keeps its rank.
NOISE = 1e-6

ROWS = 256  # that are multiplied at once where a residual is measured
SUMMED = 8192  # elements whose squares are added up in float32

SEED_TAG = b"darekit-extract-1\0"


@dataclass(frozen=True)
class Factors:
    """`b @ a`, the largest part of a matrix. `b`: (out, r) float32; `a`: (r, in) float32; r may be 0."""

    b: Matrix
    a: Matrix

    @property
    def rank(self) -> int:
        """Columns of `b`."""
        return int(self.b.shape[1])

    def cut(self, rank: int) -> Factors:
        """The first `rank` columns and rows, which are the largest part of that rank."""
        return Factors(self.b[:, :rank], self.a[:rank])


def key_of(name: str) -> int:
    """A tensor's name -> the seed of its random matrix."""
    return int.from_bytes(hashlib.blake2b(SEED_TAG + name.encode(), digest_size=8).digest(), "little")


def is_whole(shape: tuple[int, int], rank: int) -> bool:
    """Whether all singular values are computed for the first `rank` of them: where these are many, and where there are
    so few that nobody notices.

    >>> is_whole((4096, 1536), 32), is_whole((4096, 1536), 800), is_whole((4096, 64), 4)
    (False, True, True)
    """
    return 2 * (rank + OVERSAMPLING) >= min(shape) or min(shape) <= SMALL


def of_rank(matrix: Matrix, rank: int, key: int) -> Factors:
    """(out, in) float32 -> its factors of this rank, or of the matrix's own where that is less.

    Args:
        matrix: finite.
        rank: at least 1.
        key: of the random matrix, see `key_of`.

    >>> rng = np.random.default_rng(0)
    >>> low = (rng.normal(size=(300, 5)) @ rng.normal(size=(5, 200))).astype(np.float32)
    >>> found = of_rank(low, 8, key_of("w"))
    >>> found.rank, bool(np.abs(found.b @ found.a - low).max() < 1e-4)
    (5, True)
    """
    if not matrix.any():
        return _nothing(matrix)
    if is_whole((matrix.shape[0], matrix.shape[1]), rank):
        return everything(matrix)[0].cut(rank)
    basis = _range_of(matrix, rank + OVERSAMPLING, key)
    return _balanced(basis, basis.T @ matrix, rank)


def everything(matrix: Matrix) -> tuple[Factors, Doubles]:
    """(out, in) float32 -> factors of its full rank, and its singular values, (min(out, in),) float64, by LAPACK.

    Raises:
        numpy.linalg.LinAlgError: the iteration does not converge.
    """
    out, inner = matrix.shape
    if 2 * out < inner:
        found, known = everything(np.ascontiguousarray(matrix.T))
        return _signed(found.a.T.copy(), found.b.T.copy()), known
    if out > 2 * inner:  # of the triangle alone: half the memory of LAPACK's own way
        basis, triangle = np.linalg.qr(matrix)
        u, values, vt = np.linalg.svd(triangle)
        u = basis @ u
        del basis
    else:
        u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    known = values.astype(np.float64)
    roots = np.sqrt(values[: _rank(known)])
    u, vt = u[:, : roots.size], vt[: roots.size]
    u *= roots
    vt *= roots[:, None]
    return _signed(u, vt), known


def rank_of_energy(values: Doubles, energy: float) -> int:
    """Singular values, largest first -> the smallest rank that keeps this share of their squares.

    >>> rank_of_energy(np.array([3.0, 1.0, 1.0, 0.0]), 0.9), rank_of_energy(np.array([3.0, 1.0, 1.0, 0.0]), 1)
    (2, 3)
    """
    squares = np.cumsum(np.square(values))
    if not squares.size or not squares[-1]:
        return 0
    return min(int(np.searchsorted(squares, energy * squares[-1])) + 1, _rank(values))


def residual(matrix: Matrix, factors: Factors) -> float:
    """||matrix - b a||^2, in float64; a block of rows at a time."""
    total = 0.0
    for begin in range(0, matrix.shape[0], ROWS):
        left = matrix[begin : begin + ROWS] - factors.b[begin : begin + ROWS] @ factors.a
        total += square(left)
    return total


def square(matrix: Matrix) -> float:
    """||matrix||^2. Sums of a few thousand are float32's (relative error about 1e-6), the rest is float64."""
    flat = matrix.reshape(-1)
    parts = (flat[begin : begin + SUMMED] for begin in range(0, flat.size, SUMMED))
    return math.fsum(float(np.dot(part, part)) for part in parts)


def flops(shape: tuple[int, int], rank: int) -> float:
    """What `of_rank` multiplies and adds, and `residual` with it: products with the matrix alone."""
    out, inner = shape
    if is_whole(shape, rank):
        return svd_flops(shape)
    columns = rank + OVERSAMPLING
    return 2.0 * out * inner * (columns * (2 + 2 * POWERS) + rank)


def svd_flops(shape: tuple[int, int]) -> float:
    """Of `everything`: LAPACK's divide and conquer with vectors, roughly (Golub and Van Loan, figure 8.6.1)."""
    large, small = max(shape), min(shape)
    return 6.0 * large * small * small + 20.0 * small**3


def memory(shape: tuple[int, int], rank: int | None) -> int:
    """Bytes that one matrix takes: itself, and what its decomposition needs; `rank` None: all singular values."""
    out, inner = shape
    whole, small = 4 * out * inner, min(out, inner)
    if rank is None or is_whole(shape, rank):
        return 6 * whole + 4 * 12 * small * small
    columns = rank + OVERSAMPLING
    return whole + columns * (4 * 3 + 8) * (out + inner)


def _range_of(matrix: Matrix, columns: int, key: int) -> Matrix:
    """(out, in) -> (out, <= columns), orthonormal: about the span of the largest left singular vectors."""
    inner = matrix.shape[1]
    # A sign is as good a sample as a normal deviate here, and the mask's generator gives the same ones everywhere.
    signs = (draws(key, 0, 0, inner * columns) >> np.uint32(31)).astype(np.float32)
    found = _orthonormal(matrix @ (2 * signs - 1).reshape(inner, columns))
    for _ in range(POWERS):
        found = _orthonormal(matrix @ _orthonormal(matrix.T @ found))
    return _orthonormal(found)  # the second time makes it exact to float32


def _orthonormal(columns: Matrix) -> Matrix:
    """(n, l) -> (n, <= l) with the same span, through the l x l matrix of inner products.

    LAPACK's QR of so few columns takes as long as the products with the whole matrix; this takes a sixth of that. Its
    columns are orthogonal to about 1e-5 after one time, and to float32's precision after a second.
    """
    wide = columns.astype(np.float64)
    products = wide.T @ wide
    with suppress(np.linalg.LinAlgError):  # of full rank, as nearly always: half the time of eigenvalues
        root = np.linalg.cholesky(products)
        if root.diagonal().min() > NOISE * root.diagonal().max():
            turned: Matrix = columns @ np.linalg.inv(root).T.astype(np.float32)
            return turned
    squares, vectors = np.linalg.eigh(products)
    kept = squares > squares[-1] * NOISE**2
    turned = columns @ (vectors[:, kept] / np.sqrt(squares[kept])).astype(np.float32)
    return turned


def _balanced(basis: Matrix, rest: Matrix, rank: int) -> Factors:
    """(out, l) orthonormal, (l, in) -> factors of their product's largest part."""
    wide = rest.astype(np.float64)
    _, vectors = np.linalg.eigh(wide @ wide.T)
    turn = vectors[:, ::-1][:, :rank].astype(np.float32)  # largest first
    a = turn.T @ rest
    # Lengths of what is there, rather than roots of eigenvalues: whatever the small ones are, the product is right.
    lengths = np.sqrt(np.einsum("ij,ij->i", a, a, dtype=np.float64))
    kept = lengths > lengths[0] * NOISE
    roots = np.sqrt(lengths[kept]).astype(np.float32)
    b = (basis @ turn[:, kept]) * roots
    return _signed(b, a[kept] / roots[:, None])


def _signed(b: Matrix, a: Matrix) -> Factors:
    """Each column's largest element is positive: of two equal ones the first. A singular vector's sign is free."""
    if not b.size:
        return Factors(b, a)
    at = np.argmax(np.abs(b), axis=0)
    signs = np.where(b[at, np.arange(b.shape[1])] < 0, np.float32(-1), np.float32(1))
    b *= signs
    a *= signs[:, None]
    return Factors(b, a)


def _rank(values: Doubles) -> int:
    return int(np.count_nonzero(values > values[0] * NOISE)) if values.size and values[0] else 0


def _nothing(matrix: Matrix) -> Factors:
    return Factors(np.zeros((matrix.shape[0], 0), np.float32), np.zeros((0, matrix.shape[1]), np.float32))
