# SPDX-License-Identifier: Apache-2.0
"""A matrix as a product of two thin ones: truncated singular value decompositions, and how much they leave out.

Arrays only. A budget (energy, error) needs all singular values: Jacobi rotations in place, which hold less than half of
what LAPACK's decomposition would; small matrices are left to it. A rank needs the first few: a randomised range
finder with power iterations (Halko, Martinsson, Tropp, arXiv 0909.4061), whose random matrix follows from a key, so
that a tensor's factors depend on nothing but its values, on one machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from darekit import kernels
from darekit.masks import draws

Matrix = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# Columns beyond the rank, and times that the matrix and its transpose are applied once more. On bench-size matrices
# the error is 0.1 to 0.7 % above the optimum, whether the spectrum is flat or decays as i^-1.5.
OVERSAMPLING, POWERS = 8, 2
SMALL = 128  # rows or columns of matrices whose decomposition takes LAPACK no time
LAPACKS = 384  # the same of matrices whose whole decomposition is left to LAPACK

# Jacobi rotations: what an inner product of two columns may be, relative to their norms; the largest one that is
# left when products are no longer taken in float32; and sweeps, of which 4 to 6 are usual.
SETTLED, COARSE, SWEEPS = 1e-6, 0.05, 40

# Singular values below this share of the largest are float32's own noise: an exactly low-rank delta keeps its rank.
NOISE = 1e-6

STRIP = 64  # rows of inner products that are looked at at once
COLUMNS = 256  # and of a triangle that are made at once
ROWS = 256  # that are multiplied at once where a residual is measured

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
    if is_whole((matrix.shape[0], matrix.shape[1]), rank):
        return everything(matrix)[0].cut(rank)
    basis = _range_of(matrix, rank + OVERSAMPLING, key)
    if not basis.shape[1]:
        return Factors(basis, np.zeros((0, matrix.shape[1]), np.float32))
    return _balanced(basis, basis.T @ matrix, rank)


def everything(matrix: Matrix) -> tuple[Factors, Doubles]:
    """(out, in) float32 -> factors of its full rank, and its singular values, (min(out, in),) float64: 0 where they are
    float32's noise.

    Raises:
        numpy.linalg.LinAlgError: the iteration does not converge.

    >>> matrix = np.random.default_rng(0).normal(size=(500, 400)).astype(np.float32)
    >>> found, values = everything(matrix)
    >>> bool(np.abs(found.b @ found.a - matrix).max() < 1e-4), bool(np.all(np.diff(values) < 1e-3))
    (True, True)
    """
    out, inner = matrix.shape
    if out < inner:
        found, known = everything(matrix.T)
        return _signed(found.a.T, found.b.T), known
    if inner <= LAPACKS:
        u, values, vt = np.linalg.svd(matrix, full_matrices=False)
        known = values.astype(np.float64)
        roots = np.sqrt(values[: _rank(known)])
        u, vt = u[:, : roots.size], vt[: roots.size]
        u *= roots
        vt *= roots[:, None]
        return _signed(u, vt), known
    tall = 2 * out > 3 * inner
    own = _rotated(_triangle(matrix) if tall else np.array(matrix, order="F"))
    other = own.T @ (matrix.T if tall else matrix)
    known = np.zeros(inner)
    known[: own.shape[1]] = np.sqrt(np.einsum("ij,ij->i", other, other, dtype=np.float64))
    count = _rank(known)
    own, other, roots = own[:, :count], other[:count], np.sqrt(known[:count]).astype(np.float32)
    own *= roots
    other /= roots[:, None]
    return (_signed(other.T, own.T) if tall else _signed(own, other)), known


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
    if not matrix.flags.c_contiguous and matrix.T.flags.c_contiguous:
        return residual(matrix.T, Factors(factors.a.T, factors.b.T))
    rows, columns = matrix.shape
    product, total = np.empty((min(ROWS, rows), columns), np.float32), 0.0
    for begin in range(0, rows, ROWS):
        part = np.ascontiguousarray(matrix[begin : begin + ROWS])
        here = product[: part.shape[0]]
        np.matmul(factors.b[begin : begin + ROWS], factors.a, out=here)
        total += kernels.square_between(part.reshape(-1), here.reshape(-1))
    return total


def square(matrix: Matrix) -> float:
    """||matrix||^2, added up in float64."""
    return kernels.square(np.ascontiguousarray(matrix).reshape(-1))


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
    """Bytes that one matrix takes: itself, and what its decomposition needs; `rank` None: all singular values.

    >>> [round(memory(shape, None) / (4 * shape[0] * shape[1]), 1) for shape in ((1536, 1536), (38400, 1536))]
    [3.4, 2.0]
    """
    out, inner = shape
    whole, small = 4 * out * inner, min(out, inner)
    if rank is not None and not is_whole(shape, rank):
        columns = rank + OVERSAMPLING
        return whole + columns * (4 * 3 + 8) * (out + inner)
    if small <= LAPACKS:
        return 4 * whole + 4 * 5 * small * small
    large, pair = max(shape), 2 * -(-small // _blocks(small))
    tall = 2 * large > 3 * small
    height = small if tall else large
    rotating = 4 * height * (small + pair) + max(8 * height * pair + 8 * pair * pair, 5 * 8 * pair * pair)
    return whole + max((12 * small + 24 * COLUMNS) * small if tall else 0, rotating, 4 * small * (height + large))


def _range_of(matrix: Matrix, columns: int, key: int) -> Matrix:
    """(out, in) -> (out, <= columns), orthonormal: about the span of the largest left singular vectors."""
    inner = matrix.shape[1]
    # A sign is as good a sample as a normal deviate here, and the mask's generator gives the same ones everywhere.
    signs = (draws(key, 0, 0, inner * columns) >> np.uint32(31)).astype(np.float32)
    found = _orthonormal(matrix @ (2 * signs - 1).reshape(inner, columns))
    for _ in range(POWERS):
        found = _orthonormal(matrix @ _orthonormal(matrix.T @ found))
    return _orthonormal(found)  # the second time makes it exact to float32


def _triangle(matrix: Matrix) -> Matrix:
    """(out, in) -> (in, in) float32 with the same right singular vectors, on its left: Cholesky's factor of the inner
    products of its columns, in float64, block by block in one array."""
    rows, size = matrix.shape
    products = np.zeros((size, size))
    blocks = [slice(begin, min(begin + COLUMNS, size)) for begin in range(0, size, COLUMNS)]
    for begin in range(0, rows, ROWS):
        wide = matrix[begin : begin + ROWS].astype(np.float64)
        for block in blocks:
            products[block, : block.stop] += wide[:, block].T @ wide[:, : block.stop]
    # A shift of all squared values alike turns no vector, and keeps the factor from failing where values are 0.
    shift = 4 * size * np.finfo(np.float64).eps * float(products.diagonal().max())
    products[np.arange(size), np.arange(size)] += shift or 1.0
    for block in blocks:
        root = np.linalg.cholesky(products[block, block])
        products[block, block] = root
        below = products[block.stop :, block]
        below[...] = below @ np.linalg.inv(root).T
        for later in blocks:
            if later.start >= block.stop:
                products[later.start :, later] -= (
                    products[later.start :, block] @ products[later, block].T
                )  # fmt: skip
        products[block, block.stop :] = 0
    return np.asfortranarray(products, np.float32)


def _rotated(work: Matrix) -> Matrix:
    """(n, m) float32, which is overwritten, n >= m -> (n, r), orthonormal: its left singular vectors, those of large
    values first, but for values that are float32's noise.

    One-sided Jacobi rotations, of blocks of columns: these come to be u_i s_i. LAPACK's divide and conquer holds twice
    as many matrices.
    """
    size = work.shape[1]
    many = _blocks(size)
    edges = [size * i // many for i in range(many + 1)]
    pairs = [(i, j) for i in range(many) for j in range(i + 1, many)]
    top, exact = float(np.sqrt(np.einsum("ij,ij->j", work, work, dtype=np.float64).max())), False
    work /= np.float32(top or 1)  # squares stay within float32
    top = 1.0
    for _ in range(SWEEPS):
        worst = 0.0
        for i, j in pairs:
            left, right = slice(edges[i], edges[i + 1]), slice(edges[j], edges[j + 1])
            pair = np.concatenate([work[:, left], work[:, right]], axis=1)
            wide = pair.astype(np.float64) if exact else pair
            products = wide.T @ wide
            del wide
            off, largest = _off(products, top)
            worst, top = max(worst, off), max(top, largest)
            if off > 1 or np.any(np.diff(products.diagonal()) > SETTLED * top * top):
                _, vectors = np.linalg.eigh(products)
                pair = pair @ vectors[:, ::-1].astype(np.float32)
                work[:, left], work[:, right] = np.split(pair, [edges[i + 1] - edges[i]], axis=1)
                del vectors
        if worst <= 1:
            break
        exact = exact or worst * SETTLED < COARSE  # the last sweeps need products that are exact
    else:
        raise np.linalg.LinAlgError(f"Jacobi rotations did not settle in {SWEEPS} sweeps")
    del pair, products
    return _settled(work, edges)


def _blocks(size: int) -> int:
    """Of columns that are rotated against each other."""
    return max(6, -(-size // 512))


def _off(products: npt.NDArray[np.floating[Any]], top: float) -> tuple[float, float]:
    """Inner products of columns, whose largest norm is `top` -> how far the worst of them is from 0, where 1 is near
    enough, and the largest norm here.

    A column has errors of float32 relative to the largest column, and small ones are not asked to be more precise.
    """
    norms, worst = np.sqrt(products.diagonal().astype(np.float64)), 0.0
    for begin in range(0, norms.size, STRIP):
        own = norms[begin : begin + STRIP, None]
        least, most = np.minimum(own, norms), np.maximum(own, norms)
        allowed = SETTLED * most * np.maximum(least, top / 2)
        shares = np.abs(products[begin : begin + STRIP]) / np.where(allowed > 0, allowed, 1)
        shares[np.arange(len(own)), np.arange(begin, begin + len(own))] = 0
        worst = max(worst, float(shares.max()))
    return worst, float(norms.max())


def _settled(work: Matrix, edges: Sequence[int]) -> Matrix:
    """Nearly orthogonal columns, the largest first -> those above the noise, orthonormal, in the same memory.

    Each block is freed of those before it: small columns have errors that are large beside them, large ones have not.
    """
    lengths = np.sqrt(np.einsum("ij,ij->j", work, work, dtype=np.float64))
    count = int(np.count_nonzero(lengths > lengths.max(initial=0) * NOISE))
    order = np.argsort(-lengths, kind="stable")
    if np.any(order != np.arange(order.size)):
        for begin in range(0, work.shape[0], STRIP):
            work[begin : begin + STRIP] = work[begin : begin + STRIP, order]
    work = work[:, :count]
    work /= lengths[order[:count]].astype(np.float32)
    for begin, end in pairwise(edge for edge in dict.fromkeys((*(e for e in edges if e < count), count))):
        part, before = work[:, begin:end], work[:, :begin]
        for _ in range(2):
            if begin:
                part -= before @ (before.T @ part)
            wide = part.astype(np.float64)
            root = np.linalg.cholesky(wide.T @ wide)
            del wide
            part[...] = part @ np.linalg.inv(root).T.astype(np.float32)
    return work


def _orthonormal(columns: Matrix) -> Matrix:
    """(n, l) -> (n, <= l) with the same span, through the l x l matrix of inner products.

    LAPACK's QR of so few columns takes as long as the products with the whole matrix; this takes a sixth of that. Its
    columns are orthogonal to about 1e-5 after one time, and to float32's precision after a second.
    """
    if not columns.shape[1]:  # of a matrix of zeros
        return columns
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
    columns = b.T
    high, low, each = columns.argmax(axis=1), columns.argmin(axis=1), np.arange(len(columns))
    rise, fall = columns[each, high], -columns[each, low]
    signs = np.where((fall > rise) | ((fall == rise) & (low < high)), np.float32(-1), np.float32(1))
    b *= signs
    a *= signs[:, None]
    return Factors(b, a)


def _rank(values: Doubles) -> int:
    return int(np.count_nonzero(values > values[0] * NOISE)) if values.size and values[0] else 0
