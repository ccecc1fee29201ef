# SPDX-License-Identifier: Apache-2.0
"""A checkpoint: an ordered map of names to tensors, of which only the headers have been read."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from darekit.checkpoints.files import InputFile, Source
from darekit.dtypes import dtype_named
from darekit.wording import brief, size_of

SAMPLE_BYTES = 4096  # of each tensor; frozen, see `sample_digest`


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: what a header says about it, and where its bytes come from.

    Attributes:
        name: as stored.
        dtype: number format by its safetensors name, as BF16.
        shape: its shape.
        source: `read_into(buffer, offset)` fills a buffer of uint8 from that byte on.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Source

    @property
    def count(self) -> int:
        """Elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.count * dtype_named(self.dtype).itemsize


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        ref: as the user wrote it.
        directory: where config.json and the tokenizer's files lie; None for tensors in memory.
        tensors: in canonical order, that of `natural_key`.
        config: the content of config.json, None without one.
        files: what must stay open and unchanged while tensors are read.
        revision: commit hash on the Hub, where known.
    """

    ref: str
    directory: Path | None
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] | None
    files: tuple[InputFile, ...]
    revision: str | None

    def __repr__(self) -> str:
        nbytes = sum(info.nbytes for info in self.tensors.values())
        return brief(self, f"{self.ref}, {len(self.tensors)} tensors, {size_of(nbytes)}")

    def close(self) -> None:
        """Close all files."""
        for file in self.files:
            file.close()


def natural_key(name: str) -> tuple[tuple[str | tuple[int, str], ...], str]:
    """Sort key that puts layers.2 before layers.10; a total order (equal keys mean equal names).

    >>> sorted(["h.10.w", "h.2.w", "h.02.w", "h"], key=natural_key)
    ['h', 'h.02.w', 'h.2.w', 'h.10.w']
    """
    # Text and digits alternate, so only like meets like. Numbers are compared as (digits, text): Python refuses to
    # convert more than 4300 digits.
    parts = re.split("([0-9]+)", name)
    key = tuple((len(part.lstrip("0")), part.lstrip("0")) if i % 2 else part for i, part in enumerate(parts))
    return key, name


def sample_digest(checkpoint: Checkpoint) -> bytes:
    """Checkpoint -> 16 bytes: a cheap fingerprint of its content that does not depend on its shards.

    BLAKE2b (digest_size=16, no key) over the concatenation, for each tensor in the order of its name by Unicode code
    points (not the natural order), of::

        name in UTF-8, b"\\0", dtype as in safetensors ("BF16") in ASCII, b"\\0",
        the dimensions in decimal joined by "," (nothing for a scalar), b"\\0",
        the tensor's first min(4096, nbytes) raw little-endian bytes

    Seeds, and through them masks in packs on disk, depend on this encoding: it never changes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        sample = np.empty(min(SAMPLE_BYTES, info.nbytes), np.uint8)
        if sample.size:
            info.source.read_into(sample, 0)
        shape = ",".join(map(str, info.shape))
        digest.update(b"\0".join((name.encode(), info.dtype.encode("ascii"), shape.encode("ascii"), sample.tobytes())))
    return digest.digest()
