# SPDX-License-Identifier: Apache-2.0
"""Sources that decode: quantised tensors as the bytes of a number format, a tile at a time."""

from __future__ import annotations

import hashlib
import json
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from darekit.checkpoints.checkpoint import SAMPLE_BYTES, TensorInfo
from darekit.checkpoints.quantised import formulas
from darekit.checkpoints.quantised.codes import Codes, Desk
from darekit.checkpoints.quantised.formulas import Singles
from darekit.checkpoints.quantised.scales import Grid, read_part, refuse_impossible
from darekit.checkpoints.sources import Source, Traits, refuse_outside, traits_of
from darekit.dtypes import Bytes, DType, narrow
from darekit.errors import DataError
from darekit.kernels import quantised as kernels

TAG = b"darekit-dequantised-1\0"  # frozen: seeds depend on it, see `identity_of`
TILES = 4 * 65536  # elements that are decoded in one call of a kernel, as many as the engine's fast lane asks for

NONE = np.empty((0, 0), np.float32)  # in the place of zero points

SAMPLED = 2  # places at which the error of rounding is sampled
SAMPLED_ELEMENTS = 4096  # at each of them


Place = tuple[int, int, int, int, int, int]


def identity_of(facts: Mapping[str, Any], parts: Mapping[str, TensorInfo]) -> bytes:
    """What a quantised tensor is made of -> 16 bytes.

    BLAKE2b (digest_size=16, no key) over b"darekit-dequantised-1\\\\0", UTF-8 JSON of the facts (keys sorted,
    separators "," and ":"), and for each part in the order of its role: the role in UTF-8, b"\\\\0", its dtype as in
    safetensors, b"\\\\0", its dimensions in decimal joined by ",", b"\\\\0", its first min(4096, nbytes) raw bytes.

    Facts are `form`, `dtype` (that it is decoded to), and those of the form. Seeds, and through them masks, depend on
    this encoding: it never changes.
    """
    text = json.dumps(dict(facts), sort_keys=True, separators=(",", ":"))
    digest = hashlib.blake2b(TAG + text.encode(), digest_size=16)
    for role in sorted(parts):
        info = parts[role]
        sample = np.empty(min(SAMPLE_BYTES, info.nbytes), np.uint8)
        if sample.size:
            info.source.read_into(sample, 0)
        digest.update(f"{role}\0{info.dtype}\0{','.join(map(str, info.shape))}\0".encode() + sample.tobytes())
    return digest.digest()


@dataclass(frozen=True, eq=False)
class Stored:
    """What is stored of one quantised tensor.

    Attributes:
        name: the tensor's, in errors.
        dtype: that it is decoded to.
        count: its elements.
        form: what it is stored as, in words.
        parts: by their role.
        facts: all that decoding needs to know besides the parts.
        grain: elements that are in memory while any of them is decoded.
    """

    name: str
    dtype: DType
    count: int
    form: str
    parts: Mapping[str, TensorInfo]
    facts: Mapping[str, Any]
    grain: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes when decoded."""
        return self.count * self.dtype.itemsize

    def traits(self, error: Callable[[], tuple[float, float]]) -> Traits:
        """The parts' files; how many bytes are read for each byte that is given; `error` as it is."""
        found = [traits_of(info.source) for info in self.parts.values()]
        read = sum(info.nbytes for info in self.parts.values())
        return Traits(
            files=tuple(dict.fromkeys(file for traits in found for file in traits.files)),
            identity=identity_of({"form": self.form, "dtype": self.dtype.name, **self.facts}, self.parts),
            cost=read / self.nbytes if self.nbytes else 0.0,
            grain=self.grain,
            rounding=error,
        )


@dataclass(frozen=True, eq=False)
class Coded(ABC):
    """A tensor of codes, which decodes itself when it is read. `stored`: what is stored of it."""

    stored: Stored

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.stored.nbytes

    @cached_property
    def traits(self) -> Traits:
        """Those of what is stored."""
        return self.stored.traits(self.rounding)

    def read_into(self, buffer: Bytes, offset: int) -> None:
        """(n,) uint8, filled with the n bytes that begin at byte `offset` of the tensor.

        Raises:
            DataError: a scale is NaN, Inf, or what no quantiser writes.
        """
        refuse_outside(buffer, offset, self.nbytes)
        read_elements(self._decode, buffer, offset, self.stored.dtype.itemsize)

    def rounding(self) -> tuple[float, float]:
        """From a sample: about the squared norm of what rounding to these codes has changed, and that of the tensor."""
        return self._rounding

    @cached_property
    def _rounding(self) -> tuple[float, float]:
        return self._sampled()

    @abstractmethod
    def _decode(self, start: int, raw: Bytes) -> None:
        """Whole elements from one on, into (n,) uint8."""

    @abstractmethod
    def _sampled(self) -> tuple[float, float]:
        """What `rounding` keeps."""


