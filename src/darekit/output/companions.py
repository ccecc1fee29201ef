# SPDX-License-Identifier: Apache-2.0
"""Write everything beside the weights. Only `config.json` is a necessity; no courtesy may cost the weights."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from darekit.checkpoints.companions import CARD, CONFIG, Companions, Content
from darekit.errors import OutputError
from darekit.output.tokenizer import write_chat_template

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
