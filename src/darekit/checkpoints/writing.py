# SPDX-License-Identifier: Apache-2.0
"""Write what a model has beside its weights: config, tokenizer, other small files."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from darekit.checkpoints.companions import CONFIG, Companions, Content
from darekit.errors import OutputError


def write_beside(
    directory: Path, *, config: Mapping[str, Any] | None, files: Companions, chat_template: str | None = None
) -> list[str]:
    """Config and `files`; a `chat_template` takes the place of the one that is among the files.

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
        warnings += whole(what, directory / name, partial(_copy, content))
    if chat_template is not None:
        warnings += courtesy("could not write the chat template", partial(_template, directory, chat_template))
    return warnings


def courtesy(what: str, action: Callable[[], None]) -> list[str]:
    """Do what is not worth the weights: where it fails, a warning that begins with `what`."""
    try:
        action()
    except Exception as error:  # whatever it is, it is not worth an hour of merging
        return [f"{what}: {error or type(error).__name__}; the weights are not affected"]
    return []


def whole(what: str, target: Path, write: Callable[[Path], None]) -> list[str]:
    """`courtesy` that writes a file, or leaves none: half a tokenizer.json would keep the whole model from loading."""

    def action() -> None:
        try:
            write(target)
        except BaseException:
            with contextlib.suppress(OSError):
                target.unlink()
            raise

    return courtesy(what, action)


def _copy(content: Content, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        target.write_bytes(content)
    else:
        # Contents only: files in the Hub's cache are links, and may be read-only.
        shutil.copyfile(content, target)


def _template(directory: Path, template: str) -> None:
    """A chat template of its own for the tokenizer that lies there, for new and old transformers."""
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = directory / "tokenizer_config.json"
    if path.is_file():  # where transformers below 4.50 looks
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "chat_template": template}, indent=2, ensure_ascii=False) + "\n", "utf-8")
