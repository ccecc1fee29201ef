# SPDX-License-Identifier: Apache-2.0
"""Packs: stored sparse (and quantised) deltas that need no index, because the mask is a function of a seed.

`format` knows the file, `quantization` and `leaves` the numbers, `packing` writes, `reading` reads. The format is
described for other readers in docs/pack-format.md.
"""
