# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of adapters on whole arrays, float32: from stored factors to left x right, and what is made of it.

A tensor is seen as E matrices of R rows and C columns: (1, out, in) for a linear layer, (1, n, 1) for a bias, (1, out,
in x kernel) for a convolution, (E, R, C) for experts in one tensor. Its delta is left[e] x right[e] with left (E, R, r)
and right (E, r, C); whatever a file calls A and B, and however it has them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Pair = tuple[Array, Array]


def low_rank(left: Array, right: Array) -> Array:
    """(R, r) x (r, C) -> (R, C), all float32: terms are added in the order of the rank, each rounded.

    Source: LoRA, arXiv 2106.09685, section 4.1. `kernels.products.low_rank` is its fast twin.

    >>> low_rank(np.ones((2, 1), np.float32), np.array([[1, 2]], np.float32)).tolist()
    [[1.0, 2.0], [1.0, 2.0]]
    """
    total = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for k in range(left.shape[1]):
        total += left[:, k, None] * right[k]
    return total


def linear(a: Array, b: Array) -> Pair:
    """A (r, in, ...), B (out, r, ...) -> the pair of a layer stored [out, in]; a convolution's kernel is part of A."""
    return b.reshape(1, b.shape[0], -1), a.reshape(1, a.shape[0], -1)


def swapped(pair: Pair) -> Pair:
    """The pair of the transposed matrices."""
    return pair[1].swapaxes(1, 2), pair[0].swapaxes(1, 2)


def bias(b: Array) -> Pair:
    """(n,) -> the pair of a bias: n rows of one column."""
    return b.reshape(1, -1, 1), np.ones((1, 1, 1), np.float32)


def experts(a: Array, b: Array, many: int, *, slow: bool) -> Pair:
    """A (E r, in), B (out, r E) -> left (E, out, r), right (E, r, in).

    A has the expert as its slow index. B has it as its fast one, where PEFT wrote it; `slow`: also as its slow one, as
    Unsloth did.
    """
    rank = a.shape[0] // many
    if slow:
        left = b.reshape(b.shape[0], many, rank).transpose(1, 0, 2)
    else:
        left = b.reshape(b.shape[0], rank, many).transpose(2, 0, 1)
    return left, a.reshape(many, rank, a.shape[1])


def joined(pairs: list[Pair]) -> Pair:
    """The sum of products, as one product whose rank is the sum of theirs."""
    if len(pairs) == 1:
        return pairs[0]
    return np.concatenate([one[0] for one in pairs], axis=2), np.concatenate([one[1] for one in pairs], axis=1)


def taken(pair: Pair, matrix: int, begin: int, end: int) -> Pair:
    """Some rows of one matrix, as a pair of one."""
    return pair[0][matrix : matrix + 1, begin:end], pair[1][matrix : matrix + 1]


def put_together(pairs: list[tuple[Pair, int, int]], matrices: tuple[int, int, int]) -> Pair:
    """Products of one matrix each -> one of all `matrices` (E, R, C), 0 elsewhere. With each pair: of which matrix it
    is, and of which row on. Ranks add up where several are of one matrix."""
    many, rows, columns = matrices
    begins = [0] * many
    places = []
    for (left, _), matrix, _ in pairs:
        places.append(begins[matrix])
        begins[matrix] += left.shape[2]
    lefts, rights = np.zeros((many, rows, max(begins)), np.float32), np.zeros((many, max(begins), columns), np.float32)
    for ((left, right), matrix, row), k in zip(pairs, places, strict=True):
        lefts[matrix, row : row + left.shape[1], k : k + left.shape[2]] = left[0]
        rights[matrix, k : k + right.shape[1]] = right[0]
    return lefts, rights


def scaled(pair: Pair, scale: float) -> Pair:
    """The product times a number, which goes into the left factor."""
    left = np.ascontiguousarray(pair[0] * np.float32(scale))
    return left, np.ascontiguousarray(pair[1])


def norm_of(pair: Pair) -> float:
    """||left x right||_F of all matrices, from the r x r products of each factor with itself; float64.

    >>> round(norm_of((np.ones((1, 2, 1), np.float32), np.ones((1, 1, 3), np.float32))), 6)
    2.44949
    """
    total = 0.0
    for left, right in zip(*pair, strict=True):
        one: Any = left.T.astype(np.float64) @ left.astype(np.float64)
        other: Any = right.astype(np.float64) @ right.T.astype(np.float64)
        total += float((one * other).sum())
    return float(np.sqrt(max(0.0, total)))
