# SPDX-License-Identifier: Apache-2.0
"""Quantities in words."""

from __future__ import annotations


def size_of(count: float) -> str:
    """Bytes for people, in powers of ten.

    >>> size_of(1_234_000_000)
    '1.23 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
