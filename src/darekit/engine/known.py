# SPDX-License-Identifier: Apache-2.0
"""What a model's source knows before it is rounded: an adapter's product, and the values of what it makes of its base.

A delta that is known is used as it is; values that are known are compared with the base's in float32. Nobody asks for
the bytes then, which the source would have to compute as well, so there is no digest of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from darekit.checkpoints import Delta, traits_of
from darekit.dtypes import Floats
from darekit.engine.steps import Input, Merge


@dataclass(frozen=True)
class Known:
    """What a source knows of a tensor: the delta to this very base, its values, or both. None: it does not."""

    delta: Delta | None
    values: Callable[[npt.NDArray[np.float32], int], None] | None

    def read_into(self, out: npt.NDArray[np.float32], start: int, base: Floats, *, on_weights: bool) -> None:
        """(n,) float32, filled with the delta to the base's elements (n,) from number `start` on; `on_weights`: with
        the values."""
        if self.delta is not None and not on_weights:
            self.delta.read_into(out, start)
            return
        assert self.values is not None
        self.values(out, start)
        if not on_weights:
            out -= base


def known_of(step: Merge, model: Input) -> Known | None:
    """What there is for a step of this precision; None: the source's bytes are all that is known."""
    traits = traits_of(model.source)
    as_stored = step.verbatim and step.dtype.name == model.dtype.name
    if step.wide or as_stored or (traits.delta is None and traits.values is None):
        return None
    delta = traits.delta
    if delta is not None and (step.base is None or step.on_weights or delta.base != step.base.source):
        delta = None
    if traits.values is None and step.count < math.prod(step.shape):  # other rows of it are read as bytes, and digested
        delta = None
    return None if delta is None and traits.values is None else Known(delta, traits.values)


def is_finer(model: Input) -> bool:
    """Whether a source knows more than its bytes say."""
    traits = traits_of(model.source)
    return traits.delta is not None or traits.values is not None
