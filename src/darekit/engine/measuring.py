# SPDX-License-Identifier: Apache-2.0
"""The measuring half of a merge: products of a tensor's rows -> coefficients, with which the merge is a weighted sum.

The rows are what the table of methods says: the models or their sparsified deltas, the base before them where it takes
part. Products are added up in float64, leaf by leaf, within a leaf by the element's index, and leaves in order, so that
threads, spans and tiles do not matter. What is measured and settled is an ordinary step: the second pass is the
engine's own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from darekit.checkpoints.digests import LEAF
from darekit.dtypes import Floats
from darekit.engine.fused import TILES
from darekit.engine.known import is_finer
from darekit.engine.steps import Merge
from darekit.errors import DataError
from darekit.kernels import cpu
from darekit.kernels.lanes import SUMS
from darekit.masks import BLOCK
from darekit.methods import MERGE_METHODS, SUM

if TYPE_CHECKING:
    from darekit.engine.tiles import StepRun

Doubles = npt.NDArray[np.float64]

COLUMNS = 1 << 16  # whose coefficients are found at once


@dataclass(frozen=True)
class Rows:
    """Which rows of a step are measured: `base` with them, their `deltas` or the models, `raw`: as they are stored."""

    base: bool
    deltas: bool
    raw: bool
    count: int

    @staticmethod
    def of(step: Merge) -> Rows:
        """As the step's method has it. Models with a stage in any chain are base + delta."""
        method = MERGE_METHODS[step.method]
        base, deltas = method.base_row and step.base is not None, method.products == "deltas" and step.base is not None
        raw = not deltas and (step.base is None or not any(step.chains))
        return Rows(base, deltas, raw, len(step.models) + base)

    @property
    def pairs(self) -> int:
        """How many products there are."""
        return self.count * (self.count + 1) // 2

    def assemble(self, base: Floats, deltas: Floats, *, values: bool) -> Floats:
        """(n,) base, (K, n) deltas (the models themselves, where `values`) -> the (R, n) rows."""
        rows = np.empty((self.count, deltas.shape[1]), deltas.dtype)
        if self.base:
            rows[0] = base
        own = rows[int(self.base) :]
        if self.deltas or values:
            own[...] = deltas
        else:
            np.add(base, deltas, out=own)
        return rows


