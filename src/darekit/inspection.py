# SPDX-License-Identifier: Apache-2.0
"""`dare inspect`: what fine-tuning did to each tensor, and how much of it can be dropped.

One pass over both checkpoints counts |delta| by its upper 19 bits (16 of them below the octave's), so deciles are
exact to 2^-11 of their value; norms, shares and zeros are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from darekit import kernels
from darekit.checkpoints import Checkpoint, open_checkpoint
from darekit.dtypes import dtype_named
from darekit.errors import DataError
from darekit.homology import (
    R_LARGE,
    R_STOP,
    RULE_OF_THUMB,
    TAU,
    AlignedTensor,
    align,
    label,
    p_max,
    weighted_median,
)
from darekit.kernels import cpu
from darekit.packs.reading import open_model

SHARES = (0.0002, 0.002, 0.005, 0.01)  # the limits that the paper discusses
DECILES = tuple(i / 10 for i in range(11))
TILE = 65536
_DROPPED_BITS = 12
_BINS = 1 << (31 - _DROPPED_BITS)


@dataclass(frozen=True)
class TensorReport:
    """One tensor (or all of them): how large its delta is. `deciles`: |delta| at 0, 10, ..., 100 %."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    r: float
    p_max: float
    zeros: float
    shares: dict[str, float]
    deciles: tuple[float, ...]

    def to_data(self) -> dict[str, Any]:
        """JSON-able form; shares are fractions of the parameters."""
        return {**self.__dict__, "shape": list(self.shape), "deciles": list(self.deciles)}


@dataclass(frozen=True)
class Inspection:
    """The reports of all float tensors, their total, and the verdict: ok, large or wrong_base."""

    base: str
    model: str
    tensors: tuple[TensorReport, ...]
    total: TensorReport
    median_r: float
    recommended: float
    verdict: str
    words: str

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "base": self.base,
            "model": self.model,
            "verdict": self.verdict,
            "words": self.words,
            "median_r": self.median_r,
            "drop_rate": self.recommended,
            "tau": TAU,
            "total": self.total.to_data(),
            "tensors": [tensor.to_data() for tensor in self.tensors],
        }


