# SPDX-License-Identifier: Apache-2.0
"""The plan: a recipe meets the headers of real checkpoints and becomes steps with every byte offset known.

Every foreseeable error is raised here, before one byte is written. A plan can be printed, counted and executed; it
holds no model.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from darekit.architectures.depth import Depths, depths_of
from darekit.architectures.families import facts_of
from darekit.checkpoints import (
    Checkpoint,
    InputFile,
    Shard,
    TensorInfo,
    lay_out,
    sample_digest,
    traits_of,
)
from darekit.dtypes import STOCHASTIC
from darekit.engine.costs import bytes_to_read, peak_memory
from darekit.engine.steps import Merge, Step
from darekit.errors import DataError, PlanError
from darekit.masks import effective_seeds, rounding_seed
from darekit.methods import MERGE_METHODS, SPARSIFIERS
from darekit.planning.buffers import Role, counters_of, roles_of, with_constants
from darekit.planning.draft import Draft
from darekit.planning.formats import outputs_of
from darekit.planning.matching.alignment import AlignedTensor, Alignment, Heads, align
from darekit.planning.notes import equal_notes, notes_of, rate_notes, rounding_notes, wide_notes
from darekit.planning.problems import Problems
from darekit.planning.rates import settle
from darekit.planning.settings import Settings, settings_of
from darekit.planning.steps import rounded, steps_of
from darekit.planning.travel.companions import Travel, heads_giver, travel_of
from darekit.planning.travel.configs import config_notes
from darekit.planning.travel.tokenizers import choose_tokenizer, named_source, rows_of
from darekit.recipe import Recipe
from darekit.wording import brief, size_of

if TYPE_CHECKING:
    from darekit.engine.nested import Workshop
    from darekit.inputs.statistics import Statistics
    from darekit.planning.stacks.stack import Tower
    from darekit.planning.tokens import OutputVocabulary

SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class ModelSummary:
    """What a plan does to one model.

    Attributes:
        ref: the model, as written.
        seed: effective seed of its mask; None where nothing is drawn.
        parameters: its float elements.
        kept: expected number of elements that are not dropped, deltas of exactly 0 among them.
    """

    ref: str
    seed: int | None
    parameters: int
    kept: int

    @property
    def drop_rate(self) -> float:
        """Over all of the model's float parameters."""
        return 1 - self.kept / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Within:
    """A recipe that is a model of another: its name there, its plan, and what computes its tensors."""

    ref: str
    plan: Plan
    workshop: Workshop


