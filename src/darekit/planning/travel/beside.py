# SPDX-License-Identifier: Apache-2.0
"""What lies beside the weights of a plan's output: its config, the files that travel with it, its chat template."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from darekit.checkpoints.companions import Companions
from darekit.dtypes import DTYPES, DType, dtype_named
from darekit.planning.plan import Plan
from darekit.planning.travel.merged import merged_config, with_ids


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
    """What lies beside an output's weights: config.json (None: no input has one), copied files, and a chat template
    where the recipe asks for one."""

    config: dict[str, Any] | None
    files: Companions
    chat_template: str | None = None


def companions_of(plan: Plan) -> OutputCompanions:
    """What the plan found to travel, and config.json made true to the output's weights and to its tokenizer."""
    travel = plan.travel
    config = None
    if travel.config.config is not None:
        config = merged_config(
            plan.config or travel.config.config,
            dtype=main_dtype(plan),
            sizes=plan.alignment.sizes,
            tied=plan.alignment.tied,
        )
        if travel.tokenizer is not travel.config:
            config = with_ids(config, travel.tokenizer.config)
        config |= travel.labels
    return OutputCompanions(config, travel.files, plan.template)
