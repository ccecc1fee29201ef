# SPDX-License-Identifier: Apache-2.0
"""A checkpoint: an ordered map of names to tensors, of which only the headers have been read."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from darekit.checkpoints.companions import Companions
from darekit.checkpoints.files import InputFile
from darekit.checkpoints.sources import FileRange, Source, traits_of
from darekit.dtypes import dtype_named
from darekit.wording import brief, size_of

SAMPLE_BYTES = 4096  # of each tensor; frozen, see `sample_digest`


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: what a header says about it, and where its bytes come from.

    Attributes:
        name: in this checkpoint.
        dtype: number format by its safetensors name, as BF16.
        shape: its shape.
        source: `read_into(buffer, offset)` fills a buffer of uint8 from that byte on.
        stored: the name that the tensor is stored under, where a view gave it another one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Source
    stored: str | None = None

    @property
    def stored_name(self) -> str:
        """The name that masks and digests know the tensor by, whatever views have called it since."""
        return self.name if self.stored is None else self.stored

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
        directory: holds this very model, so that other programs can load it from there; None for whatever is no such
            directory: a single file, tensors in memory, a pack, a view.
        tensors: in canonical order, that of `natural_key`.
        config: the content of config.json, None without one.
        files: what this checkpoint opened, and closes.
        revision: commit hash on the Hub, where known.
        companions: the files beside the weights that belong to the model, by name.
        origin: the stored model that this one is a view of: tensors renamed or left out, and none with other bytes.
            Seeds, and through them masks, are those of the origin.
        notes: what was found on opening that its user should know.
        left: files beside the weights that do not travel with the model, and why.
    """

    ref: str
    directory: Path | None
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] | None
    files: tuple[InputFile, ...]
    revision: str | None
    companions: Companions = field(default_factory=dict)
    origin: Checkpoint | None = None
    notes: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def read_files(self) -> tuple[InputFile, ...]:
        """All files that must stay open and unchanged: this checkpoint's own, and those that its sources name."""
        named = [file for info in self.tensors.values() for file in traits_of(info.source).files]
        return tuple(dict.fromkeys((*self.files, *named)))

    def __repr__(self) -> str:
        nbytes = sum(info.nbytes for info in self.tensors.values())
        return brief(self, f"{self.ref}, {len(self.tensors)} tensors, {size_of(nbytes)}")

    def close(self) -> None:
        """Close all files that were opened for this checkpoint."""
        for file in self.files:
            file.close()


def natural_key(name: str) -> tuple[tuple[str | tuple[int, str], ...], str]:
    """Sort key that puts layers.2 before layers.10; a total order (equal keys mean equal names).

    >>> sorted(["h.10.w", "h.2.w", "h.02.w", "h"], key=natural_key)
    ['h', 'h.02.w', 'h.2.w', 'h.10.w']
    """
    # Text and digits alternate, so only like meets like. Numbers are compared as (digits, text): Python refuses to
    # convert more than 4300 digits.
    parts: list[Any] = _DIGITS.split(name)
    for i in range(1, len(parts), 2):
        digits = parts[i].lstrip("0")
        parts[i] = len(digits), digits
    return tuple(parts), name


_DIGITS = re.compile("([0-9]+)")


def natural_order(names: Collection[str]) -> list[str]:
    """Names sorted by `natural_key`. The last order is remembered, as the models of a recipe have the same names."""
    global _last_order
    given = list(names)
    if given == _last_order[0] or given == _last_order[1]:
        return list(_last_order[1])
    found = sorted(given, key=natural_key)
    _last_order = given, found
    return list(found)


_last_order: tuple[list[str], list[str]] = [], []


COMPUTED = b"darekit-computed-1\0"  # frozen, see `sample_digest`


def sample_digest(checkpoint: Checkpoint, *, decoded: bool = False) -> bytes:
    """Checkpoint -> 16 bytes: a cheap fingerprint of its content that does not depend on its shards.

    BLAKE2b (digest_size=16, no key) over the concatenation, for each tensor in the order of its name by Unicode code
    points (not the natural order), of::

        name in UTF-8, b"\\0", dtype as in safetensors ("BF16") in ASCII, b"\\0",
        the dimensions in decimal joined by "," (nothing for a scalar), b"\\0",
        the tensor's first min(4096, nbytes) raw little-endian bytes; or, where its source has an identity,
        b"darekit-computed-1\\0" and the identity

    Of a view that only renames tensors or leaves some out it is the digest of its origin. Seeds, and through them masks
    in packs on disk, depend on this encoding: it never changes.

    `decoded`: quantised tensors are sampled as they are read, so that the digest is that of a checkpoint which stores
    what they decode to. This is what packs are bound to.
    """
    if checkpoint.origin is not None:
        return sample_digest(checkpoint.origin, decoded=decoded)
    digest = hashlib.blake2b(digest_size=16)
    heads: dict[tuple[str, tuple[int, ...]], bytes] = {}
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        head = heads.get((info.dtype, info.shape))
        if head is None:
            shape = ",".join(map(str, info.shape))
            head = heads[info.dtype, info.shape] = f"\0{info.dtype}\0{shape}\0".encode("ascii")
        digest.update(name.encode() + head + content_of(info, decoded=decoded))
    return digest.digest()


def content_of(info: TensorInfo, *, decoded: bool = False) -> bytes:
    """What a tensor's sample is: its first bytes, or `COMPUTED` and the identity of one that is computed. `decoded`: of
    a quantised tensor, the first bytes that it decodes to."""
    if type(info.source) is FileRange:  # nearly always, and there may be very many
        return info.source.file.read(info.source.offset, min(SAMPLE_BYTES, info.nbytes))
    traits = traits_of(info.source)
    if traits.identity is not None and not (decoded and traits.rounding is not None):
        return COMPUTED + traits.identity
    sample = np.empty(min(SAMPLE_BYTES, info.nbytes), np.uint8)
    if sample.size:
        info.source.read_into(sample, 0)
    return sample.tobytes()
