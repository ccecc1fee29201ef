# SPDX-License-Identifier: Apache-2.0
"""The plan: a recipe meets the headers of real checkpoints and becomes steps with every byte offset known.

Every foreseeable error is raised here, before one byte is written. A plan can be printed, counted and executed; it
holds no model.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from darekit.checkpoints import (
    Checkpoint,
    InputFile,
    OutputTensor,
    Placement,
    Shard,
    TensorInfo,
    lay_out,
    open_checkpoint,
    sample_digest,
)
from darekit.dtypes import DTYPES, dtype_named
from darekit.errors import DataError, PlanError, RecipeError
from darekit.homology import AlignedTensor, Alignment, Heads, align, label
from darekit.informed import HEAVY, matrix_memory, statistics_bytes, tile_memory
from darekit.masks import effective_seeds
from darekit.methods import MERGE_METHODS, SPARSIFIERS, Sparsifier
from darekit.methods.sparsifiers import dropped_to_density, noise_gain
from darekit.naming import ONE_TERM, group_of, is_kept_dense
from darekit.packs.opening import open_model, packed_seed
from darekit.recipe import Recipe, is_exact, resolve
from darekit.recommendation.rates import MOST, settle
from darekit.stages import TRIM, TRIM_MODEL, build, tile_of
from darekit.steps import Input, StageSpec, Step

if TYPE_CHECKING:
    from darekit.statistics.files import Statistics

# Resident before the first tile: 103 MiB were measured in the fast lane, which does without numba, and 175 with it.
INTERPRETER_BYTES = 175 << 20
SHARD_SIZE = 5_000_000_000
EMBEDDING_WARNING_RATE = 0.9


@dataclass(frozen=True)
class ModelSummary:
    """What a plan does to one model. `kept` is the expected number of surviving elements."""

    ref: str
    seed: int | None
    parameters: int
    kept: int

    @property
    def drop_rate(self) -> float:
        """Over all of the model's float parameters."""
        return 1 - self.kept / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Plan:
    """Recipe x headers: the steps, the output's layout, the cost.

    What follows from headers (steps, shards, notes, costs) needs no open file; reading a tensor does. As a context
    manager a plan reopens its files where they are closed, and closes them on leaving.
    """

    recipe: Recipe
    base: Checkpoint | None
    models: tuple[Checkpoint, ...]
    alignment: Alignment
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    sample_digests: tuple[bytes, ...]  # base first, where there is one
    seeds: tuple[int | None, ...]
    summaries: tuple[ModelSummary, ...]
    notes: tuple[str, ...]
    rates: tuple[Mapping[str, float], ...]  # per model: what `drop_rate: auto` came to, by tensor
    statistics: tuple[Statistics, ...] = ()  # one of each model, where the method uses them
    read_besides: tuple[InputFile, ...] = ()  # by the models' own sources: the base of a pack that is unpacked

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Base (where there is one) and models."""
        return (*([self.base] if self.base else []), *self.models)

    @property
    def files(self) -> tuple[InputFile, ...]:
        """All open files: those of the checkpoints, the statistics, and what is read besides."""
        weights = [file for checkpoint in self.checkpoints for file in checkpoint.files]
        return (*weights, *(entry.file for entry in self.statistics if entry.file), *self.read_besides)

    def __enter__(self) -> Self:
        """Reopen the files that are closed.

        Raises:
            CheckpointError: one of them is gone, or has changed since it was planned.
        """
        try:
            for file in self.files:
                file.reopen()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; a second call does nothing."""
        for file in self.files:
            file.close()

    @property
    def bytes_in(self) -> int:
        """Bytes of all input tensors, and of the statistics that are used: what is read at least once."""
        tensors = [info for checkpoint in self.checkpoints for info in checkpoint.tensors.values()]
        used = [entry for step in self.steps for entry in step.statistics]
        return sum(info.nbytes for info in tensors) + sum(entry.count * entry.dtype.itemsize for entry in used)

    def bytes_to_read(self, finished: Container[str] = ()) -> int:
        """Bytes that the engine will read: a tensor that must be measured first is read twice, or a little more.

        Tensors in `finished` are left out.
        """
        total = 0
        for step in self.steps:
            if step.name in finished:
                continue
            measured = any(not build(spec, step).ready for chain in step.chains for spec in chain)
            inputs = (*step.models, *([step.base] if step.base else []))
            total += (2 if measured else 1) * step.count * sum(entry.dtype.itemsize for entry in inputs)
            total += 0 if step.verbatim else statistics_bytes(step, tile_of(step, step.count))
        return total

    def refuse_damaged(self, records: Mapping[str, Mapping[str, Any]], outcome: str) -> None:
        """What packs decoded to while the engine ran must be what was packed: their sources know the digests of that.

        Raises:
            DataError: it is not; `outcome`: what became of the run.
        """
        wrong: dict[str, list[str]] = {}
        for k, model in enumerate(self.models):
            for name, info in model.tensors.items():
                wanted = getattr(info.source, "result", None)
                found = records.get(name, {}).get("models", {}).get(str(k))
                if wanted is not None and found is not None and found != wanted:
                    wrong.setdefault(model.ref, []).append(name)
        if wrong:
            told = [
                f"{ref}: {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
                for ref, names in wrong.items()
            ]
            raise DataError(
                f"These tensors do not decode to what was packed; {outcome}: {'; '.join(told)}. The pack or its base "
                "is damaged: `dare verify PACK BASE` says which"
            )

    @property
    def bytes_out(self) -> int:
        """Bytes of the output's weight files."""
        return sum(shard.size for shard in self.shards)

    @property
    def parameters(self) -> int:
        """Elements of the output."""
        return sum(step.count for step in self.steps)

    def peak_memory(self, threads: int, tile: int) -> int:
        """Estimate in bytes: the interpreter, and per thread the buffers of the step whose tiles are largest; steps
        with large matrices run one at a time."""

        def cost(step: Step) -> int:
            width = 8 if step.wide else 4
            size = min(tile_of(step, tile), step.count)
            return size * width * (2 * len(step.models) + 6) + tile_memory(step, size) + matrix_memory(step)

        light = max((cost(step) for step in self.steps if matrix_memory(step) <= HEAVY), default=0)
        heavy = max((cost(step) for step in self.steps if matrix_memory(step) > HEAVY), default=0)
        return INTERPRETER_BYTES + threads * light + heavy

    def rate_of(self, model: int, tensor: AlignedTensor) -> tuple[float, float]:
        """Drop rate of one tensor of one model, and the noise of one element of it: see `drop_rate_of`."""
        return drop_rate_of(self.recipe, model, tensor)


