# SPDX-License-Identifier: Apache-2.0
"""What rounding would do, from the head of each tensor: the engine's own way of a few elements, written nowhere.

Exact for what is decided element by element. What a method measures of a whole tensor (a threshold, an angle) it
measures of the head alone.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from darekit.dtypes import Bytes
from darekit.engine.execution import Worker, settle_run
from darekit.engine.losses import record_of
from darekit.engine.stages import scope_of
from darekit.engine.steps import TRIM, TRIM_MODEL, Input, Merge, StageSpec, Step, is_counted, vectors_of
from darekit.engine.tiles import TILE, StepRun
from darekit.masks import BLOCK
from darekit.methods import MERGE_METHODS, SPARSIFIERS

TENSORS = 128  # that are looked at: 2.6 ms each, of three models with two stages


class _Nowhere:
    def write(self, buffer: Bytes, offset: int) -> None:
        """Nothing is kept."""


def sampled_records(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Steps whose inputs are open -> of some of their tensors, what `darekit.engine.losses` would record."""
    able = [head for step in steps if is_counted(step) and (head := head_of(step)) is not None]
    chosen = able[:: max(1, -(-len(able) // TENSORS))]
    stop, found = threading.Event(), []
    worker = Worker([_Nowhere()], TILE, True, threading.Event())
    for step, count in chosen:
        worker.broken.clear()
        run = StepRun(step, worker, {}, Counter())
        settle_run(run, stop)
        run.merge(0, step.count, stop)
        if record := record_of([run.losses.finish()], count):
            found.append({"rounding": record})
    return found


def head_of(step: Merge) -> tuple[Merge, int] | None:
    """A step on its first elements, a block or whole rows of them, and how many elements it stands for; None where the
    method must have all of the tensor."""
    method, scope = MERGE_METHODS[step.method], scope_of(step)
    specs = [spec for chain in step.chains for spec in chain]
    foreign = [method.foreign, *(SPARSIFIERS[s.method].foreign for s in specs if s.method in SPARSIFIERS)]
    if step.statistics or method.rows or vectors_of(step) == "column" or any(one is not None for one in foreign):
        return None
    whole = step.count <= BLOCK
    if not whole and (scope == "tensor" or step.wide):
        return None
    row = max(1, step.row)
    count = min(step.count, BLOCK if scope == "element" and not method.survey else -(-BLOCK // row) * row)

    def cut(entry: Input) -> Input:
        return replace(entry, count=min(entry.count, step.begin + count))

    def scaled(spec: StageSpec) -> StageSpec:
        if spec.method == TRIM_MODEL:
            return StageSpec(TRIM, {"keep_count": max(1, int(spec.parameters["keep"] * count))})
        if "keep_count" in spec.parameters:
            kept = round(spec.parameters["keep_count"] * count / step.count)
            return replace(spec, parameters={**spec.parameters, "keep_count": max(1, kept)})
        return spec

    return replace(
        step, count=count, output=0, offset=0, base=None if step.base is None else cut(step.base),
        models=tuple(map(cut, step.models)), chains=tuple(tuple(map(scaled, chain)) for chain in step.chains),
    ), step.count  # fmt: skip
