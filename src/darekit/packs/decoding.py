# SPDX-License-Identifier: Apache-2.0
"""A pack's tensors decoded: leaf by leaf, in place, or as the source of a checkpoint's tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from darekit import kernels
from darekit.checkpoints import TensorInfo, Traits, traits_of
from darekit.checkpoints.digests import LEAF
from darekit.checkpoints.sources import refuse_outside
from darekit.dtypes import DTYPES, Bytes, Floats
from darekit.errors import CheckpointError, DataError
from darekit.kernels import packs
from darekit.packs.format import Counts, PackedTensor, PackFile, value_sizes
from darekit.packs.frames import Forms, decompress_values, unwrap_values
from darekit.packs.lane import READ_LEAVES, Words, lane_for, stored_room, values_room
from darekit.packs.leaves import (
    Indices,
    Mask,
    decode,
    factor_of,
    number_for,
    refuse_nonfinite_results,
    restore,
    scale_factors,
    take,
)
from darekit.packs.lossless import decompress
from darekit.packs.steps import bad_steps
from darekit.packs.weights import Weight

NOTHING: Words = np.empty(0, np.uint16)

NO_SCALES: Floats = np.empty(0, np.float32)


class Decoder:
    """One tensor of a pack, leaf by leaf; threads may share it."""

    def __init__(self, source: PackFile, tensor: PackedTensor) -> None:
        self.source, self.tensor = source, tensor
        self.itemsize = DTYPES[tensor.dtype].itemsize
        self.word = np.dtype(f"u{self.itemsize}")
        self.nbytes, self.leaf_bytes = tensor.count * self.itemsize, LEAF * self.itemsize
        self.values = source.value_dtype(tensor) if tensor.kind == "delta" else DTYPES["U8"]
        self.number = number_for(tensor, self.values)
        self.factor = factor_of(tensor, source.document.rescale)
        self.mask = Mask(tensor, source.document.seed, source.rows.get(tensor.name))
        self.lane = lane_for(self.mask, self.values, self.factor)

    def size(self, leaf: int) -> int:
        """Bytes of a leaf."""
        return min(self.leaf_bytes, self.nbytes - leaf * self.leaf_bytes)

    def indices(self, leaf: int) -> Indices:
        """(k,) int32: the leaf's kept elements.

        Raises:
            CheckpointError: the mask keeps another number of them than the pack holds.
        """
        indices = self.mask.indices(leaf)
        expected = int(self.source.tables[self.tensor.name].counts[leaf])
        if indices.size != expected:
            raise CheckpointError(
                f"{self.source.file.path}, tensor {self.tensor.name}: leaf {leaf} holds {expected} elements, but its "
                f"mask keeps {indices.size}: seed, drop rate or rows are not those it was packed with"
            )
        return indices

    def check(self, leaf: int, stored: Bytes, scales: Bytes) -> None:
        """Refuse what no base could make sense of."""
        if self.tensor.kind == "lossless":
            self.restore(leaf, np.zeros(self.size(leaf), np.uint8), (stored, scales))
            return
        count = self.indices(leaf).size
        stored = self.bare(stored, count, None)
        if self.tensor.encoding == "exact" and self.tensor.codec != "none":
            return  # differences from elements that are not at hand
        if self.tensor.encoding == "exact":
            values: Floats = np.empty(count, self.number)
            kernels.widen(stored, self.values, values)
            if kernels.count_nonfinite(values):
                raise DataError(f"tensor {self.tensor.name}: a stored value is NaN or Inf")
        else:
            decode(self.tensor, self.values, stored, scales, count, np.zeros(count, self.number))

    def bare(self, stored: Bytes, count: int, base: Bytes | None) -> Bytes:
        """What is stored of a leaf's `count` values, without its frame; `base`: its elements at their places."""
        if self.tensor.codec == "none":
            return stored
        nbytes = value_sizes(self.tensor, count, self.values.itemsize)
        return decompress_values(self.tensor, self.values, stored, nbytes, base)

    @property
    def step(self) -> int:
        """How many leaves `restore_leaves` takes at most."""
        return READ_LEAVES if self.lane else 1

    def span(self, first: int) -> tuple[int, int]:
        """Where `step` leaves begin and end, from `first` on: bytes of the tensor."""
        return first * self.leaf_bytes, min((first + self.step) * self.leaf_bytes, self.nbytes)

    def restore_leaves(self, first: int, raw: Bytes) -> None:
        """Whole leaves of the base from `first` on, raw, in place -> the result."""
        if self.lane:
            self.swap_leaves(first, raw)
        else:
            self.restore(first, raw)

    def restore(self, leaf: int, raw: Bytes, found: tuple[Bytes, Bytes] | None = None) -> None:
        """One leaf of the base, raw, in place -> the result."""
        self.swap(leaf, raw, None, found)

    def swap(
        self, leaf: int, raw: Bytes, keep: Callable[[Indices | None, Bytes], None] | None = None,
        found: tuple[Bytes, Bytes] | None = None,
    ) -> None:  # fmt: skip
        """`restore`, after `keep` has seen what will be overwritten: where (None: everywhere), and raw bytes."""
        stored, scales = found or self.source.read_leaf(self.tensor, leaf)
        if keep and (self.tensor.kind == "lossless" or self.mask.whole) and stored.size:
            keep(None, raw.copy())
        if self.tensor.kind == "lossless":
            decompress(stored, raw, DTYPES[self.tensor.dtype].itemsize, self.tensor.name)
            return
        indices = None if self.mask.whole else self.indices(leaf)
        if keep and indices is not None and indices.size:
            keep(indices, take(raw, DTYPES[self.tensor.dtype], indices))
        if self.tensor.codec != "none":
            kept = raw if indices is None else take(raw, DTYPES[self.tensor.dtype], indices)
            stored = self.bare(stored, kept.size // DTYPES[self.tensor.dtype].itemsize, kept)
        restore(self.tensor, self.values, self.factor, indices, stored, scales, raw)

    def swap_leaves(self, first: int, raw: Bytes, keep: Swapped | None = None) -> None:
        """Leaves from `first` on of the base, raw and whole, in place -> the result; `keep` takes what was there.

        Only where there is a `lane`.

        Raises:
            CheckpointError: what is stored makes no sense; `keep` has what was overwritten until then.
        """
        assert self.lane is not None
        tensor, table = self.tensor, self.source.tables[self.tensor.name]
        last = first + -(-raw.size // self.leaf_bytes)
        counts = table.counts[first:last]
        values, scales = self.source.read_leaves(tensor, first, last, stored_room)
        forms = Forms.plain(counts.size)
        if tensor.codec != "none":
            values, forms = self._unwrapped(values, counts, table.values[first : last + 1])
        factors = scale_factors(scales, tensor.name) if scales.size else NO_SCALES
        kept, places = keep.room(int(counts.sum())) if keep else (NOTHING, NOTHING)
        other, wrong = self.lane.restore(raw, first, counts, values, factors, forms, kept, places)
        if keep:
            keep.counts = counts if other < 0 else counts[:other]
        if other >= 0:
            self.indices(first + other)  # says what is wrong with the mask
            raise bad_steps(tensor.name)
        refuse_nonfinite_results(wrong, tensor.name)

    def _unwrapped(self, frames: Bytes, counts: Counts, starts: Counts) -> tuple[Bytes, Forms]:
        """Frames that lie behind one another -> their values likewise, in the thread's scratch; their forms."""
        ends = np.cumsum(value_sizes(self.tensor, counts, self.values.itemsize)).tolist()
        room = values_room(ends[-1])
        return room, unwrap_values(self.tensor, self.values, frames, (starts[1:] - starts[0]).tolist(), room, ends)


def spans_of(decoders: Sequence[tuple[Decoder, Weight]]) -> list[tuple[Decoder, Weight, int]]:
    """What each call of `restore_leaves` is for: the decoder, the weight, the first leaf."""
    return [
        (decoder, weight, first)
        for decoder, weight in decoders
        for first in range(0, decoder.tensor.leaves, decoder.step)
    ]


class Swapped:
    """What some leaves of a BF16 tensor held, and where; filled and put back again and again, in the same memory."""

    __slots__ = ("counts", "places", "words")

    def __init__(self) -> None:
        self.counts = np.empty(0, np.int64)  # of each leaf's elements that are kept here
        self.words = self.places = NOTHING

    @property
    def filled(self) -> bool:
        """Whether anything is kept here."""
        return bool(self.counts.size)

    def room(self, count: int) -> tuple[Words, Words]:
        """(count,) uint16 twice: for the elements, and for their places in their leaves. Nothing may be kept here."""
        if self.words.size < count:
            # Another seed keeps a little more or less.
            self.words, self.places = np.empty((2, count + count // 32 + 256), np.uint16)
        return self.words[:count], self.places[:count]

    def put_back(self, raw: Bytes) -> None:
        """Into those leaves, (n,) uint8, in place; nothing is kept then."""
        if self.filled:
            packs.put_leaves(raw.view(np.uint16), self.counts, self.places, self.words)
            self.counts = self.counts[:0]


@dataclass(frozen=True)
class PackedSource:
    """A tensor of a bound pack: ranges of the base's, decoded leaf by leaf."""

    decoder: Decoder
    base: TensorInfo

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.decoder.nbytes

    @property
    def traits(self) -> Traits:
        """The pack beside what the base needs; the digest of all bytes as they were when the model was packed."""
        tensor, pack, base = self.decoder.tensor, self.decoder.source, traits_of(self.base.source)
        stored = pack.stored_bytes(tensor)
        return Traits(
            files=(pack.file, *base.files),
            result=tensor.result,
            seed=pack.document.seed if 0 < tensor.drop_rate < 1 else None,
            grain=LEAF,
            cost=base.cost + (stored / self.nbytes if self.nbytes else 0),
        )

    def read_into(self, buffer: Bytes, offset: int) -> None:
        """(n,) uint8, filled with the n bytes that begin at byte `offset` of the tensor."""
        size = self.decoder.leaf_bytes
        refuse_outside(buffer, offset, self.nbytes)
        done = 0
        while done < buffer.size:
            leaf, skip = divmod(offset + done, size)
            target = buffer[done:] if skip == 0 else NOTHING.view(np.uint8)
            target = target[: self._whole_leaves(target, leaf)]
            if target.size:
                self._decode(leaf, target)
                done += target.size
                continue
            raw = np.empty(self.decoder.size(leaf), np.uint8)  # of which no more than a part is wanted
            self._decode(leaf, raw)
            part = raw[skip : skip + buffer.size - done]
            buffer[done : done + part.size] = part
            done += part.size

    def _whole_leaves(self, buffer: Bytes, leaf: int) -> int:
        """Bytes of the leaves from `leaf` on that fit a buffer and can be decoded in it, in one call."""
        decoder = self.decoder
        rest = self.nbytes - leaf * decoder.leaf_bytes
        fits = rest if buffer.size >= rest else buffer.size // decoder.leaf_bytes * decoder.leaf_bytes
        nbytes = min(fits, decoder.step * decoder.leaf_bytes)
        return nbytes if buffer[:nbytes].view(decoder.word).flags.aligned else 0

    def _decode(self, leaf: int, raw: Bytes) -> None:
        """Whole leaves, from `leaf` on: (n,) uint8, filled; more than one only where there is a lane."""
        decoder = self.decoder
        self.base.source.read_into(raw, leaf * decoder.leaf_bytes)
        try:
            decoder.restore_leaves(leaf, raw)
        except CheckpointError as error:  # a recipe may have several packs
            raise CheckpointError(f"{decoder.source.file.path}: {error}; download it again") from error
