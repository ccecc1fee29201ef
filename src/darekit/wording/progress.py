# SPDX-License-Identifier: Apache-2.0
"""How far something is, as functions that take a while tell their callers."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]  # what is done, and what there is in all: bytes, rows, examples
