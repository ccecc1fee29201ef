# SPDX-License-Identifier: Apache-2.0
"""TIES' trim over the whole model (`trim: model`), as its authors do it: one threshold per model, found by counting.

A prelude to the engine: passes over all tensors add up histograms of magnitudes until each model's threshold is
exact; a last one counts the elements equal to it, so that every tensor knows how many of them survive there. Tensors
count in the order of the output's names.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from darekit.dtypes import Floats
from darekit.engine.selection import Census, Select
from darekit.engine.steps import TRIM_AT, TRIM_MODEL, Merge, StageSpec, Step
from darekit.engine.tiles import SAMPLED_PIECES, ScratchPool, Sink, StepRun, Tally
from darekit.errors import PlanError


def settle_model_trim(steps: Sequence[Step], *, threads: int, tile: int, allow_nonfinite: bool = False) -> list[Step]:
    """Replace every `trim: model` stage by one with its tensor's own threshold; other steps stay as they are.

    Raises:
        PlanError: a float64 tensor, which cannot be trimmed this way.
    """
    concerned = [step for step in steps if isinstance(step, Merge) and _trims(step)]
    if not concerned:
        return list(steps)
    wide = next((step.name for step in concerned if step.wide), None)
    if wide is not None:
        raise PlanError(f"trim: model computes in float32, but {wide} is F64; use trim: tensor")
    keeps = {k: spec.parameters["keep"] for step in concerned for k, spec in _trims(step)}
    totals = {k: sum(step.count for step in concerned if k in step.owners) for k in keeps}
    selects = {k: Select(totals[k], 0, max(1, int(keeps[k] * totals[k]))) for k in keeps}

    while waiting := {k: select for k, select in selects.items() if not select.ready}:
        sampled = all(select.sampling for select in waiting.values())
        count = _Counting(waiting)
        _visit(concerned, count, threads=threads, tile=tile, sampled=sampled, allow_nonfinite=allow_nonfinite)
        count.settle()

    equals: dict[tuple[str, int], int] = {}

    def count_equals(step: Merge, k: int, delta: Floats) -> None:
        magnitude = delta.view(np.uint32) & np.uint32(0x7FFFFFFF)
        found = int(np.count_nonzero(magnitude == np.uint32(selects[k].low)))
        with ties_lock:
            equals[step.name, k] = equals.get((step.name, k), 0) + found

    ties_lock = threading.Lock()
    _visit(concerned, count_equals, threads=threads, tile=tile, sampled=False, allow_nonfinite=allow_nonfinite)

    left = {k: select.low_left for k, select in selects.items()}
    settled: list[Step] = []
    for step in steps:
        if not isinstance(step, Merge):
            settled.append(step)
            continue
        chains = list(step.chains)
        for k, _ in _trims(step):
            here = min(left[k], equals.get((step.name, k), 0))
            left[k] -= here
            at = step.owners.index(k)
            trim = StageSpec(TRIM_AT, {"low": selects[k].low, "low_left": here})
            chains[at] = tuple(trim if spec.method == TRIM_MODEL else spec for spec in chains[at])
        settled.append(replace(step, chains=tuple(chains)))
    return settled


@dataclass
class _Hands:
    """What a step needs of a thread that only reads."""

    tile: int
    allow_nonfinite: bool
    broken: threading.Event
    outputs: Sequence[Sink] = ()
    tally: Tally = field(default_factory=Tally)
    scratch: ScratchPool = field(default_factory=ScratchPool)


class _Counting:
    """One pass: each thread counts into a census of its own, and they are added up at the end."""

    def __init__(self, selects: Mapping[int, Select]) -> None:
        self.selects = selects
        self.parts: dict[tuple[int, int], Census] = {}

    def __call__(self, step: Merge, k: int, delta: Floats) -> None:
        if k not in self.selects:
            return
        key = threading.get_ident(), k
        if key not in self.parts:
            self.parts[key] = self.selects[k].census()
        self.parts[key].count(delta)

    def settle(self) -> None:
        for k, select in self.selects.items():
            select.begin()
            for (_, owner), part in self.parts.items():
                if owner == k:
                    select.counted.add(part)
            select.settle()


def _trims(step: Merge) -> list[tuple[int, StageSpec]]:
    return [
        (owner, spec)
        for owner, chain in zip(step.owners, step.chains, strict=False)
        for spec in chain
        if spec.method == TRIM_MODEL
    ]


def _visit(
    steps: Sequence[Merge],
    see: Callable[[Merge, int, Floats], None],
    *,
    threads: int,
    tile: int,
    sampled: bool,
    allow_nonfinite: bool,
) -> None:
    """Show every tile of every model's sparsified delta to `see`, on several threads."""
    stop, broken = threading.Event(), threading.Event()
    local = threading.local()

    def visit(step: Merge) -> None:
        hands = getattr(local, "hands", None)
        if hands is None:
            hands = local.hands = _Hands(tile, allow_nonfinite, broken)
        before = tuple(tuple(spec for spec in chain if spec.method != TRIM_MODEL) for chain in step.chains)
        run = StepRun(replace(step, chains=before), hands, {}, Counter())
        run.settle(stop)
        for chain in run.chains:
            for stage in chain:
                stage.begin()
        starts = range(0, step.count, run.tile)
        if sampled:
            starts = starts[:: max(1, 4 * len(starts) // SAMPLED_PIECES)]
        trimmed = dict(_trims(step))
        for start in starts:
            deltas = run.load(start, min(run.tile, step.count - start)).deltas
            for k, owner in enumerate(step.owners):
                for stage in run.chains[k]:
                    stage.apply(deltas[k], start)
                if owner in trimmed:
                    see(step, owner, deltas[k])

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(visit, steps):
            pass
