# SPDX-License-Identifier: Apache-2.0
"""Deltas become factors: a module at a time in each thread, rounded, measured, and put into a spool.

A thread has BLAS to itself: how BLAS cuts a product depends on its threads, and with it the last bits. So the factors
depend on no number of threads.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from darekit import kernels
from darekit.dtypes import Bytes, DType, dtype_named
from darekit.errors import DataError, OutputError
from darekit.extraction import factors
from darekit.extraction.cores import Cores
from darekit.extraction.deltas import Reader
from darekit.extraction.factors import Doubles, Factors, Matrix
from darekit.extraction.modules import LeftOut, Saved
from darekit.extraction.plan import ExtractPlan, Terms
from darekit.extraction.targets import Target
from darekit.packs.workers import run_all

Place = tuple[int, tuple[int, ...]]  # of a factor in the spool: its first byte, and its shape in the file


@dataclass(frozen=True)
class Module:
    """A module's factors, as they are stored.

    Attributes:
        target: the module.
        rank: of its factors; 0: its delta is 0.
        square: ||delta||^2.
        lost: ||delta - B A||^2, of the rounded factors.
        a, b: where they lie.
        turned: those of the modules that have a table's values as their weight: the same product, transposed.
    """

    target: Target
    rank: int
    square: float
    lost: float
    a: Place
    b: Place
    turned: tuple[Place, Place] | None = None


@dataclass(frozen=True)
class Whole:
    """A tensor that is no module's: ||delta||^2; None: the base does not have it."""

    square: float | None


@dataclass(frozen=True)
class Extracted:
    """What an extraction found, in the plan's order."""

    modules: tuple[Module, ...]
    saved: tuple[tuple[Saved, Whole], ...]
    left_out: tuple[tuple[LeftOut, Whole], ...]


class Spool:
    """A file without a name: bytes are put at its end, and read from anywhere."""

    def __init__(self, folder: Path) -> None:
        path = folder / "factors"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._path: Path | None = path
        if os.name != "nt":  # there a file that is open cannot go
            path.unlink()
            self._path = None
        self._file = os.fdopen(self._fd, "r+b", buffering=0)
        self._lock = threading.Lock()
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is left of it."""
        self._file.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None

    def put(self, raw: Bytes) -> int:
        """(n,) uint8 -> where they begin.

        Raises:
            OutputError: the disk is full.
        """
        with self._lock:
            begin = self._end
            view, done = raw.data, 0
            try:
                self._file.seek(begin)
                while done < len(view):
                    done += self._file.write(view[done:]) or 0
            except OSError as error:
                raise OutputError(f"factors cannot be written beside the output: {error.strerror or error}") from error
            self._end += raw.size
            return begin

    def get(self, begin: int, raw: Bytes) -> None:
        """(n,) uint8, filled with the bytes from `begin` on."""
        with self._lock:
            self._file.seek(begin)
            done, view = 0, raw.data
            while done < len(view):
                done += self._file.readinto(view[done:]) or 0


def run(plan: ExtractPlan, spool: Spool, *, progress: Callable[[int, int], None] | None = None) -> Extracted:
    """All modules and tensors of a plan.

    Raises:
        DataError: NaN or Inf in an input, or a factor that its format cannot hold.
    """
    reader, cores = Reader(plan.model.ref), Cores(approximate=plan.terms.in_cores)
    found, picked = Results(), plan.selection
    others: list[Saved | LeftOut] = [*picked.saved, *picked.left_out]
    jobs: list[Callable[[], int]] = [
        *(_factorise(target, plan, reader, cores, spool, found) for target in sorted(picked.targets, key=_size)),
        *(_measure(one, reader, found) for one in others),
    ]
    total = sum(target.count for target in picked.targets) + sum(map(_elements, others))

    def tell(done: int) -> None:
        if progress:
            progress(done, total)

    with threadpool_limits(limits=1, user_api="blas"):
        run_all(jobs, lambda job: job(), threads=plan.threads, tell=tell)
    return Extracted(
        tuple(found.modules[target.name] for target in picked.targets),
        tuple((one, found.wholes[one.tensor.name]) for one in picked.saved),
        tuple((one, found.wholes[one.tensor.name]) for one in picked.left_out),
    )


class Results:
    """What threads found, by name."""

    def __init__(self) -> None:
        self.modules: dict[str, Module] = {}
        self.wholes: dict[str, Whole] = {}


def _size(target: Target) -> tuple[int, str]:
    return -target.count, target.name


def _elements(one: Saved | LeftOut) -> int:
    return math.prod(one.tensor.shape)


def _measure(one: Saved | LeftOut, reader: Reader, found: Results) -> Callable[[], int]:
    def work() -> int:
        known = one.tensor.base is not None and one.tensor.models[0] is not None
        found.wholes[one.tensor.name] = Whole(reader.square(one.tensor) if known else None)
        return _elements(one)

    return work


def _factorise(
    target: Target, plan: ExtractPlan, reader: Reader, cores: Cores, spool: Spool, found: Results
) -> Callable[[], int]:
    def work() -> int:
        try:
            found.modules[target.name] = factorise(target, plan.terms, reader, cores, spool)
        except np.linalg.LinAlgError as error:
            raise DataError(
                f"{target.name}: its singular values cannot be computed ({error}); with rank they are not needed"
            ) from error
        return target.count

    return work


def factorise(target: Target, terms: Terms, reader: Reader, cores: Cores, spool: Spool) -> Module:
    """One module: its matrices one after another; experts of one parameter get one rank, the largest of theirs."""
    dtype = dtype_named(terms.dtype)
    made: list[Factors] = []
    square = lost = 0.0
    for expert in range(len(target.matrices)):
        delta = cores.of(target, expert) or Full.of(target, expert, reader)
        own = delta.square()
        one = factors_of(delta, own, terms, dtype)
        square += own
        lost += delta.residual(one) if one.rank else own
        made.append(one)
        del delta
    rank = max(one.rank for one in made)
    out, inner = target.shape
    many = len(made)
    if target.parameter is None:
        b, a = made[0].b, made[0].a
    else:
        # As PEFT has them: of A the experts are the slow index, of B the fast one.
        b = np.zeros((out, rank, many), np.float32)
        a = np.zeros((many, rank, inner), np.float32)
        for expert, one in enumerate(made):
            b[:, : one.rank, expert], a[expert, : one.rank] = one.b, one.a
        b, a = b.reshape(out, rank * many), a.reshape(many * rank, inner)
    turned = (b.T, a.T) if target.heads else None
    if target.kernel:  # the kernel is that of A; B is one by one
        a, b = a.reshape(rank, *target.kernel), b.reshape(out, rank, *(1 for _ in target.kernel[1:]))

    def put(values: npt.NDArray[np.float32]) -> Place:
        return spool.put(_raw(values, dtype, target)), values.shape

    return Module(
        target, rank, square, lost, put(a), put(b), None if turned is None else (put(turned[0]), put(turned[1]))
    )


class Delta(Protocol):
    """A matrix that is to become factors, whether all of it is in memory or not."""

    def of_rank(self, rank: int) -> Factors:
        """Its factors of a rank, or of its own where that is less."""

    def decomposed(self) -> tuple[Factors, Doubles]:
        """Its factors of full rank, and its singular values."""

    def square(self) -> float:
        """The square of its norm."""

    def residual(self, found: Factors) -> float:
        """The square of what factors lack."""


@dataclass(frozen=True)
class Full:
    """A whole matrix, (out, in) float32, and the square of its norm. `key`: of the random matrix that finds its
    range."""

    matrix: Matrix
    norm: float
    key: int

    @staticmethod
    def of(target: Target, expert: int, reader: Reader) -> Full:
        """One of a module's matrices, read."""
        stored, norm = reader.matrix(target.matrices[expert])
        return Full(stored.T if target.transposed else stored, norm, factors.key_of(f"{target.name}.{expert}"))

    def of_rank(self, rank: int) -> Factors:
        """Its factors of a rank, or of its own where that is less."""
        return factors.of_rank(self.matrix, rank, self.key)

    def decomposed(self) -> tuple[Factors, Doubles]:
        """Its factors of full rank, and its singular values."""
        return factors.everything(self.matrix)

    def square(self) -> float:
        """The square of its norm."""
        return self.norm

    def residual(self, found: Factors) -> float:
        """The square of what factors lack."""
        return factors.residual(self.matrix, found)


