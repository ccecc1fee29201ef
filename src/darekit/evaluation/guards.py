# SPDX-License-Identifier: Apache-2.0
"""What must not pass in silence while a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from darekit.errors import DataError
from darekit.live.models import LiveModel


@contextmanager
def nan_refused(live: LiveModel) -> Iterator[None]:
    """NaN logits would be scored or decoded in silence: an argmax takes NaN for the largest.

    Raises:
        DataError: from within the block.
    """
    import torch

    def look(module: Any, arguments: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if logits is not None and bool(torch.isnan(logits).any()):
            raise DataError(f"the model's logits are NaN: {live.suspects}")

    handle = live.model.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()
