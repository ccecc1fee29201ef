# SPDX-License-Identifier: Apache-2.0
"""Write everything beside the weights. Only `config.json` is a necessity; no courtesy may cost the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from darekit.checkpoints.companions import CARD, Companions
from darekit.checkpoints.writing import whole, write_beside

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
    warnings = write_beside(directory, config=config, files=files, chat_template=chat_template)
    texts = ((RECIPE_NAME, RECIPE_NAME, lambda: recipe_text), ("the model card", CARD, card))
    for what, name, text in texts:
        warnings += whole(f"could not write {what}", directory / name, partial(_write, text))
    return warnings


def _write(text: Callable[[], str], path: Path) -> None:
    path.write_text(text(), encoding="utf-8")