@contextmanager
def open_plan(recipe: Recipe, *, search: Sequence[Path] = (), shard_size: int = SHARD_SIZE) -> Iterator[Plan]:
    """Open the recipe's checkpoints (headers only) and plan; the files are closed on leaving."""
    opened: list[Checkpoint] = []
    statistics: list[Statistics] = []
    try:
        if recipe.base_model is not None:
            opened.append(open_checkpoint(recipe.base_model, search=search))
        base = opened[0] if opened else None
        for entry in recipe.models:
            opened.append(open_model(entry.model, base, search=search))
        models = tuple(opened[1:] if base else opened)
        for entry in recipe.models:
            if entry.stats is not None:
                from darekit.statistics.files import open_statistics

                statistics.append(open_statistics(entry.stats, search=search))
        yield make_plan(recipe, base, models, statistics=statistics, shard_size=shard_size)
    finally:
        for checkpoint in opened:
            checkpoint.close()
        for found in statistics:
            found.close()


def make_plan(
    recipe: Recipe,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    *,
    statistics: Sequence[Statistics] = (),
    shard_size: int = SHARD_SIZE,
) -> Plan:
    """Recipe x open checkpoints (x open statistics, one of each model) -> the plan.

    Raises:
        HomologyError: the checkpoints do not belong together, or statistics are another model's.
        PlanError: a parameter is impossible for a tensor.
    """
    alignment = align(base, models, recipe.vocab, heads=_heads_of(recipe, base, models))
    recipe, rates = settle(recipe, alignment.tensors)
    digests = tuple(sample_digest(checkpoint) for checkpoint in ((base, *models) if base else models))
    seeds = _seeds(recipe, digests[1:] if base else digests)
    informed = MERGE_METHODS[recipe.merge_method].statistics is not None
    if informed:
        from darekit.statistics.matching import check_statistics, statistics_notes

        check_statistics(recipe, models, digests[1:] if base else digests, statistics)
    dtype = DTYPES[recipe.dtype] if recipe.dtype else None
    wanted = [
        OutputTensor(t.name, dtype.name if dtype and _is_float(t.dtype) else t.dtype, t.shape)
        for t in alignment.tensors
    ]
    shards = lay_out(wanted, shard_size)
    places = {p.name: (i, p) for i, shard in enumerate(shards) for p in shard.placements}
    steps = [step for t in alignment.tensors for step in _steps(recipe, seeds, t, *places[t.name], statistics)]
    notes = [*recipe.notes, *alignment.notes, *_notes(recipe, alignment, models, seeds), *_rate_notes(models, rates)]
    notes += statistics_notes(recipe, steps, statistics) if informed else ()
    return Plan(
        recipe, base, tuple(models), alignment, tuple(steps), shards, digests, seeds,
        _summaries(recipe, models, alignment, seeds), tuple(notes), rates, tuple(statistics),
    )  # fmt: skip


