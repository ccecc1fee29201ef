# SPDX-License-Identifier: Apache-2.0
"""A tensor with an adapter on it: computed from the base's bytes and two thin factors, a range at a time."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from darekit import kernels
from darekit.checkpoints import Delta, TensorInfo, Traits, traits_of
from darekit.checkpoints.checkpoint import content_of
from darekit.checkpoints.sources import refuse_outside
from darekit.dtypes import Bytes, DType, Floats, dtype_named, widen
from darekit.errors import DataError
from darekit.inputs.adapters import products
from darekit.inputs.adapters.products import Array, Pair
from darekit.kernels.products import add_low_rank_bf16, low_rank_into

TAG = b"darekit-adapter-1\0"  # frozen: seeds depend on it, see `AdaptedSource.identity`

KEPT = 32 << 20  # bytes of factors that stay in memory, at least two tensors'


@dataclass(frozen=True)
class Put:
    """Where a product lies in a tensor of (E, R, C) `matrices`: rows from `begin` on of one `matrix`."""

    matrices: tuple[int, int, int]
    matrix: int
    begin: int


@dataclass(frozen=True)
class Term:
    """One product.

    Attributes:
        a, b: the factors, as stored; without `a` the term is `b` itself, of a bias.
        scale: what the product is multiplied by.
        swap: the tensor is stored as the product's transpose.
        flipped: the factors themselves are stored transposed (mlx).
        experts: how many there are in each factor; 0: it is of one matrix.
        slow: in B, the expert is the slow index.
        take: of its matrices one, and of that the rows from .. to: the rest of it is another tensor's.
        put: where it lies in the tensor; None: it is all of it.
    """

    a: TensorInfo | None
    b: TensorInfo
    scale: float
    swap: bool = False
    flipped: bool = False
    experts: int = 0
    slow: bool = False
    take: tuple[int, int, int] | None = None
    put: Put | None = None

    @property
    def factors(self) -> tuple[TensorInfo, ...]:
        """What is stored."""
        return (self.b,) if self.a is None else (self.a, self.b)

    def pair(self) -> Pair:
        """Left and right factor, float32.

        Raises:
            DataError: a factor has NaN or Inf.
        """
        arrays = [finite_values(info) for info in self.factors]
        if self.flipped:
            arrays = [one.T for one in arrays]
        if self.a is None:
            found = products.bias(*arrays)
        elif self.experts:
            found = products.experts(arrays[0], arrays[1], self.experts, slow=self.slow)
        else:
            found = products.linear(arrays[0], arrays[1])
        if self.swap:
            found = products.swapped(found)
        if self.take is not None:
            found = products.taken(found, *self.take)
        return products.scaled(found, self.scale)

    def told(self) -> list[object]:
        """What the identity says of it."""
        return [
            self.scale.hex(), self.swap, self.flipped, self.experts, self.slow, self.take,
            None if self.put is None else [self.put.matrices, self.put.matrix, self.put.begin],
            [[one.dtype, list(one.shape), content_of(one).hex()] for one in self.factors],
        ]  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor.

    Attributes:
        matrices: (E, R, C): how many matrices the tensor is, and their rows and columns.
        terms: products that are added.
        whole: takes the tensor's place, before anything is added.
        rows: numbers of rows, and the tensor of what takes their place.
        magnitude: DoRA's, one for each row, or (`columns`) for each column.
    """

    matrices: tuple[int, int, int]
    terms: tuple[Term, ...] = ()
    whole: TensorInfo | None = None
    rows: tuple[tuple[int, ...], TensorInfo] | None = None
    magnitude: TensorInfo | None = None
    columns: bool = False

    @property
    def is_sum(self) -> bool:
        """Whether something is added to the tensor, and nothing else is done to it."""
        return self.whole is None and self.rows is None and self.magnitude is None

    def shape_stays(self, shape: tuple[int, ...]) -> bool:
        """Whether the tensor has as many elements as the base's, of this shape."""
        return math.prod(self.matrices) == math.prod(shape)

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """All that is read of the adapter."""
        rows = (self.rows[1],) if self.rows else ()
        others = tuple(one for one in (self.whole, self.magnitude) if one is not None)
        return (*(one for term in self.terms for one in term.factors), *rows, *others)

    def told(self) -> list[object]:
        """What the identity says of it."""

        def of(info: TensorInfo | None) -> list[object] | None:
            return None if info is None else [info.dtype, list(info.shape), content_of(info).hex()]

        rows = None if self.rows is None else [list(self.rows[0]), of(self.rows[1])]
        return [[term.told() for term in self.terms], of(self.whole), rows, of(self.magnitude), self.columns]


