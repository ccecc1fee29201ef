# SPDX-License-Identifier: Apache-2.0
"""The chat template that a recipe asks for: by name, as text, or the one that most models have."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from darekit.architectures.templates import CHAT_TEMPLATES
from darekit.checkpoints.companions import Companions
from darekit.checkpoints.tokenizers import chat_template

AUTO = "auto"


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


def asked_template(asked: str, models: Sequence[tuple[str, Companions]], added: Sequence[str] | None) -> TemplateChoice:
    """The template of a recipe's `chat_template`.

    Args:
        asked: `auto`, a name or a template's text.
        models: (name, companion files) of the base, where there is one, and of the models.
        added: the output's added tokens; None where they are not known.
    """
    if asked == AUTO:
        return _commonest(models)
    named = CHAT_TEMPLATES.get(asked)
    if named is None:
        return TemplateChoice(asked, "the recipe")
    missing = [] if added is None else [token for token in named.tokens if token not in added]
    warnings: tuple[str, ...] = ()
    if missing:
        warnings = (
            f"WARNING: the chat template {asked} writes {', '.join(missing)}, and to the output's tokenizer "
            f"{'that is no token' if len(missing) == 1 else 'these are no tokens'}: the model will not see where turns "
            "begin and end. Take the tokens of a model that has them (tokenizer_source: union, or that model)",
        )
    return TemplateChoice(named.text, asked, warnings=warnings)


def _commonest(models: Sequence[tuple[str, Companions]]) -> TemplateChoice:
    """The template that most models have, but for blank ends; of several the one that comes first."""
    found = [(name, template) for name, beside in models if (template := chat_template(beside)) is not None]
    if not found:
        return TemplateChoice(warnings=("chat_template is auto, but no model has one: the output has none",))
    counts = Counter(template.strip() for _, template in found)
    best = max(counts.values())
    name, template = next((name, template) for name, template in found if counts[template.strip()] == best)
    note = None
    if len(counts) > 1:
        note = f"chat_template: auto takes that of {name}, which {best} of {len(found)} models have"
    return TemplateChoice(template, name, note)
