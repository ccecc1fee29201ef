# SPDX-License-Identifier: Apache-2.0
"""The fast lane: steps on BF16 whose work is element by element, or a selection whose threshold is known.

One kernel call takes four tiles from raw bytes to raw bytes, through the same small kernels as the general way of
`darekit.engine.tiles`, but on blocks that stay in L1. Every other step goes the general way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from darekit.dtypes import Bytes
from darekit.engine.contracts import Stage
from darekit.engine.known import known_of
from darekit.engine.losses import Losses
from darekit.engine.selection import Select
from darekit.engine.stages import RandomDrop
from darekit.engine.steps import Merge
from darekit.kernels import cpu
from darekit.kernels.lanes import SAMPLED, SUM_LANES
from darekit.masks import BLOCK, DROP_ALL, stream_of
from darekit.methods import MERGE_METHODS
from darekit.methods.merging import total_weight

TILES = 4  # raw bytes of so many tiles of all inputs still fit a third-level cache

LARGE = np.uint16(0x7F00)  # BF16's bits of 2^127

FEW = 8  # models; for each number of them the kernel is compiled anew, with its loops over models unrolled


LINE = 64  # bytes: of a processor's cache, and of its widest vectors


def aligned(shape: tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """An array that begins with a line of the cache: numpy's begin 16 bytes later, and cost kernels up to 15 %."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + LINE, np.uint8)
    begin = -raw.ctypes.data % LINE
    return raw[begin : begin + size].view(dtype).reshape(shape)


class Blocks:
    """Scratch of the fast lanes' kernels: one block of draws, and of float32 for each model, the base, the sum, the
    result and two more; sums that are 0 between blocks."""

    def __init__(self) -> None:
        self.words: npt.NDArray[np.uint32] = aligned((BLOCK,), np.uint32)
        self.lanes: npt.NDArray[np.float64] = aligned((3, SUM_LANES), np.float64)
        self.work: npt.NDArray[np.float32] = aligned((FEW + 5, BLOCK), np.float32)
        self._deltas: npt.NDArray[np.float32] = aligned((0,), np.float32)

    def deltas(self, models: int, count: int) -> npt.NDArray[np.float32]:
        """(models, count) float32, in the memory that the last ones had."""
        if self._deltas.size < models * count:
            self._deltas = aligned((models * count,), np.float32)
        return self._deltas[: models * count].reshape(models, count)


