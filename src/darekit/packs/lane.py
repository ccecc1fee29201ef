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

from darekit.digests import LEAF
from darekit.dtypes import Bytes, DType, Floats
from darekit.kernels import packs as kernels
from darekit.masks import DROP_ALL
from darekit.packs.format import PackedTensor
from darekit.packs.leaves import Mask, refuse_nonfinite, refuse_nonfinite_results
from darekit.packs.quantization import TERNARY, groups_in

LANE_LEAVES = 4  # a call: with the model's they still fit the caches

Words = npt.NDArray[np.uint16]
Counts = npt.NDArray[np.int64]


class _Scratch(threading.local):
    """What the kernels work in, up to 2 MB for each thread: used again, as fresh pages cost a quarter of their time."""

    def __init__(self) -> None:
        self.bits = np.empty(LANE_LEAVES * LEAF // 64, np.uint64)
        self.room, self.delta = np.empty(LEAF + kernels.SPARE, np.uint16), np.empty(LEAF, np.float32)
        self.before, self.after, self.out = np.empty((3, LEAF), np.uint16)
        # What `encode` returns lies here, and what frames hold before `restore` has seen it.
        self.kept, self.values = np.empty((2, LANE_LEAVES * LEAF), np.uint16)


_SCRATCH = _Scratch()


@dataclass(frozen=True)
class Encoded:
    """One leaf: the base's kept elements (where values are fine-tuned elements), values and scales, all raw.

    They may lie in the thread's scratch, and hold until it encodes again.
    """

    base: Bytes
    values: Bytes
    scales: Bytes


@dataclass(frozen=True)
class Lane:
    """One tensor's constants. `first`, below: the number of the first leaf; all other leaves follow it."""

    tensor: PackedTensor
    mask: Mask
    factor: np.float32

    def encode(self, base: Bytes, tuned: Bytes, first: int, counts: Counts) -> list[Encoded]:
        """(2n,) uint8 of base, in place the result, and model -> leaves as they are stored; `counts` is filled.

        Raises:
            DataError: differences or results are NaN or Inf.
        """
        tensor, size = self.tensor, base.size // 2
        before, after = base.view(np.uint16), tuned.view(np.uint16)
        own = _SCRATCH
        constants = self._drawn(first, size), self.factor
        if not tensor.bits:
            kept, values = own.kept[:size], own.values[:size]
            bad, wrong = kernels.encode_exact(before, after, *constants, counts, kept, values, own.room, own.out)
            ends = np.cumsum(counts)
            found = [
                Encoded(kept[begin:end].view(np.uint8), values[begin:end].view(np.uint8), np.empty(0, np.uint8))
                for begin, end in zip(ends - counts, ends, strict=True)
            ]
        else:
            packed = own.values.view(np.uint8)[:size]
            scales = np.empty(counts.size * int(groups_in(LEAF, tensor.group)) + 1, np.uint16)
            mean = TERNARY if tensor.bits == 2 else 1.0 if tensor.bits == 1 else None
            bad, wrong = kernels.encode_integers(
                before, after, *constants, tensor.bits, tensor.group, mean, counts, packed, scales, own.room, own.out,
                own.delta,
            )  # fmt: skip
            sizes, groups = -(-counts * tensor.bits // 8), groups_in(counts, tensor.group)
            found = [
                Encoded(np.empty(0, np.uint8), packed[end - nbytes : end], scales[last - many : last].view(np.uint8))
                for nbytes, end, many, last in zip(sizes, np.cumsum(sizes), groups, np.cumsum(groups), strict=True)
            ]
        refuse_nonfinite(bad, tensor.name)
        refuse_nonfinite_results(wrong, tensor.name)
        return found

    def restore(
        self, raw: Bytes, first: int, counts: Counts, values: Bytes, scales: Floats,
        forms: Bytes, kept: Words, places: Words,
    ) -> tuple[int, int]:  # fmt: skip
        """(2n,) uint8 of the base, in place -> the result.

        Args:
            raw: whole leaves of the base.
            first: the number of the first.
            counts: (leaves,) kept elements of each.
            values: their values, (m,) uint8, one leaf behind the other.
            scales: (groups,) float32; empty where there are none.
            forms: (leaves,) in what form each leaf's values are: plain, or what `darekit.packs.frames` names.
            kept: takes what is overwritten, (sum of counts,); empty: nobody asks.
            places: takes where in its leaf that was; as `kept`.

        Returns:
            The first leaf of which the mask keeps another number of elements, -1 where there is none: it and those
            behind it are untouched. And how many results are NaN or Inf.
        """
        tensor, words = self.tensor, raw.view(np.uint16)
        own = _SCRATCH
        constants = self._drawn(first, words.size), self.factor
        if not tensor.bits:
            other, wrong = kernels.restore_exact(
                words, *constants, counts, values, forms, kept, places, own.room, own.before, own.after, own.out
            )
        else:
            other, wrong = kernels.restore_integers(
                words, *constants, tensor.bits, tensor.group, counts, values, scales, kept, places, own.room,
                own.before, own.out, own.delta,
            )  # fmt: skip
        return int(other), int(wrong)

    def _drawn(self, first: int, count: int) -> Any:
        """Which of `count` elements from leaf `first` on are kept, as bits."""
        mask, room = self.mask, _SCRATCH.bits if count <= LANE_LEAVES * LEAF else None
        return kernels.kept_bits(mask.seed, mask.stream, first * LEAF, mask.threshold, count, room)


def values_room(nbytes: int) -> Bytes:
    """(nbytes,) uint8 of this thread's scratch, for the values of the leaves of one call of `restore`."""
    return _SCRATCH.values.view(np.uint8)[:nbytes]


def lane_for(mask: Mask, values: DType, factor: np.float32) -> Lane | None:
    """The lane of a mask's tensor, whose stored values have the format `values`; None: it goes the general way."""
    tensor = mask.tensor
    fits = tensor.kind == "delta" and tensor.dtype == "BF16" and mask.rows is None and 0 < mask.threshold < DROP_ALL
    stored = bool(tensor.bits) or (tensor.encoding == "exact" and values.name == "BF16")
    return Lane(tensor, mask, factor) if fits and stored else None
