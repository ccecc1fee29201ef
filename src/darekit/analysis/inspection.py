# SPDX-License-Identifier: Apache-2.0
"""`dare inspect`: what fine-tuning did to each tensor, how much of it can be dropped, and how several models' deltas
stand to each other.

One pass over all checkpoints counts |delta| by its upper 19 bits (16 of them below the octave's), so deciles are
exact to 2^-11 of their value; norms, shares and zeros are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from darekit import kernels
from darekit.analysis.interference import Interference, PairCounts, judged
from darekit.dtypes import dtype_named
from darekit.errors import DataError, PlanError
from darekit.inputs.opening import packed_seed
from darekit.kernels import cpu
from darekit.planning.homology import R_LARGE, R_STOP, RULE_OF_THUMB, TAU, p_max, weighted_median
from darekit.planning.matching.alignment import AlignedTensor, align
from darekit.planning.opening import open_models
from darekit.planning.rates import MOST
from darekit.planning.rounding import rounding_of
from darekit.planning.rounding import told as rounding_told
from darekit.recipe.names import find_model
from darekit.wording import brief, label

VOCABULARIES = ("strict", "base", "pad")

PACK_NOTE = "{} is a pack: r and p_max describe what is left of its delta, rescaled, not the original model's delta"

SHARES = (0.0002, 0.002, 0.005, 0.01)  # the limits that the paper discusses

DECILES = tuple(i / 10 for i in range(11))

TILE = 65536

_DROPPED_BITS = 12

_BINS = 1 << (31 - _DROPPED_BITS)

_COARSE_BITS = 9  # of a bin's index: a histogram has four bins for each power of two


@dataclass(frozen=True)
class TensorReport:
    """One tensor (or all of them): how large its delta is.

    Attributes:
        name: the tensor.
        shape: its shape.
        parameters: its elements.
        r: ||delta|| / ||base||; infinite where the base has only zeros.
        p_max: the largest drop rate that r allows.
        zeros: fraction of the elements that fine-tuning left alone.
        shares: limit -> fraction of the elements whose |delta| is below it.
        deciles: |delta| at 0, 10, ..., 100 %.
        group: embeddings, norms, biases or heads; None: another matrix.
        head: whether it belongs to a head, as its biases do.
        norm: ||delta||.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    r: float
    p_max: float
    zeros: float
    shares: dict[str, float] = field(repr=False)
    deciles: tuple[float, ...] = field(repr=False)
    group: str | None = field(default=None, repr=False)
    head: bool = field(default=False, repr=False)
    norm: float = field(default=0.0, repr=False)

    def to_data(self) -> dict[str, Any]:
        """JSON-able form; shares are fractions of the parameters."""
        return {**self.__dict__, "shape": list(self.shape), "deciles": list(self.deciles)}


