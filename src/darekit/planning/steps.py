# SPDX-License-Identifier: Apache-2.0
"""From an aligned tensor to the steps that make it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from darekit.checkpoints import Placement, Places, TensorInfo, traits_of
from darekit.dtypes import dtype_named
from darekit.engine.steps import TRIM, TRIM_MODEL, Copy, Input, Merge, StageSpec, Step
from darekit.errors import PlanError
from darekit.methods import AVERAGE, DROP, MERGE_METHODS, SPARSIFIERS, SUM
from darekit.methods.merging import total_weight
from darekit.methods.sparsifiers import kept_count
from darekit.planning.buffers import WHOLE
from darekit.planning.draft import Draft
from darekit.planning.matching.alignment import AlignedTensor
from darekit.planning.settings import ModelSettings, Settings, is_float, merges_weights


def steps_of(draft: Draft, tensor: AlignedTensor, output: int, place: Placement) -> Iterator[Step]:
    """One step, or, where vocabularies differ, one per range of rows with the same owners.

    Args:
        draft: what the plan is made from.
        tensor: one of its alignment's.
        output: index of the shard that the tensor goes to.
        place: where in it.
    """
    inputs = {k: Input.of(info) for k, info in enumerate(tensor.models) if info is not None}
    base = Input.of(tensor.base) if tensor.base else None
    count = math.prod(tensor.shape)
    place_of: dict[str, Any] = {
        "name": tensor.name, "dtype": dtype_named(place.dtype), "shape": tensor.shape, "output": output,
        "offset": place.offset,
    }  # fmt: skip
    everything = {**place_of, "begin": 0, "count": count, "models": tuple(inputs.values()), "owners": tuple(inputs)}
    if not is_float(tensor.dtype) or tensor.copied or not inputs:  # integers, and what only the base has
        yield Copy(**everything, base=base, giver=draft.counters.get(tensor.name))
    elif tensor.head:  # the one model's own
        yield Merge(
            **everything, base=None, weights=(1.0,), chains=((),), method=AVERAGE, parameters={"normalize": True},
            verbatim=True,
        )  # fmt: skip
    elif draft.roles.get(tensor.name) == "statistic":
        yield Merge(**everything, base=base, **_average_of(draft.settings[tensor.name], tuple(inputs)))
    else:
        yield from _merge_of(draft, tensor, partial(Merge, **place_of), base, inputs).steps(count)


def rounded(steps: Iterable[Step], seed: int) -> list[Step]:
    """The same, rounded stochastically where the output's format does not hold what is computed; copies are not."""
    return [replace(step, rounding=seed) if isinstance(step, Merge) and _loses_digits(step) else step for step in steps]


def _loses_digits(step: Merge) -> bool:
    if step.verbatim and step.models[0].dtype.name == step.dtype.name:
        return False
    return step.dtype.itemsize < (8 if step.wide else 4)


def _average_of(settings: Settings, owners: tuple[int, ...]) -> dict[str, Any]:
    """How running statistics become the models' average, or what lies on the way to it from the base.

    All the way it is made of the models themselves: the sum of a base and differences can be below 0 by rounding. In
    float64 equal models stay what they are.
    """
    weights = [found.weight if (found := settings.models[k]) else 0.0 for k in owners]
    total, chains = sum(weights), ((),) * len(owners)
    if settings.scale < WHOLE:
        parts = tuple(settings.scale * weight / total if total else 0.0 for weight in weights)
        return {"weights": parts, "chains": chains, "method": SUM, "parameters": {"normalize": False}, "precise": True}
    return {
        "weights": tuple(weights) if total else (1.0,) * len(owners),
        "chains": chains,
        "method": AVERAGE,
        "parameters": {"normalize": True},
        "on_weights": True,
        "precise": True,
        "verbatim": len(owners) == 1,
    }


def _merge_of(
    draft: Draft, tensor: AlignedTensor, make: Callable[..., Merge], base: Input | None, inputs: Mapping[int, Input]
) -> _Merge:
    settings = draft.settings[tensor.name]
    models = {k: found for k, found in enumerate(settings.models) if found is not None}
    method, parameters, informed = draft.recipe.merge_method, settings.merge, None
    if MERGE_METHODS[method].statistics:
        from darekit.planning.statistics import statistics_of

        weights = {k: found.weight for k, found in models.items()}
        informed = statistics_of(draft.recipe, tensor, tuple(inputs), weights, draft.statistics)
        if informed is None:
            method, parameters = AVERAGE, {"normalize": True}
    # What a view calls otherwise keeps the mask of the tensor that is stored.
    on_deltas = base is not None and not merges_weights(draft.recipe, settings.merge)

    def places_of(info: TensorInfo) -> Places | None:
        places = traits_of(info.source).places
        return places.of_deltas() if places is not None and on_deltas else places

    streams = {k: (info.stored or "", places_of(info)) for k, info in enumerate(tensor.models) if info is not None}
    return _Merge(
        draft, tensor.name, make, base, inputs, models, streams, settings.scale, method, parameters, informed
    )  # fmt: skip