class _Counts:
    """What tiles add up to; tensors add up to the total in the same way."""

    def __init__(self) -> None:
        self.bins = np.zeros(_BINS, np.int64)
        self.squares = np.zeros(2)  # delta, base
        self.below = np.zeros(len(SHARES), np.int64)
        self.zeros = self.count = 0
        self.largest = 0.0
        self.smallest = math.inf

    def take(self, delta: np.ndarray, base: np.ndarray) -> None:
        size = np.abs(delta)
        cpu.count_bins(delta, self.bins, _DROPPED_BITS)
        self.squares += np.dot(delta, delta.astype(np.float64)), np.dot(base, base.astype(np.float64))
        self.below += [np.count_nonzero(size < limit) for limit in SHARES]
        self.zeros += size.size - int(np.count_nonzero(size))
        self.count += size.size
        self.largest = max(self.largest, float(size.max(initial=0.0)))
        self.smallest = min(self.smallest, float(size.min(initial=math.inf)))

    def add(self, other: _Counts) -> None:
        for name in ("bins", "squares", "below", "zeros", "count"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest, self.smallest = max(self.largest, other.largest), min(self.smallest, other.smallest)

    def report(self, name: str, shape: tuple[int, ...]) -> TensorReport:
        delta, base = self.squares
        r = 0.0 if delta == 0 else math.inf if base == 0 else math.sqrt(delta / base)
        count = max(1, self.count)
        return TensorReport(
            name, shape, self.count, r, p_max(r) if math.isfinite(r) else 0.0, self.zeros / count,
            {f"{limit:g}": int(below) / count for limit, below in zip(SHARES, self.below, strict=True)},
            self._deciles(),
        )  # fmt: skip

    def _deciles(self) -> tuple[float, ...]:
        if not self.count:
            return (0.0,) * len(DECILES)
        filled = np.flatnonzero(self.bins)
        upto = np.cumsum(self.bins[filled])
        at = [filled[np.searchsorted(upto, max(1, math.ceil(q * self.count)))] for q in DECILES]
        middles = (np.array(at, np.uint32) << np.uint32(_DROPPED_BITS)) + np.uint32(1 << (_DROPPED_BITS - 1))
        values = np.where(np.array(at) == 0, np.float32(0), middles.view(np.float32))
        inner = [min(max(float(v), self.smallest), self.largest) for v in values[1:-1]]
        return (self.smallest, *inner, self.largest)


def inspect(
    base: str | Path,
    model: str | Path,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Compare a model with its base, tensor by tensor.

    Args:
        base: the checkpoint that `model` was fine-tuned from.
        model: the fine-tuned model.
        threads: worker threads.
        progress: called with (bytes done, bytes in all).

    Raises:
        HomologyError: their tensors do not correspond (a vocabulary that differs is compared on the common rows).
        DataError: NaN or Inf.
    """
    from darekit.engine import default_threads

    opened: list[Checkpoint] = []
    try:
        opened.append(open_checkpoint(base))
        opened.append(open_model(model, opened[0]))
        alignment = align(opened[0], opened[1:], "base", heads="common")
        tensors = [t for t in alignment.tensors if t.models[0] and dtype_named(t.dtype).kind == "float"]
        total_bytes = sum(min(t.base.nbytes, t.models[0].nbytes) * 2 for t in tensors if t.base and t.models[0])
        total, reports, done = _Counts(), [], 0
        with ThreadPoolExecutor(threads or default_threads()) as pool:
            for tensor, counts in zip(tensors, pool.map(_count, tensors), strict=True):
                reports.append(counts.report(tensor.name, tensor.shape))
                total.add(counts)
                done += 2 * counts.count * dtype_named(tensor.dtype).itemsize
                if progress:
                    progress(min(done, total_bytes), total_bytes)
    finally:
        for checkpoint in opened:
            checkpoint.close()
    return _judged(str(base), str(model), reports, total.report("total", ()))


def _count(tensor: AlignedTensor) -> _Counts:
    counts = _Counts()
    base, model = tensor.base, tensor.models[0]
    assert base is not None and model is not None
    formats = dtype_named(base.dtype), dtype_named(model.dtype)
    before, delta = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    raws = [np.empty(TILE * dtype.itemsize, np.uint8) for dtype in formats]
    common = min(base.count, model.count)
    for start in range(0, common, TILE):
        n = min(TILE, common - start)
        for raw, info, dtype in zip(raws, (base, model), formats, strict=True):
            info.source.read_into(raw[: n * dtype.itemsize], start * dtype.itemsize)
        kernels.widen(raws[0][: n * formats[0].itemsize], formats[0], before[:n])
        bad = kernels.difference(raws[1][: n * formats[1].itemsize], formats[1], before[:n], delta[:n])
        if bad:
            raise DataError(f"NaN or Inf in {tensor.name}; inspect needs finite weights in both checkpoints")
        counts.take(delta[:n], before[:n])
    return counts


def _judged(base: str, model: str, reports: Sequence[TensorReport], total: TensorReport) -> Inspection:
    median = weighted_median((report.r, report.parameters) for report in reports)
    recommended = weighted_median((report.p_max, report.parameters) for report in reports)
    shown = f"{math.floor(recommended * 1000) / 10:g} %"
    if median > R_STOP:
        verdict, words = "wrong_base", (
            f"{label(base)} does not look like the base of {label(model)}: the median tensor changed by r = "
            f"{median:.2f} of its norm. Name the checkpoint that it was fine-tuned from"
        )  # fmt: skip
    elif median > R_LARGE:
        verdict, words = "large", (
            f"The deltas are large (median r = {median:.2f}, as after continued pre-training): about {shown} of the "
            f"parameters can be dropped {RULE_OF_THUMB}"
        )  # fmt: skip
    elif total.zeros == 1:
        verdict, words = "ok", "The two models are identical"
    else:
        verdict, words = "ok", f"About {shown} of the delta can be dropped (median r = {median:.4f}) {RULE_OF_THUMB}"
    return Inspection(base, model, tuple(reports), total, median, recommended, verdict, words)
