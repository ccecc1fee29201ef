# SPDX-License-Identifier: Apache-2.0
"""The fast lane of surveys by variance: BF16 models that nothing is dropped from before.

As in `darekit.engine.fused`, one kernel call takes four tiles from raw bytes on. What is found out is the surveyor's,
so tiles with NaN or Inf may go the general way in between.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from darekit.checkpoints.digests import LEAF
from darekit.dtypes import Bytes
from darekit.engine.fused import FEW, Blocks
from darekit.engine.known import is_finer
from darekit.engine.losses import Losses
from darekit.engine.measuring import Products
from darekit.engine.steps import Merge
from darekit.engine.surveying import Highest, Surveyor, WholeSurveyor
from darekit.kernels import surveys
from darekit.kernels.lanes import SAMPLED, SUMS
from darekit.masks import BLOCK
from darekit.methods import MERGE_METHODS
from darekit.methods.surveyed import DIVISOR_TINY, agreeing_mean, themselves, variance

Elements = npt.NDArray[np.uint16]
AT_ALL = np.array([0, 1, 1 << 31, 0], np.int64)  # bounds where nothing is selected: nobody looks at them


class FusedSurvey:
    """A step's surveyor, fed from raw bytes: (2n,) uint8 of the base and (K, n) uint16 of the models each time."""

    def __init__(self, step: Merge, surveyor: Surveyor) -> None:
        self.step, self.surveyor = step, surveyor
        self._alike = (np.float32(1),) * len(step.models)  # weights where none are needed: K alone
        self._survivors = surveyor.survivors if isinstance(surveyor.survivors, Highest) else None

    def measure(self, base_raw: Bytes, raws: Elements, start: int, blocks: Blocks) -> bool:
        """Several tiles of a measuring pass; False where a difference is NaN or Inf: this pass is then worthless."""
        base = base_raw.view(np.uint16)
        if self._survivors is not None and not self._survivors.ready:
            census, found = self._survivors.counted, np.zeros(2)
            scores = np.empty(BLOCK if census.exact else base.size, np.float32)
            above = surveys.count_variances_bf16(
                base, raws, self._alike, not census.exact, census.first, census.counts, scores, found, blocks.work
            )
            if above < 0:
                return False
            self._survivors.take_counts(scores, above, int(found[0]), base.size)
            self.surveyor.take_squares(float(found[1]), base.size)
            return True
        if not self.surveyor.parts:
            self.surveyor.parts = _parts(len(raws), self.step.count)
        sums, totals = (getattr(self.surveyor.parts[0], name).base for name in ("sums", "totals"))
        bounds = AT_ALL.copy() if self._survivors is None else self._survivors.bounds
        bad = surveys.energies_bf16(
            base, raws, self._alike, self._survivors is not None, bounds, start, LEAF, sums, totals, blocks.work
        )
        if self._survivors is not None:
            self._survivors.bounds = bounds
        return not bad

    def absorb(
        self, base_raw: Bytes, raws: Elements, start: int, out: Bytes, blocks: Blocks, losses: Losses
    ) -> int | None:
        """Several tiles -> (2n,) uint8 `out`, and how many elements survive. None where NaN or Inf came up anywhere;
        then nothing has happened."""
        assert self.surveyor.found
        many, weights = len(raws), tuple(self.surveyor.found[0].astype(np.float32))
        bounds = AT_ALL.copy() if self._survivors is None else self._survivors.bounds
        kept, counts, touched = np.zeros(1, np.int64), np.zeros(2, np.int64), np.zeros((many, 2), np.int64)
        squares = np.zeros((raws.shape[1] // (BLOCK * SAMPLED) + 2, 3))
        bad = surveys.absorb_agreeing_bf16(
            base_raw.view(np.uint16), raws, weights, self._survivors is not None, bounds, np.float32(DIVISOR_TINY),
            np.float32(self.step.factor), start, kept, counts, touched, squares, out.view(np.uint16), blocks.lanes,
            blocks.work,
        )  # fmt: skip
        if bad:
            blocks.lanes[...] = 0
            return None
        losses.add_blocks(start, raws.shape[1], counts, touched, squares)
        if self._survivors is not None:
            self._survivors.bounds = bounds
        return int(kept[0])


def _parts(many: int, count: int) -> list[Products]:
    """Squares of each of so many rows, whose sums and totals lie side by side."""
    parts = [Products(1, 0, count) for _ in range(many)]
    sums, totals = np.zeros((many, 1, SUMS)), np.zeros((many, *parts[0].totals.shape))
    for k, part in enumerate(parts):
        part.sums, part.totals = sums[k], totals[k]
    return parts


def fuse_survey(step: Merge, surveyor: Surveyor | WholeSurveyor | None) -> FusedSurvey | None:
    """The step's fast lane, if its survey is one by variance, and its inputs and output are plain BF16."""
    survey = MERGE_METHODS[step.method].survey
    if survey is None or not isinstance(surveyor, Surveyor) or step.base is None or step.on_weights:
        return None
    if (survey.scores, survey.squares, survey.merge) != (variance, themselves, agreeing_mean):
        return None
    inputs = (*step.models, step.base)
    if any(step.chains) or len(step.models) > FEW or any(map(is_finer, step.models)):
        return None
    if any(entry.dtype.name != "BF16" or entry.count < step.begin + step.count for entry in inputs):
        return None
    if step.dtype.name != "BF16" or step.rounding is not None or step.base_weight or step.begin % BLOCK:
        return None
    return FusedSurvey(step, surveyor)