@dataclass(frozen=True)
class _Merge:
    """One tensor that is merged. `inputs`, `models` and `streams` are those of its owners; `scale` is lambda;
    `informed`: what a step must know of the models' statistics, None if nothing."""

    draft: Draft
    name: str
    make: Callable[..., Merge]
    base: Input | None
    inputs: Mapping[int, Input]
    models: Mapping[int, ModelSettings]
    streams: Mapping[int, tuple[str, Places | None]]
    scale: float
    method: str
    parameters: Mapping[str, Any]
    informed: Mapping[str, Any] | None

    def steps(self, count: int) -> Iterator[Merge]:
        """The rows that the base has, then those that it lacks, or all of them where there is no base: these are the
        average of the models that have them."""
        begin = 0
        if self.base is not None:
            begin = min(self.base.count, count)
            yield self._on_base(self.base, begin)
        for end in sorted({min(entry.count, count) for entry in self.inputs.values()}):
            if end > begin:
                yield self._beyond_base(begin, end)
                begin = end

    def _on_base(self, base: Input, count: int) -> Merge:
        owners = tuple(self.inputs)
        chains = self._chains(owners, count)
        first = owners[0]
        weights = self._weights(owners)
        # What the one model's delta is multiplied by, where there is but one: a weight of 0 is divided by no sum.
        weight = self.models[first].weight
        scale = self.scale * (weight / total_weight([weight]) if self.parameters.get("normalize") else weight)
        return self.make(
            begin=0,
            count=count,
            base=base,
            models=tuple(self.inputs.values()),
            owners=owners,
            weights=weights,
            chains=chains,
            method=self.method,
            parameters=self.parameters,
            **(self.informed or {}),
            factor=self.scale,
            base_weight=sum(weights) - 1 if MERGE_METHODS[self.method].sums_models else 0.0,
            on_weights=merges_weights(self.draft.recipe, self.parameters),
            verbatim=(
                MERGE_METHODS[self.method].keeps_one
                and len(owners) == 1
                and not chains[0]
                and scale == 1.0
                and self.inputs[first].count >= count
            ),
        )

    def _beyond_base(self, begin: int, end: int) -> Merge:
        owners = tuple(k for k, entry in self.inputs.items() if entry.count >= end)
        common = self.base is None and begin == 0  # rows of all models; those that only some have are never dropped
        chains = tuple(self._chain(k, end) if common else () for k in owners)
        entry = MERGE_METHODS[self.method]
        weighed = common and (self.informed is not None or (entry.products is not None and not entry.needs_base))
        own = self.base is None and (weighed or self.method == AVERAGE or not (entry.needs_base or entry.statistics))
        parameters = self.parameters if own else {"normalize": True}
        weights = tuple(self.models[k].weight for k in owners)
        if not any(weights) and (not common or self.draft.recipe.base_model is not None):
            weights = (1.0,) * len(owners)  # "as in the base" has no meaning for what the base lacks: their average
        scale = weights[0] / total_weight(weights[:1]) if parameters.get("normalize") else weights[0]
        method = self.method if own else AVERAGE
        return self.make(
            begin=begin,
            count=end - begin,
            base=None,
            models=tuple(self.inputs[k] for k in owners),
            owners=owners,
            weights=weights,
            chains=chains,
            method=method,
            parameters=parameters,
            **(self.informed or {} if weighed else {}),
            verbatim=MERGE_METHODS[method].keeps_one and len(owners) == 1 and not chains[0] and scale == 1.0,
        )

    def _weights(self, owners: tuple[int, ...]) -> tuple[float, ...]:
        """Of its owners, one object for all tensors with equal weights."""
        weights = tuple([self.models[k].weight for k in owners])
        shared: tuple[float, ...] = self.draft.shared.setdefault(weights, weights)
        return shared

    def _chains(self, owners: tuple[int, ...], count: int) -> tuple[tuple[StageSpec, ...], ...]:
        """What happens to each owner's delta; one object for all tensors for which it is equal."""
        keys = [self._key(k, count) for k in owners]
        key = (owners, *keys)
        found: tuple[tuple[StageSpec, ...], ...] | None = self.draft.shared.get(key)
        if found is None:
            found = self.draft.shared[key] = tuple([self._chain(k, count) for k in owners])
        return found

    def _key(self, model: int, count: int) -> tuple[Any, ...]:
        """What a chain depends on. `draft.settings` keeps the settings alive, whose identity counts."""
        recipe, settings = self.draft.recipe, self.models[model]
        if recipe.sparsify is not None and SPARSIFIERS[recipe.sparsify.method].prepare is not None:
            return id(settings), self.streams[model], count, self.name
        return id(settings), self.streams[model], count if settings.keep < 1 else None

    def _chain(self, model: int, count: int) -> tuple[StageSpec, ...]:
        """What happens to one model's delta before the merge: the sparsifier, then the merge method's trim."""
        recipe, settings = self.draft.recipe, self.models[model]
        stages = []
        if recipe.sparsify is not None and settings.rate > 0:
            values = settings.sparsify
            prepare = SPARSIFIERS[recipe.sparsify.method].prepare
            if prepare is not None:
                density = {} if settings.density is None else {"density": settings.density}  # mergekit's recipes
                values = prepare({**values, **density}, count, self.name)
            seed = self.draft.seeds[model] or 0
            stages.append(StageSpec(recipe.sparsify.method, values, seed, *self.streams[model]))
        if MERGE_METHODS[recipe.merge_method].trims:
            keep = settings.keep
            whole = recipe.parameters.get("trim") == "model"
            if keep == 0 and whole:
                raise PlanError(f"keep 0 leaves nothing of {self.name}; with trim: model use a value above 0")
            if keep == 0:  # as at one end of a gradient: no count of the largest elements, which is at least 1
                stages.append(StageSpec(DROP, {"drop_rate": 1.0}, 0, *self.streams[model]))
            elif keep < 1 and whole:
                stages.append(StageSpec(TRIM_MODEL, {"keep": keep}))
            elif keep < 1:
                stages.append(StageSpec(TRIM, {"keep_count": kept_count(keep, count)}))
        return tuple(stages)
