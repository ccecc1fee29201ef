# SPDX-License-Identifier: Apache-2.0
"""Where the codes of a quantised tensor lie, and how they are taken apart: one byte for each element in the end."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from darekit.checkpoints.quantised import formulas
from darekit.checkpoints.sources import Source
from darekit.dtypes import Bytes
from darekit.kernels import quantised as kernels


class Desk(threading.local):
    """A thread's room for what it decodes: where memory is asked for anew for each tile, the system takes longer to
    find pages for it than decoding takes."""

    def __init__(self) -> None:
        self._kept: dict[str, Bytes] = {}

    def room(self, use: str, count: int) -> Bytes:
        """(count,) uint8 for one use, with anything in it. The next call for the same use gives the same memory."""
        if use not in self._kept or self._kept[use].size < count:
            self._kept[use] = np.empty(count, np.uint8)
        return self._kept[use][:count]


class Codes(Protocol):
    """The codes of a tensor, in the order of its elements."""

    @property
    def source(self) -> Source:
        """Of the bytes that they are packed in."""
        ...

    def read(self, start: int, count: int, desk: Desk) -> Bytes:
        """(count,) uint8: codes of the elements from `start` on, on the desk until the next call."""
        ...


@dataclass(frozen=True)
class Whole:
    """One byte for each code."""

    source: Source

    def read(self, start: int, count: int, desk: Desk) -> Bytes:
        """(count,) uint8: codes of the elements from `start` on, on the desk until the next call."""
        found = desk.room("codes", count)
        self.source.read_into(found, start)
        return found


@dataclass(frozen=True)
class Halves:
    """Two codes in a byte, the first in the lower or the upper four bits."""

    source: Source
    high_first: bool

    def read(self, start: int, count: int, desk: Desk) -> Bytes:
        """(count,) uint8: codes of the elements from `start` on, on the desk until the next call."""
        first, last = start // 2, -(-(start + count) // 2)
        raw = desk.room("packed", last - first)
        self.source.read_into(raw, first)
        found = desk.room("codes", count)
        kernels.nibbles(raw, self.high_first, start - 2 * first, found)
        return found


@dataclass(frozen=True)
class Words:
    """Rows of `columns` codes of so many bits, each of which begins with a word of 32 bits of its own."""

    source: Source
    bits: int
    columns: int

    @property
    def row(self) -> int:
        """Words of a row."""
        return -(-self.columns * self.bits // 32)

    def read(self, start: int, count: int, desk: Desk) -> Bytes:
        """(count,) uint8: codes of the elements from `start` on, on the desk until the next call."""
        first, last = start // self.columns, -(-(start + count) // self.columns)
        raw = np.empty((last - first) * self.row * 4, np.uint8)
        self.source.read_into(raw, first * self.row * 4)
        found = formulas.unpacked(raw.view("<u4").reshape(last - first, self.row), self.bits, self.columns)
        return found.reshape(-1)[start - first * self.columns :][:count]


def packed(source: Source, bits: int, columns: int) -> Codes:
    """Rows of codes in words of 32 bits: where no bit is left over, bytes or halves of bytes one behind the other."""
    if bits == 8 and columns % 4 == 0:
        return Whole(source)
    if bits == 4 and columns % 8 == 0:
        return Halves(source, high_first=False)
    return Words(source, bits, columns)
