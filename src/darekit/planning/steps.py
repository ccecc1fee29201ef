# SPDX-License-Identifier: Apache-2.0
"""From an aligned tensor to the steps that make it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from darekit.checkpoints import Placement, TensorInfo
from darekit.dtypes import dtype_named
from darekit.engine.steps import TRIM, TRIM_MODEL, Input, StageSpec, Step
from darekit.errors import PlanError
from darekit.methods import AVERAGE, MERGE_METHODS, SPARSIFIERS
from darekit.methods.sparsifiers import kept_count
from darekit.planning.alignment import AlignedTensor
from darekit.planning.settings import drop_rate_of, is_float, lambda_of, merges_weights, resolved, weight_of
from darekit.recipe import Recipe, resolve

if TYPE_CHECKING:
    from darekit.inputs.statistics import Statistics


def _chain(recipe: Recipe, model: int, tensor: AlignedTensor, count: int, seed: int | None) -> tuple[StageSpec, ...]:
    stages = []
    sparsify = recipe.sparsify
    rate, _ = drop_rate_of(recipe, model, tensor)
    if sparsify is not None and rate > 0:
        entry = SPARSIFIERS[sparsify.method]
        values = resolved(recipe, model, tensor.name, entry)
        if entry.prepare is not None:
            density = resolve((recipe.models[model].parameters.get("density"),), tensor.name)  # mergekit's recipes
            values = entry.prepare(values if density is None else values | {"density": density}, count, tensor.name)
        stages.append(StageSpec(sparsify.method, values, seed or 0))
    method = MERGE_METHODS[recipe.merge_method]
    if method.trims:
        keep = resolve((recipe.models[model].parameters.get("keep"), recipe.parameters.get("keep")), tensor.name)
        keep = 1.0 if keep is None else keep
        if keep <= 0:
            raise PlanError(f"keep 0 leaves nothing of {tensor.name}; use a value above 0, 1 for no trim")
        if keep < 1 and recipe.parameters.get("trim") == "model":
            stages.append(StageSpec(TRIM_MODEL, {"keep": keep}))
        elif keep < 1:
            stages.append(StageSpec(TRIM, {"keep_count": kept_count(keep, count)}))
    return tuple(stages)


def _own_parameters(recipe: Recipe, name: str) -> dict[str, Any]:
    """The merge method's parameters for one tensor, without those that become factors and stages."""
    found: dict[str, Any] = {}
    for parameter in MERGE_METHODS[recipe.merge_method].parameters.values():
        if parameter.name in ("lambda", "keep", "trim"):
            continue
        value = resolve((recipe.parameters.get(parameter.name), parameter.default), name)
        if value is None:
            raise PlanError(
                f"no {parameter.name} for tensor {name}: none of its filters match; end the list with a value without "
                "a filter"
            )
        found[parameter.name] = value
    return found


def _input(info: TensorInfo) -> Input:
    return Input(info.source, dtype_named(info.dtype), info.count)


def steps_of(
    recipe: Recipe,
    seeds: Sequence[int | None],
    tensor: AlignedTensor,
    output: int,
    place: Placement,
    statistics: Sequence[Statistics],
) -> Iterator[Step]:
    """One step, or, where vocabularies differ, one per range of rows with the same owners."""
    owners = tuple(k for k, info in enumerate(tensor.models) if info is not None)
    inputs = tuple(_input(info) for info in tensor.models if info is not None)
    base = _input(tensor.base) if tensor.base else None
    count = math.prod(tensor.shape)
    make = partial(
        Step,
        name=tensor.name,
        dtype=dtype_named(place.dtype),
        shape=tensor.shape,
        output=output,
        offset=place.offset,
    )
    if not is_float(tensor.dtype) or not owners:  # integers, and buffers that only the base has
        yield make(kind="copy", begin=0, count=count, base=base, models=inputs, owners=owners)
        return
    if tensor.head:  # the one model's own
        yield make(
            kind="merge", begin=0, count=count, base=None, models=inputs, owners=owners, weights=(1.0,), chains=((),),
            method=AVERAGE, parameters={"normalize": True}, verbatim=True,
        )  # fmt: skip
        return
    weights = {k: weight_of(recipe, k, tensor.name) for k in owners}
    own = _own_parameters(recipe, tensor.name)
    method, informed = recipe.merge_method, None
    if MERGE_METHODS[method].statistics:
        from darekit.planning.statistics import statistics_of

        informed = statistics_of(recipe, tensor, owners, weights, statistics)
        if informed is None:
            method, own = AVERAGE, {"normalize": True}
    begin = 0
    if base is not None:
        begin = min(base.count, count)
        chains = tuple(_chain(recipe, k, tensor, begin, seeds[k]) for k in owners)
        factor = lambda_of(recipe, tensor.name)
        # What the one model's delta is multiplied by, where there is but one.
        scale = factor * (1.0 if own.get("normalize") else weights[owners[0]])
        yield make(
            kind="merge",
            begin=0,
            count=begin,
            base=base,
            models=inputs,
            owners=owners,
            weights=tuple(weights.values()),
            chains=chains,
            method=method,
            parameters=own,
            **(informed or {}),
            factor=factor,
            on_weights=merges_weights(recipe, own),
            verbatim=(
                MERGE_METHODS[method].keeps_one
                and len(owners) == 1
                and not chains[0]
                and scale == 1.0
                and inputs[0].count >= begin
            ),
        )
    # Rows that the base does not have, or all of them where there is no base: the average of the models that do.
    for end in sorted({min(entry.count, count) for entry in inputs}):
        if end <= begin:
            continue
        here = [k for k, entry in zip(owners, inputs, strict=True) if entry.count >= end]
        common = base is None and begin == 0  # rows of all models; those that only some have are never dropped
        chains = tuple(_chain(recipe, k, tensor, end, seeds[k]) if common else () for k in here)
        entry = MERGE_METHODS[method]
        weighed = common and (informed is not None or (entry.products is not None and not entry.needs_base))
        parameters = own if base is None and (weighed or method == AVERAGE) else {"normalize": True}
        scale = 1.0 if parameters.get("normalize") else weights[here[0]]
        used = method if weighed else AVERAGE
        yield make(
            kind="merge",
            begin=begin,
            count=end - begin,
            base=None,
            models=tuple(inputs[owners.index(k)] for k in here),
            owners=tuple(here),
            weights=tuple(weights[k] for k in here),
            chains=chains,
            method=used,
            parameters=parameters,
            **(informed or {} if weighed else {}),
            verbatim=MERGE_METHODS[used].keeps_one and len(here) == 1 and not chains[0] and scale == 1.0,
        )
        begin = end
