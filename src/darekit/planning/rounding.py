# SPDX-License-Identifier: Apache-2.0
"""What quantisation has changed: a delta to or from a quantised model holds the error of rounding to its codes.

How large that error is follows from the codes alone, without the weights that were quantised: each stands for an
interval (`cells` of `checkpoints/quantised/formulas.py`), and what was rounded into it is off by its width over the
root of 12, on average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from darekit.checkpoints import TensorInfo, traits_of
from darekit.planning.homology import weighted_median
from darekit.planning.matching.alignment import AlignedTensor
from darekit.wording import label

SAMPLED_TENSORS = 64  # spread over the model

OWN = 0.7  # a delta that is smaller than this part of the error cannot contain it
SMALL = 0.5  # as much smaller is a delta between codes most of which are the same


@dataclass(frozen=True, slots=True)
class Rounding:
    """Medians over the tensors of which at least one side is quantised.

    Attributes:
        base: r of the base, about ||error|| / ||W||; 0 where it is not quantised.
        model: r of the model.
        delta: r of the delta in the same tensors.
    """

    base: float
    model: float
    delta: float

    @property
    def both(self) -> float:
        """r of the two errors together, if they have nothing in common."""
        return math.hypot(self.base, self.model)


class Delta(Protocol):
    """What is known of one tensor's delta."""

    @property
    def name(self) -> str:
        """The tensor."""
        ...

    @property
    def parameters(self) -> int:
        """Its elements."""
        ...

    @property
    def r(self) -> float:
        """||delta|| / ||base||."""
        ...


def rounding_of(tensors: Sequence[AlignedTensor], model: int, deltas: Iterable[Delta]) -> Rounding | None:
    """Of a model, by its index in the recipe, and its base; None where neither is quantised.

    Args:
        tensors: the alignment's.
        model: its index.
        deltas: its deltas, of some of the tensors.
    """
    known = {one.name: one for one in deltas}
    found: list[tuple[TensorInfo, TensorInfo, Delta]] = []
    for tensor in tensors:
        base, tuned, delta = tensor.base, tensor.models[model], known.get(tensor.name)
        if base is not None and tuned is not None and delta is not None and _is_rounded(base, tuned):
            found.append((base, tuned, delta))
    if not found:
        return None
    many = min(SAMPLED_TENSORS, len(found))
    some = [found[i * len(found) // many] for i in range(many)]
    return Rounding(
        weighted_median((_error(base), delta.parameters) for base, _, delta in some),
        weighted_median((_error(tuned), delta.parameters) for _, tuned, delta in some),
        weighted_median((delta.r, delta.parameters) for _, _, delta in some),
    )


def told(ref: str, base_ref: str, found: Rounding) -> str:
    """What it means for the delta, and what can be done."""
    size = f"r = {found.delta:.2g}"
    share = min(1.0, (found.both / found.delta) ** 2) if found.delta else 1.0
    if found.base and found.model:
        begin = (
            f"{label(ref)} and {label(base_ref)} are both quantised: rounding changed each by about r = "
            f"{max(found.base, found.model):.2g}, and the delta between them ({size}) is made of whole steps of codes"
        )
        if found.delta < SMALL * found.both:
            return f"{begin}. Most codes are the same; what was smaller than a step is lost"
        return f"{begin}; up to {share:.0%} of its square is rounding. Give the 16-bit releases, if there are any"
    quantised, other = (base_ref, ref) if found.base else (ref, base_ref)
    error = found.both
    if found.base and found.delta < OWN * error:
        return (
            f"{label(base_ref)} is quantised (rounding changed it by about r = {error:.2g}), but {label(ref)} differs "
            f"from what it decodes to by only {size}: it was tuned from that, so its delta has no rounding in it"
        )
    return (
        f"{label(quantised)} is quantised and {label(other)} is not: rounding changed {label(quantised)} by about "
        f"r = {error:.2g} (from the steps of its codes), which is {share:.0%} of the squared delta of {label(ref)} "
        f"({size}), not fine-tuning. Give the 16-bit release of {label(quantised)} instead, if there is one"
    )


def _is_rounded(base: TensorInfo, tuned: TensorInfo) -> bool:
    """Whether a delta can hold an error of rounding: not if it is 0, or known (an adapter's product)."""
    one, other = traits_of(base.source), traits_of(tuned.source)
    if one.rounding is None and other.rounding is None:
        return False
    return other.delta is None and (one.identity is None or one.identity != other.identity)


def _error(info: TensorInfo) -> float:
    rounding = traits_of(info.source).rounding
    if rounding is None:
        return 0.0
    error, square = rounding()
    return math.sqrt(error / square) if square else 0.0