def finite_values(info: TensorInfo) -> Array:
    """All of a tensor of an adapter, as float32.

    Raises:
        DataError: it has NaN or Inf.
    """
    found = values_of(info)
    if not np.isfinite(found).all():
        bad = int(found.size - np.count_nonzero(np.isfinite(found)))
        raise DataError(
            f"{info.name} of an adapter has {bad} values that are NaN or Inf: the training diverged, or the file is "
            "damaged; use an earlier checkpoint"
        )
    return found


def values_of(info: TensorInfo) -> Array:
    """All of a tensor, as float32."""
    dtype = dtype_named(info.dtype)
    raw = np.empty(info.nbytes, np.uint8)
    info.source.read_into(raw, 0)
    if dtype.name == "F64":
        return raw.view(np.float64).astype(np.float32).reshape(info.shape)
    values: Array = np.empty(info.count, np.float32)
    widen(raw, dtype, values)  # numpy's: factors are small, and numba takes longer to come
    return values.reshape(info.shape)


def refuse_nonfinite(tensors: Iterable[TensorInfo], ref: str) -> None:
    """Look at all values of an adapter; it is small beside a model.

    Raises:
        DataError: some are NaN or Inf.
    """
    wrong = {}
    for info in tensors:
        values = values_of(info)
        bad = int(values.size - np.count_nonzero(np.isfinite(values)))
        if bad:
            wrong[info.name] = bad
    if wrong:
        told = "; ".join(f"{name}: {count} values" for name, count in list(wrong.items())[:3])
        raise DataError(
            f"{ref} has NaN or Inf in {len(wrong)} of its tensors ({told}): the training diverged, or the file is "
            "damaged; use an earlier checkpoint"
        )


def is_idle(changes: Iterable[Change]) -> bool:
    """Whether an adapter changes nothing: it only adds products, and every factor B is 0."""
    changes = list(changes)
    if not all(change.is_sum for change in changes):
        return False
    factors = (term.b for change in changes for term in change.terms)
    return not any(bool(values_of(info).any()) for info in factors)


