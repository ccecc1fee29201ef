# SPDX-License-Identifier: Apache-2.0
"""What codes are scaled by, and the zero points that are subtracted before: one number for each block of elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from darekit.checkpoints.checkpoint import TensorInfo
from darekit.checkpoints.quantised import formulas
from darekit.checkpoints.quantised.formulas import Singles
from darekit.dtypes import Bytes, dtype_named, widen
from darekit.errors import DataError


class Grid(Protocol):
    """One number for each block of a matrix."""

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> Singles:
        """(rows, columns) float32: those in this range of rows, and of columns."""
        ...

    @property
    def parts(self) -> Sequence[TensorInfo]:
        """What it is made of."""
        ...


def read_part(info: TensorInfo, width: int, rows: tuple[int, int], columns: tuple[int, int]) -> Bytes:
    """A range of rows and columns of a tensor, seen as rows of `width` elements -> its raw bytes, contiguous."""
    size, many = dtype_named(info.dtype).itemsize, rows[1] - rows[0]
    if many == 1:  # it may be all there is, and very long
        raw = np.empty((columns[1] - columns[0]) * size, np.uint8)
        info.source.read_into(raw, (rows[0] * width + columns[0]) * size)
        return raw
    raw = np.empty(many * width * size, np.uint8)
    info.source.read_into(raw, rows[0] * width * size)
    if columns == (0, width):
        return raw
    return np.ascontiguousarray(raw.reshape(many, width * size)[:, columns[0] * size : columns[1] * size]).reshape(-1)


def widened(raw: Bytes, dtype: str) -> Singles:
    """Raw bytes of numbers, or of powers of two (E8M0, and bytes) -> (n,) float32."""
    if dtype in ("U8", "F8_E8M0"):
        return formulas.powers(raw)
    values = np.empty(raw.size // dtype_named(dtype).itemsize, np.float32)
    widen(raw, dtype_named(dtype), values)
    return values


def one(info: TensorInfo) -> np.float32:
    """The first number of a small tensor."""
    raw = np.empty(dtype_named(info.dtype).itemsize, np.uint8)
    info.source.read_into(raw, 0)
    return np.float32(widened(raw, info.dtype)[0])


@dataclass(frozen=True)
class Scales:
    """Stored scales.

    Attributes:
        info: the tensor that holds them, row by row; powers of two are bytes.
        width: blocks in a row.
        whole: a factor that all of them have besides, where there is one.
        divides: whether they are divided by it, and not multiplied.
        signed: whether they may be negative, as those of integers may.
        where: the tensor that they scale, in errors.
    """

    info: TensorInfo
    width: int
    where: str
    whole: TensorInfo | None = None
    divides: bool = False
    signed: bool = False

    @property
    def parts(self) -> Sequence[TensorInfo]:
        """The scales, and their common factor."""
        return (self.info,) if self.whole is None else (self.info, self.whole)

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> Singles:
        """(rows, columns) float32.

        Raises:
            DataError: NaN, Inf, or negative where none can be.
        """
        found = widened(read_part(self.info, self.width, rows, columns), self.info.dtype)
        refuse_impossible(found, self.info.name, self.where, signed=self.signed)
        if self.whole is not None:
            factor = one(self.whole)
            refuse_impossible(np.array([factor]), self.whole.name, self.where, zero=not self.divides)
            found = found / factor if self.divides else found * factor
        return found.reshape(rows[1] - rows[0], -1)


@dataclass(frozen=True)
class Nested:
    """Scales that are quantised themselves, with an offset: the double quantisation of bitsandbytes.

    Attributes:
        info: their codes.
        table: what each is worth, a tensor of 256.
        scales: of `block` codes each.
        offset: that is added in the end.
        where: the tensor that they scale, in errors.
    """

    info: TensorInfo
    table: TensorInfo
    scales: TensorInfo
    block: int
    offset: np.float32
    where: str

    @property
    def parts(self) -> Sequence[TensorInfo]:
        """The codes, their table, and their scales."""
        return self.info, self.table, self.scales

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> Singles:
        """(1, columns) float32: there is one row."""
        codes = read_part(self.info, self.info.count, rows, columns)
        first, last = columns[0] // self.block, -(-columns[1] // self.block)
        table = widened(read_part(self.table, 256, (0, 1), (0, 256)), self.table.dtype)
        outer = widened(read_part(self.scales, self.scales.count, (0, 1), (first, last)), self.scales.dtype)
        refuse_impossible(table, self.table.name, self.where, signed=True)
        refuse_impossible(outer, self.scales.name, self.where)
        found = table[codes] * outer[np.arange(*columns) // self.block - first] + self.offset
        refuse_impossible(found, self.info.name, self.where, signed=True)
        return found.reshape(1, -1)


@dataclass(frozen=True)
class Zeros:
    """Zero points of integers.

    Attributes:
        info: a tensor of as many integers as there are scales; or of words, in which the codes of a column are packed.
        width: in a row.
        bits: of a packed one; 0: they are not packed.
    """

    info: TensorInfo
    width: int
    bits: int = 0

    @property
    def parts(self) -> Sequence[TensorInfo]:
        """The zero points."""
        return (self.info,)

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> Singles:
        """(rows, columns) float32."""
        if not self.bits:
            raw = read_part(self.info, self.width, rows, columns)
            found = raw.view(dtype_named(self.info.dtype).numpy).astype(np.float32)
            return found.reshape(rows[1] - rows[0], -1)
        # 32 codes fill whole words, so that a range that begins with a multiple of 32 begins with a word.
        first = rows[0] // 32 * 32
        last = min(-(-rows[1] // 32) * self.bits, self.info.shape[-2])
        words = read_part(self.info, self.width, (first // 32 * self.bits, last), (0, self.width))
        down = np.ascontiguousarray(words.view("<u4").reshape(-1, self.width).T)
        codes = formulas.unpacked(down, self.bits, rows[1] - first)
        worth = formulas.integers(self.bits)[codes[columns[0] : columns[1], rows[0] - first :]]
        return np.ascontiguousarray(worth.T)


@dataclass(frozen=True)
class Ordered:
    """Another grid, whose columns are groups that the elements of a row belong to in any order.

    Attributes:
        grid: with a column for each group.
        order: a tensor of integers, the group of each element of a row.
        groups: how many there are.
        size: elements of a group, where the order says that there is none (-1 for all).
    """

    grid: Grid
    order: TensorInfo
    groups: int
    size: int

    @property
    def parts(self) -> Sequence[TensorInfo]:
        """Those of the grid, and the order."""
        return (*self.grid.parts, self.order)

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> Singles:
        """(rows, columns) float32.

        Raises:
            DataError: an element belongs to a group that does not exist.
        """
        raw = read_part(self.order, self.order.count, (0, 1), columns)
        order = raw.view(dtype_named(self.order.dtype).numpy)
        if order.size and not np.any(order != -1):
            order = np.arange(*columns) // self.size
        if order.size and not 0 <= int(order.min()) <= int(order.max()) < self.groups:
            raise DataError(
                f"{self.order.name}: groups {int(order.min())} to {int(order.max())}, of {self.groups}: it does not "
                "belong to these scales"
            )
        return np.ascontiguousarray(self.grid.read(rows, (0, self.groups))[:, order])


def refuse_impossible(scales: Singles, name: str, where: str, *, signed: bool = False, zero: bool = True) -> None:
    """Refuse scales that no quantiser writes.

    Raises:
        DataError: NaN, Inf; negative ones unless `signed`; 0 unless `zero`.
    """
    bad, what = ~np.isfinite(scales), "NaN or Inf"
    if not bad.any() and not signed:
        bad, what = scales < 0, "negative"
    if not bad.any() and not zero:
        bad, what = scales == 0, "0"
    if bad.any():
        raise DataError(
            f"{where}: {int(bad.sum())} of {scales.size} scales that were read from {name} are {what}, so its weights "
            "cannot be decoded: the file is damaged, or these are not scales. Download it again, or give the "
            "checkpoint that was quantised"
        )
