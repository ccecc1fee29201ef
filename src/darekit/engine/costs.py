# SPDX-License-Identifier: Apache-2.0
"""What executing steps costs: bytes beside the tiles, and what a step's matrices take."""

from __future__ import annotations

from collections.abc import Container, Iterable

from darekit.checkpoints import traits_of
from darekit.engine.stages import build, tile_of
from darekit.engine.steps import Merge, Step, is_measured, vectors_of
from darekit.engine.surveying import passes_of
from darekit.methods import MERGE_METHODS

# Resident before the first tile: 103 MiB were measured in the fast lane, which does without numba, and 175 with it.
INTERPRETER_BYTES = 175 << 20

HEAVY = 64 << 20  # bytes from which a step's matrices are in memory one step at a time


def matrix_memory(step: Merge) -> int:
    """Bytes that a step needs beside its tiles, as its method declares them."""
    declared = MERGE_METHODS[step.method].matrix
    if vectors_of(step) == "column":  # products, which are turned once, and coefficients
        rows = len(step.models) + 1
        return 8 * step.columns * (rows * (rows + 1) + 2 * rows)
    return 0 if declared is None else declared(columns_of(step))


def tile_memory(step: Merge, tile: int) -> int:
    """Bytes that a tile of a step needs beside its deltas: the rows that are measured; float64 for sums and solves."""
    method = MERGE_METHODS[step.method]
    if method.products:
        return tile * (8 if step.wide else 4) * (len(step.models) + 1)
    if method.survey:
        return tile * 8 * (4 if step.wide or method.survey.lines is None else 8)
    if not step.statistics:
        return 0
    return tile * (8 * 4 if method.matrix else 8 * (3 + len(step.statistics)))


def decoding_memory(step: Step, tile: int) -> int:
    """Bytes that the sources of a step need while they decode more than the tile that they were asked for."""
    inputs = step.inputs
    grains = ((min(traits_of(entry.source).grain, entry.count), entry.dtype.itemsize) for entry in inputs)
    return max((grain * itemsize for grain, itemsize in grains if grain > tile), default=0)


def statistics_bytes(step: Merge, tile: int) -> int:
    """Bytes of statistics that a step reads: Grams once for their sum and once for every run of rows."""
    size = sum(entry.dtype.itemsize * entry.count for entry in step.statistics)
    return size * (1 + -(-step.count // max(1, tile))) if MERGE_METHODS[step.method].matrix else size


def columns_of(step: Merge) -> int:
    """Inputs of a linear layer: the side of its Gram."""
    return step.shape[0] if step.transposed else step.row


def bytes_to_read(steps: Iterable[Step], finished: Container[str] = ()) -> int:
    """Bytes that the engine reads, or has its inputs' sources read: a tensor that must be measured first is read
    twice, or a little more.

    Tensors in `finished` are left out.
    """
    total = 0
    for step in steps:
        if step.name in finished:
            continue
        passes = 1
        if isinstance(step, Merge):
            passes += any(not build(spec, step).ready for chain in step.chains for spec in chain) + is_measured(step)
            passes += passes_of(step)
            total += 0 if step.verbatim else statistics_bytes(step, tile_of(step, step.count))
        total += round(passes * step.count * sum(entry.dtype.itemsize * entry.cost for entry in step.inputs))
    return total


def peak_memory(steps: Iterable[Step], threads: int, tile: int) -> int:
    """Estimate in bytes: the interpreter, and per thread the buffers of the step whose tiles are largest; steps with
    large matrices run one at a time."""
    light = heavy = 0
    for step in steps:
        size, matrix = min(tile_of(step, tile), step.count), 0
        cost = size * (8 if step.wide else 4) * (2 * len(step.models) + 6) + decoding_memory(step, size)
        if isinstance(step, Merge):
            matrix = matrix_memory(step)
            cost += tile_memory(step, size) + matrix
        if matrix <= HEAVY:
            light = max(light, cost)
        else:
            heavy = max(heavy, cost)
    return INTERPRETER_BYTES + threads * light + heavy
