# SPDX-License-Identifier: Apache-2.0
"""Sources: where the bytes of a tensor come from, and what else a source may say of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from darekit.checkpoints.files import Bytes, InputFile
from darekit.checkpoints.places import Places


class Source(Protocol):
    """Where the raw little-endian bytes of one tensor come from; threads may share it.

    A source may have an attribute `traits`; what it leaves out is asked through `traits_of`.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        ...

    def read_into(self, buffer: Bytes, offset: int) -> None:
        """(n,) uint8, filled with the n bytes that begin at byte `offset` of the tensor."""
        ...


@dataclass(frozen=True, slots=True)
class Delta:
    """A delta that a source knows more precisely than its bytes can say: an adapter's product is float32.

    Attributes:
        base: the source of the tensor that the delta is added to. Relative to any other it means nothing.
        read_into: (n,) float32, filled with the delta from an element on, given by its index in the flattened tensor.
    """

    base: Source
    read_into: Callable[[npt.NDArray[np.float32], int], None]


@dataclass(frozen=True, slots=True)
class Traits:
    """What a source may say of itself. The defaults are those of bytes that lie somewhere as they are.

    Attributes:
        files: must stay open and unchanged while the source is read.
        identity: digest of what the tensor is made of, where it is computed; it takes the place of the sample of bytes
            in the checkpoint's sample digest. None: the bytes are sampled.
        result: the content digest (`darekit.checkpoints.digests`) that all bytes must have, where it is known.
        seed: of the mask by which elements were dropped before the tensor was stored; None: none were.
        grain: elements that are decoded at once: a range that is not made of whole grains costs more than its bytes.
        delta: the float32 delta, where the source knows one.
        values: (n,) float32, filled with the elements from a number on as they are before they are rounded, where the
            source knows them so.
        cost: bytes read for each byte given.
        ordered: ranges must be read from the tensor's first on: going back begins anew.
        places: where the elements are in the stored tensor, whose mask they have; None: where they are here.
        as_stored: the bytes are the stored tensor's, in its order, so their digest is its digest.
        rounding: from a sample, about the squared norm of what rounding to the codes of a quantised tensor has changed,
            and that of the tensor itself. None: it is not quantised.
    """

    files: tuple[InputFile, ...] = ()
    identity: bytes | None = None
    result: str | None = None
    seed: int | None = None
    grain: int = 1
    delta: Delta | None = None
    values: Callable[[npt.NDArray[np.float32], int], None] | None = None
    cost: float = 1.0
    places: Places | None = None
    as_stored: bool = True
    ordered: bool = False
    rounding: Callable[[], tuple[float, float]] | None = None


PLAIN = Traits()


def traits_of(source: Source) -> Traits:
    """What a source says of itself; of one that says nothing, `PLAIN`."""
    traits: Traits = getattr(source, "traits", PLAIN)
    return traits


@lru_cache(maxsize=1024)
def _traits_of_file(file: InputFile) -> Traits:
    return Traits(files=(file,))


@dataclass(frozen=True, slots=True)
class FileRange:
    """A tensor that lies in a file."""

    file: InputFile
    offset: int
    nbytes: int

    @property
    def traits(self) -> Traits:
        """The file."""
        return _traits_of_file(self.file)

    def read_into(self, buffer: Bytes, offset: int) -> None:
        """(n,) uint8, filled with the n bytes that begin at byte `offset` of the tensor."""
        refuse_outside(buffer, offset, self.nbytes)
        self.file.read_into(buffer, self.offset + offset)


@dataclass(frozen=True)
class ArrayBytes:
    """A tensor that lies in memory. `data`: (nbytes,) uint8, contiguous."""

    data: Bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.data.nbytes

    def read_into(self, buffer: Bytes, offset: int) -> None:
        """(n,) uint8, filled with the n bytes that begin at byte `offset` of the tensor."""
        refuse_outside(buffer, offset, self.nbytes)
        buffer[...] = self.data[offset : offset + buffer.nbytes]


@dataclass(frozen=True)
class Part:
    """A range of another source's bytes: one tensor of several that are stored as one."""

    whole: Source
    offset: int
    nbytes: int

    @property
    def traits(self) -> Traits:
        """The files, and what they cost to read; the rest is about all of the tensor that is stored."""
        whole = traits_of(self.whole)
        return Traits(
            files=whole.files, seed=whole.seed, grain=whole.grain, cost=whole.cost, ordered=whole.ordered,
            rounding=whole.rounding,
        )  # fmt: skip

    def read_into(self, buffer: Bytes, offset: int) -> None:
        """(n,) uint8, filled with the n bytes that begin at byte `offset` of the tensor."""
        refuse_outside(buffer, offset, self.nbytes)
        self.whole.read_into(buffer, self.offset + offset)


@dataclass(frozen=True)
class Joined:
    """Tensors of one size that lie behind each other in one tensor."""

    parts: tuple[Source, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.parts[0].nbytes * len(self.parts)

    @property
    def traits(self) -> Traits:
        """The files, and what they cost to read."""
        found = [traits_of(part) for part in self.parts]
        return Traits(
            files=tuple(dict.fromkeys(file for one in found for file in one.files)),
            cost=sum(one.cost for one in found) / len(found),
            ordered=any(one.ordered for one in found),
        )

    def read_into(self, buffer: Bytes, offset: int) -> None:
        """(n,) uint8, filled with the n bytes that begin at byte `offset` of the tensor."""
        refuse_outside(buffer, offset, self.nbytes)
        size, done = self.parts[0].nbytes, 0
        while done < buffer.nbytes:
            part, begin = divmod(offset + done, size)
            count = min(size - begin, buffer.nbytes - done)
            self.parts[part].read_into(buffer[done : done + count], begin)
            done += count


def refuse_outside(buffer: Bytes, offset: int, nbytes: int) -> None:
    """Refuse a range that is not within a tensor of `nbytes`.

    Raises:
        ValueError: it begins before the tensor, or ends behind it.
    """
    if offset < 0 or offset + buffer.nbytes > nbytes:
        raise ValueError(f"bytes {offset} to {offset + buffer.nbytes} lie outside a tensor of {nbytes}")
