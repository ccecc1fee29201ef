# SPDX-License-Identifier: Apache-2.0
"""The strict reading of a sweep file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from darekit.evaluation.judges import metrics_of
from darekit.recipe.documents import Document, Key, Places, did_you_mean, fail, open_source, shown, suggest
from darekit.sweeps.data import DROP_RATE, SPLITS, Axis, Layout, Point, Sweep
from darekit.trials.judging import MEAN, Specs, read_judges, read_recipe_place
from darekit.trials.scores import WORDS, check_score, word_meant

KEYS = ("recipe", "axes", "seeds", "validation", "test", "choose", "plot")
_LAYOUT = ("x", "lines", "score", "title")
_JUDGES = "judges"


def read_sweep(source: str | Path | Mapping[str, Any]) -> Sweep:
    """A YAML file, or the same as data -> sweep. Relative names in a file are looked up in the working directory, then
    beside the file.

    Raises:
        RecipeError: the text is not a sweep; the message names the file, line and key, and says what to write instead.
    """
    document, name, search = open_source(source, "sweep")
    data = document.data
    for key in data:
        if key not in KEYS:
            _explain(document, key)
    for key in ("recipe", "axes"):
        if key not in data:
            fail(document, (), f"no {key}; a sweep needs recipe, axes, and judges under validation or test")
    judges = read_judges(document)
    notes: list[str] = []
    axes = _read_axes(document, tuple(dict.fromkeys(n for named in judges.values() for n in named)), notes)
    choose = data.get("choose")
    if choose is not None and not isinstance(choose, str):
        fail(document, ("choose",), f"expected the name of a score, found {shown(choose)}")
    if choose is not None:
        _check_score(
            document, ("choose",), choose, judges, SPLITS[:1] if "validation" in judges else SPLITS[1:], search
        )
    return Sweep(
        name, read_recipe_place(document, search), axes, _read_seeds(document), judges, choose,
        _read_layout(document, axes, judges, search), search, document.text, tuple(notes),
        Places(document.name, document.places),
    )  # fmt: skip


def _check_score(
    document: Document, path: Key, score: str, judges: Specs, splits: Sequence[str], search: tuple[Path, ...]
) -> None:
    """Complain about a score that no judge of these splits gives, as far as that is known before they are asked."""
    if score == MEAN:
        if len({name for named in judges.values() for name in named}) == 1:
            fail(document, path, f"there is one judge, so no {MEAN}; name one of its scores, or leave this out")
        return
    judge = score.partition("/")[0]
    there = [split for split in splits if split in judges]
    split = next((one for one in there if judge in judges[one]), there[0])
    if judge not in judges[split] and word_meant(score) in WORDS[1:]:
        fail(document, path, f"{score!r} is for a search: a sweep chooses by one score, or by {MEAN}")
    check_score(document, path, score, judges[split], search, f"under `{split}:`")
    if "/" not in score:
        known = metrics_of(judges[split][judge], search=search)
        fail(document, path, f"{judge} is a judge; name one of its scores: {judge}/{(known or ('SCORE',))[0]}")


def _explain(document: Document, key: str) -> None:
    if key in ("seed", "mask_seeds"):
        fail(document, (key,), f" is not known; write seeds: {shown(document.data[key])}")
    if key in ("models", "base_model", "merge_method", "sparsify", "parameters"):
        fail(document, (key,), " belongs to the recipe; write it under `recipe:`")
    if key in (_JUDGES, "judge", "tasks", "data"):
        fail(document, (key,), " is not known; judges go under `validation:` and `test:`, as test: {NAME: {data: F}}")
    if key == "space":
        fail(document, (key,), " belongs to a search: run dare search, or write axes: with lists of values")
    if "." in key:
        fail(document, (key,), " is a setting of the recipe; write it under `axes:`")
    fail(document, (key,), f" is not known{suggest(key, KEYS)}")


def _read_axes(document: Document, judges: tuple[str, ...], notes: list[str]) -> tuple[Axis, ...]:
    raw = document.data["axes"]
    if not isinstance(raw, dict) or not raw:
        fail(
            document, ("axes",),
            f"expected settings and their values, such as {{{DROP_RATE}: [0, 0.5, 0.9]}}, found {shown(raw)}",
        )  # fmt: skip
    axes = []
    for name, value in raw.items():
        path = ("axes", name)
        if name in ("seed", "seeds", "sparsify.seed"):
            fail(
                document,
                path,
                f" is not an axis: means are taken over it; write at the top level: seeds: {shown(value)}",
            )
        if isinstance(value, dict) and value:
            if name in _JUDGES or name == "kind":
                fail(document, path, " cannot be the name of an axis; use another word")
            points = tuple(_read_point(document, (*path, label), label, one, judges) for label, one in value.items())
            axes.append(Axis(name, points))
        elif isinstance(value, list) and value:
            axes.append(_read_values(document, path, name, value, notes))
        else:
            fail(
                document, path,
                "expected a list of values, or names with their settings, such as {DARE: {sparsify.method: dare}}, "
                f"found {shown(value)}",
            )  # fmt: skip
    return tuple(axes)


def _read_values(document: Document, path: Key, name: str, values: list[Any], notes: list[str]) -> Axis:
    if any(value is None for value in values):
        fail(document, path, "holds an empty value; name that point: {none: {KEY: null}, ...}")
    for i, value in enumerate(values):
        if value in values[:i]:
            fail(document, (*path, i), f"{shown(value)} is given twice; keep one")
    if name == DROP_RATE and 0 not in values:
        values = [0, *values]
        notes.append("drop rate 0 was added: the other drop rates are compared with it")
    return Axis(name, tuple(Point(_label(value), {name: value}) for value in values), name)


def _label(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else shown(value)


def _read_point(document: Document, path: Key, label: str, raw: Any, judges: tuple[str, ...]) -> Point:
    if raw is None:
        return Point(label, {})
    if not isinstance(raw, dict):
        fail(document, path, f"expected settings, such as {{sparsify.method: dare}}, found {shown(raw)}")
    asked = raw.get(_JUDGES)
    if asked is not None:
        for one in asked if isinstance(asked, list) else [asked]:
            if one not in judges:
                fail(document, (*path, _JUDGES), f" names {shown(one)}{suggest(str(one), judges, 'known')}")
        asked = tuple(asked) if isinstance(asked, list) else (asked,)
    return Point(label, {key: value for key, value in raw.items() if key != _JUDGES}, asked)


def _read_seeds(document: Document) -> tuple[int, ...]:
    raw = document.data.get("seeds", [])
    for one in raw if isinstance(raw, list) else [raw]:
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < 1 << 64:
            fail(
                document,
                ("seeds",),
                f"expected whole numbers from 0 to 2^64 - 1, such as [1, 2, 3], found {shown(one)}",
            )
    seeds = tuple(raw) if isinstance(raw, list) else (raw,)
    if len(set(seeds)) != len(seeds):
        fail(document, ("seeds",), f"{shown(raw)} lists a seed twice; keep one")
    return seeds


def _read_layout(document: Document, axes: tuple[Axis, ...], judges: Specs, search: tuple[Path, ...]) -> Layout:
    raw = document.data.get("plot", {})
    if not isinstance(raw, dict):
        fail(document, ("plot",), f"expected {{x: AXIS, lines: AXIS}}, found {shown(raw)}")
    names = [axis.name for axis in axes]
    for key, value in raw.items():
        if key not in _LAYOUT:
            fail(document, ("plot", key), f" is not known{suggest(key, _LAYOUT)}")
        if not isinstance(value, str):
            fail(document, ("plot", key), f"expected a word, found {shown(value)}")
        if key in ("x", "lines") and value not in names:
            fail(
                document,
                ("plot", key),
                f"{value!r} is not an axis{did_you_mean(value, names)}; axes: {', '.join(names)}",
            )
        if key == "score":
            _check_score(document, ("plot", key), value, judges, SPLITS, search)
    return Layout(**raw)
