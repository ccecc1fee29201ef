# SPDX-License-Identifier: Apache-2.0
"""A folder of `dare eval --out`, read again: what is finished, what failed, and what is still to come."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from darekit.errors import OutputError
from darekit.evaluation.asked import read_asked
from darekit.evaluation.comparison import COMPARISON, KEPT, Comparison, Evaluation, kept_in
from darekit.evaluation.scores import Score


@dataclass(frozen=True)
class EvaluationFolder:
    """What `dare eval` has left in a folder so far.

    Attributes:
        comparison: the models that were judged or failed, in order.
        recipes: model -> its recipe as data, where that is known.
        settings: what judged, in the words of `evaluate`; empty where it is unknown.
        missing: models that were asked for and have not been judged.
    """

    comparison: Comparison
    recipes: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]
    missing: tuple[str, ...]


def read_evaluation_folder(out: Path) -> EvaluationFolder:
    """`asked.json`, `evaluations.jsonl` and `comparison.json` -> every model's scores.

    Raises:
        OutputError: there is nothing of them, or a file is something else.
    """
    asked, kept = read_asked(out), kept_in(out)
    compared = _compared(out)
    if asked is None:
        evaluations = compared if compared is not None else tuple(kept.values())
        if not evaluations:
            raise OutputError(f"{out} has no finished evaluation: {COMPARISON} and {KEPT} are missing or empty")
        return EvaluationFolder(Comparison(evaluations), {}, {}, ())
    names = [name for name, _, _ in asked.models]
    # Only the run that wrote the table knows what failed.
    same = compared is not None and [one.model for one in compared] == names
    failed = {one.model: one for one in compared or () if same and one.error is not None}
    found, missing = [], []
    for name, key, _ in asked.models:
        if key in kept:
            found.append(replace(kept[key], model=name))
        elif name in failed:
            found.append(failed[name])
        else:
            missing.append(name)
    recipes = {name: recipe for name, _, recipe in asked.models}
    return EvaluationFolder(Comparison(tuple(found)), recipes, asked.settings, tuple(missing))


def _compared(out: Path) -> tuple[Evaluation, ...] | None:
    path = out / COMPARISON
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return tuple(
            Evaluation(
                str(one["model"]), {name: Score(**score) for name, score in one.get("scores", {}).items()},
                float(one.get("seconds", 0)), one.get("details", {}), one.get("error"), bool(one.get("kept", False)),
            )
            for one in data["evaluations"]
        )  # fmt: skip
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{path} is not a table of `dare eval --out` ({error!r})") from None
