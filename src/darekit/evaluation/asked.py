# SPDX-License-Identifier: Apache-2.0
"""What a run of `dare eval --out` was asked (`asked.json`): its models with their recipes, and what judges them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darekit.errors import OutputError

ASKED = "asked.json"
FORMAT = "darekit-eval-1"


@dataclass(frozen=True)
class Asked:
    """One run, before its first model is judged.

    Attributes:
        models: (name, key of its line in `evaluations.jsonl`, its recipe as data) of each.
        settings: what judges, and how, in the words of `evaluate`; only what was given.
    """

    models: tuple[tuple[str, str, Mapping[str, Any]], ...]
    settings: Mapping[str, Any]

    def to_data(self) -> dict[str, Any]:
        """What `asked.json` holds."""
        models = [{"name": name, "key": key, "recipe": recipe} for name, key, recipe in self.models]
        return {"format": FORMAT, "settings": self.settings, "models": models}


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments that say something, in JSON-able form: a function is its name."""
    return {name: _plain(value) for name, value in settings.items() if value is not None and value not in ("", (), [])
            and value is not False}  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    if callable(value):
        return f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', type(value).__name__)}"
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def read_asked(out: Path) -> Asked | None:
    """OUT/asked.json; None where there is none, as in folders of earlier versions.

    Raises:
        OutputError: it is something else.
    """
    path = out / ASKED
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(data["format"])
        models = tuple((str(one["name"]), str(one["key"]), dict(one["recipe"])) for one in data["models"])
        return Asked(models, dict(data["settings"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path} does not hold what `dare eval --out` writes ({error!r}): run it again with this version"
        ) from None
