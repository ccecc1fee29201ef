# SPDX-License-Identifier: Apache-2.0
"""The page of an evaluation: which model is best in which score, and where nobody can say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from darekit.evaluation.comparison import CLEAR, best_of, shown
from darekit.evaluation.folders import EvaluationFolder, read_evaluation_folder
from darekit.recipe.texts import recipe_text
from darekit.reports.charts import Point, dots
from darekit.reports.drawing import draw_dots
from darekit.reports.page import Copy, Number, Page, Plot, Section, Table, View
from darekit.wording import and_, distinct_labels

_WORDS = {
    "tasks": "tasks", "data": "data", "judge": "judge", "include": "local tasks", "limit": "at most",
    "num_fewshot": "examples shown", "chat_template": "chat template", "batch_size": "batch size",
    "max_length": "tokens of a row", "base": "base of packs", "dtype": "computed in",
}  # fmt: skip


def evaluation_page(folder: Path) -> Page:
    """A folder of `dare eval --out` -> its page."""
    found = read_evaluation_folder(folder)
    models = [one.model for one in found.comparison.evaluations]
    failed = [one for one in found.comparison.evaluations if one.error is not None]
    state = ""
    if found.missing:
        total = len(models) + len(found.missing)
        state = (
            f"{len(models)} of {total} models are judged; {and_(found.missing)} will be when `dare eval` is run again."
        )
    verdict, tone, details = _verdict(found)
    numbers = (Number("Models", f"{len(models) - len(failed)}", f"{len(failed)} failed" if failed else "none failed"),)
    return Page(
        "Evaluation", folder.resolve().name, verdict, tone, details, state,
        (*_bests(found), *numbers)[-4:], tuple(_facts(found)), None, tuple(_sections(found)),
        tuple(f"Failed: {one.model}: {one.error}" for one in failed),
    )  # fmt: skip


def draw_evaluation_folder(folder: Path, into: Path) -> list[Path]:
    """Every score of all models, as PNG and SVG."""
    found = read_evaluation_folder(folder)
    names = distinct_labels([one.model for one in found.comparison.evaluations])
    rows = [
        (score, [(name, one.value, one.stderr) for name, one in zip(names, row, strict=True) if one is not None])
        for score in found.comparison.names if (row := found.comparison.row(score))
    ]  # fmt: skip
    return [*draw_dots(rows, into / "scores")] if rows else []


def _verdict(found: EvaluationFolder) -> tuple[str, str, tuple[str, ...]]:
    comparison = found.comparison
    if not comparison.names:
        return "No model has a score.", "bad" if comparison.failed else "plain", ()
    wins: dict[str, list[str]] = {}
    for score in comparison.names:
        best = best_of(comparison.row(score))
        if best is not None:
            wins.setdefault(comparison.evaluations[best].model, []).append(score)
    rule = (
        f"A model counts as best where it leads every other by more than {CLEAR:g} standard errors of the difference. "
        "The models answered the same questions, so the true error is mostly smaller: this errs on the side of caution."
    )
    if len(comparison.evaluations) < 2:
        return f"One model was judged: {comparison.evaluations[0].model}.", "plain", ()
    if not wins:
        return "In no score is one model clearly best.", "plain", (rule,)
    parts = [f"{model} in {and_(scores)}" for model, scores in wins.items()]
    return f"Clearly best: {'; '.join(parts)}.", "good", (rule,)


def _bests(found: EvaluationFolder) -> Iterator[Number]:
    """Of the first scores, the best value."""
    comparison = found.comparison
    for score in comparison.names[:3]:
        row = [(one, i) for i, one in enumerate(comparison.row(score)) if one is not None]
        if row and row[0][0].higher_is_better is not None:
            sign = 1 if row[0][0].higher_is_better else -1
            one, i = max(row, key=lambda entry: sign * entry[0].value)
            clear = "" if best_of(comparison.row(score)) == i else ", not clearly"
            yield Number(f"Best {score}", shown(one), f"{comparison.evaluations[i].model}{clear}")


def _facts(found: EvaluationFolder) -> Iterator[tuple[str, str]]:
    names = [one.model for one in found.comparison.evaluations] + list(found.missing)
    yield "models", ", ".join(names)
    for key, value in found.settings.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else "yes" if value is True else str(value)
        yield _WORDS.get(key, key), text
    if not found.settings:
        yield "judged by", ", ".join(found.comparison.names) or "unknown"
    versions = {
        f"{task} {version}" for one in found.comparison.evaluations for detail in one.details.values()
        if isinstance(detail, dict) for task, version in dict(detail.get("versions", {})).items()
    }  # fmt: skip
    if versions:
        yield "versions of tasks", ", ".join(sorted(versions))


def _sections(found: EvaluationFolder) -> Iterator[Section]:
    comparison = found.comparison
    if not comparison.names:
        return
    models = [one.model for one in comparison.evaluations]
    names = distinct_labels(models)
    copies = tuple(
        Copy(model, recipe_text(found.recipes[model])) if model in found.recipes else None for model in models
    )
    views = []
    for score in comparison.names:
        row = comparison.row(score)
        points = [
            Point(None, math.nan if one is None else one.value, (model, f"{score}: {shown(one)}"), copy,
                  None if one is None else one.stderr)
            for model, one, copy in zip(models, row, copies, strict=True)
        ]  # fmt: skip
        if any(math.isfinite(point.y) for point in points):
            first = next(one for one in row if one is not None)
            way = {True: "higher is better", False: "lower is better", None: ""}[first.higher_is_better]
            title = f"{score} ({way})" if way else score
            views.append(View(score, (("", dots(names, points, {"title": title})),)))
    columns = [(score, best_of(comparison.row(score))) for score in comparison.names]
    rows = tuple(
        (model, *((shown(found_score) + (" *" if best == at else "")) if one.error is None else "failed"
                  for (score, best) in columns for found_score in [one.scores.get(score)]))
        for at, (model, one) in enumerate(zip(models, comparison.evaluations, strict=True))
    )  # fmt: skip
    starred = "; * is clearly best" if any(best is not None for _, best in columns) else ""
    table = Table(
        f"Every score; ± is one standard error{starred}", ("model", *comparison.names), rows, 1,
        copies if any(copies) else (), (), False,
    )  # fmt: skip
    pointer = "Point at a model for its recipe, click to copy it."
    parts = (
        (Plot("Scores", "Bars are one standard error.", tuple(views), pointer=pointer), table) if views else (table,)
    )
    yield Section("Scores", parts)