@dataclass(frozen=True)
class Plan:
    """Recipe x headers: the steps, the output's layout, the cost.

    What follows from headers (steps, shards, notes, costs) needs no open file; reading a tensor does. As a context
    manager a plan reopens its files where they are closed, and closes them on leaving.

    Attributes:
        recipe: what is to be done; a drop rate `auto` is resolved.
        base: the base's checkpoint; None where the recipe has none.
        models: the models' checkpoints, in the recipe's order.
        alignment: which tensors of base and models belong together.
        steps: one for each tensor of the output, independent of each other.
        shards: the output's files, with every tensor's offset.
        sample_digests: of the checkpoints, 16 bytes each; the base's first.
        seeds: effective seed of each model's mask; None where nothing is drawn.
        summaries: what is done to each model.
        notes: notes and warnings for the user.
        rates: of each model, what `drop_rate: auto` came to: tensor -> drop rate.
        settings: by tensor, what holds for it and for each model in it: weights, drop rates, the method's parameters.
        depths: which layer each tensor is in.
        travel: what goes beside the weights, and from where.
        statistics: one per model, where the method uses them.
        vocabulary: the output's tokens, where the recipe says which; None: rows are matched by number.
        others: checkpoints that give tokens or rows and are none of the models.
        roles: name -> what it is, of the tensors that are no weights: running statistics, counters.
        counters: name -> whose value each counter gets: a model's index, or -1, the base.
        towers: where each layer comes from, of stacks that slices made.
        config: of such a stack, before number format and vocabulary; None: as that of the model that gives it.
        template: the chat template that the recipe asks for; None: the one that comes with the tokenizer.
        within: the recipes that are models of this one.
        rounding: the effective seed of stochastic rounding; None: to nearest, or there is nothing to round.
    """

    recipe: Recipe
    base: Checkpoint | None
    models: tuple[Checkpoint, ...]
    alignment: Alignment
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    sample_digests: tuple[bytes, ...]
    seeds: tuple[int | None, ...]
    summaries: tuple[ModelSummary, ...]
    notes: tuple[str, ...]
    rates: tuple[Mapping[str, float], ...]
    settings: Mapping[str, Settings]
    depths: Depths
    travel: Travel
    statistics: tuple[Statistics, ...] = ()
    roles: Mapping[str, Role] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)
    vocabulary: OutputVocabulary | None = None
    others: tuple[Checkpoint, ...] = ()
    towers: tuple[Tower, ...] = ()
    config: Mapping[str, Any] | None = None
    template: str | None = None
    within: tuple[Within, ...] = ()
    rounding: int | None = None

    def __repr__(self) -> str:
        sparsify = f"{self.recipe.sparsify.method} + " if self.recipe.sparsify else ""
        models = "1 model" if len(self.models) == 1 else f"{len(self.models)} models"
        return brief(
            self, f"{sparsify}{self.recipe.merge_method}, {models}, {len(self.steps)} steps, "
            f"{self.parameters:,} parameters, {size_of(self.bytes_in)} in, {size_of(self.bytes_out)} out",
        )  # fmt: skip

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from darekit.wording.notebooks import shown_as_html

        sparsify = f"{self.recipe.sparsify.method}, then " if self.recipe.sparsify else ""
        facts = [
            ("method", f"{sparsify}{self.recipe.merge_method}"),
            *([("base", self.recipe.base_model)] if self.recipe.base_model is not None else []),
            ("output", f"{len(self.steps):,} tensors, {self.parameters:,} parameters, {size_of(self.bytes_out)}"),
            ("reads", size_of(self.bytes_in)),
        ]
        rows = [
            (one.ref, f"{one.drop_rate:.3f}", f"{one.kept:,}", "" if one.seed is None else str(one.seed))
            for one in self.summaries
        ]
        header = ("model", "drop rate", "kept", "seed")
        return shown_as_html("Plan", facts, header=header, rows=rows, notes=self.notes)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Base (where there is one) and models."""
        return (*([self.base] if self.base else []), *self.models)

    def recipe_named(self, name: str) -> Plan | None:
        """The plan of a recipe that is a model of this one, by its name in the recipe; None of what is stored."""
        parts = tuple(part for part in Path(name).parts if part not in (".", ".."))
        return next(
            (one.plan for one in self.within if one.ref == name or Path(one.ref).parts[-len(parts) :] == parts), None
        )

    @property
    def files(self) -> tuple[InputFile, ...]:
        """All files that are read, each once: those of the checkpoints and of their sources, and the statistics."""
        weights = [file for checkpoint in (*self.checkpoints, *self.others) for file in checkpoint.read_files]
        return tuple(dict.fromkeys((*weights, *(entry.file for entry in self.statistics if entry.file))))

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
        """What is read at least once: bytes behind all input tensors, and of the statistics that are used."""
        tensors = [info for checkpoint in self.checkpoints for info in checkpoint.tensors.values()]
        used = [entry for step in self.steps if isinstance(step, Merge) for entry in step.statistics]
        behind = sum(round(info.nbytes * traits_of(info.source).cost) for info in tensors)
        return behind + sum(entry.count * entry.dtype.itemsize for entry in used)

    def bytes_to_read(self, finished: Container[str] = ()) -> int:
        """Bytes that the engine will read: a tensor that must be measured first is read twice, or a little more.

        Tensors in `finished` are left out.
        """
        return bytes_to_read(self.steps, finished)

    def refuse_damaged(self, records: Mapping[str, Mapping[str, Any]], outcome: str) -> None:
        """What packs decoded to while the engine ran must be what was packed: their sources know the digests of that.

        Raises:
            DataError: it is not; `outcome`: what became of the run.
        """
        wrong: dict[str, list[str]] = {}
        for tensor in self.alignment.tensors:
            for k, (model, info) in enumerate(zip(self.models, tensor.models, strict=True)):
                wanted = None if info is None else traits_of(info.source).result
                if wanted is None or tensor.name in self.moved:  # what was read is not what is stored
                    continue
                found = records.get(tensor.name, {}).get("models", {}).get(str(k))
                if found is not None and found != wanted:
                    wrong.setdefault(model.ref, []).append(tensor.name)
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
    def moved(self) -> frozenset[str]:
        """Tensors whose rows are not read as they are stored."""
        return frozenset() if self.vocabulary is None else self.vocabulary.tensors

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
        return peak_memory(self.steps, threads, tile)

    def rate_of(self, model: int, tensor: AlignedTensor) -> tuple[float, float]:
        """Drop rate of one tensor of one model, and the noise of one element where it is a random drop that is
        rescaled, else 0."""
        found = self.settings[tensor.name].models[model]
        return (0.0, 0.0) if found is None else (found.rate, found.noise)

    def is_kept_whole(self, model: int, tensor: AlignedTensor) -> bool:
        """Whether a tensor is no weight, and this model gives it as it is: a pack rounds and drops nothing of it."""
        if tensor.name in self.counters:
            return self.counters[tensor.name] == model
        return self.roles.get(tensor.name) == "statistic" and self.rate_of(model, tensor)[0] < 1


def make_plan(
    recipe: Recipe,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    *,
    statistics: Sequence[Statistics] = (),
    others: Mapping[str, Checkpoint] | None = None,
    bases: Mapping[str, Checkpoint] | None = None,
    shard_size: int = SHARD_SIZE,
    verbatim: bool = False,
    problems: Problems | None = None,
) -> Plan:
    """Recipe x open checkpoints (x open statistics, one of each model; x others that tokens or slices name) -> plan.

    `verbatim`: tied copies and buffers are tensors like others, where all checkpoints store the same names.
    `problems`: what becomes of errors; the first is raised if not given.

    Raises:
        HomologyError: the checkpoints do not belong together, or statistics are another model's.
        PlanError: a parameter is impossible for a tensor.
        RecipeError: a parameter has no value for a tensor.
    """
    problems = problems or Problems()
    # The clearest error of those that a missing tokenizer would cause.
    problems.attempt(lambda: named_source(recipe, base, models))
    given = problems.need(lambda: _together(recipe, base, models, bases or {}, problems, verbatim=verbatim))
    base, models, depths = given.base, given.models, given.depths
    matched = problems.attempt(lambda: _with_vocabulary(recipe, given.alignment, base, models, others or {}))
    alignment, vocabulary = matched or (given.alignment, None)
    facts = facts_of(next((c.config for c in (base, *models) if c and c.config), None))
    roles = roles_of(alignment.tensors, facts)
    if (tensors := with_constants(alignment.tensors, roles)) != alignment.tensors:
        alignment = replace(alignment, tensors=tensors)
        roles = roles_of(tensors, facts)
    weights = [t for t in alignment.tensors if t.name not in roles]
    settled, rates = problems.need(lambda: settle(recipe, weights, depths))
    digests = tuple(sample_digest(checkpoint) for checkpoint in ((base, *models) if base else models))
    own_digests = digests[1:] if base else digests
    informed = MERGE_METHODS[recipe.merge_method].statistics is not None
    if informed:
        from darekit.planning.statistics import statistics_notes

        problems.attempt(lambda: _check_statistics(settled, models, own_digests, statistics, vocabulary))
    settings = problems.attempt(lambda: settings_of(settled, alignment.tensors, depths, roles)) or {}
    outputs = problems.attempt(lambda: outputs_of(alignment.tensors, recipe.dtype, facts, keep=recipe.keep_float32))
    beside = problems.attempt(lambda: _beside(settled, base, models, alignment, vocabulary)) if matched else None
    problems.stop()
    assert outputs is not None and beside is not None
    travel, template, template_notes = beside
    recipe = settled
    seeds = _seeds(recipe, own_digests)
    counters = counters_of(alignment.tensors, roles, _idle(settings.values(), len(models)))
    draft = Draft(recipe, tuple(models), alignment, depths, settings, seeds, tuple(statistics), roles, counters)
    _refuse_many_keeps(draft)
    shards = lay_out(outputs, shard_size)
    places = {p.name: (i, p) for i, shard in enumerate(shards) for p in shard.placements}
    steps = [step for tensor in alignment.tensors for step in steps_of(draft, tensor, *places[tensor.name])]
    rounding = rounding_seed(recipe.rounding_seed, digests) if recipe.rounding == STOCHASTIC else None
    if rounding is not None:
        steps = rounded(steps, rounding)
        rounding = rounding if any(isinstance(step, Merge) and step.rounding is not None for step in steps) else None
    opened = (note for checkpoint in ((base, *models) if base else models) for note in checkpoint.notes)
    notes = [*recipe.notes, *dict.fromkeys(opened), *alignment.notes, *given.notes, *notes_of(draft)]
    notes += equal_notes(models, own_digests)
    notes += rate_notes(models, rates)
    notes += wide_notes(recipe, outputs)
    notes += rounding_notes(recipe, steps)
    notes += statistics_notes(recipe, steps, statistics) if informed else ()
    notes += config_notes(base, models, travel.config, restacked=bool(recipe.slices))
    notes += [*travel.notes, *template_notes]
    return Plan(
        recipe, base, draft.models, alignment, tuple(steps), shards, digests, seeds, _summaries(draft), tuple(notes),
        rates, settings, depths, travel, draft.statistics, roles, counters, vocabulary,
        tuple((others or {}).values()), given.towers, given.config, template,
        rounding=rounding,
    )  # fmt: skip


@dataclass(frozen=True)
class _Together:
    """Checkpoints whose tensors correspond, and the stacks that slices made of them."""

    base: Checkpoint | None
    models: tuple[Checkpoint, ...]
    alignment: Alignment
    depths: Depths
    towers: tuple[Tower, ...] = ()
    config: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()


def _together(
    recipe: Recipe,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    bases: Mapping[str, Checkpoint],
    problems: Problems,
    *,
    verbatim: bool,
) -> _Together:
    vocab = "pad" if recipe.tokens else recipe.vocab
    if recipe.slices:
        from darekit.planning.stacks.config import config_of
        from darekit.planning.stacks.stack import stacked

        stack = stacked(recipe, base, models, bases, vocab, problems)
        donor = heads_giver(recipe, stack.base, stack.models) or stack.base or stack.models[0]
        config, notes = config_of(donor, stack.towers)
        return _Together(stack.base, stack.models, stack.alignment, stack.depths, stack.towers, config, notes)
    heads = _heads_of(recipe, base, models)
    alignment = align(base, models, vocab, heads=heads, extras=recipe.base_extras, verbatim=verbatim)
    return _Together(base, tuple(models), alignment, depths_of(tensor.name for tensor in alignment.tensors))


def _with_vocabulary(
    recipe: Recipe,
    alignment: Alignment,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    others: Mapping[str, Checkpoint],
) -> tuple[Alignment, OutputVocabulary | None]:
    if recipe.tokens is None:
        return alignment, None
    from darekit.planning.tokens import with_vocabulary

    return with_vocabulary(recipe, recipe.tokens, alignment, base, models, others)


def _check_statistics(
    recipe: Recipe,
    models: Sequence[Checkpoint],
    digests: Sequence[bytes],
    statistics: Sequence[Statistics],
    vocabulary: OutputVocabulary | None,
) -> None:
    from darekit.planning.statistics import check_statistics

    if vocabulary is not None and vocabulary.tensors:
        raise PlanError(
            f"{recipe.merge_method} reads statistics of rows as the models have them, but here tokens are moved "
            f"({', '.join(sorted(vocabulary.tensors))}): give the models one vocabulary first, with a merge_method "
            "without statistics"
        )
    check_statistics(recipe, models, digests, statistics)


def _beside(
    recipe: Recipe,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    alignment: Alignment,
    vocabulary: OutputVocabulary | None,
) -> tuple[Travel, str | None, tuple[str, ...]]:
    """What goes beside the weights; the chat template that the recipe asks for, and notes on it."""
    rows, owner = rows_of(alignment.sizes, base, models), vocabulary.owner if vocabulary else None
    choice = choose_tokenizer(recipe, base, models, rows, owner)
    travel = travel_of(recipe, base, models, choice, vocabulary.files if vocabulary else None)
    if recipe.chat_template is None:
        return travel, None, ()
    from darekit.planning.travel.templates import choose_template

    inputs = (base, *models) if base else models
    found = choose_template(recipe.chat_template, inputs, travel.tokenizer, vocabulary)
    return travel, found.template, found.notes


def _idle(settings: Iterable[Settings], models: int) -> list[bool]:
    """Of each model, whether everything of it is dropped."""
    kept, seen = [False] * models, [False] * models
    for found in {id(one): one for one in settings}.values():
        for k, one in enumerate(found.models):
            if one is not None:
                seen[k], kept[k] = True, kept[k] or one.rate < 1
    return [seen[k] and not kept[k] for k in range(models)]


def _refuse_many_keeps(draft: Draft) -> None:
    """A trim over the whole model finds one threshold for it: one `keep`, besides 1 for tensors that stay whole."""
    if not MERGE_METHODS[draft.recipe.merge_method].trims or draft.recipe.parameters.get("trim") != "model":
        return
    keeps: dict[int, set[float]] = {}
    for _, k, settings in draft.merged():
        if settings.keep < 1:
            keeps.setdefault(k, set()).add(settings.keep)
    for k, found in keeps.items():
        if len(found) > 1:
            raise PlanError(
                f"trim: model uses one threshold for all of {draft.models[k].ref}, but its keep is {min(found):g} in "
                f"some tensors and {max(found):g} in others; write one keep for all trimmed tensors (1 for the rest), "
                "or trim: tensor"
            )


def _heads_of(recipe: Recipe, base: Checkpoint | None, models: Sequence[Checkpoint]) -> Heads:
    giver = heads_giver(recipe, base, models)
    return "merged" if giver is None else giver


def _seeds(recipe: Recipe, digests: Sequence[bytes]) -> tuple[int | None, ...]:
    if recipe.sparsify is None or not SPARSIFIERS[recipe.sparsify.method].random:
        return tuple(None for _ in recipe.models)
    derived = effective_seeds(recipe.sparsify.seed, digests)
    explicit = [entry.parameters.get("seed") for entry in recipe.models]
    return tuple(d if e is None else cast(int, e) for d, e in zip(derived, explicit, strict=True))


def _summaries(draft: Draft) -> tuple[ModelSummary, ...]:
    total, kept = [0] * len(draft.models), [0] * len(draft.models)
    for tensor, k, settings in draft.merged():
        count = cast(TensorInfo, tensor.models[k]).count
        total[k] += count
        kept[k] += round(count * (1 - settings.rate))
    return tuple(
        ModelSummary(checkpoint.ref, seed, of, left)
        for checkpoint, seed, of, left in zip(draft.models, draft.seeds, total, kept, strict=True)
    )
