# SPDX-License-Identifier: Apache-2.0
"""A model's delta, read tile by tile into matrices: what its source knows more precisely than its bytes, or model
minus base in float32. A recipe's result is read before it is rounded to its format.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from darekit import kernels
from darekit.checkpoints import FileRange, Source, TensorInfo, traits_of
from darekit.dtypes import Bytes, Floats, dtype_named
from darekit.errors import DataError
from darekit.extraction.factors import Matrix
from darekit.extraction.targets import Block
from darekit.planning.matching.alignment import AlignedTensor

TILE = 65536  # elements


class Room(threading.local):
    """A thread's buffers: fresh memory for every tile and matrix takes a tenth of the time of reading them."""

    def __init__(self) -> None:
        self.raw: Bytes = np.empty(8 * TILE, np.uint8)
        self.other: Bytes = np.empty(2 * TILE, np.uint8)
        self.before: Matrix = np.empty(TILE, np.float32)
        self.whole: Matrix = np.empty(0, np.float32)

    def matrix(self, rows: int, columns: int) -> Matrix:
        """(rows, columns) float32, in the memory that the thread's last one had."""
        if self.whole.size < rows * columns:
            self.whole = np.empty(0, np.float32)  # the old one goes first
            self.whole = np.empty(rows * columns, np.float32)
        return self.whole[: rows * columns].reshape(rows, columns)


class Reader:
    """Reads deltas, in any thread. What must be read in order is read by one thread at a time."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._one = threading.Lock()
        self._room = Room()

    def matrix(self, blocks: Sequence[Block]) -> tuple[Matrix, float]:
        """Blocks of one width -> their delta, (rows, columns) float32, as they are stored, and the square of its norm;
        the thread's next call writes into the same memory.

        Raises:
            DataError: NaN or Inf.
        """
        whole = self._room.matrix(sum(block.shape[0] for block in blocks), blocks[0].shape[1])
        at, total = 0, 0.0
        for block in blocks:
            rows = whole[at : at + block.shape[0]]
            total += self.into(rows.reshape(-1), block.tensor, block.begin)
            at += block.shape[0]
        return whole, total

    def square(self, tensor: AlignedTensor) -> float:
        """||delta||^2 of a whole tensor, in float64.

        Raises:
            DataError: NaN or Inf.
        """
        if dtype_named(tensor.dtype).kind != "float":
            return 0.0
        count, total = _count(tensor), 0.0
        delta = np.empty(min(TILE, count), np.float32)
        with self._order(tensor):
            for start in range(0, count, TILE):
                total += self._tile(delta[: min(TILE, count - start)], tensor, start)
        return total

    def into(self, target: Matrix, tensor: AlignedTensor, begin: int) -> float:
        """(n,) float32, filled with the delta of n elements from `begin` on -> the square of its norm.

        Raises:
            DataError: NaN or Inf.
        """
        total = 0.0
        with self._order(tensor):
            at, end = begin, begin + target.size
            while at < end:  # ends of tiles are those of the tensor: what is computed is computed once
                stop = min(end, (at // TILE + 1) * TILE)
                total += self._tile(target[at - begin : stop - begin], tensor, at)
                at = stop
        return total

    def values(self, tensor: AlignedTensor) -> Iterator[Bytes]:
        """The model's values in the tensor's format, (n,) uint8 for each tile: rows that it lacks are the base's.

        Raises:
            DataError: NaN, Inf, or a value that the format cannot hold.
        """
        dtype = dtype_named(tensor.dtype)
        model = tensor.models[0]
        assert model is not None
        with self._order(tensor):
            for start in range(0, _count(tensor), TILE):
                count = min(TILE, _count(tensor) - start)
                if dtype.kind != "float":
                    raw = np.empty(count * dtype.itemsize, np.uint8)
                    model.source.read_into(raw, start * dtype.itemsize)
                    yield raw
                    continue
                wide = "F64" in (model.dtype, dtype.name)
                values: Floats = np.empty(count, np.float64 if wide else np.float32)
                have = max(0, min(count, model.count - start))
                if have:
                    _read(model, start, values[:have])
                if have < count:
                    assert tensor.base is not None
                    _read(tensor.base, start + have, values[have:])
                raw = np.empty(count * dtype.itemsize, np.uint8)
                if kernels.count_nonfinite(values) or kernels.round_to(values, dtype, raw):
                    raise DataError(self._bad(tensor))
                yield raw

    def _order(self, tensor: AlignedTensor) -> AbstractContextManager[object]:
        model = tensor.models[0]
        ordered = model is not None and traits_of(model.source).ordered
        return self._one if ordered else nullcontext()

    def _tile(self, target: Matrix, tensor: AlignedTensor, start: int) -> float:
        base, model = tensor.base, tensor.models[0]
        assert base is not None and model is not None
        have = max(0, min(target.size, model.count - start, base.count - start))
        target[have:] = 0  # rows that either lacks do not differ
        if not have:
            return 0.0
        target = target[:have]
        known, found = traits_of(model.source).delta, None
        if known is not None and are_same(known.base, base.source):
            known.read_into(target, start)
            bad = kernels.count_nonfinite(target)
        elif (exact := traits_of(model.source).values) is not None and base.dtype != "F64":
            before = np.empty(have, np.float32)
            _read(base, start, before)
            exact(target, start)
            target -= before
            bad = kernels.count_nonfinite(target)
        elif "F64" in (base.dtype, model.dtype):
            wide = np.empty((2, have))
            _read(base, start, wide[0])
            _read(model, start, wide[1])
            with np.errstate(over="ignore", invalid="ignore"):
                target[...] = wide[1] - wide[0]
            bad = kernels.count_nonfinite(target)
        elif base.dtype == model.dtype == "BF16":
            raws = self._room.raw[: 2 * have], self._room.other[: 2 * have]
            for info, raw in zip((base, model), raws, strict=True):
                info.source.read_into(raw, 2 * start)
            bad, found = kernels.squared_difference(*raws, target)
        else:
            room, dtype = self._room, dtype_named(model.dtype)
            before = room.before[:have]
            _read(base, start, before, room.raw)
            raw = room.raw[: have * dtype.itemsize]
            model.source.read_into(raw, start * dtype.itemsize)
            bad = kernels.difference(raw, dtype, before, target)
        if bad:
            raise DataError(self._bad(tensor))
        return kernels.square(target) if found is None else found

    def _bad(self, tensor: AlignedTensor) -> str:
        return (
            f"NaN or Inf in {tensor.name} of {self._model} or its base, or a number too large for {tensor.dtype}; an "
            "adapter needs finite weights: repair the model, or leave it out"
        )


def are_same(one: Source, other: Source) -> bool:
    """Whether two sources are one tensor: a base that was opened twice has two files, which are one on the disk."""
    if one == other:
        return True
    if not isinstance(one, FileRange) or not isinstance(other, FileRange):
        return False
    same = one.file.path == other.file.path or one.file.path.samefile(other.file.path)
    return same and (one.offset, one.nbytes) == (other.offset, other.nbytes)


def _count(tensor: AlignedTensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def _read(info: TensorInfo, start: int, values: Floats, room: Bytes | None = None) -> None:
    dtype = dtype_named(info.dtype)
    raw = np.empty(values.size * dtype.itemsize, np.uint8) if room is None else room[: values.size * dtype.itemsize]
    info.source.read_into(raw, start * dtype.itemsize)
    kernels.widen(raw, dtype, values)
