# SPDX-License-Identifier: Apache-2.0
"""Which files travel beside an output's weights, and from where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from darekit.checkpoints import Checkpoint, companions
from darekit.checkpoints.companions import Companions, Content, content_of
from darekit.checkpoints.tokenizers import CONFIG as TOKENIZER_CONFIG
from darekit.checkpoints.tokenizers import read_json
from darekit.planning.travel.labels import label_notes, shared_labels
from darekit.planning.travel.tokenizers import TokenizerChoice
from darekit.recipe import Recipe
from darekit.wording import label, some


@dataclass(frozen=True)
class Travel:
    """What travels beside an output's weights.

    Attributes:
        tokenizer: whose tokenizer it is, and with it template, generation settings and ids of special tokens.
        config: whose config.json the output's is made of.
        files: what is copied, by name.
        notes: notes for the user.
        labels: keys of config.json that come from the fine-tuned models: what the rows of their classifiers stand for.
    """

    tokenizer: Checkpoint
    config: Checkpoint
    files: Companions = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    labels: Mapping[str, Any] = field(default_factory=dict)


def tokenizer_files(beside: Companions) -> dict[str, Content]:
    """The files that turn text into tokens and back."""
    named = companions.matching(beside, (*companions.TOKENIZER, *companions.TEMPLATES))
    return named | _code(beside, TOKENIZER_CONFIG)


def model_files(beside: Companions) -> dict[str, Content]:
    """The files that belong to the model itself, beside `config.json` and the weights."""
    return companions.matching(beside, companions.MODEL) | _code(beside, companions.CONFIG)


def further_files(beside: Companions) -> dict[str, Content]:
    """Processors, and the files that are on no list."""
    listed = companions.matching(beside, companions.ALL)
    further = {name: content for name, content in beside.items() if name not in listed}
    return companions.matching(beside, companions.PROCESSOR) | further


def companion_files(beside: Companions) -> dict[str, Content]:
    """Everything that an output made from a model should carry, beside `config.json` and the weights."""
    return tokenizer_files(beside) | model_files(beside) | further_files(beside)


def travel_of(
    recipe: Recipe,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    choice: TokenizerChoice,
    rewritten: Companions | None = None,
) -> Travel:
    """Which files travel with an output: all that belong to a tokenizer from its source, code that `config` refers to
    from there, and everything else from the models where they agree, otherwise from the tokenizer's source too.

    `rewritten`: the tokenizer's own files, where tokens were added.
    """
    source, config = choice.source, config_giver(recipe, base, models)
    beside = dict(source.companions)
    if rewritten is not None:
        replaced = companions.matching(beside, companions.TOKENIZER)
        beside = {**{name: content for name, content in beside.items() if name not in replaced}, **rewritten}
    bundle = tokenizer_files(beside) | companions.matching(beside, companions.MODEL)
    code = _code(config.companions, companions.CONFIG)
    inputs = [*([base] if base is not None else []), *models]
    further, notes = _further(source, base, models)
    notes += _left_behind(inputs)
    labels: Mapping[str, Any] = {}
    if heads_giver(recipe, base, models) is None:  # the rows of classifiers are merged, and what they stand for counts
        labels = shared_labels(base, models) if config is base else {}
        notes += label_notes(base if config is base else None, models, labels)
    if base is not None and base.config is None and config is not base and len(models) > 1:
        notes.append(f"the base has no config.json: the output has that of {label(config.ref)}")
    if "_class_name" in (config.config or {}):
        notes.append(
            f"{_name(config, base)} is a model of diffusers, which looks for diffusion_pytorch_model.safetensors: "
            "rename the output's model.safetensors (and where there are shards, each of them and their index)"
        )
    return Travel(source, config, code | bundle | further, (*choice.notes, *notes), labels)


def _further(
    source: Checkpoint, base: Checkpoint | None, models: Sequence[Checkpoint]
) -> tuple[dict[str, Content], list[str]]:
    """Processors and files that are on no list: those in which all models agree, else those of `source`."""
    inputs = [*([base] if base is not None else []), *models]
    found = {id(one): further_files(one.companions) for one in (*inputs, source)}
    names = dict.fromkeys(name for one in inputs for name in found[id(one)])
    files: dict[str, Content] = {}
    foreign: dict[str, list[str]] = {}
    dropped: dict[str, list[str]] = {}
    for name in companions.MODEL:  # never of another than the tokenizer
        if name not in source.companions and (owners := [one for one in inputs if name in one.companions]):
            dropped.setdefault(" and ".join(_name(one, base) for one in owners), []).append(name)
    differing = []
    for name in names:
        holders = [one for one in models if name in found[id(one)]]
        alike = len(holders) == len(models) and _equal([found[id(one)][name] for one in holders])
        giver = source
        if alike and not (name in found[id(source)] and _equal([found[id(one)][name] for one in (source, models[0])])):
            giver = models[0]
        if name not in found[id(giver)]:
            owners = [one for one in inputs if name in found[id(one)]]
            dropped.setdefault(" and ".join(_name(one, base) for one in owners), []).append(name)
            continue
        files[name] = found[id(giver)][name]
        if giver is not source:
            foreign.setdefault(label(giver.ref), []).append(name)
        elif not alike and not _equal([found[id(one)][name] for one in holders] + [files[name]]):
            differing.append(name)
    notes = [f"{some(of, 6)} of {whose} {'is' if len(of) == 1 else 'are'} copied" for whose, of in foreign.items()]
    if differing:
        verb = "differs" if len(differing) == 1 else "differ"
        notes.append(f"{some(differing, 6)} {verb} between the inputs: copied from {_name(source, base)}")
    if layers := [name.rpartition("/")[0] for name in differing if companions.LAYER.fullmatch(name)]:
        notes.append(
            f"{some(layers)} {'is a trained layer' if len(layers) == 1 else 'are trained layers'} of the embedding "
            "model: merge them like the models themselves, as `base_model: BASE/FOLDER` and so on, and replace the "
            "output's"
        )
    for whose, of in dropped.items():
        notes.append(
            f"{some(of, 6)} of {whose} {'is' if len(of) == 1 else 'are'} not copied: {_name(source, base)}, from which "
            f"the files beside the weights come, has no such file{'' if len(of) == 1 else 's'}"
        )
    return files, notes


def _left_behind(inputs: Sequence[Checkpoint]) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for one in inputs:
        for name, why in one.left.items():
            reasons.setdefault(why, []).append(f"{label(one.ref)}/{name}")
    for why, of in reasons.items():
        yield f"not copied: {some(of, 6)} ({why})"


def _equal(contents: Sequence[Content]) -> bool:
    try:
        first, *others = (content_of(content) for content in contents)
    except OSError:
        return False
    return all(other == first for other in others)


def _name(one: Checkpoint, base: Checkpoint | None) -> str:
    return "the base" if one is base else label(one.ref)


def config_giver(recipe: Recipe, base: Checkpoint | None, models: Sequence[Checkpoint]) -> Checkpoint:
    """Whose config.json an output's is made of: the base's, a single model's own, or that of who gives the heads."""
    giver = heads_giver(recipe, base, models)
    if giver is not None and giver.config is not None:  # class, number of labels and their names go with the head
        return giver
    # Cut to the base's rows, a model does not know the tokens that its config speaks of.
    of_base = recipe.tokenizer_source in ("base", "union") or (
        recipe.tokenizer_source is None and recipe.vocab == "base"
    )
    single = len(models) == 1 and not of_base and models[0].config is not None
    if base is None or single:
        return next((one for one in models if one.config is not None), models[0])
    return base if base.config is not None else next((one for one in models if one.config is not None), base)


def heads_giver(recipe: Recipe, base: Checkpoint | None, models: Sequence[Checkpoint]) -> Checkpoint | None:
    """The checkpoint that `heads` names; None: heads are merged like all tensors."""
    if recipe.heads is None:
        return None
    if recipe.heads == "base" and base is not None:
        return base
    return next(model for model, entry in zip(models, recipe.models, strict=True) if entry.model == recipe.heads)


def _code(beside: Companions, config: str) -> dict[str, Content]:
    return companions.matching(beside, companions.CODE) if read_json(beside, config).get("auto_map") else {}
