# SPDX-License-Identifier: Apache-2.0
"""A chat template of its own for an output's tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TemplateChoice:
    """The chat template that a recipe asks for.

    Attributes:
        template: its text; None where there is none.
        source: whose it is: a model's name, that of the template, or "the recipe".
        note: what was decided, where that is not what one would expect.
        warnings: what the user should decide.
    """

    template: str | None = None
    source: str | None = None
    note: str | None = None
    warnings: tuple[str, ...] = ()


def write_chat_template(directory: Path, template: str) -> None:
    """Give a template to the tokenizer in `directory`, for new and old transformers."""
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = directory / "tokenizer_config.json"
    if path.is_file():  # where transformers below 4.50 looks
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "chat_template": template}, indent=2, ensure_ascii=False) + "\n", "utf-8")