class Shelf:
    """Factors in memory, those used last; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[int, tuple[object, object, int]] = OrderedDict()

    def get(self, owner: object, make: Callable[[], tuple[object, int]]) -> object:
        """What `make` made for this owner, or makes now: it, and its bytes."""
        with self._lock:
            if id(owner) in self._found:
                self._found.move_to_end(id(owner))
                return self._found[id(owner)][1]
        found, nbytes = make()
        with self._lock:
            self._found[id(owner)] = owner, found, nbytes
            while len(self._found) > 2 and sum(entry[2] for entry in self._found.values()) > KEPT:
                self._found.popitem(last=False)
        return found


@dataclass(frozen=True, eq=False)
class AdaptedSource:
    """A tensor with an adapter on it.

    Attributes:
        base: the tensor that the adapter is on; where `change.whole` has another shape or there is none, only its
            number format counts.
        shape: of this tensor.
        change: what the adapter does to it.
        shelf: where factors are kept.
    """

    base: TensorInfo
    shape: tuple[int, ...]
    change: Change
    shelf: Shelf = field(repr=False)
    _own: dict[str, Array] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __repr__(self) -> str:
        return f"<AdaptedSource: {self.base.name}>"

    @cached_property
    def _dtype(self) -> DType:
        return dtype_named(self.base.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self._dtype.itemsize

    @cached_property
    def traits(self) -> Traits:
        """The adapter's files beside what the base needs; the exact delta, where something is added and nothing else
        done; the exact values, in any case."""
        base, change = traits_of(self.base.source), self.change
        stored = (traits_of(one.source) for one in change.stored)
        read = sum(one.nbytes for one in change.stored) / max(1, self.nbytes)
        reads_base = change.whole is None
        files = (*(base.files if reads_base else ()), *(file for one in stored for file in one.files))
        narrow = self._dtype.name != "F64"
        return Traits(
            files=tuple(dict.fromkeys(files)),
            identity=self.identity,
            seed=base.seed if reads_base else None,
            grain=base.grain if reads_base else 1,
            delta=self._delta if narrow else None,
            values=self.values_into if narrow else None,
            cost=(base.cost if reads_base else 0.0) + read,
            ordered=base.ordered and reads_base,
        )

    @property
    def identity(self) -> bytes:
        """16 bytes, for sample digests: BLAKE2b over `TAG`, and as JSON what the base's sample is and what the adapter
        does: scales as hexadecimal numbers, factors by number format, shape and their own samples. Frozen."""
        base = None if self.change.whole is not None else content_of(self.base).hex()
        told = [base, self.base.dtype, list(self.change.matrices), self.change.told()]
        text = json.dumps(told, separators=(",", ":"))
        return hashlib.blake2b(TAG + text.encode(), digest_size=16).digest()

    @cached_property
    def _delta(self) -> Delta | None:
        """Relative to what the base itself is relative to, where it is an adapted tensor too; None where this or that
        is more than a sum."""
        traits = traits_of(self.base.source)
        below = traits.delta
        if not self.change.is_sum or (below is None and traits.values is not None):
            return None
        if below is None:
            return Delta(self.base.source, self.product_into)

        def both(part: Array, start: int) -> None:
            below.read_into(part, start)
            own = np.empty_like(part)
            self.product_into(own, start)
            part += own

        return Delta(below.base, both)

    # Values

    def product_into(self, part: Array, start: int) -> None:
        """(n,) float32, filled with the product's elements from number `start` of the flattened tensor on."""
        if not self.change.terms:
            part[...] = 0
            return
        left, right = self._pair()
        size = self.change.matrices[1] * self.change.matrices[2]
        done = 0
        while done < part.size:
            matrix, at = divmod(start + done, size)
            count = min(size - at, part.size - done)
            low_rank_into(left[matrix], right[matrix], at, part[done : done + count])
            done += count

    def values_into(self, part: Array, start: int) -> None:
        """(n,) float32, filled with the tensor's elements from number `start` on, as they are before any rounding."""
        if self._delta is not None:
            read_values(replace(self.base, source=self._delta.base), part, start)
            own = np.empty_like(part)
            self._delta.read_into(own, start)
            part += own
            return
        self._start_into(part, start)
        if self.change.terms:
            own = np.empty_like(part)
            self.product_into(own, start)
            part += own
        if self.change.magnitude is not None:
            part *= self._along(self._factors(), start, part.size)

    def _start_into(self, part: Array, start: int) -> None:
        """What is added to: the base's elements, or what takes their place."""
        if self.change.whole is not None:
            read_values(self.change.whole, part, start)
        else:
            exact = traits_of(self.base.source).values
            if exact is not None:
                exact(part, start)
            else:
                read_values(self.base, part, start)
        if self.change.rows is not None:
            self._put_rows(part, start)

    def _put_rows(self, part: Array, start: int) -> None:
        assert self.change.rows is not None
        numbers, info = self.change.rows
        width = self.change.matrices[2]
        values = self._kept("rows", lambda: (found := finite_values(info), found.nbytes))
        for row, own in zip(numbers, values, strict=True):
            begin, end = max(start, row * width), min(start + part.size, (row + 1) * width)
            if begin < end:
                part[begin - start : end - start] = own[begin - row * width : end - row * width]

    def _pair(self) -> Pair:
        def make() -> tuple[object, int]:
            pairs = [(term.pair(), term.put) for term in self.change.terms]
            puts = [(pair, put.matrix, put.begin) for pair, put in pairs if put is not None]
            pair = products.put_together(puts, self.change.matrices) if puts else products.joined([p for p, _ in pairs])
            pair = np.ascontiguousarray(pair[0]), np.ascontiguousarray(pair[1])
            return pair, pair[0].nbytes + pair[1].nbytes

        found: Pair = self.shelf.get(self, make)  # type: ignore[assignment]
        return found

    def pair(self) -> Pair:
        """The factors of what is added, float32."""
        return self._pair()

    # DoRA

    def _along(self, factors: Array, start: int, count: int) -> Array:
        """One factor for each of some elements; `factors`: of rows or columns."""
        _, _, width = self.change.matrices
        at = np.arange(start, start + count)
        return factors[at % width if self.change.columns else at // width]

    def _factors(self) -> Array:
        """(R,) or (C,) float32: magnitude / norm of what it is the magnitude of."""
        found: Array = self._kept("factors", self._make_factors)
        return found

    def _make_factors(self) -> tuple[Array, int]:
        """One pass over the tensor; sums of squares in float64, row by row."""
        assert self.change.magnitude is not None
        _, rows, width = self.change.matrices
        squares = np.zeros(width if self.change.columns else rows, np.float64)
        many = max(1, 65536 // max(1, width))
        for row in range(0, rows, many):
            part: Array = np.empty(min(many, rows - row) * width, np.float32)
            self._start_into(part, row * width)
            own = np.empty_like(part)
            self.product_into(own, row * width)
            block = (part + own).reshape(-1, width).astype(np.float64)
            block *= block
            if self.change.columns:
                for one in block:
                    squares += one
            else:
                squares[row : row + len(block)] = block.sum(axis=1)
        magnitude = finite_values(self.change.magnitude).reshape(-1).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            factors = (magnitude / np.sqrt(squares)).astype(np.float32)
        if not np.isfinite(factors).all():
            raise DataError(
                f"{self.base.name}: DoRA divides by the norm of each row of the base plus the product, and one "
                "of them is 0 or not finite: the adapter does not belong to this base"
            )
        return factors, factors.nbytes

    def _kept(self, what: str, make: Callable[[], tuple[Array, int]]) -> Array:
        with self._lock:
            if what not in self._own:
                self._own[what] = make()[0]
            return self._own[what]

    # Bytes

    def read_into(self, buffer: Bytes, offset: int) -> None:
        """(n,) uint8, filled with the n bytes that begin at byte `offset` of the tensor, rounded to its format."""
        refuse_outside(buffer, offset, self.nbytes)
        size = self._dtype.itemsize
        first, last = offset // size, -(-(offset + buffer.nbytes) // size)
        if first * size != offset or (last - first) * size != buffer.nbytes or buffer.ctypes.data % size:
            whole = np.empty((last - first) * size, np.uint8)
            if whole.size:
                self.read_into(whole, first * size)
            buffer[...] = whole[offset - first * size :][: buffer.nbytes]
            return
        for at in range(first, last, CHUNK):
            count = min(CHUNK, last - at)
            self._round_into(buffer[(at - first) * size : (at - first + count) * size], at, count)

    def _round_into(self, out: Bytes, start: int, count: int) -> None:
        number = np.float64 if self._dtype.name == "F64" else np.float32
        change: Array = np.empty(count, np.float32)
        if self._delta is None:
            self.values_into(change, start)
            self._refuse(kernels.round_to(change.astype(number, copy=False), self._dtype, out))
            return
        raw = np.empty_like(out)
        self._delta.base.read_into(raw, start * self._dtype.itemsize)
        if self._dtype.name == "BF16" and self._delta.base is self.base.source and self._in_one(start, count):
            (left, right), size = self._pair(), self.change.matrices[1] * self.change.matrices[2]
            matrix, at = divmod(start, size)
            work: Array = np.empty((2, count), np.float32)
            words = raw.view(np.uint16), left[matrix], right[matrix], at, out.view(np.uint16), work
            self._refuse(add_low_rank_bf16(*words))
            return
        base: Floats = np.empty(count, number)
        kernels.widen(raw, self._dtype, base)
        self._delta.read_into(change, start)
        change = change.astype(number, copy=False)
        self._refuse(kernels.add_round(raw, self._dtype, base, change, 1.0, self._dtype, out))

    def _in_one(self, start: int, count: int) -> bool:
        """Whether a range lies in one of the matrices."""
        size = self.change.matrices[1] * self.change.matrices[2]
        return start // size == (start + count - 1) // size

    def _refuse(self, overflowed: int) -> None:
        if overflowed:
            raise DataError(
                f"{self.base.name}: with the adapter on it {overflowed} values do not fit {self._dtype.torch_name}"
            )


CHUNK = 65536  # elements that are rounded at once


def read_values(info: TensorInfo, part: npt.NDArray[np.float32], start: int) -> None:
    """(n,) float32, filled with a stored tensor's elements from number `start` on."""
    dtype = dtype_named(info.dtype)
    raw = np.empty(part.size * dtype.itemsize, np.uint8)
    info.source.read_into(raw, start * dtype.itemsize)
    if dtype.name == "F64":
        part[...] = raw.view(np.float64)
    else:
        widen(raw, dtype, part)
