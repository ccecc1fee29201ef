# SPDX-License-Identifier: Apache-2.0
"""What in a checkpoint is no weight: running statistics and counters. No gradient made them, so none is a delta to
drop, rescale, trim or elect a sign of.

Statistics (running means and variances, load balancing biases, codebooks that follow a moving average) become the
average of the models', as far as the merge goes from the base. An average of variances is a variance, while a delta
that is dropped and rescaled makes them negative. Counters become the largest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from darekit.architectures.families import Facts
from darekit.checkpoints import TensorInfo
from darekit.dtypes import dtype_named
from darekit.errors import NotFetched
from darekit.methods import MergeMethod
from darekit.planning.matching.alignment import AlignedTensor
from darekit.planning.matching.equality import are_equal, read_whole

Role = Literal["statistic", "counter"]

BASE = -1  # who gives a counter, where models have their index

WHOLE = 1 - 1e-6  # how far is all the way: what is left of the base would be lost in rounding

SMALL = 1 << 16  # bytes: a constant is no larger

_BY_NAME = {"running_mean", "running_var", "num_batches_tracked"}


def roles_of(tensors: Iterable[AlignedTensor], facts: Facts) -> dict[str, Role]:
    """Names of the tensors that are no weights -> what they are.

    Floats are statistics where the architecture keeps them as buffers (and they have no axis of tokens, which grows
    with the vocabulary). Integers are counters where it counts with them, or where they are single numbers: quantised
    weights never are.
    """
    tables = (facts.statistics, facts.counters, facts.buffers)
    words = _BY_NAME | {ending.rpartition(".")[2].removeprefix("^") for table in tables for ending in table}
    roles: dict[str, Role] = {}
    for tensor in tensors:
        name = tensor.name
        if tensor.head or tensor.copied:
            continue
        if dtype_named(tensor.dtype).kind != "float":
            if facts.is_counter(name) or all(size == 1 for size in tensor.shape):
                roles[name] = "counter"
        elif name.rpartition(".")[2] in words and facts.is_buffer(name) and _is_plain(tensor, facts):
            roles[name] = "statistic"
    return roles


def with_constants(tensors: Sequence[AlignedTensor], roles: Mapping[str, Role]) -> tuple[AlignedTensor, ...]:
    """Statistics that are constants (bounds of +-Inf that no training moves) become copies of the base's: they have no
    average, and are no fault of the input. They hold NaN or Inf, and the same bytes in the base and every model."""
    return tuple(
        replace(tensor, models=(None,) * len(tensor.models), copied=True) if _is_constant(tensor, roles) else tensor
        for tensor in tensors
    )


def _is_constant(tensor: AlignedTensor, roles: Mapping[str, Role]) -> bool:
    base = tensor.base
    if roles.get(tensor.name) != "statistic" or base is None or base.nbytes > SMALL:
        return False
    if any(model is None or not are_equal(base, model) for model in tensor.models):
        return False
    try:
        values = read_whole(base).view(dtype_named(base.dtype).numpy)
    except NotFetched:
        return False
    return not np.isfinite(values.astype(np.float64)).all()


def _is_plain(tensor: AlignedTensor, facts: Facts) -> bool:
    """Whether all inputs have its shape, and none of its axes counts tokens."""
    found = (tensor.base, *tensor.models)
    alike = all(info is None or info.shape == tensor.shape for info in found)
    return alike and facts.token_axis(tensor.name, tensor.shape) is None


def reach(method: MergeMethod, parameters: Mapping[str, Any], scale: float, weights: Sequence[float]) -> float:
    """How far statistics go from the base's to the models' average, in [0, 1]: as far as the merge goes.

    Args:
        method: the merge method.
        parameters: its own, for this tensor.
        scale: lambda.
        weights: the models' weights, 0 or more.

    With base b, weights w_k and lambda, b + lambda sum_k w_k (x_k - b) is a convex combination of what is averaged
    as long as lambda sum_k w_k <= 1 (of normalised weights: lambda <= 1). Then it is the average taken that far.
    Beyond, it is the average.

    >>> from darekit.methods import MERGE_METHODS
    >>> reach(MERGE_METHODS["task_arithmetic"], {"normalize": False}, 0.3, [1.0, 1.0])
    0.6
    >>> reach(MERGE_METHODS["task_arithmetic"], {"normalize": False}, 1.0, [1.0, 1.0])
    1.0
    """
    total = sum(weights)
    if total <= 0:
        return 0.0
    if method.base_row:
        return min(1.0, max(0.0, float(parameters.get("t", 1.0))))
    summed = method.kernel is not None and parameters.get("normalize") is False and method.mean_if is None
    return min(1.0, max(0.0, scale * (total if summed else 1.0)))


def counters_of(tensors: Iterable[AlignedTensor], roles: Mapping[str, Role], idle: Sequence[bool]) -> dict[str, int]:
    """Counters -> who gives the value: the model with the largest, the first of several; BASE where no model has it.

    Args:
        tensors: the alignment's.
        roles: what is no weight.
        idle: of each model, whether all of it is dropped: then it has no say.
    """
    givers = {}
    for tensor in tensors:
        if roles.get(tensor.name) != "counter":
            continue
        found = {
            k: _value_of(info)
            for k, info in enumerate(tensor.models)
            if info is not None and not (idle[k] and tensor.base is not None)
        }
        givers[tensor.name] = max(found, key=found.__getitem__) if found else BASE
    return givers


def _value_of(info: TensorInfo) -> int:
    """The sum of a counter's elements, which are few."""
    raw = np.empty(info.nbytes, np.uint8)
    try:
        if raw.size:
            info.source.read_into(raw, 0)
    except NotFetched:
        return 0
    return sum(int(value) for value in raw.view(dtype_named(info.dtype).numpy))
