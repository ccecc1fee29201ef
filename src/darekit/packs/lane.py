# SPDX-License-Identifier: Apache-2.0
"""The fast lane: BF16 tensors that are dropped from go through one kernel, several leaves at a time.

It computes what `darekit.packs.leaves` computes leaf by leaf, to the bit (the tests hold one to the other), and saves
its dozen calls from Python per leaf, which cost more than the arithmetic. Everything else goes the general way.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from darekit.checkpoints.digests import LEAF
from darekit.dtypes import Bytes, DType, Floats
from darekit.kernels import packs as kernels
from darekit.masks import DROP_ALL
from darekit.packs.format import PackedTensor
from darekit.packs.frames import Forms
from darekit.packs.leaves import Mask, refuse_nonfinite, refuse_nonfinite_results
from darekit.packs.quantization import TERNARY, groups_in

READ_LEAVES = 16  # a call, of Python and of the system: fewer cost more time, and more only memory

Words = npt.NDArray[np.uint16]
Counts = npt.NDArray[np.int64]


class Room:
    """Memory that is used again and again; it grows where more is asked for."""

    def __init__(self) -> None:
        self._raw: Bytes = np.empty(0, np.uint8)

    def get(self, nbytes: int) -> Bytes:
        """(nbytes,) uint8, in place of what was got before."""
        if self._raw.size < nbytes:
            self._raw = np.empty(nbytes + nbytes // 16 + 4096, np.uint8)  # other leaves keep a little more
        return self._raw[:nbytes]


class _Scratch(threading.local):
    """What the kernels work in, a few MB for each thread: used again, as fresh pages cost a quarter of their time."""

    def __init__(self) -> None:
        self.bits = np.empty(LEAF // 64, np.uint64)
        self.room, self.delta = np.empty(LEAF + kernels.SPARE, np.uint16), np.empty(LEAF, np.float32)
        self.singles = np.empty(LEAF, np.float32)
        self.before, self.after, self.out = np.empty((3, LEAF), np.uint16)
        self.kept = np.empty(READ_LEAVES * LEAF, np.uint16)  # the base's elements that `encode` returns
        self.stored, self.values = Room(), Room()


_SCRATCH = _Scratch()


@dataclass(frozen=True)
class Encoded:
    """Leaves as they are stored, all raw and one behind another.

    Attributes:
        base: the base's kept elements, where values are the model's in the same format; holds until the thread encodes
            again.
        values: in the buffer that was given.
        scales: likewise.
        ends: where each leaf's values end, in bytes.
        scale_ends: where each leaf's scales end, in bytes.
    """

    base: Bytes
    values: Bytes
    scales: Bytes
    ends: list[int]
    scale_ends: list[int]


@dataclass(frozen=True)
class Lane:
    """One tensor's constants. `first`, below: the number of the first leaf; all other leaves follow it."""

    tensor: PackedTensor
    mask: Mask
    factor: np.float32

    @property
    def most_scales(self) -> int:
        """Bytes of a leaf's scales, at most."""
        return 2 * int(groups_in(LEAF, self.tensor.group)) if self.tensor.bits else 0

    def encode(self, base: Bytes, tuned: Bytes, first: int, counts: Counts, values: Bytes, scales: Bytes) -> Encoded:
        """(2n,) uint8 of base, in place the result, and of the model -> the leaves as they are stored.

        Args:
            base: whole leaves, READ_LEAVES at most.
            tuned: the same of the model.
            first: the number of the first.
            counts: (leaves,) takes how many elements each keeps.
            values: takes what is stored of them, (2n,) uint8 at most.
            scales: likewise, `most_scales` for each leaf.

        Raises:
            DataError: differences or results are NaN or Inf.
        """
        tensor, size = self.tensor, base.size // 2
        before, after = base.view(np.uint16), tuned.view(np.uint16)
        own, nothing = _SCRATCH, scales[:0]
        constants = self._mask_from(first), self.factor
        if not tensor.bits:
            kept, words = own.kept[:size], values[: 2 * size].view(np.uint16)
            bad, wrong = kernels.encode_exact(
                before, after, *constants, counts, kept, words, own.bits, own.room, own.out
            )
            ends = (2 * np.cumsum(counts)).tolist()
            found = Encoded(kept.view(np.uint8)[: ends[-1]], values[: ends[-1]], nothing, ends, [0] * counts.size)
        else:
            mean = TERNARY if tensor.bits == 2 else 1.0 if tensor.bits == 1 else None
            bad, wrong = kernels.encode_integers(
                before, after, *constants, tensor.bits, tensor.group, mean, counts, values, scales.view(np.uint16),
                own.bits, own.room, own.before, own.after, own.out, own.delta, own.singles,
            )  # fmt: skip
            ends = np.cumsum(-(-counts * tensor.bits // 8)).tolist()
            scale_ends = (2 * np.cumsum(groups_in(counts, tensor.group))).tolist()
            found = Encoded(nothing, values[: ends[-1]], scales[: scale_ends[-1]], ends, scale_ends)
        refuse_nonfinite(bad, tensor.name)
        refuse_nonfinite_results(wrong, tensor.name)
        return found

    def restore(
        self, raw: Bytes, first: int, counts: Counts, values: Bytes, scales: Floats,
        forms: Forms, kept: Words, places: Words,
    ) -> tuple[int, int]:  # fmt: skip
        """(2n,) uint8 of the base, in place -> the result.

        Args:
            raw: whole leaves of the base.
            first: the number of the first.
            counts: (leaves,) kept elements of each.
            values: their values, (m,) uint8, one leaf behind the other.
            scales: (groups,) float32; empty where there are none.
            forms: how they stand there.
            kept: takes what is overwritten, (sum of counts,); empty: nobody asks.
            places: takes where in its leaf that was; as `kept`.

        Returns:
            The first leaf of which the mask keeps another number of elements, or whose values make no sense, -1 where
            there is none: it and those behind it are untouched. And how many results are NaN or Inf.
        """
        tensor, words = self.tensor, raw.view(np.uint16)
        own = _SCRATCH
        constants = self._mask_from(first), self.factor
        if not tensor.bits:
            other, wrong = kernels.restore_exact(
                words, *constants, counts, values, forms.kinds, forms.many, forms.numbers, kept, places, own.bits,
                own.room, own.before, own.after, own.out,
            )  # fmt: skip
        else:
            other, wrong = kernels.restore_integers(
                words, *constants, tensor.bits, tensor.group, counts, values, scales, kept, places, own.bits, own.room,
                own.before, own.out, own.delta,
            )  # fmt: skip
        return int(other), int(wrong)

    def _mask_from(self, first: int) -> tuple[Any, Any, int, int]:
        """As kernels take it: seed, stream, threshold, and the first element of leaf `first`."""
        mask = self.mask
        return mask.seed, mask.stream, mask.threshold, first * LEAF


def stored_room(nbytes: int) -> Bytes:
    """(nbytes,) uint8 of this thread's scratch: what is read of a pack for one call of `restore`."""
    return _SCRATCH.stored.get(nbytes)


def values_room(nbytes: int) -> Bytes:
    """(nbytes,) uint8 of this thread's scratch: the values for one call of `restore`, out of their frames."""
    return _SCRATCH.values.get(nbytes)


def lane_for(mask: Mask, values: DType, factor: np.float32) -> Lane | None:
    """The lane of a mask's tensor, whose stored values have the format `values`; None: it goes the general way."""
    tensor = mask.tensor
    fits = tensor.kind == "delta" and tensor.dtype == "BF16" and mask.rows is None and 0 < mask.threshold < DROP_ALL
    stored = bool(tensor.bits) or (tensor.encoding == "exact" and values.name == "BF16")
    return Lane(tensor, mask, factor) if fits and stored else None
