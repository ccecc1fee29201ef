# SPDX-License-Identifier: Apache-2.0
"""Write everything beside the weights. Only `config.json` is a necessity; no courtesy may cost the weights."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from darekit.checkpoints.companions import CARD, CONFIG, Companions, Content
from darekit.dtypes import DTYPES, DType, dtype_named
from darekit.errors import OutputError
from darekit.output.config import merged_config, with_ids
from darekit.output.tokenizer import write_chat_template
from darekit.planning.plan import Plan

RECIPE_NAME = "darekit_recipe.yaml"


def write_companions(
    directory: Path,
    *,
    config: Mapping[str, Any] | None,
    files: Companions,
    chat_template: str | None = None,
    recipe_text: str,
    card: Callable[[], str],
) -> list[str]:
    """Config, tokenizer and other `files`, recipe, and the card last.

    `card` makes the card's text; it is called here, so that whatever it raises becomes a warning. A
    `chat_template` takes the place of the one that is among the files.

    Returns:
        One warning for each courtesy that failed.

    Raises:
        OutputError: `config.json` cannot be written.
    """
    warnings: list[str] = []
    if config is None:
        warnings.append("no input has a config.json: the output has none, and transformers cannot load it by itself")
    else:
        path = directory / CONFIG
        try:
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except (OSError, TypeError, ValueError) as error:
            raise OutputError(f"cannot write {path}: {error}; a model without it cannot be loaded") from error

    for name, content in files.items():
        what = f"could not write {name}" if isinstance(content, bytes) else f"could not copy {content}"
        _try(warnings, what, _whole, directory / name, partial(_copy, content))
    if chat_template is not None:
        _try(warnings, "could not write the chat template", write_chat_template, directory, chat_template)
    texts = ((RECIPE_NAME, RECIPE_NAME, lambda: recipe_text), ("the model card", CARD, card))
    for what, name, text in texts:
        _try(warnings, f"could not write {what}", _whole, directory / name, partial(_write, text))
    return warnings


def _try(warnings: list[str], what: str, action: Callable[..., None], *arguments: Any) -> None:
    try:
        action(*arguments)
    except Exception as error:  # whatever it is, it is not worth an hour of merging
        warnings.append(f"{what}: {error or type(error).__name__}; the weights are not affected")


def _whole(target: Path, write: Callable[[Path], None]) -> None:
    """Write a file, or leave none: half a tokenizer.json would keep the whole model from loading."""
    try:
        write(target)
    except BaseException:
        with contextlib.suppress(OSError):
            target.unlink()
        raise


def _copy(content: Content, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        target.write_bytes(content)
    else:
        # Contents only: files in the Hub's cache are links, and may be read-only.
        shutil.copyfile(content, target)


def _write(text: Callable[[], str], path: Path) -> None:
    path.write_text(text(), encoding="utf-8")


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
    return OutputCompanions(config, travel.files, plan.template)