def factors_of(delta: Delta, square: float, terms: Terms, dtype: DType) -> Factors:
    """A delta and the square of its norm -> its factors under these terms, with the values that they have once they
    are stored."""
    if not square:
        return delta.of_rank(1)
    if terms.rank is not None:
        return _rounded(delta.of_rank(terms.rank), dtype)
    assert terms.share is not None
    whole, values = delta.decomposed()
    most = min(whole.rank, terms.max_rank or whole.rank)
    rank = min(most, factors.rank_of_energy(values, terms.share))
    # What is kept is what is stored: where rounding the factors costs the rest of the budget, the rank grows.
    budget = (1 - terms.share) * square
    found = _rounded(whole.cut(rank), dtype)
    while rank < most and delta.residual(found) > budget:
        rank = min(most, rank + max(1, rank // 16))
        found = _rounded(whole.cut(rank), dtype)
    return found


def _rounded(found: Factors, dtype: DType) -> Factors:
    if dtype.name == "F32":
        return found
    return Factors(*(_widened(_raw(one, dtype, None), dtype, one.shape) for one in (found.b, found.a)))


def _widened(raw: Bytes, dtype: DType, shape: Sequence[int]) -> Matrix:
    values = np.empty(math.prod(shape), np.float32)
    kernels.widen(raw, dtype, values)
    return values.reshape(*shape)


def _raw(values: npt.NDArray[np.float32], dtype: DType, target: Target | None) -> Bytes:
    flat = np.ascontiguousarray(values).reshape(-1)
    if dtype.name == "F32":
        return flat.view(np.uint8)
    raw = np.empty(flat.size * dtype.itemsize, np.uint8)
    if kernels.round_to(flat, dtype, raw):
        where = f"{target.name}: " if target else ""
        raise DataError(f"{where}a factor is too large for {dtype.torch_name}; use float32 or bfloat16")
    return raw