@dataclass(frozen=True)
class FusedStep:
    """A step's constants: per model (K,) streams, seeds, thresholds (0: no random drop) and factors, the stages that
    select (None: none), weights; and the merge's. `drops`: the stages whose masks may lie elsewhere; `finer`: 1 where
    a model's delta is known, and no difference of BF16."""

    streams: npt.NDArray[np.uint64]
    seeds: npt.NDArray[np.uint64]
    drops: tuple[RandomDrop, ...]
    thresholds: npt.NDArray[np.uint32]
    factors: npt.NDArray[np.float32]
    selects: tuple[Select | None, ...]
    weights: tuple[np.float32, ...]
    election: bool
    normalize: bool
    divisor: np.float32
    scale: np.float32
    base_weight: np.float32
    verbatim: bool
    counted: bool
    rounding: tuple[np.uint64, np.uint64] | None  # stream and seed of what rounds; None: to nearest
    finer: npt.NDArray[np.int64]

    def in_place(self, start: int, count: int) -> bool:
        """Whether all masks of the elements from `start` on are where the elements are: the kernel knows no other."""
        return all(drop.in_place(start, count) for drop in self.drops)

    def absorb(
        self,
        base_raw: Bytes,
        raws: npt.NDArray[np.uint16],
        deltas: npt.NDArray[np.float32],
        start: int,
        out: Bytes,
        blocks: Blocks,
        losses: Losses,
    ) -> npt.NDArray[np.int64] | None:
        """(2n,) uint8 base, (K, n) uint16 models -> (2n,) uint8 `out`, and how many elements of each model survive.

        `deltas`, (K, n) float32: of the models whose delta is known; (K, 0) where none is. What rounding did goes to
        `losses`. None where NaN or Inf came up anywhere; then nothing has happened. Without a base its elements are 0.
        """
        if self.verbatim:
            return self._copy(base_raw, raws, out)
        kept, counts = np.zeros(len(self.weights), np.int64), np.zeros(2, np.int64)
        touched = np.zeros((len(self.weights), 2), np.int64)
        squares = np.zeros((raws.shape[1] // (BLOCK * SAMPLED) + 2, 3))
        bounds = np.zeros((len(self.weights), 4), np.int64)
        for k, select in enumerate(self.selects):
            if select is not None:
                bounds[k] = select.bounds
        kernel, own = cpu.absorb_bf16, self.rounding or ()
        if self.rounding is not None:
            kernel = cpu.absorb_stochastic_bf16
        bad = kernel(
            base_raw.view(np.uint16), raws, deltas, self.finer, start, self.streams, self.seeds, self.thresholds,
            self.factors, bounds, self.weights, self.election, self.normalize, self.divisor, self.scale,
            self.base_weight, *own, kept, counts, touched, squares, out.view(np.uint16), blocks.words, blocks.lanes,
            blocks.work,
        )  # fmt: skip
        if bad:
            blocks.lanes[...] = 0
            return None
        if self.counted:
            losses.add_blocks(start, raws.shape[1], counts, touched, squares)
        for k, select in enumerate(self.selects):
            if select is not None:
                select.bounds = bounds[k]
        return kept

    @staticmethod
    def _copy(base_raw: Bytes, raws: npt.NDArray[np.uint16], out: Bytes) -> npt.NDArray[np.int64] | None:
        """The one model's own bytes; None where a value is no number, or so large that the difference might be Inf."""
        for values in (base_raw.view(np.uint16), raws[0]):
            if np.any((values & np.uint16(0x7FFF)) >= LARGE):
                return None
        out.view(np.uint16)[...] = raws[0]
        return np.array([raws.shape[1]])


def fuse(step: Merge, chains: Sequence[Sequence[Stage]]) -> FusedStep | None:
    """The step's constants, if the one kernel can do all of it; `chains`: each model's stages."""
    inputs = step.inputs
    if (step.base is not None and step.on_weights) or step.wide:
        return None
    if len(chains) > FEW:
        return None
    kernel = MERGE_METHODS[step.method].kernel
    if kernel not in ("sum", "elect"):
        return None
    if any(entry.dtype.name != "BF16" or entry.count < step.begin + step.count for entry in inputs):
        return None
    finer = [not step.verbatim and known_of(step, model) is not None for model in step.models]
    if any(finer) and any(isinstance(stage, Select) for chain in chains for stage in chain):  # which see BF16 alone
        return None
    if step.dtype.name != "BF16" or not all(map(_is_known, chains)):
        return None
    if step.rounding is not None and step.begin % BLOCK:  # rows that the base lacks may begin anywhere
        return None
    drops = [chain[0] if chain and isinstance(chain[0], RandomDrop) else None for chain in chains]
    weights = np.array(step.weights, np.float64)
    normalize = bool(step.parameters.get("normalize"))
    return FusedStep(
        streams=np.array([drop.stream if drop else 0 for drop in drops], np.uint64),
        seeds=np.array([drop.seed if drop else 0 for drop in drops], np.uint64),
        drops=tuple(drop for drop in drops if drop and drop.places is not None),
        thresholds=np.array([drop.threshold if drop else 0 for drop in drops], np.uint32),
        factors=np.array([drop.factor if drop else 1 for drop in drops], np.float32),
        selects=tuple(chain[0] if chain and isinstance(chain[0], Select) else None for chain in chains),
        weights=tuple(weights.astype(np.float32)),
        election=kernel == "elect",
        normalize=normalize,
        divisor=np.float32(total_weight(weights) if normalize and kernel == "sum" else 1.0),
        scale=np.float32(step.factor),
        base_weight=np.float32(step.base_weight),
        verbatim=step.verbatim,
        counted=step.base is not None,
        rounding=None if step.rounding is None else (np.uint64(stream_of(step.name)), np.uint64(step.rounding)),
        finer=np.array(finer, np.int64),
    )


def widened(raw: Bytes) -> npt.NDArray[np.float32]:
    """(2n,) uint8 of BF16 -> (n,) float32, without numba."""
    values = raw.view(np.uint16).astype(np.uint32)
    values <<= np.uint32(16)
    return values.view(np.float32)


def _is_known(chain: Sequence[Stage]) -> bool:
    """Nothing, one selection, or one random drop that keeps something."""
    if not chain:
        return True
    one = chain[0]
    return len(chain) == 1 and (isinstance(one, Select) or (isinstance(one, RandomDrop) and one.threshold < DROP_ALL))
