# SPDX-License-Identifier: Apache-2.0
"""Tensors that are not merged: bytes pass from an input to the output, and what should be equal is compared."""

from __future__ import annotations

import math
import threading
from collections.abc import MutableMapping

import numpy as np

from darekit import kernels
from darekit.checkpoints.digests import TensorDigest
from darekit.engine.steps import Copy
from darekit.engine.tiles import BASE, OUT, Hands, convert, put, read


def copy(
    step: Copy, hands: Hands, digests: MutableMapping[int, TensorDigest], begin: int, end: int, stop: threading.Event
) -> None:
    """Elements begin .. end: the base's (in the output's format, where that of a float is another), when all agree; or
    those of the step's `giver`."""
    inputs = [*([(BASE, step.base)] if step.base else []), *zip(step.owners, step.models, strict=True)]
    for key, entry in inputs:
        digests.setdefault(key, TensorDigest(entry.dtype.itemsize))
    relayed = _is_relayed(step)
    # A relayed tensor has one digest, its input's and its output's.
    digests.setdefault(OUT, digests[inputs[0][0]] if relayed else TensorDigest(step.dtype.itemsize))
    (first, origin), *others = sorted(inputs, key=lambda entry: entry[0] != step.giver)
    converted = origin.dtype.name != step.dtype.name
    size = min(hands.tile, end - begin) * max(entry.dtype.itemsize for _, entry in inputs)
    rooms = hands.scratch.rows(2 if others else 1, size)
    for start in range(begin, end, hands.tile):
        if stop.is_set():
            return
        count = min(hands.tile, end - start)
        raw = read(hands.tally, origin, step.begin + start, count, rooms[0])
        digests[first].update(raw)
        for key, entry in others:
            other = read(hands.tally, entry, step.begin + start, count, rooms[1])
            digests[key].update(other)
            if step.giver is None and not np.array_equal(raw, other):
                hands.tally.differing[key, step.name] += 1
                hands.broken.set()
        if hands.broken.is_set():
            continue
        overflowed = 0
        if converted:
            scratch = hands.scratch.get(0, count, step.wide)
            kernels.widen(raw, origin.dtype, scratch.base)
            raw = scratch.out[: count * step.dtype.itemsize]
            overflowed = convert(scratch.base, step.dtype, raw)
        put(step, hands, raw, start, overflowed, None if relayed else digests[OUT])


def _is_relayed(step: Copy) -> bool:
    """Whether the output tensor is made of all bytes of its one input, and of nothing else."""
    if len(step.inputs) > 1:
        return False
    whole = step.begin == 0 and step.count == math.prod(step.shape) == step.inputs[0].count
    return whole and step.inputs[0].dtype.name == step.dtype.name