class Products:
    """What adds up over elements begin .. end of a tensor; `begin` is the start of a leaf, and rows come in order."""

    def __init__(self, pairs: int, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self.sums: Doubles = np.zeros((pairs, SUMS))
        self.totals: Doubles = np.zeros((-(-(end - begin) // LEAF), pairs))

    def add(self, rows: Floats, start: int) -> None:
        """Take rows (R, n) of elements start .. start + n."""
        cpu.products(rows, rows.shape[1], start - self.begin, LEAF, self.sums, self.totals)

    def finish(self) -> Doubles:
        """(leaves, pairs), the last partial one included."""
        if (self.end - self.begin) % LEAF:
            self.totals[-1] = add_leaves(self.sums.T)  # as `add_up` does it
        return self.totals


def add_leaves(rows: Doubles) -> Doubles:
    """(n, pairs) -> their sum (pairs,), one after another."""
    with np.errstate(over="ignore", invalid="ignore"):
        total: Doubles = np.add.accumulate(rows, axis=0)[-1] if len(rows) else np.zeros(rows.shape[1])
    return total


def measure(run: StepRun, begin: int, end: int, stop: threading.Event) -> Doubles:
    """Elements begin .. end of a step -> the products of each of their leaves, (leaves, pairs).

    The chains' stages must be ready. Elements where a row is NaN or Inf count as 0: the pass that merges lists them.
    """
    step, rows = run.step, Rows.of(run.step)
    found = Products(rows.pairs, begin, end)
    for chain in run.chains:
        for stage in chain:
            stage.begin()
    fast = _is_fast(step)
    size = TILES * run.tile if fast else run.tile
    for start in range(begin, end, size):
        if stop.is_set() or run.hands.broken.is_set():
            break
        count = min(size, end - start)
        if fast and _add_bf16(run, rows, found, start, count):
            continue
        for at in range(start, start + count, run.tile):
            found.add(_load(run, rows, at, min(run.tile, start + count - at)), at)
    return found.finish()


def _is_fast(step: Merge) -> bool:
    inputs = step.inputs
    return not step.wide and not any(step.chains) and not any(map(is_finer, step.models)) and all(
        entry.dtype.name == "BF16" and entry.count >= step.begin + step.count for entry in inputs
    )  # fmt: skip


def _add_bf16(run: StepRun, rows: Rows, found: Products, start: int, count: int) -> bool:
    """Several tiles through the one kernel; False where a value is NaN or Inf, and nothing was added then."""
    step, many = run.step, len(run.step.models)
    base_raw, raws, _ = run.hands.scratch.raw_only(many, count)
    if step.base is not None and (rows.base or rows.deltas):
        run.read(step.base, step.begin + start, count, base_raw)
    for k, model in enumerate(step.models):
        run.read(model, step.begin + start, count, raws[k].view(np.uint8))
    at = start - found.begin
    totals = found.totals[at // LEAF : -(-(at + count) // LEAF)]
    before = found.sums.copy()
    bad = cpu.products_bf16(
        base_raw.view(np.uint16), raws, int(rows.base), int(rows.deltas), at % LEAF, LEAF, found.sums, totals,
        np.empty((many + 1, BLOCK), np.float32),
    )  # fmt: skip
    if bad:
        found.sums[...] = before
    return not bad


def measure_columns(run: StepRun, stop: threading.Event) -> Doubles:
    """All of a step, in order -> the products of each of its columns, (columns, pairs)."""
    step, rows = run.step, Rows.of(run.step)
    totals = np.zeros((rows.pairs, step.columns))
    for chain in run.chains:
        for stage in chain:
            stage.begin()
    for start in range(0, step.count, run.tile):
        if stop.is_set() or run.hands.broken.is_set():
            break
        cpu.products_by_column(_load(run, rows, start, min(run.tile, step.count - start)), start, totals)
    return totals.T


def _load(run: StepRun, rows: Rows, start: int, count: int) -> Floats:
    """The rows of one tile, the general way."""
    scratch = run.load(start, count, values=rows.raw, with_base=rows.base)
    for chain, delta in zip(run.chains, scratch.deltas, strict=True):
        for stage in chain:
            stage.apply(delta, start)
    assembled = rows.assemble(scratch.base, scratch.deltas, values=rows.raw)
    return without_bad(assembled, run.bad_at)


def without_bad(rows: Floats, bad_at: npt.NDArray[np.bool_] | None) -> Floats:
    """(R, n) rows in place: 0 where any of them, or `bad_at`, says NaN or Inf."""
    finite = np.isfinite(rows).all(axis=0)
    if bad_at is not None:
        finite &= ~bad_at
    rows[:, ~finite] = 0
    return rows


def coefficients(step: Merge, products: Doubles) -> Doubles:
    """(..., pairs) products -> (..., R) coefficients, by the step's method.

    Raises:
        DataError: float64 cannot hold a product.
    """
    method, rows = MERGE_METHODS[step.method], Rows.of(step)
    if not np.isfinite(products).all():
        raise DataError(f"{step.name}: the values are too large for {step.method}: their products overflow float64")
    upper = np.triu_indices(rows.count)
    matrix = np.empty((*products.shape[:-1], rows.count, rows.count))
    matrix[..., upper[0], upper[1]] = products
    matrix[..., upper[1], upper[0]] = products
    arguments = {name: step.parameters[name] for name in method.own_parameters}
    if method.weighted:
        arguments["weights"] = np.array(step.weights, np.float64)
    found: Doubles = method.function(matrix, **arguments)
    return found


def _parts(step: Merge, found: Doubles) -> tuple[Doubles, Doubles]:
    """(..., R) coefficients -> of the deltas, (..., K), and of the base in what is added to it, (...)."""
    rows = Rows.of(step)
    own = found[..., int(rows.base) :]
    if rows.deltas or step.base is None:
        return own, found[..., 0] if rows.base else np.zeros(found.shape[:-1])
    return own, found.sum(axis=-1) - 1  # sum c_k (base + delta_k) is base + (sum c_k - 1) base + sum c_k delta_k


def settled(step: Merge, leaves: Doubles) -> tuple[Merge, Doubles]:
    """A measured step, its leaves' products in order (leaves, pairs) -> the weighted sum that it is, and the rows'
    coefficients, (R,)."""
    found = coefficients(step, add_leaves(leaves))
    weights, base_weight = _parts(step, found)
    alone = len(step.models) == 1 and not any(step.chains) and step.models[0].count >= step.begin + step.count
    itself = step.factor == 1 and found.tolist() == [0.0, 1.0][-len(found) :]
    return replace(
        step, method=SUM, parameters={}, weights=tuple(map(float, weights)), base_weight=float(base_weight),
        verbatim=alone and itself,
    ), found  # fmt: skip


@dataclass(frozen=True)
class ByColumn:
    """A step whose columns have coefficients of their own, all of them known: those of the deltas, (K, columns), and of
    the base in what is added to it, (columns,)."""

    weights: Floats
    base_weight: Floats

    @staticmethod
    def of(step: Merge, products: Doubles) -> tuple[ByColumn, Doubles]:
        """A measured step, (columns, pairs) products -> how it is merged, and the coefficients, (columns, R)."""
        # Some at a time: a method makes arrays as large as these.
        starts = range(0, len(products), COLUMNS)
        parts = [coefficients(step, products[at : at + COLUMNS]) for at in starts]
        found = np.concatenate(parts) if parts else np.zeros((0, Rows.of(step).count))
        weights, base_weight = _parts(step, found)
        number = np.float64 if step.wide else np.float32
        return ByColumn(np.ascontiguousarray(weights.T, number), base_weight.astype(number)), found

    def merge(self, base: Floats, deltas: Floats, start: int) -> Floats:
        """One tile: (n,) base, (K, n) deltas (models, where there is no base) from element `start` on -> (n,)."""
        merged = np.zeros(deltas.shape[1], deltas.dtype)
        if not deltas.size:
            return merged
        at = np.arange(start, start + deltas.shape[1]) % self.base_weight.size
        for weight, delta in zip(self.weights, deltas, strict=True):
            merged += weight[at] * delta
        if self.base_weight.any():
            merged += self.base_weight[at] * base
        return merged


def merge_rows(
    step: Merge, base: Floats, deltas: Floats, bad_at: npt.NDArray[np.bool_] | None
) -> tuple[Floats, Doubles]:
    """One tile of a step in which each row has its own coefficients: (n,) base, (K, n) deltas (models, where there is
    no base) -> merged (n,), and the coefficients (rows, R)."""
    rows, length = Rows.of(step), max(1, step.row)
    many = deltas.shape[1] // length
    assembled = without_bad(rows.assemble(base, deltas, values=step.base is None), bad_at)
    totals, sums = np.zeros((many, rows.pairs)), np.zeros((rows.pairs, SUMS))
    cpu.products_by_row(assembled, length, sums, totals)
    found = coefficients(step, totals)
    weights, base_weight = _parts(step, found)
    merged = np.zeros((many, length), deltas.dtype)
    for k, delta in enumerate(deltas):
        merged += weights[:, k, None].astype(deltas.dtype) * delta.reshape(many, length)
    if base_weight.any():
        merged += base_weight[:, None].astype(deltas.dtype) * base.reshape(many, length)
    return merged.reshape(-1), found


def told(found: Mapping[int, Doubles]) -> Doubles:
    """First element -> coefficients from there on; all of them in order, (rows, R)."""
    return np.concatenate([found[start] for start in sorted(found)])