@dataclass(frozen=True, eq=False)
class Scaled(Coded):
    """A tensor whose codes lie in the order of its elements.

    Attributes:
        codes: one for each element.
        table: what each is worth.
        how: the same as arithmetic, for kernels.
        scales: one for each block.
        zeros: subtracted before; None: nothing is.
        rows: of a matrix of those that lie one behind the other: blocks do not reach into the next.
        columns: of a row.
        block: rows and columns of elements that share a scale.
        factor: of all elements.
        desk: where threads decode.
        anything: whether codes that are not 0 may have a scale of 0: bitsandbytes gives zeros any code.
    """

    codes: Codes
    table: Singles
    how: kernels.How
    scales: Grid
    zeros: Grid | None
    rows: int
    columns: int
    block: tuple[int, int]
    desk: Desk
    factor: float = 1.0
    anything: bool = False

    def _decode(self, start: int, raw: Bytes) -> None:
        size, dtype = self.stored.dtype.itemsize, self.stored.dtype
        scratch = self.desk.room("scratch", 8 * kernels.BLOCK).view(np.float32).reshape(2, kernels.BLOCK)
        end = start + raw.nbytes // size
        done = start
        while done < end:
            # Matrices of their own have blocks of their own.
            stop = min(end, done + TILES, (done // (self.rows * self.columns) + 1) * self.rows * self.columns)
            part = raw[(done - start) * size : (stop - start) * size]
            codes, zeros, scales, place = self._read(done, stop - done)
            zeros = NONE if zeros is None else zeros
            factor = np.float32(self.factor)
            if dtype.name == "BF16" and part.ctypes.data % 2 == 0:
                kernels.worth_bf16(
                    codes, self.table, self.how, zeros, scales, *place, factor, part.view(np.uint16), scratch
                )
            else:
                values, rounded = np.empty(stop - done, np.float32), np.empty(part.nbytes, np.uint8)
                kernels.worth(codes, self.table, self.how, zeros, scales, *place, factor, values, scratch)
                narrow(values, dtype, rounded)
                part[...] = rounded
            done = stop

    def _read(self, start: int, count: int) -> tuple[Bytes, Singles | None, Singles, Place]:
        """Codes, zero points and scales of elements that lie in one matrix; and where: the first element in it, its
        columns, the block's rows and columns, and the first row and column of blocks."""
        matrix, begin = divmod(start, self.rows * self.columns)
        (top, bottom), (left, right) = self._blocks(begin, count)
        lines = matrix * -(-self.rows // self.block[0])  # of blocks, before this matrix
        codes = self.codes.read(start, count, self.desk)
        scales = self.scales.read((lines + top, lines + bottom), (left, right))
        zeros = None if self.zeros is None else self.zeros.read((lines + top, lines + bottom), (left, right))
        place = begin, self.columns, *self.block, top, left
        if not self.anything and not scales.all():
            self._refuse_lost(codes, zeros, scales, place)
        return codes, zeros, scales, place

    def _blocks(self, begin: int, count: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Which rows and columns of blocks a range of a matrix touches; all columns, unless it lies in one row."""
        first, last = begin // self.columns, (begin + count - 1) // self.columns
        rows = first // self.block[0], last // self.block[0] + 1
        if first == last:
            column = begin % self.columns
            return rows, (column // self.block[1], (column + count - 1) // self.block[1] + 1)
        return rows, (0, -(-self.columns // self.block[1]))

    def _worth(
        self, codes: Bytes, table: Singles, zeros: Singles | None, scales: Singles, place: Place, factor: float
    ) -> Singles:
        """By the definition."""
        begin, columns, height, width, top, left = place
        zeros = np.zeros_like(scales) if zeros is None else zeros
        return formulas.worth(
            codes, table, zeros, scales, begin, columns, (height, width), (top, left), np.float32(factor)
        )

    def _refuse_lost(self, codes: Bytes, zeros: Singles | None, scales: Singles, place: Place) -> None:
        """A block of zeros may have a scale of 0: then its codes are zeros too."""
        if np.any(self._worth(codes, self.table, zeros, (scales == 0).astype(np.float32), place, 1.0) != 0):
            raise DataError(
                f"{self.stored.name}: a scale in {self.scales.parts[0].name} is 0, and the codes that it scales are "
                "not: their values are lost. The file is damaged; download it again, or give the checkpoint that was "
                "quantised"
            )

    def _sampled(self) -> tuple[float, float]:
        widths, error, square = formulas.cells(self.table), 0.0, 0.0
        for start, count in sampled_at(self.stored.count, self.rows * self.columns):
            codes, zeros, scales, place = self._read(start, count)
            values = self._worth(codes, self.table, zeros, scales, place, self.factor)
            steps = self._worth(codes, widths, None, scales, place, self.factor)
            square += float(np.nansum(np.square(values, dtype=np.float64)))
            error += float(np.square(steps, dtype=np.float64).sum()) / 12
        return error, square


class Matrix:
    """A matrix with its columns as rows: pairs of codes, exponents of their scales, and which rows of these are strange
    to the kernel; who makes it holds the lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pairs: Bytes = np.empty((0, 0), np.uint8)
        self.exponents: Bytes = np.empty((0, 0), np.uint8)
        self.strange: Bytes = np.empty(0, np.uint8)
        self.made = False
        self.users = 0

    def room(self, rows: int, groups: int, columns: int) -> None:
        """For pairs and exponents: what was there, if it is as large."""
        if self.pairs.shape != (rows, columns) or self.exponents.shape != (groups, columns):
            self.pairs = np.empty((rows, columns), np.uint8)
            self.exponents = np.empty((groups, columns), np.uint8)


class Shelf:
    """Matrices that were read whole, because their elements lie in another order than they are asked for in: as many as
    threads read, the last ones. Threads share a matrix where they read the same."""

    def __init__(self) -> None:
        self.desk = Desk()
        self._lock = threading.Lock()
        self._threads: set[int] = set()
        self._kept: OrderedDict[Any, Matrix] = OrderedDict()

    @contextmanager
    def matrix(self, key: Any, make: Callable[[Matrix], None]) -> Iterator[Matrix]:
        """A matrix, made if it is not here; it stays as long as it is used."""
        with self._lock:
            self._threads.add(threading.get_ident())
            if key not in self._kept:
                idle = [old for old, one in self._kept.items() if not one.users]
                full = len(self._kept) >= len(self._threads)
                # Its memory is used again: finding pages for a new one takes four times as long as making it.
                found = self._kept.pop(idle[0]) if idle and full else Matrix()
                found.made = False
                self._kept[key] = found
            found = self._kept[key]
            found.users += 1
            self._kept.move_to_end(key)
        try:
            with found.lock:
                if not found.made:
                    make(found)
                    found.made = True
            yield found
        finally:
            with self._lock:
                found.users -= 1


@dataclass(frozen=True, eq=False)
class Flipped(Coded):
    """Matrices that were packed down their columns: (e, n, g, b) bytes of two codes each -> (e, 2 g b, n).

    Attributes:
        blocks: the codes, the first of two in the lower bits.
        scales: (e, n, g) powers of two, one for 2 b codes.
        shape: (e, n, g, b).
        shelf: where matrices are kept that were read.
    """

    blocks: Source
    scales: TensorInfo
    shape: tuple[int, int, int, int]
    shelf: Shelf

    def _decode(self, start: int, raw: Bytes) -> None:
        size, dtype, (_, n, g, b) = self.stored.dtype.itemsize, self.stored.dtype, self.shape
        matrix = 2 * g * b * n
        done, end = start, start + raw.nbytes // size
        while done < end:
            expert, begin = divmod(done, matrix)
            stop = min(end, done + TILES, (expert + 1) * matrix)
            part = raw[(done - start) * size : (stop - start) * size]
            direct = dtype.name == "BF16" and part.ctypes.data % 2 == 0
            words = part.view(np.uint16) if direct else np.empty(stop - done, np.uint16)
            with self.shelf.matrix((id(self), expert), partial(self._read, expert)) as found:
                kernels.flipped_bf16(
                    found.pairs, formulas.E2M1, formulas.POWERS, found.exponents, found.strange, 2 * b, begin, words
                )
            if not direct:  # BF16 holds every product of these codes and powers of two, but for the smallest
                rounded = np.empty(part.nbytes, np.uint8)
                narrow((words.astype(np.uint32) << 16).view(np.float32), dtype, rounded)
                part[...] = rounded
            done = stop

    def _read(self, expert: int, matrix: Matrix) -> None:
        """One matrix, with its columns as rows: (g b, n) pairs, and (g, n) exponents."""
        _, n, g, b = self.shape
        rows, room = self.shelf.desk.room("rows", n * g * b), self.shelf.desk.room
        padded = -(-g // 8) * 8  # whole words of exponents
        matrix.room(g * b, padded, n)
        self.blocks.read_into(rows, expert * n * g * b)
        _flip(rows.reshape(n, g * b), matrix.pairs)
        exponents = room("exponents", n * padded).reshape(n, padded)
        exponents[:, :g], exponents[:, g:] = self._exponents(expert * n, n), 127
        _flip(exponents, matrix.exponents)
        low, high = matrix.exponents.min(axis=1), matrix.exponents.max(axis=1)
        matrix.strange = ((low < 2) | (high > 252)).astype(np.uint8)

    def _exponents(self, row: int, many: int) -> Bytes:
        """(many, g) uint8."""
        g = self.shape[2]
        found = read_part(self.scales, g, (row, row + many), (0, g))
        if found.size and found.max() == 255:
            refuse_impossible(formulas.powers(found), self.scales.name, self.stored.name)
        return found.reshape(many, g)

    def _sampled(self) -> tuple[float, float]:
        _, _, g, b = self.shape
        widths, error, square = formulas.cells(formulas.E2M1), 0.0, 0.0
        rows = self.shape[0] * self.shape[1]
        many = min(rows, max(1, SAMPLED_ELEMENTS // max(1, 2 * g * b)))
        for start in dict.fromkeys(i * (rows - many) // (SAMPLED - 1) for i in range(SAMPLED if rows else 0)):
            raw = np.empty(many * g * b, np.uint8)
            self.blocks.read_into(raw, start * g * b)
            scales = np.repeat(formulas.powers(self._exponents(start, many).reshape(-1)), 2 * b)
            codes = formulas.nibbles(raw, False)
            square += float(np.square(formulas.E2M1[codes] * scales, dtype=np.float64).sum())
            error += float(np.square(widths[codes] * scales, dtype=np.float64).sum()) / 12
        return error, square


def _flip(rows: Bytes, out: Bytes) -> None:
    """(n, m) uint8 -> `out`, (m, n): its transpose."""
    if rows.shape[0] % 8 or rows.shape[1] % 8:
        np.copyto(out, rows.T)
    else:
        kernels.flip(rows.view("<u8"), out.view("<u8"))


def sampled_at(count: int, within: int) -> list[tuple[int, int]]:
    """(start, count) of a few ranges of a tensor, each within one of the matrices of so many elements."""
    if not count:
        return []
    starts = dict.fromkeys(i * max(0, count - SAMPLED_ELEMENTS) // (SAMPLED - 1) for i in range(SAMPLED))
    return [(start, min(SAMPLED_ELEMENTS, within - start % within, count - start)) for start in starts]


def read_elements(decode: Callable[[int, Bytes], None], buffer: Bytes, offset: int, size: int) -> None:
    """Have whole elements of so many bytes decoded, and take a range of bytes of them."""
    first, last = offset // size, -(-(offset + buffer.nbytes) // size)
    if first * size == offset and (last - first) * size == buffer.nbytes:
        decode(first, buffer)
    else:  # nobody's hot path
        whole = np.empty((last - first) * size, np.uint8)
        decode(first, whole)
        buffer[...] = whole[offset - first * size :][: buffer.nbytes]


def named(parts: Sequence[tuple[str, TensorInfo | None]]) -> dict[str, TensorInfo]:
    """Those parts that are there."""
    return {role: info for role, info in parts if info is not None}
