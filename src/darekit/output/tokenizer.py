# SPDX-License-Identifier: Apache-2.0
"""Which files travel with a model, and whose chat template the output gets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darekit.checkpoints import companions


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


def tokenizer_files(directory: Path) -> tuple[Path, ...]:
    """The files in `directory` that turn text into tokens and back."""
    return _matching(directory, (*companions.TOKENIZER, *companions.TEMPLATES, *companions.PROCESSOR)) + _code(
        directory, "tokenizer_config.json"
    )


def model_files(directory: Path) -> tuple[Path, ...]:
    """The files in `directory` that belong to its model, beside `config.json` and the weights."""
    return _matching(directory, companions.MODEL) + _code(directory, companions.CONFIG)


def companion_files(directory: Path) -> tuple[Path, ...]:
    """Everything in `directory` that an output made from it should carry, beside `config.json` and the weights."""
    return tuple(dict.fromkeys(tokenizer_files(directory) + model_files(directory)))


def chat_template(directory: Path) -> str | None:
    """The default chat template, found where transformers looks for it and in the same order."""
    try:
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, ValueError):
        pass
    # chat_template.json is read by processors only, so a tokenizer's own config goes before it.
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = _read_json(directory / name).get("chat_template")
        if isinstance(found, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
            found = next((each.get("template") for each in found if _is_default(each)), None)
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str):
            return found
    return None


def choose_chat_template(base: Path | None, models: Sequence[tuple[str, Path]]) -> TemplateChoice:
    """The base's template; where it has none, the one on which all (name, directory) models that have one agree.

    `base` is the directory the tokenizer comes from; None counts as one without a template.
    """
    own = chat_template(base) if base is not None else None
    if own is not None:
        return TemplateChoice(own, "base")
    owners: dict[str, list[str]] = {}  # by template without the blank end that only some file formats keep
    for name, directory in models:
        template = chat_template(directory)
        if template is not None:
            owners.setdefault(template.rstrip(), []).append(name)
    if not owners:
        return TemplateChoice()
    if len(owners) == 1:
        names = next(iter(owners.values()))
        template = next(found for name, path in models if name == names[0] and (found := chat_template(path)))
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


def _matching(directory: Path, patterns: Sequence[str]) -> tuple[Path, ...]:
    return tuple(path for pattern in patterns for path in sorted(directory.glob(pattern)) if path.is_file())


def _code(directory: Path, config: str) -> tuple[Path, ...]:
    return _matching(directory, companions.CODE) if _read_json(directory / config).get("auto_map") else ()


def _is_default(entry: object) -> bool:
    return isinstance(entry, dict) and entry.get("name") == "default"


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
