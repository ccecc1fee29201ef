# SPDX-License-Identifier: Apache-2.0
"""Merge methods that read statistics, cut into tiles: Fishers are streamed beside the models, and of Grams only the
sum of one layer is in memory. What they compute is defined in `darekit.methods.informed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from darekit import kernels
from darekit.dtypes import Bytes, Floats
from darekit.engine.costs import columns_of
from darekit.engine.steps import Input, Merge
from darekit.errors import DataError
from darekit.methods import MERGE_METHODS
from darekit.methods.informed import NormalEquations, fisher, shares_of

Read = Callable[[Input, int, int, Bytes], Bytes]  # input, first element, elements, buffer -> the bytes that it has

Combine = Callable[[Floats, Floats, int], Floats]  # deltas (K, n), scratch (n,), first element -> merged (n,)


def informed_combiner(step: Merge, read: Read) -> Combine:
    """The step's merge method with its constants and its statistics."""
    return RegMeanTiles(step, read) if MERGE_METHODS[step.method].statistics == "gram" else FisherTiles(step, read)


class FisherTiles:
    """`fisher`, element by element. A model with fewer rows than the step has a Fisher of 0 in those it lacks."""

    def __init__(self, step: Merge, read: Read) -> None:
        self.step, self.read = step, read
        self.weights, self.sizes = np.array(step.weights, np.float64), np.array(step.sizes, np.float64)

    def __call__(self, deltas: Floats, merged: Floats, start: int) -> Floats:
        """One tile: see `Combine`."""
        step, count = self.step, deltas.shape[1]
        fishers = np.zeros(deltas.shape, deltas.dtype)
        for k, entry in enumerate(step.statistics):
            raw = self.read(entry, step.begin + start, count, np.empty(count * entry.dtype.itemsize, np.uint8))
            values = fishers[k, : raw.size // entry.dtype.itemsize]
            kernels.widen(raw, entry.dtype, values)
            if not (np.isfinite(values).all() and values.min(initial=0) >= 0):
                raise DataError(
                    f"the Fisher of {step.name}, model {step.owners[k]} of the recipe (counted from 0), has NaN, Inf "
                    "or negative values; recreate it with `dare stats fisher`"
                )
        result: Floats = fisher(deltas, self.weights, fishers, self.sizes, **step.parameters)
        return result


class RegMeanTiles:
    """`regmean`, some rows at a time; the sum of the Grams is factorised before the first."""

    def __init__(self, step: Merge, read: Read) -> None:
        self.step, self.read = step, read
        self.equations: NormalEquations | None = None

    def __call__(self, deltas: Floats, merged: Floats, start: int) -> Floats:
        """One tile: see `Combine`."""
        step, columns = self.step, columns_of(self.step)
        if not columns or not deltas.size:
            return merged
        try:
            if self.equations is None:
                self.equations = self._prepare(columns)
            if step.transposed:
                whole = deltas.reshape(len(deltas), columns, -1).transpose(0, 2, 1)
                return np.ascontiguousarray(self.equations.solve(whole).T).reshape(-1)
            return self.equations.solve(deltas.reshape(len(deltas), -1, columns)).reshape(-1)
        except DataError as error:
            raise DataError(f"{step.name}: {error}") from None

    def _prepare(self, columns: int) -> NormalEquations:
        step, parameters = self.step, self.step.parameters
        weights, sizes = np.array(step.weights, np.float64), np.array(step.sizes, np.float64)
        return NormalEquations.of(
            [GramRows(entry, columns, self.read) for entry in step.statistics],
            shares_of(weights, sizes, normalize=parameters["normalize"]),
            weights,
            off_diagonal=parameters["off_diagonal"],
            ridge=parameters["ridge"],
        )


@dataclass(frozen=True)
class GramRows:
    """A Gram that lies in a file: a slice of its rows is read when it is asked for."""

    entry: Input
    columns: int
    read: Read

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.columns, self.columns

    def __getitem__(self, rows: slice) -> Floats:
        count = (rows.stop - rows.start) * self.columns
        itemsize = self.entry.dtype.itemsize
        raw = self.read(self.entry, rows.start * self.columns, count, np.empty(count * itemsize, np.uint8))
        values: Floats = np.empty(count, np.float64 if itemsize == 8 else np.float32)
        kernels.widen(raw, self.entry.dtype, values)
        return values.reshape(-1, self.columns)
