# SPDX-License-Identifier: Apache-2.0
"""What lies beside the weights of a plan's output: its config, the files that travel with it, its chat template."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from darekit.checkpoints import Checkpoint
from darekit.checkpoints.companions import TOKENIZER, Companions, matching
from darekit.checkpoints.tokenizers import Tokenizer
from darekit.dtypes import DTYPES, DType, dtype_named
from darekit.planning.config import merged_config
from darekit.planning.files import TemplateChoice, choose_chat_template, model_files, tokenizer_files
from darekit.planning.plan import Plan, heads_giver
from darekit.planning.templates import asked_template
from darekit.wording import label


def main_dtype(plan: Plan) -> DType:
    """The format of most of the output's float bytes: what config.json must say."""
    sizes: Counter[str] = Counter()
    for shard in plan.shards:
        for place in shard.placements:
            if dtype_named(place.dtype).kind == "float":
                sizes[place.dtype] += max(1, place.nbytes)
    return DTYPES[sizes.most_common(1)[0][0]] if sizes else DTYPES["F32"]


@dataclass(frozen=True)
class OutputCompanions:
    """What lies beside an output's weights: config.json (None: no input has one), copied files, the chat template."""

    config: dict[str, Any] | None
    files: Companions
    chat_template: TemplateChoice | None


def companions_of(plan: Plan) -> OutputCompanions:
    """Config of the base (of the model, where there is only one and the tokenizer is its own too), and the rest."""
    recipe = plan.recipe
    donor = plan.base or plan.models[0]
    tokenizer: Checkpoint = donor
    if plan.vocabulary is not None:
        tokenizer = plan.vocabulary.owner
    elif recipe.tokenizer_source != "base":
        tokenizer = next(
            m for m, e in zip(plan.models, recipe.models, strict=True) if e.model == recipe.tokenizer_source
        )
        if len(plan.models) == 1 and tokenizer.config is not None:
            donor = tokenizer
        if not tokenizer_files(tokenizer.companions):
            tokenizer = donor  # weights alone: the base's is better than none
    giver = heads_giver(recipe, plan.base, plan.models)
    if giver is not None and giver.config is not None:  # class, number of labels and their names go with the head
        donor = giver
    config = None
    if donor.config is not None:
        config = merged_config(
            plan.config or donor.config,
            dtype=main_dtype(plan),
            sizes=plan.alignment.sizes,
            tied=plan.alignment.tied,
        )
    beside = tokenizer.companions
    if plan.vocabulary is not None and plan.vocabulary.files is not None:
        others = {name: content for name, content in beside.items() if not matching({name: content}, TOKENIZER)}
        beside = {**others, **plan.vocabulary.files}
    files = tokenizer_files(beside)
    files |= {name: content for name, content in model_files(donor.companions).items() if name not in files}
    named = [(label(model.ref), model.companions) for model in plan.models]
    if recipe.chat_template is None:
        return OutputCompanions(config, files, choose_chat_template(tokenizer.companions, named))
    if plan.base is not None:
        named.insert(0, (label(plan.base.ref), plan.base.companions))
    added = None
    if plan.vocabulary is not None:
        added = [token.content for token in plan.vocabulary.joined.added]
    elif (found := Tokenizer.of(tokenizer)) is not None:
        added = [token.content for token in found.added]
    return OutputCompanions(config, files, asked_template(recipe.chat_template, named, added))
