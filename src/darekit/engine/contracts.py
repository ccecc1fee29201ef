# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of a stage: one operation on one delta, tile by tile."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from darekit.dtypes import Bytes, DType

Tile = npt.NDArray[np.floating]


class Stage(Protocol):
    """One operation on one delta, tile by tile; as it stands here it needs no measuring."""

    ordered: bool = False  # tiles must come in order, from the tensor's first on

    @property
    def ready(self) -> bool:
        """False: wants a(nother) measuring pass."""
        return True

    @property
    def sampling(self) -> bool:
        """Whether that pass may skip most tiles."""
        return False

    def begin(self) -> None:
        """A pass over the tensor starts."""
        return

    def measure(self, delta: Tile, start: int) -> None:
        """One tile of a measuring pass; may overwrite it."""
        return

    def settle(self) -> None:
        """A measuring pass is over."""
        return

    def take(self, raw: Bytes, dtype: DType, base: Tile, delta: Tile, start: int) -> tuple[int, int] | None:
        """Make the delta from raw bytes and sparsify it in one go, where there is a kernel for that.

        Returns how many elements of the delta are NaN or Inf (`delta` is then worthless) and how many survive.
        """
        return None

    def apply(self, delta: Tile, start: int) -> int:
        """Sparsify one tile in place; returns how many elements survive."""
        ...