@dataclass(frozen=True)
class Histogram:
    """|delta| of all elements that are not 0: `counts[i]` of them from `edges[i]` up to `edges[i + 1]`.

    Attributes:
        edges: of the bins, ascending, one more than there are counts.
        counts: elements in each bin.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"edges": list(self.edges), "counts": list(self.counts)}


@dataclass(frozen=True)
class Inspection:
    """One model's delta from its base, tensor by tensor.

    Attributes:
        base: as written.
        model: as written.
        tensors: the reports of all float tensors.
        total: the same over all of them.
        median_r: median of the tensors' r, weighted by their parameters.
        recommended: the drop rate that is advised: the median p_max, at most 0.99.
        verdict: ok, large or wrong_base.
        words: the verdict in a sentence.
        histogram: of |delta| over all tensors.
        notes: what was not compared, and why.
        rounding: how much of the delta is the error of quantisation, in words; None where nothing is quantised.
    """

    base: str
    model: str
    tensors: tuple[TensorReport, ...]
    total: TensorReport
    median_r: float
    recommended: float
    verdict: str
    words: str
    histogram: Histogram
    notes: tuple[str, ...] = ()
    rounding: str | None = None

    def __repr__(self) -> str:
        return brief(
            self, f"{self.model} on {self.base}: {self.verdict}, {len(self.tensors)} tensors, median r "
            f"{self.median_r:.3g}, drop rate up to {self.recommended:.3g}",
        )  # fmt: skip

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
            "histogram": self.histogram.to_data(),
            "notes": list(self.notes),
            "tensors": [tensor.to_data() for tensor in self.tensors],
        }


@dataclass(frozen=True)
class Comparison:
    """Several models of one base: each one's inspection, and how their deltas relate to each other.

    Attributes:
        base: as written.
        models: an inspection of each model, in order.
        interference: every pair of models, and all of them together.
        notes: what was not compared, and why.
    """

    base: str
    models: tuple[Inspection, ...]
    interference: Interference
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return brief(self, f"{', '.join(one.model for one in self.models)} on {self.base}")

    def to_data(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "base": self.base,
            "models": [model.to_data() for model in self.models],
            "interference": self.interference.to_data(),
            "notes": list(self.notes),
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
            self._deciles(), norm=math.sqrt(delta),
        )  # fmt: skip

    def histogram(self) -> Histogram:
        """Four bins for each power of two, from the smallest to the largest that is not 0."""
        coarse = self.bins.reshape(-1, 1 << _COARSE_BITS).sum(1)
        coarse[0] -= self.zeros  # what is smaller than any float32 of BF16's range stays
        filled = np.flatnonzero(coarse)
        if not filled.size:
            return Histogram((), ())
        first, last = int(filled[0]), int(filled[-1])
        edges = (np.arange(first, last + 2, dtype=np.uint32) << np.uint32(_COARSE_BITS + _DROPPED_BITS)).view(
            np.float32
        )
        return Histogram(tuple(map(float, edges)), tuple(map(int, coarse[first : last + 1])))

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


@overload
def inspect(
    base: str | Path,
    model: str | Path,
    /,
    *,
    vocab: str = "base",
    heads: str | Path | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection: ...


@overload
def inspect(
    base: str | Path,
    model: str | Path,
    other: str | Path,
    /,
    *more: str | Path,
    vocab: str = "base",
    heads: str | Path | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison: ...


def inspect(
    base: str | Path,
    *models: str | Path,
    vocab: str = "base",
    heads: str | Path | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection | Comparison:
    """Compare a model with its base, tensor by tensor; of several models, their deltas with each other too.

    Args:
        base: the checkpoint that the models were fine-tuned from.
        models: the fine-tuned models: of one the result is an `Inspection`, of several a `Comparison`.
        vocab: of vocabularies that differ, as in a recipe: `strict` refuses them; under `base` and `pad` the rows that
            base and model share are compared (`pad` keeps the others as they are: they are not part of a delta).
        heads: whose heads a recipe would take as they are: `base`, `model` (if there is only one) or one of the models
            as written; heads are not compared then. None: heads are compared if all have the same shapes.
        threads: worker threads.
        progress: called with (bytes done, bytes in all).

    Returns:
        For one model an `Inspection`, for several a `Comparison`.

    Raises:
        HomologyError: their tensors do not correspond.
        PlanError: `vocab` or `heads` is not one of these words.
        DataError: NaN or Inf.

    Examples:
        >>> found = dk.inspect("base", "math")
        >>> found
        <Inspection: math on base: ok, 21 tensors, median r 0.0403, drop rate up to 0.961>
        >>> most = max(found.tensors, key=lambda tensor: tensor.r)  # where fine-tuning changed most
        >>> most.name, round(most.r, 3), round(most.p_max, 3)
        ('model.layers.1.self_attn.o_proj.weight', 0.042, 0.957)

        Several models, and the cosine between the first two deltas:

        >>> both = dk.inspect("base", "math", "code")
        >>> both.interference.pairs, [round(cosine, 3) for cosine in both.interference.mean_cosine]
        (((0, 1),), [-0.007])
    """
    if not models:
        raise TypeError("inspect needs at least one model besides the base")
    names = [str(model) for model in models]
    if vocab not in VOCABULARIES:
        raise PlanError(f"vocab: expected {', '.join(VOCABULARIES)}, found {vocab!r}")
    giver = None if heads is None else _giver_of(str(heads), str(base), names)
    found, interference, notes = _inspect_all(str(base), names, vocab, giver, threads, progress)
    if interference is None:
        return replace(found[0], notes=notes)
    return Comparison(str(base), tuple(found), interference, notes)


def _giver_of(heads: str, base: str, models: Sequence[str]) -> int:
    """Whose heads are kept: 0 is the base, 1 the first model."""
    if heads == "base":
        return 0
    if heads == "model" and len(models) == 1:
        return 1
    names = [base, *models]
    found = find_model(heads, names)
    if found is not None:
        return names.index(found)
    raise PlanError(
        f"heads: expected base{', model' if len(models) == 1 else ''} or one of the models as written "
        f"({', '.join(models)}), found {heads!r}"
    )


def _inspect_all(
    base: str,
    models: Sequence[str],
    vocab: str,
    giver: int | None,
    threads: int | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[Inspection], Interference | None, tuple[str, ...]]:
    from darekit.machine import threads_of

    with open_models(base, models) as (origin, tuned):
        assert origin is not None
        alignment = align(origin, tuned, vocab, heads="common" if giver is None else (origin, *tuned)[giver])
        compared = [tensor for tensor in alignment.tensors if any(tensor.models) and not tensor.head]
        unseen = () if giver is None else ("heads are not compared: they are taken as they are",)
        dropped = [label(name) for name, model in zip(models, tuned, strict=True) if packed_seed(model) is not None]
        opened = dict.fromkeys(note for checkpoint in (origin, *tuned) for note in checkpoint.notes)
        notes = (*opened, *alignment.notes, *unseen, *_rows_left_out(compared, models), *map(PACK_NOTE.format, dropped))
        tensors = [tensor for tensor in compared if dtype_named(tensor.dtype).kind == "float"]
        total_bytes = sum(info.nbytes for t in tensors for info in (t.base, *t.models) if info)
        totals, done = [_Counts() for _ in models], 0
        together = PairCounts(len(models))
        reports: list[list[TensorReport]] = [[] for _ in models]
        relations = []
        with ThreadPoolExecutor(threads_of(threads)) as pool:
            for tensor, (counts, pairs) in zip(tensors, pool.map(_count, tensors), strict=True):
                for k, one in enumerate(counts):
                    if tensor.models[k] is not None:
                        report = one.report(tensor.name, tensor.shape)
                        reports[k].append(replace(report, group=tensor.group, head=tensor.of_head))
                        totals[k].add(one)
                if pairs is not None:
                    relations.append(replace(pairs.report(tensor.name, tensor.shape), group=tensor.group))
                    together.add(pairs)
                done += sum(info.nbytes for info in (tensor.base, *tensor.models) if info)
                if progress:
                    progress(done, total_bytes)
        rounded = [rounding_of(tensors, k, own) for k, own in enumerate(reports)]
    told = [
        None if one is None else rounding_told(model, base, one) for model, one in zip(models, rounded, strict=True)
    ]
    notes = (*notes, *filter(None, told))
    found = [
        replace(_judged(base, model, own, total.report("total", ()), total.histogram()), rounding=words)
        for model, own, total, words in zip(models, reports, totals, told, strict=True)
    ]
    if len(models) == 1:
        return found, None, notes
    return found, judged(models, together.pairs, relations, together.report("total", ())), notes


def _rows_left_out(tensors: Sequence[AlignedTensor], models: Sequence[str]) -> Iterator[str]:
    """Of vocabularies that differ: how many rows each has."""
    for tensor in tensors:
        rows = [info.shape[0] for info in (tensor.base, *tensor.models) if info and info.shape]
        if len({*rows}) > 1:
            named = ", ".join(f"{count} in {label(model)}" for count, model in zip(rows[1:], models, strict=True))
            yield f"{tensor.name}: {rows[0]} rows in the base, {named}; only the rows of both are compared"


def _count(tensor: AlignedTensor) -> tuple[list[_Counts], PairCounts | None]:
    """One pass over a tensor in the base and in all models."""
    base, models = tensor.base, tensor.models
    assert base is not None
    counts = [_Counts() for _ in models]
    pairs = PairCounts(len(models)) if len(models) > 1 else None
    before, deltas = np.empty(TILE, np.float32), np.empty((len(models), TILE), np.float32)
    raw = np.empty(TILE * 8, np.uint8)
    commons = [min(base.count, info.count) if info else 0 for info in models]
    for start in range(0, max(commons), TILE):
        n = min(TILE, max(commons) - start)
        dtype = dtype_named(base.dtype)
        base.source.read_into(raw[: n * dtype.itemsize], start * dtype.itemsize)
        kernels.widen(raw[: n * dtype.itemsize], dtype, before[:n])
        sizes = []
        for k, info in enumerate(models):
            sizes.append(max(0, min(n, commons[k] - start)))
            if info is None or not sizes[k]:
                continue
            m, dtype = sizes[k], dtype_named(info.dtype)
            info.source.read_into(raw[: m * dtype.itemsize], start * dtype.itemsize)
            if kernels.difference(raw[: m * dtype.itemsize], dtype, before[:m], deltas[k, :m]):
                raise DataError(f"NaN or Inf in {tensor.name}; inspect needs finite weights in all checkpoints")
            counts[k].take(deltas[k, :m], before[:m])
        if pairs is not None:
            pairs.take([deltas[k, :m] for k, m in enumerate(sizes)])
    return counts, pairs


def _judged(
    base: str, model: str, reports: Sequence[TensorReport], total: TensorReport, histogram: Histogram
) -> Inspection:
    median = weighted_median((report.r, report.parameters) for report in reports)
    recommended = min(MOST, weighted_median((report.p_max, report.parameters) for report in reports))
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
    return Inspection(base, model, tuple(reports), total, median, recommended, verdict, words, histogram)
