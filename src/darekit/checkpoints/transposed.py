# SPDX-License-Identifier: Apache-2.0
"""A tensor read with its last two axes swapped."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field

import numpy as np

from darekit.checkpoints.files import Bytes
from darekit.checkpoints.sources import Source, Traits, refuse_outside, traits_of

BAND = 1 << 20  # bytes of the stored matrix that are read at once


@dataclass(frozen=True, eq=False)
class Transposed:
    """Another source's tensor with its last two axes swapped: (..., rows, columns) stored, (..., columns, rows) read.

    A range of it lies scattered over a whole matrix, so a matrix is turned at once, and each thread keeps the one that
    it turned last: those that it asks for next lie in the same one.

    Attributes:
        whole: the tensor as it is stored.
        shape: of it.
        itemsize: bytes of an element.
        last: what each thread keeps; shared by the tensors of one checkpoint, so that there is one for each thread.
    """

    whole: Source
    shape: tuple[int, ...]
    itemsize: int
    last: threading.local = field(default_factory=threading.local, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.whole.nbytes

    @property
    def _matrix(self) -> int:
        return math.prod(self.shape[-2:]) * self.itemsize

    @property
    def traits(self) -> Traits:
        """The files, and what they cost to read; the rest is about the tensor as it is stored."""
        whole = traits_of(self.whole)
        return Traits(
            files=whole.files, seed=whole.seed, grain=max(1, math.prod(self.shape[-2:])), cost=whole.cost,
            as_stored=False,
        )  # fmt: skip

    def read_into(self, buffer: Bytes, offset: int) -> None:
        """(n,) uint8, filled with the n bytes that begin at byte `offset` of the tensor."""
        refuse_outside(buffer, offset, self.nbytes)
        done = 0
        while done < buffer.nbytes:
            index, begin = divmod(offset + done, self._matrix)
            count = min(self._matrix - begin, buffer.nbytes - done)
            buffer[done : done + count] = self._turned(index)[begin : begin + count]
            done += count

    def _turned(self, index: int) -> Bytes:
        """(matrix,) uint8: one matrix, turned."""
        if getattr(self.last, "of", None) != (id(self), index):
            rows, columns = self.shape[-2:]
            turned = np.empty(self._matrix, np.uint8)
            there = turned.view(f"u{self.itemsize}").reshape(columns, rows)
            step = max(1, BAND // (columns * self.itemsize))
            raw = np.empty(step * columns * self.itemsize, np.uint8)
            for row in range(0, rows, step):
                band = raw[: min(step, rows - row) * columns * self.itemsize]
                self.whole.read_into(band, index * self._matrix + row * columns * self.itemsize)
                there[:, row : row + step] = band.view(there.dtype).reshape(-1, columns).T
            self.last.of, self.last.turned = (id(self), index), turned
        found: Bytes = self.last.turned
        return found
