# SPDX-License-Identifier: Apache-2.0
"""A view that gathers token rows: one axis of a tensor in another order, with rows of other models' tensors in it.

Nothing is expanded: a range is read from wherever its rows lie, neighbours in one read. A row keeps the mask that it
has in the model's own stored tensor (`Places`), wherever the view puts it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from threading import Lock

import numpy as np
import numpy.typing as npt

from darekit import kernels
from darekit.checkpoints import Places, TensorInfo, Traits, traits_of
from darekit.checkpoints.places import ELSEWHERE, Rows, run_ends, split
from darekit.checkpoints.sources import refuse_outside
from darekit.dtypes import Bytes, DType, Floats, dtype_named
from darekit.errors import HomologyError

ZERO, MEAN, FILL = -1, -2, -3  # in the place of an input: zeros, the mean of some rows, the mean of all

CHUNK = 65536  # elements that are widened at once


@dataclass(frozen=True, eq=False)
class RowTable:
    """Where each row of a view comes from.

    Attributes:
        owners: (n,) int64, the index of the tensor that has it; or `ZERO`; `MEAN`, of rows that `means` lists; `FILL`,
            the mean of all rows of this view before `tokens`.
        rows: (n,) int64, the row in that tensor; `ELSEWHERE` where there is no one row.
        means: row of the view -> (tensor, row) of all those that it is the mean of.
        tokens: rows that hold a token, from the first on; the others are padding.
    """

    owners: Rows
    rows: Rows
    means: Mapping[int, Sequence[tuple[int, int]]] = field(default_factory=dict)
    tokens: int = 0

    def is_identity(self, own: int, length: int) -> bool:
        """Whether it is tensor number `own`, whose axis is so long, as it is."""
        return (
            self.rows.size == length
            and bool((self.owners == own).all())
            and bool((self.rows == np.arange(length)).all())
        )


def gathered(
    own: int,
    table: RowTable,
    inputs: Sequence[TensorInfo | None],
    axis: int,
    alike: npt.NDArray[np.bool_] | None = None,
) -> TensorInfo:
    """Tensor number `own` of `inputs` with its rows as in a table; its name and number format stay.

    Args:
        own: the tensor whose masks the rows have that it has itself.
        table: where each row comes from.
        inputs: the tensors that the table names; None: is not named.
        axis: the one that is gathered; all others must be alike.
        alike: (n,) bool, which rows are the base's own in its view, to the bit; None: nobody knows.

    Raises:
        HomologyError: an input has another shape besides that axis.
    """
    info = inputs[own]
    assert info is not None
    named = set(table.owners.tolist()).union(k for rows in table.means.values() for k, _ in rows)
    for k in sorted(k for k in named if k >= 0):
        other = inputs[k]
        assert other is not None
        if (*other.shape[:axis], *other.shape[axis + 1 :]) != (*info.shape[:axis], *info.shape[axis + 1 :]):
            raise HomologyError(
                f"{info.name}: token rows of shape {list(other.shape)} do not fit among rows of shape "
                f"{list(info.shape)}; models that give each other rows must have the same hidden size"
            )
    shape = (*info.shape[:axis], int(table.rows.size), *info.shape[axis + 1 :])
    source = RowSource(own, table, tuple(inputs), axis, alike)
    return replace(info, shape=shape, source=source)


@dataclass(frozen=True, eq=False)
class RowSource:
    """The bytes of a gathered tensor. `gathered` makes it."""

    own: int
    table: RowTable
    inputs: tuple[TensorInfo | None, ...]
    axis: int
    alike: npt.NDArray[np.bool_] | None = None
    _lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def _info(self) -> TensorInfo:
        info = self.inputs[self.own]
        assert info is not None
        return info

    @cached_property
    def _dtype(self) -> DType:
        return dtype_named(self._info.dtype)

    @cached_property
    def _outer(self) -> int:
        return math.prod(self._info.shape[: self.axis])

    @cached_property
    def _inner(self) -> int:
        return math.prod(self._info.shape[self.axis + 1 :])

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self._outer * self.table.rows.size * self._inner * self._dtype.itemsize

    @cached_property
    def traits(self) -> Traits:
        """Those of all inputs together; a known delta is one to another tensor, and no digest is known."""
        named = set(self.table.owners.tolist()).union(k for rows in self.table.means.values() for k, _ in rows)
        found = [traits_of(info.source) for k, info in enumerate(self.inputs) if info is not None and k in named]
        own = self.table.owners == self.own
        rows = np.where(own, self.table.rows, ELSEWHERE)
        return Traits(
            files=tuple(dict.fromkeys(file for traits in found for file in traits.files)),
            seed=traits_of(self._info.source).seed,
            grain=max((traits.grain for traits in found), default=1),
            cost=max((traits.cost for traits in found), default=1.0),
            places=Places(rows, self._info.shape[self.axis], self._outer, self._inner, self.alike),
        )

    @cached_property
    def _ends(self) -> Rows:
        """Where runs of rows end that can be read at once."""
        owners, rows = self.table.owners, self.table.rows
        # Numbers that no two tensors share, so that neighbours are of one tensor; what is made here has its kind's.
        apart = np.where(owners >= 0, owners * (np.int64(1) << 40) + rows, owners)
        return run_ends(apart, owners >= 0)

    def read_into(self, buffer: Bytes, offset: int) -> None:
        """(n,) uint8, filled with the n bytes that begin at byte `offset` of the tensor."""
        refuse_outside(buffer, offset, self.nbytes)
        size = self._dtype.itemsize
        first, last = offset // size, -(-(offset + buffer.nbytes) // size)
        if first * size != offset or (last - first) * size != buffer.nbytes:  # not whole elements: nobody's hot path
            whole = np.empty((last - first) * size, np.uint8)
            self.read_into(whole, first * size)
            buffer[...] = whole[offset - first * size :][: buffer.nbytes]
            return
        for at, many, outer, row, column in split(self._ends, self._inner, first, last - first):
            self._read(buffer[at * size : (at + many) * size], outer, row, column)

    def _read(self, out: Bytes, outer: int, row: int, column: int) -> None:
        """One run: elements from (outer, row, column) of the view on."""
        owner = int(self.table.owners[row])
        if owner >= 0:
            self._copy(owner, outer, int(self.table.rows[row]), column, out)
        elif owner == ZERO:
            out[...] = 0
        else:
            size, count = self._dtype.itemsize, out.nbytes // self._dtype.itemsize
            done = 0
            while done < count:  # a run may hold several rows
                many = min(count - done, self._inner - column)
                values = (
                    self._fill[outer, column : column + many] if owner == FILL else self._mean(outer, row, column, many)
                )
                kernels.round_to(values, self._dtype, out[done * size : (done + many) * size])
                done, row, column = done + many, row + 1, 0

    def _copy(self, owner: int, outer: int, row: int, column: int, out: Bytes) -> None:
        """Elements of one input's tensor, in this view's number format."""
        info = self.inputs[owner]
        assert info is not None
        dtype = dtype_named(info.dtype)
        at = (outer * info.shape[self.axis] + row) * self._inner + column
        if dtype.name == self._dtype.name:
            info.source.read_into(out, at * dtype.itemsize)
            return
        count, size = out.nbytes // self._dtype.itemsize, self._dtype.itemsize
        for start in range(0, count, CHUNK):
            many = min(CHUNK, count - start)
            values = self._values(info, at + start, many)
            kernels.round_to(values, self._dtype, out[start * size : (start + many) * size])

    def _values(self, info: TensorInfo, at: int, count: int) -> Floats:
        """(count,) elements of a tensor from one on, widened."""
        dtype = dtype_named(info.dtype)
        raw = np.empty(count * dtype.itemsize, np.uint8)
        info.source.read_into(raw, at * dtype.itemsize)
        values: Floats = np.empty(count, np.float64 if dtype.name == "F64" else np.float32)
        kernels.widen(raw, dtype, values)
        return values

    def _mean(self, outer: int, row: int, column: int, count: int) -> Floats:
        """(count,) float32 (of F64 float64): the mean of the rows that a row of the view stands for, in their order."""
        number = np.float64 if self._dtype.name == "F64" else np.float32
        total: Floats = np.zeros(count, number)
        listed = self.table.means[row]
        for k, other in listed:
            info = self.inputs[k]
            assert info is not None
            total += self._values(info, (outer * info.shape[self.axis] + other) * self._inner + column, count)
        return total / number(len(listed))

    @property
    def _fill(self) -> Floats:
        """(outer, inner) float64: the mean of all rows that hold tokens; made once."""
        with self._lock:
            return self._filling

    @cached_property
    def _filling(self) -> Floats:
        n, size, rows = self.table.rows.size, self._dtype.itemsize, max(1, CHUNK // max(1, self._inner))
        total = np.zeros((self._outer, self._inner), np.float64)
        for outer in range(self._outer):
            for row in range(0, self.table.tokens, rows):
                many = min(rows, self.table.tokens - row)
                raw = np.empty(many * self._inner * size, np.uint8)
                self.read_into(raw, (outer * n + row) * self._inner * size)
                values: Floats = np.empty(many * self._inner, np.float64 if self._dtype.name == "F64" else np.float32)
                kernels.widen(raw, self._dtype, values)
                total[outer] += values.reshape(many, self._inner).sum(axis=0, dtype=np.float64)
        return total / max(1, self.table.tokens)
