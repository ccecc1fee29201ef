# SPDX-License-Identifier: Apache-2.0
"""A chat template of its own for an output's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path


def write_chat_template(directory: Path, template: str) -> None:
    """Give a template to the tokenizer in `directory`, for new and old transformers."""
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = directory / "tokenizer_config.json"
    if path.is_file():  # where transformers below 4.50 looks
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "chat_template": template}, indent=2, ensure_ascii=False) + "\n", "utf-8")
