# SPDX-License-Identifier: Apache-2.0
"""Do these checkpoints belong together? First from headers alone, then from a small sample of their values.

The numeric test rests on one number per tensor, r = ||delta||_F / ||W||_F. With random drop and rescale the relative
perturbation of a linear layer's output is about rho = r sqrt(p / (1 - p)) for inputs without a preferred direction.
The thresholds are a rule of thumb from small models, and stand here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from darekit.checkpoints import TensorInfo, traits_of
from darekit.dtypes import Floats, dtype_named, widen
from darekit.errors import DataError
from darekit.planning.matching.alignment import AlignedTensor
from darekit.wording import label

TAU = 0.2  # rho up to which abilities stayed in every small model that was measured

RHO_STOP = 0.5

R_LARGE = 0.25

R_STOP = 0.5

SAMPLED_CHUNKS = 4

SAMPLED_ELEMENTS = 4096  # per chunk

COSTLY = 1 << 20  # elements: where so many are decoded at once, chunks are not spread over the tensor

Sample = tuple[list[tuple[int, int]], Floats]  # which chunks, and their values

RULE_OF_THUMB = "(a rule of thumb from small models)"


@dataclass(frozen=True, slots=True)
class Norms:
    """A sample's squared norms for one tensor of one model, and what will be dropped of it."""

    name: str
    parameters: int
    delta: float
    base: float
    drop_rate: float  # 0: not dropped
    noise: float  # of one element, as a multiple of it; 0: not a random drop that is rescaled, rho says nothing

    @property
    def r(self) -> float:
        """||delta|| / ||W||; infinite where the base is all zeros and the delta is not."""
        if self.delta == 0:
            return 0.0
        return math.inf if self.base == 0 else math.sqrt(self.delta / self.base)

    @property
    def rho(self) -> float:
        """Predicted relative perturbation of the output."""
        return self.r * self.noise if self.noise else 0.0


def sample_norms(
    tensors: Iterable[AlignedTensor],
    model: int,
    rate_of: Callable[[AlignedTensor], tuple[float, float]],
    kept: dict[str, Sample] | None = None,
) -> list[Norms]:
    """Read a few evenly spread chunks of each float tensor of one model and its base.

    Args:
        tensors: the alignment's tensors.
        model: the model's index in the recipe.
        rate_of: tensor -> (drop rate, noise of one element where it is a random drop that is rescaled).
        kept: samples of the base's tensors of which much is decoded at once, for the next model of the same recipe.
    """
    norms = []
    kept = {} if kept is None else kept
    for tensor in tensors:
        base, tuned = tensor.base, tensor.models[model]
        if base is None or tuned is None or dtype_named(base.dtype).kind != "float":
            continue
        if any(traits_of(info.source).ordered for info in (base, tuned)):  # a few chunks would cost all that is before
            continue
        common = min(base.count, tuned.count)
        grain = max(traits_of(info.source).grain for info in (base, tuned))
        # Where much is decoded at once, all chunks come from what is decoded first.
        chunks = _chunks(common if grain < COSTLY else min(common, grain))
        found = kept.get(tensor.name)
        before = found[1] if found is not None and found[0] == chunks else _read(base, chunks)
        if traits_of(base.source).grain >= COSTLY:
            kept[tensor.name] = chunks, before
        after = _read(tuned, chunks)
        with np.errstate(invalid="ignore", over="ignore"):
            change = after - before
        usable = np.isfinite(change)
        delta, square = _sum_of_squares(change, usable), _sum_of_squares(before, usable)
        rate, noise = rate_of(tensor)
        norms.append(Norms(tensor.name, common, delta, square, rate, noise))
    return norms


def check_integers(tensors: Iterable[AlignedTensor], refs: Sequence[str]) -> None:
    """Integer and bool tensors are copied: a sample must agree before anything is written.

    Raises:
        DataError: they differ, as those of quantised models do.
    """
    for tensor in tensors:
        if dtype_named(tensor.dtype).kind == "float":
            continue
        first = tensor.base or next(info for info in tensor.models if info)
        for ref, other in zip(refs, tensor.models, strict=True):
            if other is None or other is first:
                continue
            size = min(first.nbytes, 1 << 20)
            raws = np.empty(size, np.uint8), np.empty(size, np.uint8)
            first.source.read_into(raws[0], 0)
            other.source.read_into(raws[1], 0)
            if first.shape != other.shape or not np.array_equal(*raws):
                raise DataError(
                    f"{tensor.name} ({tensor.dtype}) of {ref} differs from the base's. Integers and complex numbers "
                    "cannot be merged; if the model is quantised, dequantise it first"
                )


