# SPDX-License-Identifier: Apache-2.0
"""Which number format each tensor of the output has: the recipe's, but for what is kept in 32 bits on purpose."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from darekit.architectures.families import Facts, pattern_of
from darekit.checkpoints import OutputTensor
from darekit.dtypes import DTYPES
from darekit.planning.matching.alignment import AlignedTensor

NARROW = 2  # bytes: up to here a format is one to which weights are rounded for training and inference


def outputs_of(tensors: Sequence[AlignedTensor], dtype: str | None, facts: Facts, *, keep: bool) -> list[OutputTensor]:
    """The output's tensors in order, each in its number format.

    Args:
        tensors: the alignment's.
        dtype: what the recipe asks for, None: as the base has them.
        facts: what is known of the base's class.
        keep: whether tensors stay wide that are wide on purpose (see `wide_on_purpose`).
    """
    if dtype is None:
        return [OutputTensor(t.name, t.dtype, t.shape) for t in tensors]
    wide = wide_on_purpose(tensors, dtype, facts) if keep else frozenset()
    return [
        OutputTensor(
            t.name,
            dtype if DTYPES[t.dtype].kind == "float" and not t.copied and t.name not in wide else t.dtype,
            t.shape,
        )
        for t in tensors
    ]


def wide_on_purpose(tensors: Sequence[AlignedTensor], dtype: str, facts: Facts) -> frozenset[str]:
    """Names of the tensors in 32 bits or more that are not rounded to a 16-bit `dtype`.

    They are those of a checkpoint that is otherwise in 16 bits (or fewer): whoever wrote it left them wide, because
    sums and comparisons depend on them (the biases by which routers choose experts, decay rates of state spaces). And
    those that transformers keeps in F32 when it loads a model of this class in that format.
    """
    if DTYPES[dtype].itemsize > NARROW:
        return frozenset()
    wide = [t for t in tensors if _is_wide(t.dtype) and not t.copied]
    if not wide:
        return frozenset()
    narrow = _narrow_inputs(tensors)
    stays: dict[str, bool] = {}
    asked = bool(facts.kept_f32_strictly or facts.kept_f32)
    found = set()
    for tensor in wide:
        inputs = (tensor.base, *tensor.models)
        if any(info is not None and narrow[k] and _is_wide(info.dtype) for k, info in enumerate(inputs)):
            found.add(tensor.name)
        elif asked:
            pattern = pattern_of(tensor.name)
            if pattern not in stays:
                stays[pattern] = facts.stays_f32(tensor.name, dtype)
            if stays[pattern]:
                found.add(tensor.name)
    return frozenset(found)


def _narrow_inputs(tensors: Sequence[AlignedTensor]) -> list[bool]:
    """Of the base and each model, whether most elements of its float tensors have 16 bits or fewer."""
    # Counted by format and shape first: these are few, tensors may be very many.
    kinds: list[Counter[tuple[str, tuple[int, ...]]]] = [Counter() for _ in range(1 + len(tensors[0].models))]
    for tensor in tensors:
        for kind, info in zip(kinds, (tensor.base, *tensor.models), strict=True):
            if info is not None:
                kind[info.dtype, info.shape] += 1
    found = []
    for kind in kinds:
        size: Counter[bool] = Counter()
        for (dtype, shape), many in kind.items():
            if DTYPES[dtype].kind == "float":
                size[_is_wide(dtype)] += many * math.prod(shape)
        found.append(size[False] > size[True])
    return found


def _is_wide(dtype: str) -> bool:
    entry = DTYPES[dtype]
    return entry.kind == "float" and entry.itemsize > NARROW
