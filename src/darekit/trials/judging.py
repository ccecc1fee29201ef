# SPDX-License-Identifier: Apache-2.0
"""The judges of a sweep or search file: read, made, and asked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from darekit.errors import DarekitError, DataError
from darekit.evaluation.judges import Judge, check_judge, judge_of
from darekit.evaluation.scores import Score
from darekit.live.models import LiveModel
from darekit.recipe.documents import Document, Places, fail, shown

SPLITS = ("validation", "test")
MEAN = "mean"

AGAIN = "`test:` asks {} just as `validation:` does; use other data there: scores flatter what was chosen by them"

Specs = Mapping[str, Mapping[str, Any]]  # split -> name -> what judges


def read_judges(document: Document) -> Specs:
    """The judges of a file, by split and name; without any, an error.

    Raises:
        RecipeError: what is written is no judge; with line and key.
    """
    judges = {split: _read_split(document, split) for split in SPLITS if split in document.data}
    if not judges:
        fail(document, (), "no judges; add `test: {NAME: {data: FILE}}`, and `validation:` if settings are chosen")
    return judges


def _read_split(document: Document, split: str) -> Mapping[str, Any]:
    raw = document.data[split]
    shape = "expected names with their judges, such as {reverse: {data: reverse.jsonl}}"
    if not isinstance(raw, dict) or not raw:
        fail(document, (split,), f"{shape}, found {shown(raw)}")
    for name, spec in raw.items():
        if name in ("data", "tasks", "command", "python") and not isinstance(spec, dict):
            fail(document, (split,), f"{shape}: give this judge a name, {split}: {{NAME: {{{name}: {shown(spec)}}}}}")
        if not isinstance(spec, dict) or not spec:
            fail(document, (split, name), f"expected a judge, such as {{data: FILE}}, found {shown(spec)}")
        if name in (MEAN, *SPLITS):
            fail(document, (split, name), " is a reserved name; use another one")
    return cast(dict[str, Any], raw)


def read_recipe_place(document: Document, search: tuple[Path, ...]) -> Path | Mapping[str, Any]:
    """The recipe of a file: its own file, or its data."""
    raw = document.data["recipe"]
    if isinstance(raw, str) and raw:
        return Path(found_in(raw, search))
    if isinstance(raw, dict) and raw:
        return cast(dict[str, Any], raw)
    fail(document, ("recipe",), f"expected a recipe or a recipe's file, found {shown(raw)}")


def found_in(name: str, search: Sequence[Path]) -> str:
    """A relative name as it is in the working directory, else beside the file that names it where it is there."""
    if not Path(name).is_absolute() and not Path(name).exists():
        for folder in search:
            if (folder / name).exists():
                return str(folder / name)
    return name


def search_of(recipe: Path | Mapping[str, Any], folders: Sequence[Path]) -> tuple[Path, ...]:
    """Where the relative names of a file and of its recipe are looked up after the working directory."""
    own = (recipe.resolve().parent,) if isinstance(recipe, Path) else ()
    return tuple(dict.fromkeys((*own, *folders)))


def make_judges(places: Places, specs: Specs, search: Sequence[Path]) -> dict[str, dict[str, Judge]]:
    """Split -> name -> judge. `places`: of the file, for errors.

    Raises:
        DarekitError: a judge cannot be made; the message says which.
    """
    made: dict[str, dict[str, Judge]] = {}
    for split, named in specs.items():
        for name, spec in named.items():
            with named_in(places, split, name):
                made.setdefault(split, {})[name] = judge_of(spec, search=search)
    return made


def check_judges(places: Places, specs: Specs, search: Sequence[Path]) -> dict[str, dict[str, Judge]]:
    """Complain about judges that cannot be, without the data of lm-eval's tasks -> those that need none.

    Raises:
        DarekitError: as `make_judges`.
    """
    made: dict[str, dict[str, Judge]] = {}
    for split, named in specs.items():
        for name, spec in named.items():
            with named_in(places, split, name):
                judge = check_judge(spec, search=search)
            if judge is not None:
                made.setdefault(split, {})[name] = judge
    return made


@contextmanager
def named_in(places: Places, *path: str) -> Iterator[None]:
    """Errors say which key of a file they are about."""
    try:
        yield
    except DarekitError as error:
        error.args = (f"{places.at(*path)}: {error}",)
        raise


def asked_again(specs: Specs) -> tuple[str, ...]:
    """Judges under `test:` that ask just what one under `validation:` asks: their scores flatter what was chosen."""
    chosen = [*specs.get("validation", {}).values()]
    return tuple(name for name, spec in specs.get("test", {}).items() if spec in chosen)


def asked(name: str, judge: Judge, live: LiveModel) -> dict[str, Score]:
    """A judge's scores of the model as it is now, each called after its judge: `reverse/exact_match`.

    Raises:
        DataError: one is not finite, or the judge fails.
    """
    found = {}
    for metric, score in judge(live).items():
        if not math.isfinite(score.value):
            raise DataError(f"{name}/{metric} is {score.value}")
        found[f"{name}/{metric}"] = score
    return found


def judge_in(score: str) -> str:
    """The judge that gives a score."""
    return score.partition("/")[0]
