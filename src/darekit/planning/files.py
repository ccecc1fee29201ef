# SPDX-License-Identifier: Apache-2.0
"""Which files travel with a model, and whose chat template the output gets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darekit.checkpoints import companions
from darekit.checkpoints.companions import Companions, Content


@dataclass(frozen=True)
class TemplateChoice:
    """The chat template of an output.

    Attributes:
        template: its text; None where there is none.
        source: whose it is: "base", a model's name, or None where there is none.
        borrowed: it is not among the base's own files and has to be written (`write_chat_template`).
        note: what was decided, where that is not what one would expect.
        warnings: what the user should decide.
    """

    template: str | None = None
    source: str | None = None
    borrowed: bool = False
    note: str | None = None
    warnings: tuple[str, ...] = ()


def tokenizer_files(beside: Companions) -> dict[str, Content]:
    """The companion files that turn text into tokens and back."""
    named = companions.matching(beside, (*companions.TOKENIZER, *companions.TEMPLATES, *companions.PROCESSOR))
    return named | _code(beside, "tokenizer_config.json")


def model_files(beside: Companions) -> dict[str, Content]:
    """The companion files that belong to the model itself, beside `config.json` and the weights."""
    return companions.matching(beside, companions.MODEL) | _code(beside, companions.CONFIG)


def companion_files(beside: Companions) -> dict[str, Content]:
    """Everything that an output made from a model should carry, beside `config.json` and the weights."""
    return tokenizer_files(beside) | model_files(beside)


def chat_template(beside: Companions) -> str | None:
    """The default chat template, found where transformers looks for it and in the same order."""
    try:
        return companions.content_of(beside["chat_template.jinja"]).decode("utf-8")
    except (KeyError, OSError, ValueError):
        pass
    # chat_template.json is read by processors only, so a tokenizer's own config goes before it.
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = _read_json(beside, name).get("chat_template")
        if isinstance(found, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
            found = next((each.get("template") for each in found if _is_default(each)), None)
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str):
            return found
    return None


def choose_chat_template(base: Companions, models: Sequence[tuple[str, Companions]]) -> TemplateChoice:
    """The base's template; where it has none, the one on which all (name, companions) models that have one agree.

    `base`: the companion files among which the tokenizer is.
    """
    own = chat_template(base)
    if own is not None:
        return TemplateChoice(own, "base")
    owners: dict[str, list[str]] = {}  # by template without the blank end that only some file formats keep
    for name, beside in models:
        template = chat_template(beside)
        if template is not None:
            owners.setdefault(template.rstrip(), []).append(name)
    if not owners:
        return TemplateChoice()
    if len(owners) == 1:
        names = next(iter(owners.values()))
        template = next(found for name, beside in models if name == names[0] and (found := chat_template(beside)))
        return TemplateChoice(
            template, names[0], True, f"the base has no chat template: took the one of {', '.join(names)}"
        )
    groups = "; ".join(", ".join(names) for names in owners.values())
    return TemplateChoice(
        warnings=(
            f"the base has no chat template, and those of the models differ ({groups}): the output has none; "
            f"choose one with tokenizer_source, or put a chat_template.jinja into the output",
        )
    )


def write_chat_template(directory: Path, template: str) -> None:
    """Give a template to the tokenizer in `directory`, for new and old transformers."""
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = directory / "tokenizer_config.json"
    if path.is_file():  # where transformers below 4.50 looks
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "chat_template": template}, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _code(beside: Companions, config: str) -> dict[str, Content]:
    return companions.matching(beside, companions.CODE) if _read_json(beside, config).get("auto_map") else {}


def _is_default(entry: object) -> bool:
    return isinstance(entry, dict) and entry.get("name") == "default"


def _read_json(beside: Companions, name: str) -> dict[str, Any]:
    """A JSON object; an empty one where there is none that can be read."""
    try:
        value = json.loads(companions.content_of(beside[name]).decode("utf-8"))
    except (KeyError, OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