def _heads_of(recipe: Recipe, base: Checkpoint | None, models: Sequence[Checkpoint]) -> Heads:
    giver = heads_giver(recipe, base, models)
    return "merged" if giver is None else giver


def heads_giver(recipe: Recipe, base: Checkpoint | None, models: Sequence[Checkpoint]) -> Checkpoint | None:
    """The checkpoint that `heads` names; None: heads are merged like all tensors."""
    if recipe.heads is None:
        return None
    if recipe.heads == "base" and base is not None:
        return base
    return next(model for model, entry in zip(models, recipe.models, strict=True) if entry.model == recipe.heads)


def _is_float(dtype: str) -> bool:
    return dtype_named(dtype).kind == "float"


def _seeds(recipe: Recipe, digests: Sequence[bytes]) -> tuple[int | None, ...]:
    if recipe.sparsify is None or not SPARSIFIERS[recipe.sparsify.method].random:
        return tuple(None for _ in recipe.models)
    derived = effective_seeds(recipe.sparsify.seed, digests)
    explicit = [entry.parameters.get("seed") for entry in recipe.models]
    return tuple(d if e is None else cast(int, e) for d, e in zip(derived, explicit, strict=True))


def drop_rate_of(recipe: Recipe, model: int, tensor: AlignedTensor) -> tuple[float, float]:
    """Recipe, model, tensor -> (drop rate, noise of one element where it is a random drop that is rescaled, else 0)."""
    sparsify = recipe.sparsify
    if sparsify is None or tensor.head or is_kept_dense(tensor.name, tensor.shape, sparsify.keep_dense):
        return 0.0, 0.0
    entry = SPARSIFIERS[sparsify.method]
    values = _resolved(recipe, model, tensor.name, entry)
    rate, q = float(values["drop_rate"]), float(values.get("q", 0.0))
    rescaled = entry.unbiased and (values.get("rescale") != "none" or q > 0) and sparsify.on == "delta"
    return rate, noise_gain(rate, q) if rescaled else 0.0


def _resolved(recipe: Recipe, model: int, name: str, entry: Sparsifier) -> dict[str, Any]:
    """The sparsifier's parameters for one tensor: the model's own, else the recipe's, else the defaults."""
    assert recipe.sparsify is not None
    own, shared = recipe.models[model].parameters, recipe.sparsify.parameters
    values = {}
    for parameter in entry.parameters.values():
        value = resolve((own.get(parameter.name), shared.get(parameter.name)), name)
        value = parameter.default if value is None else value
        if value is None:
            raise RecipeError(
                f"no {parameter.name} for tensor {name} of model {recipe.models[model].model}: none of its filters "
                f"match; end the list with a value without a filter, or set sparsify.{parameter.name}"
            )
        values[parameter.name] = value
    return values


