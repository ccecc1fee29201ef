# SPDX-License-Identifier: Apache-2.0
"""A merge written down as the formulas have it, and small families: what methods' own tests are given too."""

from darekit.testing.reference import reference as merge
from darekit.testing.subjects import family, raw_of

__all__ = ["family", "merge", "raw_of"]