def _chunks(count: int) -> list[tuple[int, int]]:
    if count <= SAMPLED_CHUNKS * SAMPLED_ELEMENTS:
        return [(0, count)]
    step = (count - SAMPLED_ELEMENTS) // (SAMPLED_CHUNKS - 1)
    return [(i * step, SAMPLED_ELEMENTS) for i in range(SAMPLED_CHUNKS)]


def _read(info: TensorInfo, chunks: Sequence[tuple[int, int]]) -> Floats:
    """(start, count) of chunks, all of one count -> (chunks, count) float32 or float64."""
    dtype, shape = dtype_named(info.dtype), (len(chunks), chunks[0][1])
    raw = np.empty((shape[0], shape[1] * dtype.itemsize), np.uint8)
    for row, (start, _) in zip(raw, chunks, strict=True):
        info.source.read_into(row, start * dtype.itemsize)
    values: Floats = np.empty(shape, np.float64 if dtype.name == "F64" else np.float32)
    widen(raw.reshape(-1), dtype, values.reshape(-1))
    return values


def _sum_of_squares(values: Floats, usable: npt.NDArray[np.bool_]) -> float:
    """(chunks, count), of which only what is usable counts; chunk by chunk, so that a NaN changes no other sum."""
    if usable.all():
        return sum(np.square(values, dtype=np.float64).sum(axis=1).tolist(), 0.0)
    rows = zip(values, usable, strict=True)
    return sum((float(np.sum(np.square(row[good], dtype=np.float64))) for row, good in rows), 0.0)


def weighted_median(pairs: Iterable[tuple[float, int]]) -> float:
    """(value, weight) pairs -> the value at half of the weight; 0 for none.

    >>> weighted_median([(1.0, 1), (5.0, 3), (9.0, 1)])
    5.0
    """
    ordered = sorted(pairs)
    half = sum(weight for _, weight in ordered) / 2
    total = 0.0
    for value, weight in ordered:
        total += weight
        if total >= half:
            return value
    return 0.0


def p_max(r: float, tau: float = TAU) -> float:
    """Largest drop rate with rho <= tau: tau^2 / (tau^2 + r^2)."""
    return tau * tau / (tau * tau + r * r)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the sample says of one model: `stop` is a refusal, `warning` a line to print; None: nothing to say."""

    model: str
    r: float
    rho: float
    stop: str | None
    warning: str | None

    def to_data(self) -> Mapping[str, float | str | None]:
        """JSON-able form."""
        return {"model": self.model, "r": self.r, "rho": self.rho, "warning": self.stop or self.warning}


def judge(ref: str, base_ref: str, norms: Sequence[Norms]) -> Judgement:
    """Norms of one model -> is this its base, and is as much dropped as deltas this large can bear?

    Args:
        ref: the model, as the recipe names it.
        base_ref: its base.
        norms: its sampled norms.

    The medians run over the tensors that are dropped, over all where none is.
    """
    scope = [n for n in norms if n.drop_rate > 0] or list(norms)
    r = weighted_median((n.r, n.parameters) for n in scope)
    random = [n for n in scope if n.noise]
    rho = weighted_median((n.rho, n.parameters) for n in random) if random else 0.0
    stop = warning = None
    if r > R_STOP:
        stop = (
            f"{base_ref} does not look like the base of {ref}: the median tensor differs from it by r = {r:.2f} of "
            f"its norm; fine-tuning usually changes 0.001 to 0.1, and more than {R_STOP} is refused {RULE_OF_THUMB}. "
            "Name the checkpoint that the model was fine-tuned from"
        )
    elif rho > RHO_STOP:
        stop = (
            f"Too much of {ref} is dropped for deltas this large: predicted perturbation rho = {rho:.3f} "
            f"(r = {r:.3f}), and more than {RHO_STOP} is refused {RULE_OF_THUMB}. A drop rate of "
            f"{_shown_rate(r)} brings it to {TAU}"
        )
    elif rho > TAU:
        warning = (
            f"{label(ref)}: predicted perturbation rho = {rho:.2f} (r = {r:.3f}) is above {TAU} {RULE_OF_THUMB}; "
            f"a drop rate of {_shown_rate(r)} would bring it to {TAU}"
        )
    elif norms and all(n.delta == 0 for n in norms):
        warning = f"{label(ref)} is identical to {base_ref} wherever it was sampled: is it the right model?"
    return Judgement(ref, r, rho, stop, warning)


def _shown_rate(r: float) -> str:
    return f"{math.floor(p_max(r) * 1000) / 1000:g}"