def _chain(recipe: Recipe, model: int, tensor: AlignedTensor, count: int, seed: int | None) -> tuple[StageSpec, ...]:
    stages = []
    sparsify = recipe.sparsify
    rate, _ = drop_rate_of(recipe, model, tensor)
    if sparsify is not None and rate > 0:
        entry = SPARSIFIERS[sparsify.method]
        values = _resolved(recipe, model, tensor.name, entry)
        if sparsify.method == "della":
            _check_window(values["drop_rate"], values["window"], tensor.name)
        if sparsify.method == "breadcrumbs":
            # mergekit's recipes count survivors from the density as written, never through 1 - p.
            density = resolve((recipe.models[model].parameters.get("density"),), tensor.name)
            values["keep_count"] = dropped_to_density(count, rate) if density is None else _count(density, count)
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
            stages.append(StageSpec(TRIM, {"keep_count": _count(keep, count)}))
    return tuple(stages)


def _count(keep: float, count: int) -> int:
    """k = max(1, int(keep n)), from the number as written; nothing of nothing."""
    return min(count, max(1, int(keep * count)))


def _check_window(rate: float, window: float, name: str) -> None:
    if rate - window / 2 < 0 or rate + window / 2 > 1:
        largest = 2 * min(rate, 1 - rate)
        raise PlanError(
            f"della: drop rate {rate:g} with window {window:g} asks {name} for drop rates from {rate - window / 2:g} "
            f"to {rate + window / 2:g}; they must stay within [0, 1]: use a window of at most {largest:g} "
            "(mergekit's epsilon is half of it)"
        )


def _input(info: TensorInfo) -> Input:
    return Input(info.source, dtype_named(info.dtype), info.count)


