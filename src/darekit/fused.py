# SPDX-License-Identifier: Apache-2.0
"""The fast lane: steps whose whole work is element by element on BF16 go through one kernel, four tiles at a time.

It computes what the small kernels compute, to the bit (the conformance tests hold both to the formulas), and saves
their round trips through memory and Python. Every other step goes the general way of `darekit.tiles`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from darekit.dtypes import Bytes
from darekit.kernels import cpu
from darekit.masks import DROP_ALL, stream_of, threshold_of
from darekit.methods.merging import total_weight
from darekit.methods.sparsifiers import survivor_factor
from darekit.steps import StageSpec, Step

TILES = 4  # raw bytes of so many tiles of all inputs still fit a third-level cache


@dataclass(frozen=True)
class FusedStep:
    """A step's constants: per model (K,) seeds, thresholds (0: dense), factors and weights; and the merge's."""

    stream: np.uint64
    seeds: npt.NDArray[np.uint64]
    thresholds: npt.NDArray[np.uint32]
    factors: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]
    election: bool
    normalize: bool
    divisor: np.float32
    scale: np.float32

    def absorb(
        self, base_raw: Bytes, raws: npt.NDArray[np.uint16], start: int, kept: npt.NDArray[np.int64], out: Bytes
    ) -> bool:
        """(2n,) uint8 base, (K, n) uint16 models -> (2n,) uint8 `out`; False where NaN or Inf came up anywhere."""
        bad = cpu.absorb_bf16(
            base_raw.view(np.uint16), raws, self.seeds, self.stream, start, self.thresholds, self.factors,
            self.weights, self.election, self.normalize, self.divisor, self.scale, kept, out.view(np.uint16),
        )  # fmt: skip
        return not bad


def fuse(step: Step) -> FusedStep | None:
    """The step's constants, if the one kernel can do all of it."""
    inputs = (*step.models, *([step.base] if step.base else []))
    if step.kind != "merge" or step.base is None or step.on_weights or step.verbatim:
        return None
    if step.method not in ("linear", "task_arithmetic", "ties"):
        return None
    if any(entry.dtype.name != "BF16" or entry.count < step.begin + step.count for entry in inputs):
        return None
    if step.dtype.name != "BF16" or not all(map(_is_random_drop, step.chains)):
        return None
    weights = np.array(step.weights, np.float64)
    normalize = bool(step.parameters.get("normalize"))
    rates = [chain[0].parameters["drop_rate"] if chain else 0.0 for chain in step.chains]
    factors = [
        survivor_factor(rate, chain[0].parameters.get("rescale", "none"), chain[0].parameters.get("q", 0.0))
        if chain
        else np.float32(1)
        for rate, chain in zip(rates, step.chains, strict=True)
    ]
    return FusedStep(
        stream=np.uint64(stream_of(step.name)),
        seeds=np.array([chain[0].seed if chain else 0 for chain in step.chains], np.uint64),
        thresholds=np.array([threshold_of(rate) for rate in rates], np.uint32),
        factors=np.array(factors, np.float32),
        weights=weights.astype(np.float32),
        election=step.method == "ties",
        normalize=normalize,
        divisor=np.float32(total_weight(weights) if normalize and step.method != "ties" else 1.0),
        scale=np.float32(step.factor),
    )


def _is_random_drop(chain: tuple[StageSpec, ...]) -> bool:
    """Nothing, or one random drop that keeps something and needs no norm."""
    if not chain:
        return True
    spec = chain[0]
    random = spec.method in ("dare", "drop_only") and spec.parameters.get("rescale") != "l1"
    return len(chain) == 1 and random and threshold_of(spec.parameters["drop_rate"]) < DROP_ALL