def _steps(
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
    if not _is_float(tensor.dtype) or not owners:  # integers, and buffers that only the base has
        yield make(kind="copy", begin=0, count=count, base=base, models=inputs, owners=owners)
        return
    if tensor.head:  # the one model's own
        yield make(
            kind="merge", begin=0, count=count, base=None, models=inputs, owners=owners, weights=(1.0,), chains=((),),
            method="linear", parameters={"normalize": True}, verbatim=True,
        )  # fmt: skip
        return
    weights = {k: _weight(recipe, k, tensor.name) for k in owners}
    own = {
        name: recipe.parameters.get(name, parameter.default)
        for name, parameter in MERGE_METHODS[recipe.merge_method].parameters.items()
        if name not in ("lambda", "keep", "trim")
    }
    method, informed = recipe.merge_method, None
    if MERGE_METHODS[method].statistics:
        from darekit.statistics.matching import statistics_of

        informed = statistics_of(recipe, tensor, owners, weights, statistics)
        if informed is None:
            method, own = "linear", {"normalize": True}
    begin = 0
    if base is not None:
        begin = min(base.count, count)
        chains = tuple(_chain(recipe, k, tensor, begin, seeds[k]) for k in owners)
        factor = _factor(recipe, tensor.name)
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
            on_weights=_on_weights(recipe, own),
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
        weighed = common and informed is not None
        parameters = own if base is None and (weighed or method == "linear") else {"normalize": True}
        scale = 1.0 if parameters["normalize"] else weights[here[0]]
        yield make(
            kind="merge",
            begin=begin,
            count=end - begin,
            base=None,
            models=tuple(inputs[owners.index(k)] for k in here),
            owners=tuple(here),
            weights=tuple(weights[k] for k in here),
            chains=chains,
            method=method if weighed else "linear",
            parameters=parameters,
            **(informed or {} if weighed else {}),
            verbatim=len(here) == 1 and not chains[0] and scale == 1.0,
        )
        begin = end


def _on_weights(recipe: Recipe, parameters: Mapping[str, Any]) -> bool:
    """Whether the models themselves are merged: asked for, or an unnormalised sum of w_k theta_k, which is not the
    base plus anything."""
    if recipe.sparsify is not None and recipe.sparsify.on == "weights":
        return True
    return recipe.merge_method == "linear" and not parameters.get("normalize")


def _factor(recipe: Recipe, name: str) -> float:
    value = resolve((recipe.parameters.get("lambda"),), name)
    return 1.0 if value is None else float(value)


def _weight(recipe: Recipe, model: int, name: str) -> float:
    value = resolve((recipe.models[model].parameters.get("weight"), recipe.parameters.get("weight")), name)
    return 1.0 if value is None else float(value)


def _summaries(
    recipe: Recipe, models: Sequence[Checkpoint], alignment: Alignment, seeds: Sequence[int | None]
) -> tuple[ModelSummary, ...]:
    summaries = []
    for k, checkpoint in enumerate(models):
        total = kept = 0
        for tensor in alignment.tensors:
            info = tensor.models[k]
            if info is None or not _is_float(info.dtype):
                continue
            total += info.count
            kept += round(info.count * (1 - drop_rate_of(recipe, k, tensor)[0]))
        summaries.append(ModelSummary(checkpoint.ref, seeds[k], total, kept))
    return tuple(summaries)


def _notes(
    recipe: Recipe, alignment: Alignment, models: Sequence[Checkpoint], seeds: Sequence[int | None]
) -> Iterator[str]:
    by_seed: dict[int, list[str]] = {}
    for checkpoint, seed in zip(models, seeds, strict=True):
        for one in {seed, packed_seed(checkpoint)} - {None}:
            by_seed.setdefault(cast(int, one), []).append(label(checkpoint.ref))
    for seed, names in by_seed.items():
        if len(names) > 1:
            yield (
                f"{' and '.join(names)} have the same effective seed {seed}: their masks are equal and interfere "
                "everywhere at once; give each its own"
            )
    yield from _idle(recipe, [tensor.name for tensor in alignment.tensors], alignment)
    if recipe.sparsify is None or recipe.sparsify.on == "weights":
        return
    rates = [drop_rate_of(recipe, k, tensor)[0] for tensor in alignment.tensors for k in range(len(models))]
    if rates and min(rates) == 1:
        yield "the drop rate is 1: everything is dropped, and the output is the base"
        return
    rate, name = max(
        (
            (drop_rate_of(recipe, k, tensor)[0], tensor.name)
            for tensor in alignment.tensors
            if group_of(tensor.name, tensor.shape) == "embeddings"
            for k in range(len(models))
        ),
        default=(0.0, ""),
    )
    if rate >= EMBEDDING_WARNING_RATE:
        yield (
            f"{name} is dropped at p = {rate:g}: one-hot inputs get no averaging; "
            "keep_dense: [embeddings, norms] usually costs little and keeps more"
        )


def _rate_notes(models: Sequence[Checkpoint], rates: Sequence[Mapping[str, float]]) -> Iterator[str]:
    for checkpoint, found in zip(models, rates, strict=True):
        if found:
            yield (
                f"{label(checkpoint.ref)}: drop_rate auto, by a sample of each tensor, is {min(found.values()):g} to "
                f"{max(found.values()):g} in {len(found)} tensors (at most {MOST})"
            )


def _idle(recipe: Recipe, names: Sequence[str], alignment: Alignment) -> Iterator[str]:
    """Filters and patterns that match no tensor: most are misspelt."""
    sparsify, known = recipe.sparsify, {*names}
    scopes = [
        recipe.parameters,
        *(entry.parameters for entry in recipe.models),
        *([sparsify.parameters] if sparsify else []),
    ]
    for parameters in scopes:
        for parameter, value in parameters.items():
            for entry in value if isinstance(value, tuple) else ():
                if is_exact(entry.filter):
                    used = entry.filter[1:] in known
                else:
                    used = any(resolve(((entry,),), name) is not None for name in names)
                if not used:
                    yield f"{parameter}: the filter {entry.filter!r} matches no tensor"
    for pattern in sparsify.keep_dense if sparsify and sparsify.keep_dense != ONE_TERM else ():
        if not any(is_kept_dense(tensor.name, tensor.shape, [pattern]) for tensor in alignment.tensors):
            yield f"keep_dense: {pattern!r} matches no tensor"


def resolved_parameters(plan: Plan) -> list[Mapping[str, Any]]:
    """What was really done to which tensors, for the lock: equal settings stand together."""
    groups: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for step in plan.steps:
        if step.kind != "merge" or step.begin:
            continue
        setting = {
            "weights": list(step.weights),
            **({"method": step.method} if plan.statistics else {}),
            "lambda": step.factor,
            "stages": [
                [
                    {"method": spec.method, **{n: v for n, v in spec.parameters.items() if n != "keep_count"}}
                    for spec in chain
                ]
                for chain in step.chains
            ],
        }
        groups.setdefault(repr(setting), (setting, []))[1].append(step.name)
    return [{**setting, "tensors": names} for setting, names in groups.values()]
